"""Relative biases that depend only on positions: ALiBi and T5."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from posjax.checks import bounded, check_at_least, is_traced
from posjax.core.encoding import (
    AttentionInputs,
    Dims,
    PositionalEncoding,
    get_param,
    hyperparameter,
    register,
    traced_hparam,
)
from posjax.core.structures import HEAD_AXES, Bias, Pair, ScoreModifications, Table
from posjax.typing import Array, Float, Int, Params

MOST_BUCKETS = 4096  # the program has an operation for every second bucket


@register("alibi")
class Alibi(PositionalEncoding):
    """Penalizes scores linearly in distance, with a fixed slope per head (ALiBi): bias = -m_n |i - j|.

    The bias is not divided by sqrt(H). Slopes form a geometric sequence with first element and ratio 2^(-8/N); if N is not a power
    of two, they follow the rule of the released code.

    Args:
      slope: m of every head, in nats per position; None gives each head its ALiBi slope. It may be a traced scalar, such as a swept
        hyperparameter, or an array [N] with the slope of each head, such as ``alibi_slopes(32)[:8]`` in a call that sees 8 heads of
        32; its gradient is zero.

    Raises:
      ValueError: slope is neither one positive number nor one per head (a traced one that is not positive gives NaN), or it is None
        inside a ``jax.shard_map`` over an axis that shards heads, where a call does not see all heads.

    Example:
      >>> encoding = pj.alibi()

    Press et al., arXiv:2108.12409.
    """

    slope: Array | float | None = hyperparameter(default=None, above=0, rank=1, hint="None takes ALiBi's slopes")

    def __post_init__(self) -> None:
        check_slopes(self.slope)

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        slopes = slopes_of_heads(self.slope, inputs.query.shape[2])
        return ScoreModifications(biases=(Bias(Pair(LinearPenalty(), args=slopes, learned=False)),))


@register("t5")
class T5(PositionalEncoding):
    """Adds a learned bias per head and bucket of relative position (T5): bias = b_n[bucket(j - i)].

    Short distances have a bucket each; beyond, bucket widths grow logarithmically. params["bias"] is [num_buckets, N], initially
    zero. The bias is added to the scores unscaled. T5 itself does not scale q.k, so a T5 checkpoint also needs ``scale=1``.

    Args:
      num_buckets: number of buckets, at most 4,096; if bidirectional, half of them for each direction. The last holds all longer
        distances.
      max_distance: distance, in positions, from which on all pairs share the last bucket.
      bidirectional: True gives keys after the query their own buckets (encoders); False puts them into bucket 0 (decoders).

    Raises:
      ValueError: num_buckets is too small, or odd although bidirectional, or max_distance does not exceed the exact buckets.

    Example:
      >>> encoding = pj.t5(num_buckets=32, max_distance=128)
      >>> params = encoding.init(jax.random.key(0), pj.Dims(num_heads=4, head_dim=8))
      >>> params["bias"].shape
      (32, 4)

    Raffel et al., arXiv:1910.10683, section 2.1.
    """

    num_buckets: int = bounded(32, most=MOST_BUCKETS)
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self) -> None:
        check_buckets(self.num_buckets, self.max_distance, self.bidirectional)

    def init(self, key: Array, dims: Dims) -> Params:
        return {"bias": jnp.zeros((self.num_buckets, dims.num_heads), jnp.float32)}

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        table = get_param(params, "bias", self.registered_name, (self.num_buckets, inputs.query.shape[2]))
        bucket = T5Bucket(self.num_buckets, self.max_distance, self.bidirectional)
        return ScoreModifications(biases=(Bias(Pair(bucket), Table(table.T)),))


alibi, t5 = Alibi, T5


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns ALiBi's slopes, [N] float32.

    They are the first c powers of 2^(-8/c), with c the largest power of two up to N, followed by every other slope of 2c heads.
    If N is not a power of two, a literal reading of the paper's formula differs; this is what its code and BLOOM do.
    """
    check_at_least("num_heads", num_heads, 1)
    closest = 2 ** int(math.log2(num_heads))

    def powers(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 / n * np.arange(1, n + 1))

    return np.concatenate([powers(closest), powers(2 * closest)[0::2][: num_heads - closest]]).astype(np.float32)


def check_slopes(slope: Array | float | None) -> None:
    """Raises ValueError if an array of slopes is empty or one of them is not positive; traced slopes are not checked."""
    if not np.ndim(slope) or is_traced(slope):
        return
    slopes = np.asarray(slope)
    if not slopes.size or not (np.isfinite(slopes) & (slopes > 0)).all():
        raise ValueError(f"slope must be positive for each head, got {slopes[:5]}")


def slopes_of_heads(slope: Array | float | None, num_heads: int) -> Float[Array, " N"]:
    """Returns the slope of each head, [N] float32.

    Every head has ``slope`` or its element of an array; slopes that are not positive become NaN. If ``slope`` is None, the heads
    have ALiBi's slopes.

    Raises:
      ValueError: slope is an array of another length, or None where a call may see only some of the heads.
    """
    if slope is None:
        mesh = jax.sharding.get_abstract_mesh()
        manual = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual]
        if cut := [name for name in manual if name in HEAD_AXES and mesh.shape[name] > 1]:
            raise ValueError(
                f"slope must be an array inside a shard_map over the axis {cut[0]!r}, where a call does not see all heads, "
                "got None; pass each device its part of posjax.encodings.relative.alibi_slopes(num_heads)"
            )
        return jnp.asarray(alibi_slopes(num_heads))
    slope = traced_hparam(slope)
    if slope.ndim == 1 and slope.shape != (num_heads,):
        raise ValueError(f"slope must be one number or one for each of {num_heads} heads, got shape {slope.shape}")
    return jnp.broadcast_to(jnp.where(slope > 0, slope, jnp.nan), (num_heads,))


@dataclasses.dataclass(frozen=True)
class LinearPenalty:
    """Computes -slope |difference along axis 0|, float32, for ``Pair``."""

    scales_with_args = True

    def __call__(self, differences: tuple[Array, ...], slope: Array) -> Array:
        return -slope * jnp.abs(differences[0]).astype(jnp.float32)


def check_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    """Raises ValueError if the buckets have no exact part, no logarithmic part, or cannot be halved for two directions."""
    check_at_least("num_buckets", num_buckets, 4 if bidirectional else 2, MOST_BUCKETS)
    if bidirectional and num_buckets % 2:
        raise ValueError(f"num_buckets must be even with bidirectional=True, got {num_buckets}")
    exact = num_buckets // (4 if bidirectional else 2)
    if max_distance <= exact:
        raise ValueError(
            f"max_distance must be an integer above the {exact} exact buckets of num_buckets={num_buckets}, got {max_distance!r}"
        )


def t5_bucket(relative_position: Int[Array, "..."], num_buckets: int, max_distance: int, bidirectional: bool) -> Int[Array, "..."]:
    """Returns T5's bucket of the relative position j - i (key minus query).

    The logarithmic part counts thresholds that the host computes in float64, because a float32 logarithm puts some distances on the
    wrong side of an edge on some devices.
    """
    span = num_buckets // 2 if bidirectional else num_buckets
    distance = jnp.abs(relative_position) if bidirectional else jnp.maximum(-relative_position, 0)
    bucket = jnp.zeros(jnp.shape(relative_position), jnp.int32)
    exact = span // 2
    bucket = bucket + jnp.minimum(distance, exact)
    for threshold in _bucket_thresholds(span, exact, max_distance):
        bucket = bucket + (distance >= threshold).astype(jnp.int32)
    if bidirectional:
        bucket = bucket + span * (relative_position > 0).astype(jnp.int32)
    return bucket


@functools.cache
def _bucket_thresholds(span: int, exact: int, max_distance: int) -> tuple[int, ...]:
    """Returns the smallest distance of each bucket after the first logarithmic one.

    bucket(d) = exact + floor(log(d / exact) / log(max_distance / exact) * (span - exact)).
    """
    steps = np.arange(1, span - exact)
    edges = exact * (max_distance / exact) ** (steps / (span - exact))
    rounded = np.round(edges)
    return tuple(int(e) for e in np.where(np.abs(edges - rounded) < 1e-9 * edges, rounded, np.ceil(edges)))


@dataclasses.dataclass(frozen=True)
class T5Bucket:
    """Computes T5's bucket of a pair from the difference i - j along axis 0, for ``Pair``."""

    num_buckets: int
    max_distance: int
    bidirectional: bool

    def __call__(self, differences: tuple[Array, ...], args: tuple) -> Array:
        difference = differences[0]
        if not jnp.issubdtype(difference.dtype, jnp.integer):  # T5's code truncates towards zero
            difference = difference.astype(jnp.int32)
        return t5_bucket(-difference, self.num_buckets, self.max_distance, self.bidirectional)

    def uniform(self, first_query: Array, last_query: Array, first_key: Array, last_key: Array) -> Array:
        """Returns whether all pairs in a range of queries and a range of keys are in one bucket.

        This holds if all are in the furthest bucket of their direction or, with bidirectional=False, all in bucket 0.
        """
        span = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        furthest = max((span // 2, *_bucket_thresholds(span, span // 2, self.max_distance)))
        return (first_query - last_key >= furthest) | (first_key - last_query >= (furthest if self.bidirectional else 0))
