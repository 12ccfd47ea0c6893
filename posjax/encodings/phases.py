"""Angles of sinusoids and rotations: position times frequency, accurate at positions where a float32 product is not."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import is_traced
from posjax.core.encoding import traced_hparam
from posjax.typing import Array, Float


def geometric_frequencies(theta: Array | float, width: int) -> np.ndarray | Array:
    """Returns theta^(-2m/width) for m = 0 .. width/2 - 1, in radians per position (RoFormer, section 3.2.2).

    The result is a float64 NumPy array. For a traced theta it is a float32 jax array, and a theta that is not positive gives NaN or
    infinity.
    """
    ratio = np.arange(0, width, 2, dtype=np.float64) / width
    return power(theta, ratio) if is_traced(theta) else np.asarray(theta, np.float64) ** -ratio


def power(theta: Array | float, ratio: np.ndarray) -> Float[Array, "*_ F"]:
    """Computes theta^-ratio, for a traced theta, with a relative error of at most 2.3 * 2^-24 on a CPU.

    Args:
      theta: positive; a number, or [..., 1].
      ratio: [F].

    exp2(-ratio * log2(theta)) has twenty times that error. With theta = 2^e f, the exponent is e * ratio + log2(f) * ratio. The
    product of the integer e and the leading bits of ratio is exact, and ldexp applies its integer part without rounding. The
    remainder, which goes through exp2, is small, and so is its rounding error.
    """
    theta = traced_hparam(theta)
    ratio = ratio.reshape((1,) * (theta.ndim - 1) + (-1,))  # explicit rank, for strict rank promotion
    leading = np.round(ratio * 2.0**12) / 2.0**12
    whole = jnp.frexp(theta * math.sqrt(2.0))[1] - 1  # brings f as close to 1 as possible
    exponent = whole.astype(jnp.float32)
    product = exponent * jnp.asarray(leading, jnp.float32)
    integer_part = jnp.round(product)
    remainder = exponent * jnp.asarray(ratio - leading, jnp.float32)
    remainder = remainder + jnp.log2(jnp.ldexp(theta, -whole)) * jnp.asarray(ratio, jnp.float32)
    return jnp.ldexp(jnp.exp2(-(product - integer_part) - remainder), -integer_part.astype(jnp.int32))


def angles(positions: Array, frequencies: np.ndarray | Array) -> Float[Array, "..."]:
    """Returns positions[..., None] * frequencies, modulo 2 pi where that is exact, as float32.

    A float32 product has an error of 6e-3 rad at position 100,000, because the frequency is rounded before the multiplication.
    With frequencies that are concrete on the host, the product is computed in turns, in 32-bit fixed point: whole turns overflow
    and vanish, as a rotation needs, and the remainder has an error of about 1e-6 rad at every position below 2^31. Fractional
    positions are split into a whole number and the rest. Traced frequencies (a swept theta) use the float32 product.

    Args:
      positions: integers or floats of any shape.
      frequencies: [F] radians per position; a NumPy array selects the exact path.

    Returns:
      [..., F] radians, for integers in [-pi, pi) on the exact path.
    """
    return angles_by_channel(jnp.asarray(positions)[..., None], frequencies)


def angles_by_channel(positions: Array, frequencies: np.ndarray | Array) -> Float[Array, "..."]:
    """Returns positions * frequencies as ``angles`` does, for positions [..., F or 1] that may differ between frequencies [F]."""
    frequencies = frequencies.reshape((1,) * (positions.ndim - 1) + (-1,))  # explicit rank, for strict rank promotion
    if not isinstance(frequencies, np.ndarray):
        return positions.astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        positions = positions.astype(jnp.float32)
        whole = jnp.round(positions)
        rest = (positions - whole) * jnp.asarray(
            frequencies, jnp.float32
        )  # at most half a position: a float32 product is exact enough
        return angles_by_channel(whole.astype(jnp.int32), frequencies) + rest
    turns = np.mod(frequencies.astype(np.float64) / (2 * np.pi), 1.0)
    high = np.floor(turns * 2.0**32)
    low = turns - high / 2.0**32  # remainder after 32 bits of a turn; float32 extends it to 56 bits in total
    fixed_point = positions.astype(jnp.uint32) * jnp.asarray(high.astype(np.uint32))
    signed = fixed_point.astype(jnp.int32).astype(jnp.float32) * 2.0**-32  # two's complement: a turn in [-1/2, 1/2)
    remainder = positions.astype(jnp.float32) * jnp.asarray(low, jnp.float32)
    return (signed + remainder) * (2 * np.pi)


def angles_of_learned(positions: Array, frequencies: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns positions * frequencies, modulo 2 pi, for float32 frequencies that are traced or learned, with their gradients.

    Position and frequency are each split into two numbers of 12 bits, so that the partial products are exact in float32. Their
    sines and cosines, which reduce large arguments accurately, bring each into [-pi, pi]. The error is about 1e-6 rad for positions
    below 2^24, where that of a float32 product is half a radian. The axes of both arguments broadcast.
    """
    plain = positions.astype(jnp.float32) * frequencies  # has the gradient
    position, frequency = map(_two_halves, jax.lax.stop_gradient((positions.astype(jnp.float32), frequencies)))
    reduced = position[1] * frequency[1]
    for p, f in ((0, 1), (1, 0), (0, 0)):
        product = position[p] * frequency[f]
        reduced += jnp.arctan2(jnp.sin(product), jnp.cos(product))
    return reduced + (plain - jax.lax.stop_gradient(plain))  # adds zero


def _two_halves(x: Float[Array, "..."]) -> tuple[Array, Array]:
    """Splits float32 numbers into their leading 12 bits and the rest, which has at most 12."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    leading = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return leading, x - leading
