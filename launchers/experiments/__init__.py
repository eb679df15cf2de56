"""Does pretraining learn? The trials that `slim-brain experiments` makes, and the tables of what they found."""
