"""Inference with trained weights: encoding, vectors, predictions, exports. Independent of the training code."""
