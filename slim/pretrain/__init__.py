"""Hiera-JEPA pretraining: EMA target, running means, predictor, the terms of the loss, and the task."""
