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
      mlp_dim: hidden width of the MLP. None means 4 D, or 8 D / 3 with a gate (the same number of parameters).
      max_length: longest sequence that encodings with a table of positions support.
      is_causal: True builds a decoder, False an encoder whose first token is [CLS].
      norm: "rmsnorm" or "layernorm".
      norm_epsilon: epsilon that norms add to the variance.
      norm_position: "pre" normalizes the input of each residual branch and the output of the last layer. "post" normalizes after
        each residual sum and once after the embedding, as BERT does. "output" normalizes the output of each branch before the sum,
        as OLMo 2 does, and "sandwich" both the input and the output, as Gemma 2 and 3 do, and the output of the last layer.
      parallel_residual: whether both branches of a layer read the layer's input, as in GPT-NeoX; with norm_position="pre" only.
      shared_norm: whether the two branches of a parallel residual share one norm, as in GPT-J.
      qk_norm: norm of queries and keys before attention: None, "head" over the channels of each head (Qwen 3, Gemma 3), or "full"
        over those of all heads (OLMo 2).
      embedding_norm: whether a norm follows the embedding, as in BLOOM; norm_position="post" has one in any case.
      embedding_scale: factor of the token embeddings. None means sqrt(D).
      num_token_types: number of token types (BERT's segments A and B), which have embeddings. None means no token types.
      activation: "gelu" (the tanh approximation), "gelu_exact", or, with a gate, "swiglu" or "geglu" (with the approximation).
      biases: the projections that have a bias: "qkv", "out" (of attention), "mlp", "head".
      tie_embeddings: whether the output projection shares the token embedding matrix. False gives it a matrix of its own.
      head_transform: whether a projection with a bias, the activation and a norm precede the output projection, as in BERT's head
        for masked tokens.
      dropout_rate: dropout rate after the embedding and after each residual branch.
      remat: what the backward pass recomputes. "none" recomputes no activations. "full" saves only the input of each layer and
        recomputes the rest. "attention" saves query, key, value and the results of attention and recomputes the rest, so that the
        forward pass of attention runs only once.
      scan_layers: True compiles one layer and scans over it, so that compile time does not grow with depth. False unrolls the
        scan, so that each layer is compiled separately; this makes a step of three small layers a quarter faster on a CPU.
      compute_dtype: "float32" or "bfloat16". Parameters and softmax statistics stay in float32.
      attention: "softmax", or "linear" for RoFormer's linear attention, which needs an encoding that only rotates.
      attention_scale: factor of the attention scores. None means 1 / sqrt(H).
      local_window_size: number of earlier (and, in an encoder, later) positions that a token attends to. None means all. A tuple of
        windows is repeated over the layers; its length must divide L.
      logits_soft_cap: soft cap of the attention scores. None means no cap.
      final_logits_soft_cap: soft cap of the logits over the vocabulary. None means no cap.
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
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    parallel_residual: bool = False
    shared_norm: bool = False
    qk_norm: Literal["head", "full"] | None = None
    embedding_norm: bool = False
    embedding_scale: float | None = bounded(None, above=0)
    num_token_types: int | None = bounded(None, least=1)
    activation: Literal["gelu", "gelu_exact", "swiglu", "geglu"] = "gelu"
    biases: tuple[Literal["qkv", "out", "mlp", "head"], ...] = ()
    tie_embeddings: bool = True
    head_transform: bool = False
    dropout_rate: float = bounded(0.0, least=0, below=1)
    remat: Literal["none", "attention", "full"] = "none"
    scan_layers: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["softmax", "linear"] = "softmax"
    attention_scale: float | None = bounded(None, above=0)
    local_window_size: int | tuple[int | None, ...] | None = bounded(None, least=1)
    logits_soft_cap: float | None = bounded(None, above=0)
    final_logits_soft_cap: float | None = bounded(None, above=0)
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
        if isinstance(self.local_window_size, tuple) and (
            not self.local_window_size or self.num_layers % len(self.local_window_size)
        ):
            raise ValueError(
                f"local_window_size must be one, or a tuple whose length divides num_layers={self.num_layers}, "
                f"got {len(self.local_window_size)}"
            )
        if self.parallel_residual and self.norm_position != "pre":
            raise ValueError(f"norm_position must be 'pre' with parallel_residual, got {self.norm_position!r}")
        if self.shared_norm and not self.parallel_residual:
            raise ValueError("parallel_residual must be True with shared_norm, got False")
        if self.embedding_norm and self.norm_position == "post":
            raise ValueError("embedding_norm must be False with norm_position='post', which has that norm, got True")
        if self.attention == "linear" and (any(window is not None for window in self.windows) or self.logits_soft_cap is not None):
            raise ValueError(
                "local_window_size and logits_soft_cap must be None with attention='linear', which has no scores, got "
                f"{self.local_window_size} and {self.logits_soft_cap}"
            )
        if self.attention == "linear" and self.attention_scale is not None:
            raise ValueError(f"attention_scale must be None with attention='linear', got {self.attention_scale}")
        if self.attention == "linear" and self.implementation is not None:
            raise ValueError(f"implementation must be None with attention='linear', got {self.implementation!r}")
        _ = self.dims  # num_kv_heads must divide num_heads

    @property
    def dims(self) -> Dims:
        """Returns the sizes that the parameters of an encoding depend on."""
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        return Dims(self.num_heads, head_dim, self.embed_dim, self.max_length, self.num_kv_heads)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Returns the local window of each layer."""
        windows = self.local_window_size if isinstance(self.local_window_size, tuple) else (self.local_window_size,)
        return windows * (self.num_layers // len(windows))


def check_memory(config: TransformerConfig, copies: int | float = 1) -> None:
    """Raises ValueError if the weights of a model, without those of its encodings, do not fit the memory of this machine.

    Args:
      config: the model.
      copies: how often the weights are held: 1 for a model, 4 in training with Adam; less where they are sharded over devices.
    """
    dims, width = config.dims, config.embed_dim
    heads = 2 * (dims.num_heads + dims.num_kv_heads) * dims.head_dim
    hidden = mlp_dim(config) * (3 if is_gated(config) else 2)
    rows = config.vocab_size * (1 if config.tie_embeddings else 2) + (config.num_classes or 0) + (config.num_token_types or 0)
    rows += width if config.head_transform else 0
    sizes = dict(vocab_size=config.vocab_size, num_layers=config.num_layers, embed_dim=width, mlp_dim=mlp_dim(config))
    sizes |= dict(num_heads=dims.num_heads, num_kv_heads=dims.num_kv_heads, head_dim=dims.head_dim, num_classes=config.num_classes)
    weights = jax.ShapeDtypeStruct((rows + config.num_layers * (heads + hidden), width), jnp.float32)
    check_fits(f"a Transformer with {', '.join(f'{name}={size}' for name, size in sizes.items())}", weights, copies)


def is_gated(config: TransformerConfig) -> bool:
    """Returns whether the MLP multiplies its activation by a second projection."""
    return config.activation in ("swiglu", "geglu")


def mlp_dim(config: TransformerConfig) -> int:
    """Returns the hidden width of the MLP, by default that of as many parameters with a gate as without."""
    return config.mlp_dim or (8 * config.embed_dim // 3 if is_gated(config) else 4 * config.embed_dim)
