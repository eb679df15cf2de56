"""Does pretraining learn? The trials that `tools/experiments.py` makes, and the tables of what they found."""
