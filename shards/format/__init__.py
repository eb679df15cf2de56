"""The on-disk format of a dataset: layout, samples, manifest, grid, and the readers, also over a network."""
