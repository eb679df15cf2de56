"""SLURM jobs: settings, scripts, submission, status, and what runs inside a job."""
