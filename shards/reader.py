"""`from shards.reader import Dataset`: the documented import path of `shards.format.reader`."""

from shards.format.reader import Dataset, Samples, away

__all__ = ["Dataset", "Samples", "away"]
