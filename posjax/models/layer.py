"""One layer of the Transformer: an attention branch and an MLP branch, around which norms and sums may stand in several ways.

norm_position    pre                     x + branch(norm(x))
                 post                    norm(x + branch(x))
                 output                  x + norm(branch(x))
                 sandwich                x + output_norm(branch(norm(x)))
parallel_residual                        x + attention(norm(x)) + mlp(norm(x))
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from posjax.attention import kv_cache
from posjax.attention.api import attention
from posjax.attention.backends.xla_chunked.attention import SAVED
from posjax.attention.linear import linear_attend, linear_attention
from posjax.core.encoding import PositionalEncoding
from posjax.models.config import TransformerConfig, is_gated, mlp_dim
from posjax.typing import Array, Float, Int, Params


class Layer(nnx.Module):
    """Applies one attention branch and one MLP branch.

    ``Transformer`` builds all L layers in one vmapped call, so every parameter has a leading axis of layers.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        dims, dtype = config.dims, jnp.dtype(config.compute_dtype)
        width = config.embed_dim

        def linear(
            source: int | tuple[int, ...], target: int | tuple[int, ...], bias: bool, gain: float = 1.0
        ) -> nnx.LinearGeneral:
            axis = tuple(range(-len(source), 0)) if isinstance(source, tuple) else -1
            init = nnx.initializers.variance_scaling(gain, "fan_in", "normal")
            return nnx.LinearGeneral(source, target, axis=axis, use_bias=bias, dtype=dtype, kernel_init=init, rngs=rngs)

        # 2L branches are added to the residual stream: this gain keeps its variance near one at initialization (GPT-2).
        last = 1.0 / (2 * config.num_layers)
        heads = (dims.num_heads, dims.head_dim)
        kv_heads = (dims.num_kv_heads, dims.head_dim)
        qkv_bias, out_bias, mlp_bias = ("qkv" in config.biases, "out" in config.biases, "mlp" in config.biases)
        self.query = linear(width, heads, qkv_bias)
        self.key = linear(width, kv_heads, qkv_bias)
        self.value = linear(width, kv_heads, qkv_bias)
        self.out = linear(heads, width, out_bias, last)
        hidden = mlp_dim(config)
        self.up = linear(width, hidden, mlp_bias)
        if is_gated(config):
            self.gate = linear(width, hidden, mlp_bias)
        self.down = linear(hidden, width, mlp_bias, last)
        self.attention_norm = norm(config, width, rngs)
        if not config.shared_norm:
            self.mlp_norm = norm(config, width, rngs)
        if config.norm_position == "sandwich":
            self.attention_output_norm = norm(config, width, rngs)
            self.mlp_output_norm = norm(config, width, rngs)
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.query_norm = norm(config, dims.head_dim if per_head else dims.num_heads * dims.head_dim, rngs)
            self.key_norm = norm(config, dims.head_dim if per_head else dims.num_kv_heads * dims.head_dim, rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoding: PositionalEncoding,
        params: Params,
        positions: Int[Array, "_ T"],
        coordinates: Array | None,
        segment_ids: Int[Array, "B T"] | None,
        dropout_key: Array | None,
        window: int | None,
        cache: kv_cache.LayerCache | None = None,
    ) -> tuple[Array, tuple[Array, Array, Array, Array | None, Params], kv_cache.LayerCache | None]:
        """Returns the output of the layer, the inputs of its attention (see ``LayerRecord``), and the updated cache.

        Args:
          x: input.
          encoding, params: the encoding of the layer and its parameters.
          positions, coordinates, segment_ids: as in ``posjax.attention``, of queries and keys.
          dropout_key: PRNG key for dropout. None disables dropout.
          window: the layer's local window; a cache has its own.
          cache: the cache of the layer, in decoding.
        """
        config = self.config
        position, rate = config.norm_position, config.dropout_rate
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)

        hidden = self.attention_norm(x) if position in ("pre", "sandwich") else x
        mixed, record, cache = self._attend(hidden, encoding, params, positions, coordinates, segment_ids, window, cache)
        branch = self.out(mixed)
        if position == "output":
            branch = self.attention_norm(branch)
        elif position == "sandwich":
            branch = self.attention_output_norm(branch)
        residual = x + dropout(branch, rate, keys[0])
        if position == "post":
            residual = self.attention_norm(residual)

        if not config.shared_norm:
            hidden = x if config.parallel_residual else residual
            hidden = self.mlp_norm(hidden) if position in ("pre", "sandwich") else hidden
        up = self.up(hidden)
        active = activate(config, self.gate(hidden)) * up if is_gated(config) else activate(config, up)
        branch = self.down(active)
        if position == "output":
            branch = self.mlp_norm(branch)
        elif position == "sandwich":
            branch = self.mlp_output_norm(branch)
        x = residual + dropout(branch, rate, keys[1])
        if position == "post":
            x = self.mlp_norm(x)
        return x, record, cache

    def _attend(
        self,
        hidden: Array,
        encoding: PositionalEncoding,
        params: Params,
        positions: Array,
        coordinates: Array | None,
        segment_ids: Array | None,
        window: int | None,
        cache: kv_cache.LayerCache | None,
    ) -> tuple[Array, tuple[Array, Array, Array, Array | None, Params], kv_cache.LayerCache | None]:
        config = self.config
        query, key, value = checkpoint_name((self.query(hidden), self.key(hidden), self.value(hidden)), SAVED)
        if config.qk_norm == "head":
            query, key = self.query_norm(query), self.key_norm(key)
        elif config.qk_norm == "full":
            query, key = (
                normalize(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
                for normalize, x in ((self.query_norm, query), (self.key_norm, key))
            )
        shared = dict(is_causal=config.is_causal, segment_ids=segment_ids, query_positions=positions, key_positions=positions)
        source = hidden if encoding.needs_hidden else None
        how = dict(scale=config.attention_scale, logits_soft_cap=config.logits_soft_cap, implementation=config.implementation)
        if config.attention == "linear" and cache is not None:
            positions, segments = kv_cache.next_positions(cache, hidden.shape[1], positions, segment_ids)
            mixed, cache = linear_attend(query, key, value, encoding, params, cache, positions=positions, real=segments != 0)
            after = kv_cache.position_after(positions, segments, cache.next_position)
            cache = dataclasses.replace(cache, next_position=after)
        elif config.attention == "linear":
            mixed = linear_attention(query, key, value, encoding, params, **shared)
        elif cache is not None:
            own = dict(positions=positions, coordinates=coordinates, segment_ids=segment_ids, hidden=source)
            mixed, cache = kv_cache.attend(query, key, value, encoding, params, cache, **own, **how)
        else:
            own = dict(query_coordinates=coordinates, key_coordinates=coordinates, hidden=source)
            mixed = attention(query, key, value, encoding, params, local_window_size=window, **shared, **own, **how)
        return mixed, (query, key, value, source, params), cache


def norm(config: TransformerConfig, width: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns a norm over ``width`` channels, of the kind that the configuration selects."""
    kind = nnx.RMSNorm if config.norm == "rmsnorm" else nnx.LayerNorm
    return kind(width, epsilon=config.norm_epsilon, dtype=jnp.dtype(config.compute_dtype), rngs=rngs)


def activate(config: TransformerConfig, x: Array) -> Array:
    """Applies the activation function, without a gate."""
    if config.activation == "swiglu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=config.activation != "gelu_exact")


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Sets elements to zero with probability ``rate`` and scales the others to keep the mean; no change if the key is None."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0).astype(x.dtype)
