"""Contextual Position Encoding (CoPE): positions counted by gates that depend on content.

    g_ij = sigmoid(q_i.k_j / sqrt(H))          gate: whether key j counts for query i (+ gate_bias inside)
    p_ij = sum of g_ik for k = j .. i          position: the count from key to query, both included
    bias_ij = q_i.e(p_ij)                      e interpolated between integer positions, clamped at the last

Each bias term processes key tiles from right to left and carries the running count of every row, so no array is [T, S].
(CoPE is neither Clipped RoPE nor Complex Positional Encoding, which share the acronym.)
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from posjax.checks import check_at_least, check_finite, is_traced
from posjax.core.bias import BiasTerm, Interpolation, Tile
from posjax.core.encoding import (
    AttentionInputs,
    Dims,
    PositionalEncoding,
    get_param,
    hyperparameter,
    register,
    traced_hparam,
)
from posjax.encodings.relative import check_slope, slopes_of_heads
from posjax.typing import Array, Float, Params

Gates = Literal["logits", "content", "keys", "values"]


def _condition(self: PositionalEncoding, params: Params, hidden: Float[Array, "B T D"]) -> Params:
    if self.gates != "keys":
        return params
    kernel = get_param(params, "gate_kernel", self.name)
    return params | {"gate_key": jnp.einsum("btd,dkh->btkh", hidden, kernel.astype(hidden.dtype))}


@register("cope")
class Cope(PositionalEncoding):
    """Adds a bias q_i.e(p_ij) for a contextual position p_ij, the sum of gates from key to query (CoPE).

        p_ij = min(sum_{k=j..i} g_ik, P - 1)
        bias_ij = (1 - w) z_i[floor p] + w z_i[floor p + 1],    w = p - floor p,    z_i = q_i.e

    A query counts itself: if all gates are one, p_ij = i - j + 1. Keys must be ordered by position; masked keys count zero. Gates,
    counts and bias are float32 for every input dtype.

    params["embedding"] is [P, H], or [N, P, H] with per_head, initially zero. gates="keys" adds params["gate_kernel"] [D, K, H].

    Args:
      max_position: P, the number of position embeddings; positions are clamped to P - 1.
      gates: source of the gate logits. "logits": the scores scale * q.k, after rotation if there is one. "content": the scores
        before rotation. "keys": separate gate keys k = W_g h, which ``condition`` computes from the layer's input. "values": q.v.
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
      ValueError: max_position is below 2, gates is unknown, gate_bias is not finite, clamp is out of range (a traced one gives
        NaN), gates="keys" is used without ``condition``, or (in attention) neither is_causal nor a mask is given.

    Golovneva et al., arXiv:2405.18719, equations 3 to 6 and Listing 1.
    """

    max_position: int
    gates: Gates = "logits"
    scaled: bool = False
    per_head: bool = False
    shared: bool = True
    gate_bias: Array | float = hyperparameter(0.0)
    clamp: Array | int | None = hyperparameter(None)

    is_contextual = True
    condition = _condition

    def __post_init__(self) -> None:
        check_at_least("max_position", self.max_position, 2)
        _check_gates(self.gates, self.gate_bias)
        _check_clamp(self.clamp, self.max_position)

    @property
    def per_layer(self) -> bool:
        return not self.shared

    def init(self, key: Array, dims: Dims) -> Params:
        heads = (dims.num_heads,) if self.per_head else ()
        embedding = jnp.zeros((*heads, self.max_position, dims.head_dim), jnp.float32)
        return _gate_params(self.gates, key, dims) | {"embedding": embedding}

    def bias(self, params: Params, inputs: AttentionInputs) -> tuple[BiasTerm, ...]:
        heads, head_dim = inputs.query.shape[2:]
        shape = (heads, self.max_position, head_dim) if self.per_head else (self.max_position, head_dim)
        embedding = get_param(params, "embedding", "cope", shape)
        embedding = embedding * inputs.scale if self.scaled else embedding
        embedding = embedding if self.clamp is None else _clamped(embedding, self.clamp)
        return (_counting_term("cope", self.gates, self.gate_bias, params, inputs, embedding, (0 if self.per_head else None,)),)


@register("cope_alibi")
class CopeAlibi(PositionalEncoding):
    """Penalizes scores linearly in the contextual position of CoPE: bias_ij = -m_n p_ij.

    p_ij is counted as in ``cope`` and is not clamped.

    Args:
      slope: m of every head, in nats per position; None gives each head its ALiBi slope. It may be a traced scalar, such as a swept
        hyperparameter; its gradient is zero.
      learned: True makes m a parameter, params["slope"] [N], initialized to ``slope``.
      gates, shared, gate_bias: as in ``cope``.

    Raises:
      ValueError: slope is not one positive number (a traced one that is not positive gives NaN), gates is unknown, or gate_bias is
        not finite.

    Golovneva et al., arXiv:2405.18719, the CoPE_ALiBi rows.
    """

    slope: Array | float | None = hyperparameter(None)
    learned: bool = False
    gates: Gates = "logits"
    shared: bool = True
    gate_bias: Array | float = hyperparameter(0.0)

    is_contextual = True
    condition = _condition

    def __post_init__(self) -> None:
        check_slope(self.slope)
        _check_gates(self.gates, self.gate_bias)

    @property
    def per_layer(self) -> bool:
        return not self.shared

    def init(self, key: Array, dims: Dims) -> Params:
        slopes = {"slope": slopes_of_heads(self.slope, dims.num_heads)} if self.learned else {}
        return _gate_params(self.gates, key, dims) | slopes

    def bias(self, params: Params, inputs: AttentionInputs) -> tuple[BiasTerm, ...]:
        heads = inputs.query.shape[2]
        slopes = get_param(params, "slope", "cope_alibi", (heads,)) if self.learned else slopes_of_heads(self.slope, heads)
        return (_counting_term("cope_alibi", self.gates, self.gate_bias, params, inputs, slopes, (0,)),)


@register("cope_mlp")
class CopeMlp(PositionalEncoding):
    """Adds the bias of CoPE with position embeddings from a small network: bias_ij = q_i.e(p_ij), e(p) = W_2 relu(w_1 p + b_1).

    Positions are not clamped. There is no b_2, because it would add the same number to every key of a row, which softmax cancels.
    As a function of one number the network is piecewise linear. Its pieces are computed once per row, and each pair of query and
    key looks up its piece.

    Parameters, F = hidden_dim: params["weight_in"] [F], ["bias_in"] [F], and ["weight_out"] [F, H], which is initially zero.
    gates="keys" adds ["gate_kernel"] as in ``cope``.

    Args:
      hidden_dim: F, the width of the network.
      gates, scaled, shared, gate_bias: as in ``cope``.

    Raises:
      ValueError: hidden_dim is below 1, gates is unknown, or gate_bias is not finite.

    Golovneva et al., arXiv:2405.18719, the CoPE_MLP row. The paper does not give the network's shape; this one is ours.
    """

    hidden_dim: int = 64
    gates: Gates = "logits"
    scaled: bool = False
    shared: bool = True
    gate_bias: Array | float = hyperparameter(0.0)

    is_contextual = True
    condition = _condition

    def __post_init__(self) -> None:
        check_at_least("hidden_dim", self.hidden_dim, 1)
        _check_gates(self.gates, self.gate_bias)

    @property
    def per_layer(self) -> bool:
        return not self.shared

    def init(self, key: Array, dims: Dims) -> Params:
        gate_key, key = jax.random.split(key)
        # The kinks -b/w cover positions 0 .. 64: with gates of 1/2, most of the first hundred tokens are there.
        kinks = jnp.linspace(0.0, 64.0, self.hidden_dim, endpoint=False)
        weight = jnp.abs(jax.random.normal(key, (self.hidden_dim,))) * 0.1 + 0.01
        return _gate_params(self.gates, gate_key, dims) | {
            "weight_in": weight,
            "bias_in": -weight * kinks,
            "weight_out": jnp.zeros((self.hidden_dim, dims.head_dim)),
        }

    def bias(self, params: Params, inputs: AttentionInputs) -> tuple[BiasTerm, ...]:
        weight_out = get_param(params, "weight_out", "cope_mlp", (self.hidden_dim, inputs.query.shape[3]))
        weight_out = weight_out * inputs.scale if self.scaled else weight_out
        first = tuple(get_param(params, name, "cope_mlp", (self.hidden_dim,)) for name in ("weight_in", "bias_in"))
        tables = (*first, weight_out)
        return (_counting_term("cope_mlp", self.gates, self.gate_bias, params, inputs, tables, (None, None, None)),)


cope, cope_alibi, cope_mlp = Cope, CopeAlibi, CopeMlp


# Bias as a function of the count -------------------------------------------------------------------------------------


def _products(query: Array, table: Array) -> Array:
    """Returns q.e of every query with every row of a table [P, H] or [N, P, H], as [B, N, t, P] float32."""
    return jnp.einsum("bnth,nph->bntp" if table.ndim == 3 else "bnth,ph->bntp", query.astype(jnp.float32), table)


def _load_interpolated(rows: dict[str, Array], tables: tuple) -> dict[str, Array]:
    z = _products(rows["query"], tables[1])
    steps = jnp.diff(z, axis=-1, append=z[..., -1:])  # past the last position the slope is zero
    return rows | {"z": jnp.stack([z, steps], axis=-1)}


def _interpolated(counts: Array, rows: dict[str, Array], embedding: Array) -> Array:
    """Interpolates z at fractional positions, [B, N, t, s], clamped to the last position."""
    position = jnp.minimum(counts, rows["z"].shape[-2] - 1)
    floor = jnp.floor(position)
    value_and_slope = _looked_up(rows["z"], floor.astype(jnp.int32))
    return value_and_slope[..., 0] + (position - floor) * value_and_slope[..., 1]


def _saturate_interpolated(rows: dict[str, Array], tables: tuple, carry: Array) -> tuple[Array, Array]:
    """Returns which rows have reached the last position, and the value of z there.

    It is the bias of every key further left, whatever the gates of those keys are.
    """
    last = rows["z"].shape[-2] - 1
    return carry >= last, rows["z"][..., last, 0]


def _penalised(counts: Array, rows: dict[str, Array], slopes: Array) -> Array:
    return -slopes[None, :, None, None] * counts


def _load_network(rows: dict[str, Array], tables: tuple) -> dict[str, Array]:
    """Computes the network's linear pieces for every query: rows["z"] [B, N, t, F + 1, 2], slope and intercept between two kinks.

    A unit of positive weight is active to the right of its kink -b/w, one of negative weight to the left.
    """
    weight, offset, weight_out = tables[1]
    kinks = _kinks(weight, offset)
    order = jnp.argsort(kinks)
    z = _products(rows["query"], weight_out)[..., order]
    lines = z[..., None] * jnp.stack([weight, offset], -1)[order]  # of each unit, where it is active
    falls = (weight < 0)[order, None]
    passed = jnp.cumsum(jnp.where(falls, -lines, lines), axis=-2)
    start = jnp.where(falls, lines, 0.0).sum(-2, keepdims=True)
    return rows | {"z": start + jnp.concatenate([jnp.zeros_like(start), passed], axis=-2)}


def _kinks(weight: Array, offset: Array) -> Array:
    """Returns the position at which each unit becomes active or inactive, [F].

    It is infinite for a unit of zero weight, which is active everywhere or nowhere.
    """
    flat = weight == 0.0
    return jnp.where(flat, jnp.where(offset > 0, -jnp.inf, jnp.inf), -offset / jnp.where(flat, 1.0, weight))


def _network(counts: Array, rows: dict[str, Array], tables: tuple[Array, Array, Array]) -> Array:
    """Evaluates the network at each count by looking up its linear piece; each unit costs one comparison."""
    kinks = jax.lax.stop_gradient(jnp.sort(_kinks(*tables[:2])))
    at = jax.lax.stop_gradient(counts)
    none = jnp.zeros(counts.shape, jnp.int32)
    piece, _ = jax.lax.scan(lambda n, kink: (n + (at >= kink), None), none, kinks, unroll=min(kinks.size, 64))
    line = _looked_up(rows["z"], piece)
    return line[..., 0] * counts + line[..., 1]


def _looked_up(table: Array, index: Array) -> Array:
    """Gathers row ``index`` [B, N, t, s] from a table [B, N, t, P, 2] that differs between queries.

    Both numbers come from one gather on a flat array, whose transpose is three times as fast on a CPU as that of two gathers.
    """
    row = jnp.arange(math.prod(table.shape[:3]), dtype=jnp.int32).reshape(*table.shape[:3], 1)
    return table.reshape(-1, 2).at[row * table.shape[3] + index].get(mode="promise_in_bounds")


# Counting ------------------------------------------------------------------------------------------------------------


def gates_and_positions(term: BiasTerm, tile: Tile) -> tuple[Array, Array] | None:
    """Returns the gates g_ij and positions p_ij of a term on the tile that it was cut to, [B, N, t, s] float32 each.

    Gates are zero where masked; positions are not clamped. Returns None for a term that does not count.
    """
    if not isinstance(term.function, _CountingTile):
        return None
    gates = _gates(tile, term.rows, term.columns, term.tables)
    return gates, _positions(gates, term.carry)


def _gates(tile: Tile, rows: dict[str, Array], columns: dict[str, Array], tables: tuple) -> Array:
    scale, _, *gate_bias = tables
    logits = tile.logits
    if columns:
        query, key = rows["query"], columns["gate_key"]
        batch, heads, length, width = query.shape
        grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], length, width)
        logits = jnp.einsum("bkgth,bksh->bkgts", grouped, key, preferred_element_type=jnp.float32) * scale
        logits = logits.reshape(batch, heads, length, key.shape[2])
    for more in gate_bias:  # empty, or one scalar
        logits = logits + more
    return jnp.where(tile.allowed, jax.nn.sigmoid(logits), 0.0)


def _positions(gates: Array, carry: Array) -> Array:
    return carry[..., None] + _sum_to_the_right(gates)


def _sum_to_the_right(gates: Array) -> Array:
    """Sums gates[..., k] over k >= j, by a product with a triangle of ones within blocks and a short sum over the blocks.

    This is faster than a scan on every device, and its rounding error grows only with the number of blocks.
    """
    block, columns = 32, gates.shape[-1]
    padded = jnp.pad(gates, [(0, 0)] * (gates.ndim - 1) + [(0, -columns % block)])
    blocks = padded.reshape(*gates.shape[:-1], -1, block)
    ones = jnp.tril(jnp.ones((block, block), gates.dtype))
    within = jnp.einsum("...k,kj->...j", blocks, ones, precision=jax.lax.Precision.HIGHEST)
    totals = within[..., 0]
    right = jax.lax.cumsum(totals, axis=totals.ndim - 1, reverse=True) - totals
    return (within + right[..., None]).reshape(padded.shape)[..., :columns]


@dataclasses.dataclass(frozen=True)
class _CountingTile:
    """The tile function of a term that counts gates.

    Two are equal if the bias is the same function of the count, so that jit compiles such terms once.
    """

    name: str = dataclasses.field(compare=False)  # for error messages
    bias_of_count: Callable[[Array, dict[str, Array], Any], Array]

    def __call__(self, tile: Tile, rows: dict, columns: dict, tables: tuple, carry: Array) -> tuple[Array, Array]:
        counts = _positions(_gates(tile, rows, columns, tables), carry)
        return self.bias_of_count(counts, rows, tables[1]), counts[..., 0]

    def __repr__(self) -> str:
        return self.name


# For each encoding: its bias as a function of the count, its load and its saturate.
_COUNTING = {
    "cope": (_interpolated, _load_interpolated, _saturate_interpolated),
    "cope_alibi": (_penalised, None, None),
    "cope_mlp": (_network, _load_network, None),
}


def _counting_term(
    encoding: str,
    gates: Gates,
    gate_bias: Array | float,
    params: Params,
    inputs: AttentionInputs,
    tables: Any,
    heads: tuple[int | None, ...],
) -> BiasTerm:
    """Builds the bias term of an encoding that counts gates.

    Its tables are (scale, ``tables``), followed by gate_bias unless that is the number 0. ``heads`` gives the head axis of each
    leaf of ``tables``, as in ``BiasTerm``.
    """
    bias_of_count, load, saturate = _COUNTING[encoding]
    biased = is_traced(gate_bias) or float(gate_bias) != 0.0
    name = f"{encoding} with gates={gates!r}{' and a gate_bias' if biased else ''}"
    rows = {} if load is None and gates == "logits" else {"query": jnp.swapaxes(inputs.query, 1, 2)}
    columns = {} if gates == "logits" else {"gate_key": jnp.swapaxes(_gate_key(gates, params, inputs), 1, 2)}
    batch, length, num_heads, _ = inputs.query.shape
    return BiasTerm(
        function=_CountingTile(name, bias_of_count),
        rows=rows,
        columns=columns,
        tables=(jnp.asarray(inputs.scale, jnp.float32), tables, *((traced_hparam(gate_bias),) if biased else ())),
        carry=jnp.zeros((batch, num_heads, length), jnp.float32),
        load=load,
        saturate=saturate,
        fused=Interpolation() if encoding == "cope" and gates == "logits" and not biased else None,
        heads=(None, *heads, *((None,) if biased else ())),
    )


def _clamped(embedding: Array, clamp: Array | int) -> Array:
    """Returns the embedding [..., P, H] with all rows after row ``clamp`` replaced by it, which makes interpolation constant there.

    All values are NaN if clamp is out of range.
    """
    clamp, last = traced_hparam(clamp), embedding.shape[-2] - 1
    row = jnp.minimum(jnp.arange(last + 1), jnp.round(clamp).astype(jnp.int32))
    row = jnp.where((clamp >= 1) & (clamp <= last), row, last + 1)
    return embedding.at[..., row, :].get(mode="fill", fill_value=jnp.nan)


def _gate_key(gates: Gates, params: Params, inputs: AttentionInputs) -> Array:
    if gates == "content":
        return inputs.key
    if gates == "keys":
        return get_param(params, "gate_key", "cope after condition(params, hidden)", inputs.key.shape)
    if inputs.value is None:
        raise ValueError("value must be given to attention_weights for gates='values', got None")
    width = inputs.query.shape[-1]
    if inputs.value.shape[-1] != width:
        raise ValueError(f"value must have the head dimension of query, {width}, for gates='values', got {inputs.value.shape[-1]}")
    return inputs.value


def _gate_params(gates: Gates, key: Array, dims: Dims) -> Params:
    if gates != "keys":
        return {}
    shape = (dims.embed_dim, dims.num_kv_heads, dims.head_dim)
    return {"gate_kernel": jax.random.normal(key, shape, jnp.float32) * dims.embed_dim**-0.5}


def _check_gates(gates: str, gate_bias: Array | float) -> None:
    if gates not in ("logits", "content", "keys", "values"):
        raise ValueError(f"gates must be 'logits', 'content', 'keys' or 'values', got {gates!r}")
    check_finite("gate_bias", gate_bias)


def _check_clamp(clamp: Array | int | None, max_position: int) -> None:
    if clamp is None:
        return
    check_finite("clamp", clamp)
    if not is_traced(clamp) and not (float(clamp).is_integer() and 1 <= float(clamp) < max_position):
        raise ValueError(f"clamp must be an integer from 1 to max_position - 1 = {max_position - 1}, got {clamp!r}; None is that")
