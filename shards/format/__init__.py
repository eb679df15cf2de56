"""The format of a dataset on disk: layout, samples, manifest, grid, and readers for local and remote datasets."""
