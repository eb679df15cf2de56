"""Harmonise one scan to the common grid and TR: BOLD, mask, space, resampling, confounds, quality."""
