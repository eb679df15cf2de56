"""Convert cohorts to a dataset: sessions, the work folder, splits, packing, and the dry run."""
