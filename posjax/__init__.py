"""posjax: positional encodings for Transformers in JAX, as values made of pure functions."""

from posjax.attention.api import attention, attention_weights
from posjax.attention.backends.gpu.blocks import GpuBlocks
from posjax.attention.backends.tpu.blocks import Blocks
from posjax.attention.flax_modules import attention_fn
from posjax.attention.kv_cache import Cache, attend, cache_layout, init_cache
from posjax.attention.linear import linear_attention
from posjax.core.chain import chain
from posjax.core.encoding import AttentionInputs, Dims, PositionalEncoding, Tokens, encoding, identity, register
from posjax.core.masks import Mask
from posjax.core.structures import (
    Bias,
    Hinges,
    Pair,
    Replace,
    Rotate,
    Scan,
    ScoreModifications,
    Softmax,
    StickBreaking,
    Table,
    Transport,
)
from posjax.encodings.absolute import learned, sinusoidal
from posjax.encodings.cope import cope, cope_alibi, cope_mlp
from posjax.encodings.relative import alibi, t5
from posjax.encodings.rotary import convert_pairing, rope
from posjax.encodings.tupe import tupe

__version__ = "0.2.0"
__all__ = [
    "AttentionInputs",
    "Bias",
    "Blocks",
    "Cache",
    "Dims",
    "GpuBlocks",
    "Hinges",
    "Mask",
    "Pair",
    "PositionalEncoding",
    "Replace",
    "Rotate",
    "Scan",
    "ScoreModifications",
    "Softmax",
    "StickBreaking",
    "Table",
    "Tokens",
    "Transport",
    "alibi",
    "attend",
    "attention",
    "attention_fn",
    "attention_weights",
    "cache_layout",
    "chain",
    "convert_pairing",
    "cope",
    "cope_alibi",
    "cope_mlp",
    "encoding",
    "identity",
    "init_cache",
    "learned",
    "linear_attention",
    "register",
    "rope",
    "sinusoidal",
    "t5",
    "tupe",
]
