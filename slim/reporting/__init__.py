"""The page of a run: its curves, its health, its results."""
