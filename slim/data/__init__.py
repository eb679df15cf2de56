"""From sessions of a dataset to batches: samples, masks, collating, and the loading processes."""
