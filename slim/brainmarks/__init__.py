"""The model `slim_brain` of Brainmarks, a public evaluation suite of fMRI models."""
