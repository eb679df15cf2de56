"""Jobs on SLURM: settings, scripts, attempts, conversion jobs, and following them."""
