"""The files of a run folder: checkpoints and their mirror, weights, provenance, subjects seen, the lock."""
