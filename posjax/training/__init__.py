"""Training: the train state and step, optimizers, checkpoints and the training loop."""

from posjax.checks import require

require("posjax.training", "optax")
