"""The configuration of a Transformer: its sizes, its choices, and whether it fits the memory of the machine."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from posjax.checks import bounded, check_fields, check_fits
from posjax.core.encoding import MOST_CHANNELS, Dims


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Configures the architecture of a Transformer.

    Attributes:
      vocab_size: V, the vocabulary size.
      num_layers: L, the number of layers.
      embed_dim: D, the width of the model.
      num_heads: N, the number of query heads.
      num_kv_heads: K, the number of key and value heads. None means N.
      head_dim: H, the width of one head. None means D / N.
      mlp_dim: hidden width of the MLP. None means 4 D with gelu and 8 D / 3 with swiglu (the same number of parameters).
      max_length: longest sequence that encodings with a table of positions support.
      is_causal: True builds a decoder, False an encoder whose first token is [CLS].
      norm: "rmsnorm" or "layernorm".
      norm_epsilon: epsilon that norms add to the variance.
      norm_position: "pre" normalizes the input of each residual branch and the output of the last layer. "post" normalizes after
        each residual sum and once after the embedding, as BERT does.
      activation: "gelu" or "swiglu".
      embedding_scale: factor of the token embeddings. None means sqrt(D).
      tie_embeddings: whether the output projection shares the token embedding matrix. False gives it a matrix of its own.
      dropout_rate: dropout rate after the embedding and after each residual branch.
      remat: what the backward pass recomputes. "none" recomputes no activations. "full" saves only the input of each layer and
        recomputes the rest. "attention" saves query, key, value and the results of attention and recomputes the rest, so that the
        forward pass of attention runs only once.
      scan_layers: True compiles one layer and scans over it, so that compile time does not grow with depth. False unrolls the
        scan, so that each layer is compiled separately; this makes a step of three small layers a quarter faster on a CPU.
      compute_dtype: "float32" or "bfloat16". Parameters and softmax statistics stay in float32.
      attention: "softmax", or "linear" for RoFormer's linear attention, which needs an encoding that only rotates.
      local_window_size: number of earlier (and, in an encoder, later) positions that a token attends to. None means all.
      logits_soft_cap: soft cap of the attention scores. None means no cap.
      implementation: implementation of softmax attention, as in ``posjax.attention``. None selects the fastest.
      num_classes: number of classes of a classification head on [CLS]. None means no such head.

    Raises:
      ValueError: a size is not positive or does not divide another, or a choice is unknown. The message names the argument.
    """

    vocab_size: int = bounded(least=1)
    num_layers: int = bounded(4, least=1)
    embed_dim: int = bounded(128, least=1)
    num_heads: int = bounded(4, least=1, most=MOST_CHANNELS)
    num_kv_heads: int | None = bounded(None, least=1)
    head_dim: int | None = bounded(None, least=1, most=MOST_CHANNELS)
    mlp_dim: int | None = bounded(None, least=1)
    max_length: int = bounded(1024, least=1)
    is_causal: bool = True
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_epsilon: float = bounded(1e-6, above=0)
    norm_position: Literal["pre", "post"] = "pre"
    activation: Literal["gelu", "swiglu"] = "gelu"
    embedding_scale: float | None = bounded(None, above=0)
    tie_embeddings: bool = True
    dropout_rate: float = bounded(0.0, least=0, below=1)
    remat: Literal["none", "attention", "full"] = "none"
    scan_layers: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["softmax", "linear"] = "softmax"
    local_window_size: int | None = bounded(None, least=1)
    logits_soft_cap: float | None = bounded(None, above=0)
    implementation: Literal["xla", "xla_chunked", "pallas"] | None = None
    num_classes: int | None = bounded(None, least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.head_dim is None and self.embed_dim > MOST_CHANNELS * self.num_heads:
            most = f"{MOST_CHANNELS} * num_heads={self.num_heads} if head_dim is None"
            raise ValueError(f"embed_dim must be at most {most}, got {self.embed_dim}")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads must divide embed_dim={self.embed_dim} if head_dim is None, got {self.num_heads}; "
                "change one of them or set head_dim"
            )
        if self.attention == "linear" and (self.local_window_size is not None or self.logits_soft_cap is not None):
            raise ValueError(
                "local_window_size and logits_soft_cap must be None with attention='linear', which has no scores, got "
                f"{self.local_window_size} and {self.logits_soft_cap}"
            )
        if self.attention == "linear" and self.implementation is not None:
            raise ValueError(f"implementation must be None with attention='linear', got {self.implementation!r}")
        _ = self.dims  # num_kv_heads must divide num_heads

    @property
    def dims(self) -> Dims:
        """Returns the sizes that the parameters of an encoding depend on."""
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        return Dims(self.num_heads, head_dim, self.embed_dim, self.max_length, self.num_kv_heads)


def check_memory(config: TransformerConfig, copies: int | float = 1) -> None:
    """Raises ValueError if the weights of a model, without those of its encodings, do not fit the memory of this machine.

    Args:
      config: the model.
      copies: how often the weights are held: 1 for a model, 4 in training with Adam; less where they are sharded over devices.
    """
    dims, width = config.dims, config.embed_dim
    heads = 2 * (dims.num_heads + dims.num_kv_heads) * dims.head_dim
    hidden = mlp_dim(config) * (2 if config.activation == "gelu" else 3)
    rows = config.vocab_size * (1 if config.tie_embeddings else 2) + (config.num_classes or 0)
    sizes = dict(vocab_size=config.vocab_size, num_layers=config.num_layers, embed_dim=width, mlp_dim=mlp_dim(config))
    sizes |= dict(num_heads=dims.num_heads, num_kv_heads=dims.num_kv_heads, head_dim=dims.head_dim, num_classes=config.num_classes)
    weights = jax.ShapeDtypeStruct((rows + config.num_layers * (heads + hidden), width), jnp.float32)
    check_fits(f"a Transformer with {', '.join(f'{name}={size}' for name, size in sizes.items())}", weights, copies)


def mlp_dim(config: TransformerConfig) -> int:
    """Returns the hidden width of the MLP, by default that of as many parameters with gelu as with swiglu."""
    return config.mlp_dim or (4 * config.embed_dim if config.activation == "gelu" else 8 * config.embed_dim // 3)
