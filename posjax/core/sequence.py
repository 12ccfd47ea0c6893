"""Operations along a sequence that respect segments, for encodings that sum over tokens."""

import jax
import jax.numpy as jnp

from posjax.typing import Array, Float, Int


def prefix_sum(
    x: Float[Array, "B N T"], segments: Int[Array, "B T"] | None = None, *, exclusive: bool = False
) -> tuple[Float[Array, "B N T"], Float[Array, "B N T"]]:
    """Computes prefix sums of x within each segment, in two parts whose sum is exact to about 45 bits.

    For two tokens of a segment, (high_i - high_j) + (low_i - low_j) is the sum between them. It has float32 precision for sequences
    of any length, whereas a single float32 sum of log gates has an error of 9e-3 nats at 65,000 tokens.

    Args:
      x: [B or 1, N, T] float32.
      segments: [B, T]; tokens of a segment need not be contiguous. None: all tokens are in one segment.
      exclusive: leaves the token itself out of its sum.

    Returns:
      (high, low), [B, N, T] float32. Only ``high`` has gradients.
    """
    starts = jnp.zeros((1, 1, x.shape[2]), bool)
    if segments is not None:
        order = jnp.argsort(segments, axis=1, stable=True)[:, None]
        x = jnp.take_along_axis(jnp.broadcast_to(x, (segments.shape[0], *x.shape[1:])), order, axis=2)
        found = jnp.take_along_axis(segments[:, None], order, axis=2)
        starts = jnp.diff(found, axis=2, prepend=found[..., :1]) != 0
    high, low = _scan(x, starts)
    if exclusive:
        high, low = (jnp.pad(part, [(0, 0), (0, 0), (1, 0)])[..., :-1] for part in (high, low))
        high, low = (jnp.where(starts, 0.0, part) for part in (high, low))
    if segments is not None:
        back = jnp.argsort(order, axis=2)
        high, low = (jnp.take_along_axis(part, back, axis=2) for part in (high, low))
    return high, low


@jax.custom_vjp
def _scan(x: Array, starts: Array) -> tuple[Array, Array]:
    """Returns inclusive sums along the last axis in two parts, restarted at every start, so that NaN stays in its segment."""
    starts = jnp.broadcast_to(starts, x.shape)
    return jax.lax.associative_scan(_add, (x, jnp.zeros_like(x), starts), axis=x.ndim - 1)[:2]


Sums = tuple[Array, Array, Array]


def _add(a: Sums, b: Sums) -> Sums:
    """Adds two numbers of two parts each (Dekker's and Knuth's sums), or returns the second if a segment starts in it."""
    high = a[0] + b[0]
    rest = high - a[0]
    low = (a[0] - (high - rest)) + (b[0] - rest) + (a[1] + b[1])
    total = high + low
    return jnp.where(b[2], b[0], total), jnp.where(b[2], b[1], low - (total - high)), a[2] | b[2]


def _scan_forward(x: Array, starts: Array) -> tuple[tuple[Array, Array], Array]:
    return _scan(x, starts), starts


def _scan_backward(starts: Array, gradients: tuple[Array, Array]) -> tuple[Array, None]:
    high, _ = gradients
    ends = jnp.concatenate(
        [starts[..., 1:], jnp.zeros_like(starts[..., :1])], -1
    )  # ends of segments, which are starts from the right
    parts = high, jnp.zeros_like(high), jnp.broadcast_to(ends, high.shape)
    sums, _, _ = jax.lax.associative_scan(_add, parts, axis=high.ndim - 1, reverse=True)
    return sums, None


_scan.defvjp(_scan_forward, _scan_backward)
