"""Explain which voxels and windows a probe depends on: integrated gradients, maps in MNI space, figures."""
