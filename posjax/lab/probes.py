"""Measures of how a trained model uses positions: pure functions of arrays, whose results ``posjax.plots`` draws.

Attention is passed as the probabilities that ``posjax.attention_weights`` returns. Nothing here depends on models or training.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends.bias_terms import gates_and_sums
from posjax.attention.backends.reference import scores_of
from posjax.attention.call import prepare
from posjax.checks import check_at_least
from posjax.core.encoding import Dims, PositionalEncoding, Tokens
from posjax.core.structures import Scan
from posjax.encodings.rotary import decay_bound
from posjax.typing import Array, Float, Int, Params


def loss_by_index(
    losses: Float[Array, "B T"], weights: Float[Array, "B T"], num_bins: int
) -> tuple[Float[Array, " num_bins"], Float[Array, " num_bins"]]:
    """Computes the mean loss by token index, which shows whether, and up to what length, more context helps.

    Index t belongs to bin floor(t * num_bins / T). Rows of several batches may be concatenated along B.

    Args:
      losses: [B, T], in any unit.
      weights: [B, T], 0 for tokens to leave out.
      num_bins: number of bins, at most T.

    Returns:
      (index, loss): [num_bins] float32 each, the mean index of a bin and its weighted mean loss; NaN if a bin has no weight.

    Raises:
      ValueError: the shapes differ, or num_bins is outside [1, T].
    """
    if losses.ndim != 2 or losses.shape != weights.shape:
        raise ValueError(f"losses and weights must both have shape [B, T], got {losses.shape} and {weights.shape}")
    check_at_least("num_bins", num_bins, 1)
    length = losses.shape[1]
    if num_bins > length:
        raise ValueError(f"num_bins must be at most the number of tokens in a row, {length}, got {num_bins}")
    bins = np.arange(length) * num_bins // length
    centres = np.bincount(bins, np.arange(length)) / np.bincount(bins)
    weights = weights.astype(jnp.float32)
    # A token without weight may have any loss, even NaN.
    by_index = jnp.where(weights == 0.0, 0.0, losses.astype(jnp.float32) * weights).sum(0)
    total = jax.ops.segment_sum(by_index, bins, num_bins)
    return jnp.asarray(centres, jnp.float32), total / jax.ops.segment_sum(weights.sum(0), bins, num_bins)


def attention_distance(
    weights: Float[Array, "B N T S"],
    query_positions: Int[Array, "_ T"],
    key_positions: Int[Array, "_ S"],
    query_weights: Float[Array, "B T"] | None = None,
) -> Float[Array, " N"]:
    """Computes the mean attention distance of each head, in tokens: the mean over queries of sum_s a_ts |i - j|.

    Args:
      weights: [B, N, T, S] attention probabilities a.
      query_positions: i, integers [T] or [B, T].
      key_positions: j, integers [S] or [B, S].
      query_weights: [B, T] weight of each query, 0 for padding; None: all queries have equal weight.

    Returns:
      [N] float32; NaN if all query weights are 0.
    """
    i = jnp.atleast_2d(query_positions)[:, None, :, None]
    j = jnp.atleast_2d(key_positions)[:, None, None, :]
    distance = jnp.abs(i - j).astype(jnp.float32)
    # A product and a sum instead of an einsum, whose operands accelerators would round to fewer bits.
    return _mean_over_queries((weights.astype(jnp.float32) * distance).sum(-1), query_weights)


def attention_entropy(weights: Float[Array, "B N T S"], query_weights: Float[Array, "B T"] | None = None) -> Float[Array, " N"]:
    """Computes the attention entropy of each head, in nats: the mean over queries of -sum_s a_ts log a_ts.

    Its exponential is the effective number of keys that a head attends to.

    Args:
      weights: [B, N, T, S] attention probabilities a.
      query_weights: [B, T] weight of each query, 0 for padding; None: all queries have equal weight.

    Returns:
      [N] float32; NaN if all query weights are 0.
    """
    return _mean_over_queries(jax.scipy.special.entr(weights.astype(jnp.float32)).sum(-1), query_weights)


def _mean_over_queries(values: Float[Array, "B N T"], query_weights: Array | None) -> Float[Array, " N"]:
    if query_weights is None:
        return values.mean((0, 2))
    counts = query_weights.astype(jnp.float32)[:, None]
    return jnp.where(counts == 0.0, 0.0, values * counts).sum((0, 2)) / counts.sum((0, 2))


def cope_positions(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    encoding: PositionalEncoding,
    params: Params,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    query_positions: Int[Array, "_ T"] | None = None,
    key_positions: Int[Array, "_ S"] | None = None,
    hidden: Array | None = None,
    scale: Array | float | None = None,
) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T S"]]:
    """Computes the gates and contextual positions of CoPE that causal ``posjax.attention`` uses with these arguments.

    Args:
      query, key, value, encoding, params, segment_ids, query_positions, key_positions, hidden, scale: as in ``posjax.attention``.

    Returns:
      (gates, positions): [B, N, T, S] float32 each. Gates of masked keys are zero; a position is the sum of the gates from the
      key to the query, before it is clamped to the last embedding.

    Raises:
      ValueError: the encoding has no bias that counts by gates, or more than one. A forgetting gate sums logarithms, not a count.
    """
    own = dict(query_positions=query_positions, key_positions=key_positions, hidden=hidden, scale=scale)
    call = prepare(query, key, value, encoding, params, is_causal=True, segment_ids=segment_ids, **own)
    counts = [_is_count(bias.at) for bias in call.biases if isinstance(bias.at, Scan)]
    if sum(counts) != 1:
        raise ValueError(
            "encoding must have one bias that counts by gates, as cope(64) and chain(rope(), cope(64)) do, got "
            f"{encoding.title} with {sum(counts)}"
        )
    return gates_and_sums(call)[counts.index(True)]


def counts_by_gates(encoding: PositionalEncoding, dims: Dims) -> bool:
    """Returns whether an encoding has exactly one bias that is read at a count by gates, as ``cope_positions`` requires.

    Args:
      encoding: the encoding.
      dims: sizes of the heads.

    Example:
      >>> from posjax.lab.probes import counts_by_gates
      >>> counts_by_gates(pj.cope(64), pj.Dims(num_heads=4, head_dim=8))
      True
    """

    def scans(key: Array) -> tuple[Scan, ...]:
        heads = (dims.num_heads, dims.num_kv_heads, dims.num_kv_heads)
        query, keys, value = (jnp.zeros((1, 2, n, dims.head_dim)) for n in heads)
        hidden = jnp.zeros((1, 2, dims.embed_dim))
        call = prepare(query, keys, value, encoding, encoding.init(key, dims), is_causal=True, hidden=hidden)
        return tuple(bias.at for bias in call.biases if isinstance(bias.at, Scan))

    return sum(map(_is_count, jax.eval_shape(scans, jax.random.key(0)))) == 1


def _is_count(scan: Scan) -> bool:
    """Returns whether the gates of a scan count keys: they lie from 0 to 1, as the logarithm of a forgetting gate does not."""
    args = jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), scan.args)
    with jax.ensure_compile_time_eval():
        gates = np.asarray(scan.gate(jnp.linspace(-30.0, 30.0, 7), args))
    return bool((gates >= 0).all() and (gates <= 1).all())


def decay_curve(
    encoding: PositionalEncoding,
    params: Params,
    distances: Int[Array, " S"],
    dims: Dims,
    *,
    query: Float[Array, "N H"] | None = None,
    key: Float[Array, "K H"] | None = None,
) -> Float[Array, "N S"]:
    """Computes the effect of an encoding alone on the attention score at each distance i - j, relative to distance 0, in nats.

    Its exponential is the factor by which the encoding changes an unnormalized attention weight. Every position has the same query
    q and key k, so that keys differ only in their position:

        score_ij = q_i.k_j / sqrt(H) after rotation + bias_ij + (H / D) PE_i.PE_j / sqrt(H)
        curve[d] = mean over i of score_{i,i-d} - score_{i,i}

    PE is what the encoding adds to an embedding of zero; H / D of its product is the expected contribution in a head with random,
    equal W_q and W_k. Products of content and PE average to zero and are left out, as is position 0, TUPE's [CLS].
    Closed forms: rope sqrt(H) (mean of cos(d theta_m) - 1), alibi -m_n d, sinusoidal sqrt(H) (mean of cos - 1) / 2.

    CoPE's bias is linear in the query and its gates depend on q.k: pass a query of the trained model, and a key that sets the gate
    (a zero key makes every gate 0.5; with the default key nearly all gates are 1, and the curve is a relative bias at d + 1).
    If the encoding has a table of positions, the mean at a larger distance covers fewer positions.

    Args:
      encoding, params: the encoding and its parameters, as ``init`` returned them or trained.
      distances: i - j in tokens, integers; negative for keys after the query, where the encoding supports them.
      dims: sizes of the model. Scores are dense, [N, L, L]; L is the encoding's max_length, or else the largest distance + 2.
      query: [N, H] or [H], the same at every position; None: ones, the scale of normalized channels.
      key: [K, H] or [H]; None: ones.

    Returns:
      [N, S] float32.

    Raises:
      ValueError: a distance exceeds the encoding's max_length, or is negative for a contextual encoding.

    Example:
      >>> from posjax.lab.probes import decay_curve
      >>> dims = pj.Dims(num_heads=8, head_dim=8)
      >>> decay_curve(pj.alibi(), {}, np.arange(3), dims)[0].tolist()
      [0.0, -0.5, -1.0]
    """
    distances = np.asarray(distances)
    if distances.ndim != 1 or not np.issubdtype(distances.dtype, np.integer) or not distances.size:
        raise ValueError(f"distances must be a non-empty integer array [S], got {distances.dtype}{list(distances.shape)}")
    reach, limit = int(np.abs(distances).max()), encoding.max_length(dims)
    length = reach + 2 if limit is None else limit
    if reach + 2 > length:
        raise ValueError(f"distances must be at most {length - 2} for {encoding.title} with max_length={limit}, got {reach}")
    if encoding.needs_causal and distances.min() < 0:
        raise ValueError(
            f"distances must not be negative for {encoding.title}, which counts over earlier keys, got {distances.min()}"
        )
    positions = jnp.arange(1, length)[None]
    zero_embeddings = jnp.zeros((1, length - 1, dims.embed_dim))
    qkv = [
        _everywhere(x, length - 1, heads, dims.head_dim)
        for x, heads in ((query, dims.num_heads), (key, dims.num_kv_heads), (key, dims.num_kv_heads))
    ]
    options = dict(query_positions=positions, key_positions=positions, hidden=zero_embeddings)
    with jax.default_matmul_precision("highest"):  # accelerators' default rounds products too coarsely for a curve near zero
        call = prepare(*qkv, encoding, params, is_causal=encoding.needs_causal, **options)
        scores = scores_of(call)[1][0]
        added = encoding.embed(params, zero_embeddings, Tokens(positions))[0]
        scores += call.scale * dims.head_dim / dims.embed_dim * (added @ added.T)
    scores -= jnp.diagonal(scores, axis1=1, axis2=2)[..., None]
    column = np.arange(length - 1)[:, None] - distances
    inside = (column >= 0) & (column < length - 1)
    along = scores[:, np.arange(length - 1)[:, None], np.clip(column, 0, length - 2)]
    return jnp.where(inside, along, 0.0).sum(1) / inside.sum(0)


def rope_bound(distances: Int[Array, " S"], head_dim: int, theta: float = 10_000.0) -> Float[Array, " S"]:
    """Computes the shape of RoFormer's decay bound, for comparison with ``decay_curve`` of rope: sqrt(H) (b_d / b_0 - 1).

    b is ``rotary.decay_bound``. The result is scaled to start where the curve starts and is therefore no longer a bound on it: for
    equal queries and keys, the bound itself lies far above the curve.

    Args:
      distances: i - j in tokens, integers.
      head_dim, theta: H and the base of rope's frequencies.

    Returns:
      [S] float32.
    """
    bound = decay_bound(jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.asarray(distances)]), head_dim, theta)
    return math.sqrt(head_dim) * (bound[1:] / bound[0] - 1.0)


def _everywhere(x: Array | None, length: int, heads: int, width: int) -> Float[Array, "1 L N H"]:
    x = jnp.ones((), jnp.float32) if x is None else jnp.asarray(x, jnp.float32)
    return jnp.broadcast_to(x, (1, length, heads, width))
