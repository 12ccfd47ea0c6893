"""Angles of sinusoids and rotations: position times frequency, exact far past the point where a float32 product is not."""

import jax.numpy as jnp
import numpy as np

from posjax.typing import Array, Float


def geometric_frequencies(theta: float, width: int) -> np.ndarray:
    """theta^(-2m/width) for m = 0 .. width/2 - 1, in radians per position, float64 (RoFormer, section 3.2.2)."""
    return np.asarray(theta, np.float64) ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def angles(positions: Array, frequencies: np.ndarray | Array) -> Float[Array, "..."]:
    """positions[..., None] * frequencies modulo 2 pi, float32.

    A float32 product is off by 6e-3 rad at position 100,000, because the frequency was rounded before it was multiplied.
    With integer positions and frequencies known on the host, the product is taken in turns, in 32-bit fixed point: whole
    turns overflow and drop out, which is what a rotation wants, and what is left is right to about 1e-6 rad at every
    position below 2^31. Traced frequencies (a swept theta) and fractional positions take the float32 product.

    Args:
      positions: integers (or floats) of any shape.
      frequencies: [F] radians per position; a NumPy array takes the exact path.

    Returns:
      [..., F] radians, in [-pi, pi) on the exact path.
    """
    positions = jnp.asarray(positions)
    if not isinstance(frequencies, np.ndarray) or not jnp.issubdtype(positions.dtype, jnp.integer):
        return positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    turns = np.mod(frequencies.astype(np.float64) / (2 * np.pi), 1.0)
    high = np.floor(turns * 2.0**32)
    low = turns - high / 2.0**32  # what 32 bits of a turn leave over; float32 holds it to 56 bits in all
    whole = positions[..., None].astype(jnp.uint32) * jnp.asarray(high.astype(np.uint32))
    signed = whole.astype(jnp.int32).astype(jnp.float32) * 2.0**-32  # two's complement: a turn in [-1/2, 1/2)
    rest = positions[..., None].astype(jnp.float32) * jnp.asarray(low, jnp.float32)
    return (signed + rest) * (2 * np.pi)
