"""The training loop around DeepSpeed. A `TrainingTask` supplies the data, the model and the loss."""
