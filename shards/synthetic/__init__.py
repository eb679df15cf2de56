"""A synthetic cohort: anatomy, signals, and a known ground truth."""
