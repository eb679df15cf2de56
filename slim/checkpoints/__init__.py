"""What lies in a run folder, without an engine: checkpoints, their mirror, weights, who was seen, the lock."""
