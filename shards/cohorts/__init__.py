"""Which scans there are: cohort files, BIDS, patterns of paths, participants, images in memory."""
