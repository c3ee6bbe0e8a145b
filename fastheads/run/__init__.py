"""profile(): loading a model, batches, the loop, checkpoints, signals, several processes."""
