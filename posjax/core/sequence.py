"""Operations along a sequence that respect segments: what encodings sum over tokens goes through these."""

import jax
import jax.numpy as jnp

from posjax.typing import Array, Float, Int


def prefix_sum(
    x: Float[Array, "B N T"], segments: Int[Array, "B T"] | None = None, *, exclusive: bool = False
) -> tuple[Float[Array, "B N T"], Float[Array, "B N T"]]:
    """Sums x over the tokens of each token's segment up to the token, in two parts whose sum is exact to some 45 bits.

    The difference of two tokens of one segment, (high_i - high_j) + (low_i - low_j), is the sum between them. It has the precision
    of float32 however long the sequence is: one float32 sum of log gates loses 9e-3 nats at 65,000 tokens. An unknown constant, the
    same for all tokens of a segment, may be added to all sums.

    Args:
      x: [B or 1, N, T] float32.
      segments: [B, T]; tokens of a segment need not be contiguous. None: all tokens are in one segment.
      exclusive: leaves the token itself out of its sum.

    Returns:
      (high, low), [B, N, T] float32. Gradients flow through ``high`` alone.
    """
    if segments is not None:
        order = jnp.argsort(segments, axis=1, stable=True)[:, None]
        x = jnp.take_along_axis(jnp.broadcast_to(x, (segments.shape[0], *x.shape[1:])), order, axis=2)
    high, low = _scan(x)
    if exclusive:
        high, low = (jnp.pad(part, [(0, 0), (0, 0), (1, 0)])[..., :-1] for part in (high, low))
    if segments is not None:
        back = jnp.argsort(order, axis=2)
        high, low = (jnp.take_along_axis(part, back, axis=2) for part in (high, low))
    return high, low


@jax.custom_vjp
def _scan(x: Array) -> tuple[Array, Array]:
    """Returns the inclusive sums along the last axis, in two parts."""
    return jax.lax.associative_scan(_add, (x, jnp.zeros_like(x)), axis=-1)


def _add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Adds two numbers of two parts each (Dekker's and Knuth's sums)."""
    high = a[0] + b[0]
    rest = high - a[0]
    low = (a[0] - (high - rest)) + (b[0] - rest) + (a[1] + b[1])
    total = high + low
    return total, low - (total - high)


def _scan_forward(x: Array) -> tuple[tuple[Array, Array], None]:
    return _scan(x), None


def _scan_backward(_: None, gradients: tuple[Array, Array]) -> tuple[Array]:
    high, _ = gradients
    return (jax.lax.cumsum(high, axis=high.ndim - 1, reverse=True),)


_scan.defvjp(_scan_forward, _scan_backward)
