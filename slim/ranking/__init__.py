"""Stage 1: rank the windows of a scan. Parcels, the temporal extractor, saliency, and rankers by name."""
