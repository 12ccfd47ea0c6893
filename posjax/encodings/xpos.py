"""xPos: RoPE with gains of query and key, so that scores decay with the distance."""

import math

import jax.numpy as jnp
import numpy as np

from posjax.checks import bounded, is_traced
from posjax.core.encoding import AttentionInputs, PositionalEncoding, register
from posjax.core.structures import Pairing, Rotate, ScoreModifications
from posjax.encodings.absolute import theta
from posjax.encodings.phases import angles, geometric_frequencies
from posjax.typing import Array, Float, Params


@register("xpos")
class XPos(PositionalEncoding):
    """Rotates query and key as ``rope`` does and multiplies each by gains, so that their product decays with the distance (xPos).

    With zeta_m = (2m/H + gamma) / (1 + gamma) for pair m, a query at position p is multiplied by zeta_m^((p - centre) / scale_base)
    and a key by the inverse, which leaves zeta_m^((i - j) / scale_base) in their product. The centre cancels because it is the same
    for every query and every cached key. torchscale and x-transformers take half of the current length instead, which no longer
    matches keys that were cached earlier. Attention is usually causal: gains grow toward later keys.

    Gains must fit the exponents of the dtype. With the defaults and float32 or bfloat16, positions may lie up to 28,328 from the
    centre, where the gain of pair 0 is 2^100; the reach is proportional to scale_base. A sequence of 56,000 tokens can be placed
    around centre=28_000. Beyond the reach, known positions raise an error, and the output of traced ones is NaN.

    Args:
      scale_base: positions per factor zeta_m.
      gamma: the smallest zeta is gamma / (1 + gamma).
      theta, pairing: as in ``rope``.
      centre: the position with gains of one.

    Raises:
      ValueError: an argument is out of bounds, (in ``attend``) H is odd, or a position is out of reach.

    Example:
      >>> encoding = pj.xpos()

    Sun et al., arXiv:2212.10554, section 3.2.
    """

    scale_base: float = bounded(512.0, above=0)
    gamma: float = bounded(0.4, above=0)
    theta: Array | float = theta()
    pairing: Pairing = "interleaved"
    centre: int = bounded(0, least=0)

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        head_dim, dtype = inputs.query.shape[-1], inputs.query.dtype
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for xpos, got {head_dim}")
        frequencies = geometric_frequencies(self.theta, head_dim)
        zeta = (np.arange(0, head_dim, 2) / head_dim + self.gamma) / (1 + self.gamma)
        exponents = np.log2(zeta) / self.scale_base  # of two, per position
        reach = math.floor(_most_bits(dtype) / -exponents[0])
        phases, gains = [], []
        for tokens, sign in ((inputs.q, 1), (inputs.k, -1)):
            self._check_reach(tokens.positions, reach, dtype)
            phases.append(angles(tokens.positions, frequencies)[:, :, None])
            gain = _powers_of_two(tokens.positions - self.centre, sign * exponents, reach)
            gains.append(gain[:, :, None])
        return ScoreModifications((Rotate(*phases, *gains, pairing=self.pairing, learned=False),))

    def _check_reach(self, positions: Array, reach: int, dtype: jnp.dtype) -> None:
        if is_traced(positions):
            return
        furthest = np.abs(np.asarray(positions, np.float64) - self.centre).max()
        if furthest > reach:
            raise ValueError(
                f"positions must be within {reach} of centre={self.centre} for xpos in {dtype}, got one at a distance of "
                f"{furthest:.10g}; a larger scale_base reaches further, and the centre may lie in the middle of the sequence"
            )


xpos = XPos


def _most_bits(dtype: jnp.dtype) -> float:
    """Returns the largest exponent of two of a gain: the gained values of size one stay 2^26 above the smallest normal number."""
    return -math.log2(float(jnp.finfo(dtype).tiny)) - 26 if jnp.finfo(dtype).bits > 16 or dtype == jnp.bfloat16 else 4.0


def _powers_of_two(distances: Array, exponents: np.ndarray, reach: int) -> Float[Array, "... F"]:
    """Returns 2^(distances[..., None] * exponents) with a relative error of about 2e-7; NaN beyond the reach.

    A float32 product with the exponent would be off by 4e-6 at 2^100. The whole part of the product is therefore computed in
    integers, in units of 2^-23.
    """
    exponents = exponents.reshape((1,) * distances.ndim + (-1,))
    whole = jnp.round(distances).astype(jnp.int32)
    rest = (distances - whole).astype(jnp.float32)  # of real-valued positions
    leading = np.round(exponents * 2.0**23)
    low = jnp.asarray(exponents - leading / 2.0**23, jnp.float32)
    product = whole[..., None] * jnp.asarray(leading, jnp.int32)  # at most 2^30 within the reach
    fraction = (product & (2**23 - 1)).astype(jnp.float32) * 2.0**-23
    fraction += whole[..., None].astype(jnp.float32) * low + rest[..., None] * jnp.asarray(exponents, jnp.float32)
    power = jnp.ldexp(jnp.exp2(fraction), product >> 23)
    return jnp.where((jnp.abs(distances) <= reach)[..., None], power, jnp.nan)
