"""Contextual Position Encoding (CoPE): positions counted by gates that depend on content.

    g_ij = sigmoid(q_i.k_j / sqrt(H))          gate: how much key j counts for query i (gate_bias is added to its argument)
    p_ij = sum of g_ik for k = j .. i          position: the count from key to query, both included
    bias_ij = q_i.e(p_ij)                      e interpolated between integer positions, clamped at the last

The count is a ``Scan`` along the keys, which backends evaluate tile by tile, so no array is [T, S].
(CoPE is neither Clipped RoPE nor Complex Positional Encoding, which share the acronym.)
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from posjax.checks import bounded, is_traced
from posjax.core.encoding import (
    AttentionInputs,
    Dims,
    PositionalEncoding,
    get_param,
    hyperparameter,
    register,
    traced_hparam,
)
from posjax.core.structures import Bias, Hinges, Scan, ScoreModifications, Table, sigmoid
from posjax.encodings.relative import check_slopes, slopes_of_heads
from posjax.typing import Array, Params

Gates = Literal["logits", "content", "keys", "values"]


@register("cope")
class Cope(PositionalEncoding):
    """Adds a bias q_i.e(p_ij) for a contextual position p_ij, the sum of gates from key to query (CoPE).

        p_ij = min(sum_{k=j..i} g_ik, P - 1)
        bias_ij = (1 - w) z_i[floor p] + w z_i[floor p + 1],    w = p - floor p,    z_i = q_i.e

    A query counts itself: if all gates are one, p_ij = i - j + 1. Keys must be ordered by position; masked keys count zero. Gates,
    counts and bias are float32 for every input dtype.

    params["embedding"] is [P, H], or [N, P, H] with per_head, initially zero. gates="keys" adds params["gate_kernel"] [D, K, H].

    Args:
      max_position: P, the number of position embeddings, at most 2^24: float32 counts no further. Positions are clamped to P - 1.
      gates: source of the gate logits. "logits": the scores scale * q.k, after rotation if there is one. "content": the scores
        before rotation. "keys": separate gate keys k = W_g h of the layer's input h, the argument ``hidden`` of
        ``posjax.attention``. "values": q.v.
      scaled: False adds z unscaled (Listing 1 of the paper); True scales it like q.k (the released code). The two train
        differently.
      per_head: True gives each head its own embeddings; False shares them between heads, as in the paper.
      shared: True shares one set of parameters between all layers, as in the paper; False gives each layer its own.
      gate_bias: added to the gate logits, in nats: g = sigmoid(logit + gate_bias). With a negative value, gates are rarely open at
        the start of training. It may be a traced scalar, such as a swept hyperparameter; its gradient is zero. The "pallas"
        kernels support only the number 0.
      clamp: position to clamp to instead, an integer from 1 to P - 1; None is P - 1. ``cope(64, clamp=15)`` equals ``cope(16)``
        with the first 16 embeddings, at the cost of 64. It may be a traced scalar, such as a swept hyperparameter; a traced float
        is rounded.

    Raises:
      ValueError: max_position is below 2 or above 2^24, gates is unknown, gate_bias is not finite, clamp is out of range (a traced
        one gives NaN), gates="keys" is used without ``hidden``, or (in attention) neither is_causal nor a mask is given.

    Example:
      >>> encoding = pj.cope(max_position=64)
      >>> with_gate_keys = pj.cope(64, gates="keys")
      >>> encoding.init(jax.random.key(0), pj.Dims(num_heads=4, head_dim=8))["embedding"].shape
      (64, 8)

    Golovneva et al., arXiv:2405.18719, equations 3 to 6 and Listing 1.
    """

    max_position: int = bounded(least=2, most=2**24)
    gates: Gates = "logits"
    scaled: bool = False
    per_head: bool = False
    shared: bool = True
    gate_bias: Array | float = hyperparameter(default=0.0)
    clamp: Array | float | int | None = hyperparameter(default=None)

    needs_causal = True

    def __post_init__(self) -> None:
        _check_clamp(self.clamp, self.max_position)

    @property
    def per_layer(self) -> bool:
        return not self.shared

    @property
    def needs_hidden(self) -> bool:
        return self.gates == "keys"

    def init(self, key: Array, dims: Dims) -> Params:
        heads = (dims.num_heads,) if self.per_head else ()
        embedding = jnp.zeros((*heads, self.max_position, dims.head_dim), jnp.float32)
        return _gate_params(self.gates, key, dims) | {"embedding": embedding}

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        heads, head_dim = inputs.query.shape[2:]
        shape = (heads, self.max_position, head_dim) if self.per_head else (self.max_position, head_dim)
        embedding = get_param(params, "embedding", self.registered_name, shape)
        embedding = embedding * inputs.scale if self.scaled else embedding
        embedding = embedding if self.clamp is None else _clamped(embedding, self.clamp)
        at = _scan(self, params, inputs, bound=float(self.max_position - 1))
        read = Table(embedding if self.per_head else embedding[None], side="query", interpolate=True)
        return ScoreModifications(biases=(Bias(at, read),))


@register("cope_alibi")
class CopeAlibi(PositionalEncoding):
    """Penalizes scores linearly in the contextual position of CoPE: bias_ij = -m_n p_ij.

    p_ij is counted as in ``cope`` and is not clamped.

    Args:
      slope: m of every head, in nats per position; None gives each head its ALiBi slope. It may be a traced scalar, such as a swept
        hyperparameter, or an array [N] with the slope of each head; its gradient is zero.
      learned: True makes m a parameter, params["slope"] [N], initialized to ``slope``.
      gates, shared, gate_bias: as in ``cope``.

    Raises:
      ValueError: slope is not one positive number (a traced one that is not positive gives NaN), gates is unknown, or gate_bias is
        not finite.

    Example:
      >>> encoding = pj.cope_alibi()

    Golovneva et al., arXiv:2405.18719, the CoPE_ALiBi rows.
    """

    slope: Array | float | None = hyperparameter(default=None, above=0, rank=1, hint="None takes ALiBi's slopes")
    learned: bool = False
    gates: Gates = "logits"
    shared: bool = True
    gate_bias: Array | float = hyperparameter(default=0.0)

    needs_causal = True

    def __post_init__(self) -> None:
        check_slopes(self.slope)

    @property
    def per_layer(self) -> bool:
        return not self.shared

    @property
    def needs_hidden(self) -> bool:
        return self.gates == "keys"

    def init(self, key: Array, dims: Dims) -> Params:
        slopes = {"slope": slopes_of_heads(self.slope, dims.num_heads)} if self.learned else {}
        return _gate_params(self.gates, key, dims) | slopes

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        heads = inputs.query.shape[2]
        slopes = get_param(params, "slope", self.registered_name, (heads,)) if self.learned else slopes_of_heads(self.slope, heads)
        # The network of one hinge, -m relu(p): positions are never negative.
        read = Hinges(jnp.ones((1, 1), jnp.float32), jnp.zeros((1, 1), jnp.float32), -slopes[:, None])
        return ScoreModifications(biases=(Bias(_scan(self, params, inputs), read),))


@register("cope_mlp")
class CopeMlp(PositionalEncoding):
    """Adds the bias of CoPE with position embeddings from a small network: bias_ij = q_i.e(p_ij), e(p) = W_2 relu(w_1 p + b_1).

    Positions are not clamped. There is no b_2, because it would add the same number to every key of a row, which softmax cancels.
    As a function of one number the network is piecewise linear. Its pieces are computed once per row, and each pair of query and
    key looks up its piece.

    Parameters, F = hidden_dim: params["weight_in"] [F], ["bias_in"] [F], and ["weight_out"] [F, H], which is initially zero.
    gates="keys" adds ["gate_kernel"] as in ``cope``.

    Args:
      hidden_dim: F, the width of the network, at most 65,536.
      gates, scaled, shared, gate_bias: as in ``cope``.

    Raises:
      ValueError: hidden_dim is below 1, gates is unknown, or gate_bias is not finite.

    Example:
      >>> encoding = pj.cope_mlp(hidden_dim=64)

    Golovneva et al., arXiv:2405.18719, the CoPE_MLP row. The paper does not give the network's shape; this one is ours.
    """

    hidden_dim: int = bounded(64, least=1, most=2**16)
    gates: Gates = "logits"
    scaled: bool = False
    shared: bool = True
    gate_bias: Array | float = hyperparameter(default=0.0)

    needs_causal = True

    @property
    def per_layer(self) -> bool:
        return not self.shared

    @property
    def needs_hidden(self) -> bool:
        return self.gates == "keys"

    def init(self, key: Array, dims: Dims) -> Params:
        gate_key, key = jax.random.split(key)
        # The kinks -b/w cover positions 0 .. 64, which contain most of the first hundred tokens if gates are 1/2.
        kinks = jnp.linspace(0.0, 64.0, self.hidden_dim, endpoint=False)
        weight = jnp.abs(jax.random.normal(key, (self.hidden_dim,))) * 0.1 + 0.01
        return _gate_params(self.gates, gate_key, dims) | {
            "weight_in": weight,
            "bias_in": -weight * kinks,
            "weight_out": jnp.zeros((self.hidden_dim, dims.head_dim)),
        }

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        weight_out = get_param(params, "weight_out", self.registered_name, (self.hidden_dim, inputs.query.shape[3]))
        weight_out = weight_out * inputs.scale if self.scaled else weight_out
        weight_in, bias_in = (
            get_param(params, name, self.registered_name, (self.hidden_dim,))[None] for name in ("weight_in", "bias_in")
        )
        read = Hinges(weight_in, bias_in, weight_out[None], side="query")
        return ScoreModifications(biases=(Bias(_scan(self, params, inputs), read),))


cope, cope_alibi, cope_mlp = Cope, CopeAlibi, CopeMlp


# Counting ------------------------------------------------------------------------------------------------------------


def shifted_sigmoid(x: Array, args: tuple[Array]) -> Array:
    """Returns sigmoid(x + gate_bias), for ``Scan``."""
    return jax.nn.sigmoid(x + args[0])


def _scan(encoding: "Cope | CopeAlibi | CopeMlp", params: Params, inputs: AttentionInputs, bound: float | None = None) -> Scan:
    """Returns the contextual position of an encoding, as the sum of its gates."""
    gate_bias, source = encoding.gate_bias, dict[str, Any]()
    if encoding.gates != "logits":
        scale = jnp.asarray(inputs.scale, jnp.float32).reshape(1)
        source |= dict(query=inputs.query, key=_gate_key(encoding, params, inputs), scale=scale)
    if not is_traced(gate_bias) and float(gate_bias) == 0.0:
        return Scan(sigmoid, **source, bound=bound)
    return Scan(shifted_sigmoid, **source, args=(traced_hparam(gate_bias).reshape(1),), bound=bound)


def _clamped(embedding: Array, clamp: Array | float | int) -> Array:
    """Returns the embedding [..., P, H] with all rows after row ``clamp`` replaced by it, which makes interpolation constant there.

    All values are NaN if clamp is out of range.
    """
    clamp, last = traced_hparam(clamp), embedding.shape[-2] - 1
    row = jnp.minimum(jnp.arange(last + 1), jnp.round(clamp).astype(jnp.int32))
    row = jnp.where((clamp >= 1) & (clamp <= last), row, last + 1)
    return embedding.at[..., row, :].get(mode="fill", fill_value=jnp.nan)


def _gate_key(encoding: "Cope | CopeAlibi | CopeMlp", params: Params, inputs: AttentionInputs) -> Array:
    gates = encoding.gates
    if gates == "content":
        return inputs.key
    if gates == "keys":
        if inputs.k.hidden is None:
            raise ValueError(
                "hidden must be an array for gates='keys', got None; pass the array that query, key and value were projected from"
            )
        hidden = inputs.k.hidden
        kernel = get_param(params, "gate_kernel", encoding.registered_name, (hidden.shape[-1], *inputs.key.shape[2:]))
        return jnp.einsum("btd,dkh->btkh", hidden, kernel.astype(hidden.dtype)).astype(inputs.key.dtype)
    if inputs.value is None:
        raise ValueError("value must be an array for gates='values', got None; pass it to attention_weights")
    width = inputs.query.shape[-1]
    if inputs.value.shape[-1] != width:
        raise ValueError(f"value must have the head dimension of query, {width}, for gates='values', got {inputs.value.shape[-1]}")
    return inputs.value


def _gate_params(gates: Gates, key: Array, dims: Dims) -> Params:
    if gates != "keys":
        return {}
    shape = (dims.embed_dim, dims.num_kv_heads, dims.head_dim)
    return {"gate_kernel": jax.random.normal(key, shape, jnp.float32) * dims.embed_dim**-0.5}


def _check_clamp(clamp: Array | float | int | None, max_position: int) -> None:
    if clamp is not None and not is_traced(clamp) and not (float(clamp).is_integer() and 1 <= float(clamp) < max_position):
        raise ValueError(
            f"clamp must be an integer from 1 to max_position - 1 = {max_position - 1}, got {clamp!r}; None means max_position - 1"
        )
