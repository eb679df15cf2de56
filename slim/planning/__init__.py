"""Estimate what a run needs: memory of a step, buffers of ZeRO, FLOPs, hours, disk space."""
