"""Stage 2, tensors only: the grid of tokens, ragged layouts and operations, the Hiera encoder and its heads."""
