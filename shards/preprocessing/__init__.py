"""One scan on the common grid and TR: BOLD, mask, space, resampling, confounds, quality."""
