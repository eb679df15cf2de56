"""Cohorts of NIfTI scans in, Zarr-backed WebDataset shards of ranked windows out.

`shards.cohorts` finds scans, `shards.preprocessing` brings one to the common grid and TR, `shards.conversion` drives
the whole, `shards.format` is the on-disk contract and reads it back.
"""
