"""posjax: positional encodings for Transformers in JAX, as values made of pure functions."""

from posjax.absolute import learned, sinusoidal
from posjax.attention import attention, attention_fn, attention_weights
from posjax.bias import BiasTerm, Mask, Tile, position_bias
from posjax.contextual import cope, cope_alibi, cope_mlp
from posjax.decoding import Cache, attend, cached, init_cache
from posjax.encoding import AttentionInputs, Dims, PositionalEncoding, chain, identity
from posjax.kernels.blocks import Blocks
from posjax.kernels.gpu_blocks import GpuBlocks
from posjax.linear_attention import linear_attention
from posjax.relative import alibi, t5
from posjax.rotary import convert_pairing, rope
from posjax.untied import tupe

__version__ = "0.1.0"
__all__ = [
    "AttentionInputs",
    "BiasTerm",
    "Blocks",
    "Cache",
    "Dims",
    "GpuBlocks",
    "Mask",
    "PositionalEncoding",
    "Tile",
    "alibi",
    "attend",
    "attention",
    "attention_fn",
    "attention_weights",
    "cached",
    "chain",
    "convert_pairing",
    "cope",
    "cope_alibi",
    "cope_mlp",
    "identity",
    "init_cache",
    "learned",
    "linear_attention",
    "position_bias",
    "rope",
    "sinusoidal",
    "t5",
    "tupe",
]
