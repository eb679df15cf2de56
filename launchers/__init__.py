"""Starting a pretraining run: `local` on this machine; `job` is what every process of a run does."""
