"""Stage 1: which windows of a scan matter. Parcels, the temporal extractor, saliency, and rankers by name."""
