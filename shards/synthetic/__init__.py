"""A cohort nobody was scanned for: anatomy, signals, and the truth that is planted in them."""
