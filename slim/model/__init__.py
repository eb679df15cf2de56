"""The model: the grid of tokens, ragged layouts and operations, the Hiera encoder and its head."""
