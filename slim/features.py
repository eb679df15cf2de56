"""Documented import path of `slim.evaluation.transformer`: `from slim.features import SlimBrainTransformer`."""

from slim.evaluation.transformer import POOLINGS, SlimBrainTransformer

__all__ = ["POOLINGS", "SlimBrainTransformer"]
