"""The Transformer model and its losses."""

from posjax.checks import require

require("posjax.models", "flax")
