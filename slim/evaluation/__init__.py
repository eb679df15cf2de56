"""Tasks, splits, probes, baselines and metrics, and the transformer for scikit-learn."""
