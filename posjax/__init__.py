"""posjax: positional encodings for Transformers in JAX, as values made of pure functions."""

import os
from typing import TYPE_CHECKING

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
from posjax.encodings.frequencies import (
    dynamic_ntk_scaling,
    linear_scaling,
    llama3_scaling,
    longrope_scaling,
    ntk_fixed_scaling,
    ntk_scaling,
    ntk_theta_scaling,
    proportional_scaling,
    yarn_scaling,
)
from posjax.encodings.multi_axis import axial_coordinates, axial_rope, mrope, mrope_positions, rope_mixed
from posjax.encodings.pope import pope
from posjax.encodings.query_scale import log_scale, query_scale
from posjax.encodings.relative import alibi, t5
from posjax.encodings.rope_config import rope_from_config
from posjax.encodings.rotary import convert_pairing, rope
from posjax.encodings.tupe import tupe
from posjax.encodings.xpos import xpos

if TYPE_CHECKING:
    from posjax.lab.trained import TrainedRun

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
    "axial_coordinates",
    "axial_rope",
    "cache_layout",
    "chain",
    "convert_pairing",
    "cope",
    "cope_alibi",
    "cope_mlp",
    "dynamic_ntk_scaling",
    "encoding",
    "identity",
    "init_cache",
    "learned",
    "linear_attention",
    "linear_scaling",
    "llama3_scaling",
    "load",
    "log_scale",
    "longrope_scaling",
    "mrope",
    "mrope_positions",
    "ntk_fixed_scaling",
    "ntk_scaling",
    "ntk_theta_scaling",
    "pope",
    "proportional_scaling",
    "query_scale",
    "register",
    "rope",
    "rope_from_config",
    "rope_mixed",
    "sinusoidal",
    "t5",
    "tupe",
    "xpos",
    "yarn_scaling",
]


def load(path: str | os.PathLike, *, encoding: str | None = None, seed: int | None = None) -> "TrainedRun":
    """Opens a run that ``posjax train`` or ``posjax compare`` trained.

        run = posjax.load("runs/mine")
        logits = run.model(run.tokenizer.encode("def ")[None])     # [1, T, V]

    Functions of ``posjax.lab.trained`` return what the model does with a text: ``token_losses``, ``attention_maps`` and
    ``gates_and_positions``. The data of the run are not needed.

    Args:
      path: the workdir. Nothing in it is changed.
      encoding, seed: which run of a comparison; None if there is only one choice.

    Returns:
      A ``posjax.lab.trained.TrainedRun`` with the attributes model, params, config, tokenizer and others.

    Raises:
      ValueError: there is no run, or more than one; or its encoding cannot be imported.
      CheckpointError: the run has no intact checkpoint.
    """
    from posjax.lab import trained

    return trained.load(os.fspath(path), encoding=encoding, seed=seed)
