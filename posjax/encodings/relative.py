"""Static relative biases, functions of two positions: ALiBi and T5."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from posjax.checks import check_at_least, check_positive
from posjax.core.bias import BiasTerm, Lookup, Penalty, position_bias
from posjax.core.encoding import AttentionInputs, Dims, PositionalEncoding, leaf, setting
from posjax.typing import Array, Float, Int, Params


def alibi(slope: Array | float | None = None) -> PositionalEncoding:
    """A linear penalty on distance, with a fixed slope a head: bias = -m_n |i - j|, not divided by sqrt(H).

    Slopes start at 2^(-8/N) with that ratio; where N is not a power of two, by the rule of the released code.

    Args:
      slope: m of every head, in nats per position; None takes ALiBi's slope of each head. It may be a traced scalar: a setting of a
        sweep, with gradient zero.

    Raises:
      ValueError: a slope that is not one positive number; a traced one gives NaN.

    Press et al., arXiv:2108.12409.
    """
    check_slope(slope)

    def bias(params: Params, inputs: AttentionInputs) -> tuple[BiasTerm, ...]:
        return (position_bias(_linear_penalty, slopes_of_heads(slope, inputs.query.shape[2]), Penalty(), heads=(0,)),)

    return PositionalEncoding(name="alibi", bias=bias)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """ALiBi's slopes [N], float32: 2^(-8/c) and its powers for the largest power of two c in N, then every other slope of 2c.

    The paper's formula read literally differs where N is not a power of two; this is what its code, and BLOOM, do.
    """
    check_at_least("num_heads", num_heads, 1)
    closest = 2 ** int(math.log2(num_heads))

    def powers(n: int) -> np.ndarray:
        return 2.0 ** (-8.0 / n * np.arange(1, n + 1))

    return np.concatenate([powers(closest), powers(2 * closest)[0::2][: num_heads - closest]]).astype(np.float32)


def check_slope(slope: Array | float | None) -> None:
    """Raises ValueError for a slope that does not fall."""
    if slope is not None:
        check_positive("slope", slope, "None takes ALiBi's slopes")


def slopes_of_heads(slope: Array | float | None, num_heads: int) -> Float[Array, " N"]:
    """[N] float32: one slope for every head, NaN where it is not positive, or ALiBi's slope of each where it is None."""
    if slope is None:
        return jnp.asarray(alibi_slopes(num_heads))
    return jnp.full(num_heads, jnp.where(setting(slope) > 0, setting(slope), jnp.nan))


def _linear_penalty(query_positions: Array, key_positions: Array, slopes: Array) -> Array:
    distance = jnp.abs(query_positions - key_positions).astype(jnp.float32)
    return -slopes[None, :, None, None] * distance


def t5(num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False) -> PositionalEncoding:
    """A learned bias a head and bucket of distance: bias = b_n[bucket(j - i)], buckets exact up to a point, then logarithmic.

    params["bias"] is [num_buckets, N], initially zero. It is added to the scores as they are: T5 itself does not scale q.k, so
    a T5 checkpoint also needs ``scale=1``.

    Args:
      num_buckets: how many; half of them for each direction where bidirectional. The last holds all that is further.
      max_distance: distance, in positions, from which on all share the last bucket.
      bidirectional: keys after the query have buckets of their own (encoders); False: they share bucket 0 (decoders).

    Raises:
      ValueError: too few buckets, an odd number where bidirectional, or max_distance not past the exact buckets.

    Raffel et al., arXiv:1910.10683, section 2.1.
    """
    check_buckets(num_buckets, max_distance, bidirectional)
    function, lookup = _bucket_function(num_buckets, max_distance, bidirectional)

    def init(key: Array, dims: Dims) -> Params:
        return {"bias": jnp.zeros((num_buckets, dims.num_heads), jnp.float32)}

    def bias(params: Params, inputs: AttentionInputs) -> tuple[BiasTerm, ...]:
        return (position_bias(function, leaf(params, "bias", "t5", (num_buckets, inputs.query.shape[2])), lookup, heads=(1,)),)

    return PositionalEncoding(name="t5", init=init, bias=bias)


def check_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> None:
    """Raises ValueError where the bucket rule has no exact or no logarithmic part."""
    check_at_least("num_buckets", num_buckets, 4 if bidirectional else 2)
    if bidirectional and num_buckets % 2:
        raise ValueError(f"num_buckets must be even where bidirectional=True, got {num_buckets}")
    exact = num_buckets // (4 if bidirectional else 2)
    if isinstance(max_distance, bool) or not isinstance(max_distance, int) or max_distance <= exact:
        raise ValueError(
            f"max_distance must be an integer past the {exact} exact buckets of num_buckets={num_buckets}, got {max_distance!r}"
        )


def t5_bucket(relative_position: Int[Array, "..."], num_buckets: int, max_distance: int, bidirectional: bool) -> Int[Array, "..."]:
    """T5's bucket of j - i (key minus query).

    The logarithmic part is a count of thresholds, taken on the host in float64: a float32 logarithm puts some distances on the
    wrong side of an edge on some devices.
    """
    span = num_buckets // 2 if bidirectional else num_buckets
    distance = jnp.abs(relative_position) if bidirectional else jnp.maximum(-relative_position, 0)
    bucket = jnp.zeros(jnp.shape(relative_position), jnp.int32)
    exact = span // 2
    bucket = bucket + jnp.minimum(distance, exact)
    for threshold in _bucket_thresholds(span, exact, max_distance):
        bucket = bucket + (distance >= threshold)
    if bidirectional:
        bucket = bucket + span * (relative_position > 0)
    return bucket


@functools.cache
def _bucket_thresholds(span: int, exact: int, max_distance: int) -> tuple[int, ...]:
    """The least distance of each bucket past the first logarithmic one.

    bucket(d) = exact + floor(log(d / exact) / log(max_distance / exact) * (span - exact)).
    """
    steps = np.arange(1, span - exact)
    edges = exact * (max_distance / exact) ** (steps / (span - exact))
    rounded = np.round(edges)
    return tuple(int(e) for e in np.where(np.abs(edges - rounded) < 1e-9 * edges, rounded, np.ceil(edges)))


def one_bucket(num_buckets: int, max_distance: int, bidirectional: bool) -> Callable[[Array, Array, Array, Array], Array]:
    """(first query position, last, first key position, last) -> whether all pairs between fall in one bucket: the furthest
    of their direction, or, where keys ahead share bucket 0, that one."""
    span = num_buckets // 2 if bidirectional else num_buckets
    furthest = max((span // 2, *_bucket_thresholds(span, span // 2, max_distance)))

    def uniform(first_query: Array, last_query: Array, first_key: Array, last_key: Array) -> Array:
        return (first_query - last_key >= furthest) | (first_key - last_query >= (furthest if bidirectional else 0))

    return uniform


@functools.cache
def _bucket_function(num_buckets: int, max_distance: int, bidirectional: bool):
    """One pair of objects for equal arguments, as position_bias asks: the bias, and the same by name."""

    def index(query_positions: Array, key_positions: Array) -> Array:
        return t5_bucket(key_positions - query_positions, num_buckets, max_distance, bidirectional)

    def function(query_positions: Array, key_positions: Array, table: Array) -> Array:
        return jnp.moveaxis(jnp.take(table.astype(jnp.float32), index(query_positions, key_positions)[:, 0], axis=0), -1, 1)

    return function, Lookup(index, one_bucket(num_buckets, max_distance, bidirectional))
