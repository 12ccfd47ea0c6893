"""Rotary position embedding (RoPE)."""

import jax.numpy as jnp

from posjax.core.encoding import AttentionInputs, PositionalEncoding, hyperparameter, register
from posjax.core.structures import Pairing, Rotate, ScoreModifications
from posjax.encodings.absolute import check_theta
from posjax.encodings.phases import angles, geometric_frequencies
from posjax.typing import Array, Float, Int, Params


@register("rope")
class Rope(PositionalEncoding):
    """Rotates pairs of query and key channels by their position (RoPE), so that q.k depends only on the difference of positions.

    With R = fraction * H rotated channels and phase p * theta^(-2m/R) for m = 0 .. R/2 - 1, pair m at position p becomes

        (q_a, q_b) -> (q_a cos - q_b sin, q_a sin + q_b cos)

    Args:
      theta: base of the frequencies; wavelengths range from 2 pi to 2 pi theta positions. It may be a traced scalar, such as a
        swept hyperparameter; its gradient is zero. Phases are then float32 products with a relative error of up to 2e-7.
      fraction: fraction of the head's channels that are rotated, from the first on; 0.25 in GPT-NeoX.
      pairing: which channels form pair m: "half" is (m, m + R/2) (GPT-NeoX, transformers' Llama), "interleaved" is
        (2m, 2m + 1) (GPT-J, Meta's Llama). A checkpoint trained with one gives wrong results with the other; ``convert_pairing``
        reorders its channels.

    Raises:
      ValueError: theta is not one positive number (a traced theta that is not positive gives NaN), fraction is outside (0, 1],
        pairing is unknown, or (in ``attend``) fraction * H is not an even number of channels.

    Su et al., arXiv:2104.09864, equation 34.
    """

    theta: Array | float = hyperparameter(10_000.0)
    fraction: float = 1.0
    pairing: Pairing = "half"

    def __post_init__(self) -> None:
        check_theta(self.theta)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction!r}")
        check_pairing(self.pairing)

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        frequencies = geometric_frequencies(self.theta, rotated_width(inputs.query.shape[-1], self.fraction))
        query_phase, key_phase = (angles(tokens.positions, frequencies)[:, :, None] for tokens in (inputs.q, inputs.k))
        return ScoreModifications((Rotate(query_phase, key_phase, pairing=self.pairing, learned=False),))


rope = Rope


def rotated_width(head_dim: int, fraction: float) -> int:
    """Returns the number of a head's channels that are rotated.

    Raises:
      ValueError: fraction * head_dim is odd, below 2 or not an integer.
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
    """Reorders the output channels of a query or key projection, so that attention is the same under the other pairing.

    Args:
      kernel: [..., H], an array whose last axis is the channels of a head, such as a kernel [D, N, H] or a bias [N, H].
      source: pairing that the projection was trained with.
      target: pairing that the projection will be used with.
      fraction: ``fraction`` of ``rope``.

    Raises:
      ValueError: a pairing is unknown, or fraction * H is not an even number of channels.
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
    """Returns RoFormer's upper bound on a rotated product: the mean over m of |S_m|, S_m = sum_{l<m} exp(i * distance * theta_l).

    Only this bound decays with distance; the product itself need not. Su et al., arXiv:2104.09864, section 3.4.3.
    """
    phase = angles(distances, geometric_frequencies(theta, head_dim))
    partial = jnp.hypot(jnp.cumsum(jnp.cos(phase), -1), jnp.cumsum(jnp.sin(phase), -1))
    return partial.mean(-1)
