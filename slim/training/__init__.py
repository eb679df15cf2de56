"""The loop over DeepSpeed. It knows neither JEPA nor labels: a `TrainingTask` brings them."""
