"""Operations along a sequence that respect segments: encodings sum and convolve over tokens through these."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from posjax.typing import Array, Float, Int


@functools.partial(jax.jit, static_argnames="exclusive", inline=True)  # step by step, the scan compiles for seconds outside of jit
def prefix_sum(
    x: Float[Array, "B N T"], segments: Int[Array, "B T"] | None = None, *, exclusive: bool = False
) -> tuple[Float[Array, "B N T"], Float[Array, "B N T"]]:
    """Sums x over the tokens of each token's segment up to the token, in two parts whose sum is exact to some 45 bits.

    The difference of two tokens of one segment, (high_i - high_j) + (low_i - low_j), is the sum between them. It has the precision
    of float32 however long the sequence is: one float32 sum of log gates loses 9e-3 nats at 65,000 tokens.

    Args:
      x: [B or 1, N, T] float32.
      segments: [B, T]; tokens of a segment need not be contiguous. None: all tokens are in one segment.
      exclusive: leaves the token itself out of its sum.

    Returns:
      (high, low), [B, N, T] float32. Gradients flow through ``high`` alone.
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


@functools.partial(jax.jit, inline=True)
def short_conv(
    x: Float[Array, "B T C"], taps: Float[Array, "W C"], segments: Int[Array, "B T"] | None = None, state: Any = None
) -> tuple[Float[Array, "B T C"], Any]:
    """Convolves each channel causally over the last W tokens of a segment, and carries the end of the sequence to the next call.

    y_t = sum_w taps[w] x_{t - w}, where t - w is the w-th token before t without counting padding, and is zero if it has another
    segment than t. Calls on the pieces of a sequence match one call on all of it.

    Args:
      x: [B, T, C].
      taps: [W, C]; the first one is that of the token itself.
      segments: [B, T]; 0 is padding, whose result is zero. None: all tokens are in one segment.
      state: result of the call on the tokens before; None or zeros at the start.

    Returns:
      [B, T, C] in the dtype of x, and the state: the last W - 1 tokens that are not padding, [B, W - 1, C], and their segments
      [B, W - 1].
    """
    batch, length, channels = x.shape
    past = taps.shape[0] - 1
    segments = jnp.ones((batch, length), jnp.int32) if segments is None else segments
    if state is None:
        state = jnp.zeros((batch, past, channels), x.dtype), jnp.zeros((batch, past), jnp.int32)
    x, segments = jnp.concatenate([state[0], x], 1), jnp.concatenate([state[1], segments.astype(jnp.int32)], 1)
    order = jnp.argsort(segments != 0, axis=1, stable=True)  # padding first: a token's predecessors then stand right before it
    x, segments = jnp.take_along_axis(x, order[..., None], axis=1), jnp.take_along_axis(segments, order, axis=1)
    y = x * taps[0].astype(x.dtype)
    for w in range(1, past + 1):
        is_same = (segments[:, w:] == segments[:, :-w]) & (segments[:, w:] != 0)
        y = y.at[:, w:].add(jnp.where(is_same[..., None], x[:, :-w] * taps[w].astype(x.dtype), 0))
    y = jnp.where((segments != 0)[..., None], y, 0)
    back = jnp.argsort(order, axis=1)[..., None]
    return jnp.take_along_axis(y, back, axis=1)[:, past:], (x[:, length:], segments[:, length:])


@jax.custom_vjp
def _scan(x: Array, starts: Array) -> tuple[Array, Array]:
    """Returns the inclusive sums along the last axis in two parts, begun anew at every start: NaN stays in its segment."""
    starts = jnp.broadcast_to(starts, x.shape)
    return jax.lax.associative_scan(_add, (x, jnp.zeros_like(x), starts), axis=x.ndim - 1)[:2]


Sums = tuple[Array, Array, Array]


def _add(a: Sums, b: Sums) -> Sums:
    """Adds two numbers of two parts each (Dekker's and Knuth's sums), or takes the second if a segment starts in it."""
    high = a[0] + b[0]
    rest = high - a[0]
    low = (a[0] - (high - rest)) + (b[0] - rest) + (a[1] + b[1])
    total = high + low
    return jnp.where(b[2], b[0], total), jnp.where(b[2], b[1], low - (total - high)), a[2] | b[2]


def _scan_forward(x: Array, starts: Array) -> tuple[tuple[Array, Array], Array]:
    return _scan(x, starts), starts


def _scan_backward(starts: Array, gradients: tuple[Array, Array]) -> tuple[Array, None]:
    high, _ = gradients
    ends = jnp.concatenate([starts[..., 1:], jnp.zeros_like(starts[..., :1])], -1)  # of segments, from the right their starts
    parts = high, jnp.zeros_like(high), jnp.broadcast_to(ends, high.shape)
    sums, _, _ = jax.lax.associative_scan(_add, parts, axis=high.ndim - 1, reverse=True)
    return sums, None


_scan.defvjp(_scan_forward, _scan_backward)
