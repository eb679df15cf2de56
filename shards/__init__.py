"""Convert cohorts of NIfTI scans to datasets: WebDataset shards with the ranked windows of each scan as Zarr arrays.

`shards.cohorts` finds scans, `shards.preprocessing` harmonises them to a common grid and TR, `shards.conversion` runs
the whole conversion, and `shards.format` defines the format on disk and reads it.
"""
