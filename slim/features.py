"""`from slim.features import SlimBrainTransformer`: the documented import path of `slim.evaluation.transformer`."""

from slim.evaluation.transformer import POOLINGS, SlimBrainTransformer

__all__ = ["POOLINGS", "SlimBrainTransformer"]
