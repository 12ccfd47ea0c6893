"""Training: the train state and step, optimizers, checkpoints and the training loop."""
