"""Start conversions and runs, on this machine or on a SLURM cluster. `job` is the entry point of a run's processes."""
