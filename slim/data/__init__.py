"""Make batches from the sessions of a dataset: samples, masks, collating, and loading processes."""
