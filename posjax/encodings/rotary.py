"""Rotary position embedding (RoPE)."""

import jax.numpy as jnp

from posjax.core.bias import Pairing, Rotation
from posjax.core.encoding import AttentionInputs, PositionalEncoding
from posjax.encodings.absolute import check_theta
from posjax.encodings.phases import angles, geometric_frequencies
from posjax.typing import Array, Float, Int, Params


def rope(theta: Array | float = 10_000.0, fraction: float = 1.0, pairing: Pairing = "half") -> PositionalEncoding:
    """Rotates pairs of channels of query and key by position * theta_m, so that q.k depends on the distance alone.

    (q_a, q_b) -> (q_a cos - q_b sin, q_a sin + q_b cos) with phase p * theta^(-2m/R), m = 0 .. R/2 - 1, R = fraction * H.

    Args:
      theta: base of the frequencies; wavelengths run from 2 pi to 2 pi theta positions. It may be a traced scalar: a setting of a
        sweep, with gradient zero. Phases are then products in float32, off by up to 2e-7 of themselves.
      fraction: share of the head's channels that are rotated, the first ones; 0.25 in GPT-NeoX.
      pairing: which channels form pair m: "half" is (m, m + R/2) (GPT-NeoX, transformers' Llama), "interleaved" is
        (2m, 2m + 1) (GPT-J, Meta's Llama). Checkpoints of one are wrong in the other: ``convert_pairing`` reorders them.

    Raises:
      ValueError: theta is not one positive number (a traced one gives NaN), fraction is outside (0, 1], pairing is unknown, or
        (in ``rotate``) fraction * H is not an even number of channels.

    Su et al., arXiv:2104.09864, equation 34.
    """
    check_theta(theta)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction!r}")
    check_pairing(pairing)

    def rotation(params: Params, inputs: AttentionInputs) -> Rotation:
        frequencies = geometric_frequencies(theta, rotated_width(inputs.query.shape[-1], fraction))
        return Rotation(angles(inputs.query_positions, frequencies), angles(inputs.key_positions, frequencies), pairing)

    def rotate(params: Params, query: Array, key: Array, inputs: AttentionInputs) -> tuple[Array, Array]:
        return rotation(params, inputs).applied(query, key)

    return PositionalEncoding(name="rope", rotate=rotate, rotation=rotation)


def rotated_width(head_dim: int, fraction: float) -> int:
    """How many of a head's channels are rotated.

    Raises:
      ValueError: the number is odd or not whole.
    """
    width = round(head_dim * fraction)
    if width < 2 or width % 2 or abs(width - head_dim * fraction) > 1e-6:
        raise ValueError(
            "fraction * head_dim must be an even number of channels of at least 2, "
            f"got {fraction!r} * {head_dim} = {head_dim * fraction:g}"
        )
    return width


def convert_pairing(
    kernel: Float[Array, "D N H"], *, source: Pairing, target: Pairing, fraction: float = 1.0
) -> Float[Array, "D N H"]:
    """Reorders the output channels of a query or key projection made for one pairing, for the same attention in the other.

    Args:
      kernel: [..., H]: any array whose last axis is a head's channels (a bias [N, H] too).
      source: the pairing that it was trained with.
      target: the pairing that it will be used with.
      fraction: rope's fraction.

    Raises:
      ValueError: an unknown pairing, or fraction * H is not an even number of channels.
    """
    check_pairing(source)
    check_pairing(target)
    width = rotated_width(kernel.shape[-1], fraction)
    channels = jnp.arange(kernel.shape[-1])
    if source == target:
        return kernel
    pairs = channels[:width].reshape(width // 2, 2) if source == "interleaved" else channels[:width].reshape(2, width // 2)
    return kernel[..., jnp.concatenate([pairs.T.reshape(-1), channels[width:]])]


def check_pairing(pairing: str) -> None:
    """Raises ValueError for an unknown pairing."""
    if pairing not in ("half", "interleaved"):
        raise ValueError(f"pairing must be 'half' or 'interleaved', got {pairing!r}")


def decay_bound(distances: Int[Array, " S"], head_dim: int, theta: float = 10_000.0) -> Float[Array, " S"]:
    """RoFormer's upper bound on the decay of a rotated product: mean over m of |S_m|, S_m = sum_{l<m} exp(i * distance * theta_l).

    Only this bound decays with distance; the product itself need not. Su et al., arXiv:2104.09864, section 3.4.3.
    """
    phase = angles(distances, geometric_frequencies(theta, head_dim))
    partial = jnp.hypot(jnp.cumsum(jnp.cos(phase), -1), jnp.cumsum(jnp.sin(phase), -1))
    return partial.mean(-1)
