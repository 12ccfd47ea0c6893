"""Checkpoints of other libraries: their configurations, weights, tokenizers and files.

model = from_pretrained("models/SmolLM2-135M")
tokenizer = tokenizer_of("models/SmolLM2-135M")
"""

from posjax.models.pretrained.files import Checkpoint, open_checkpoint
from posjax.models.pretrained.load import from_pretrained, load_params, save_pretrained
from posjax.models.pretrained.tokenizer import PretrainedTokenizer, tokenizer_of

__all__ = [
    "Checkpoint",
    "PretrainedTokenizer",
    "from_pretrained",
    "load_params",
    "open_checkpoint",
    "save_pretrained",
    "tokenizer_of",
]
