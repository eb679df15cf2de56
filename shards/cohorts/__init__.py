"""Find scans: cohort files, BIDS derivatives, file patterns, participants tables, images in memory."""
