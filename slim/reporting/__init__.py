"""The report page of a run: its curves, findings and results."""
