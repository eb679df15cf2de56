"""Which voxels a probe looks at: integrated gradients, maps in MNI space, figures."""
