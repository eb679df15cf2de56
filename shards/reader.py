"""Documented import path of `shards.format.reader`: `from shards.reader import Dataset`."""

from shards.format.reader import Dataset, Samples, away

__all__ = ["Dataset", "Samples", "away"]
