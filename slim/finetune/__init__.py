"""Fine-tuning of a pretrained encoder on the labels of a task."""
