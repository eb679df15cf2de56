"""Cohorts of NIfTI runs in, Zarr-backed WebDataset shards of ranked windows out.

Read in this order: `cohort` finds runs, `harmonise` brings one run to the common grid and TR, `patches` gathers its
brain patches, `layout` is the on-disk contract, `convert` drives the whole, `reader` and `stream` give it back.
"""
