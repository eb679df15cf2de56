"""The page of a dataset: what is in it, what to look at, figures of single sessions."""
