"""What a run needs before it runs: memory of a step, buffers of ZeRO, FLOPs, hours, disk."""
