"""Rotary position embedding (RoPE)."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import bounded, check, is_array, short
from posjax.core.encoding import AttentionInputs, PositionalEncoding, register
from posjax.core.structures import Pairing, Rotate, ScoreModifications
from posjax.encodings.absolute import theta
from posjax.encodings.frequencies import ProportionalScaling, Scaling, sequence_lengths
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
      fraction: fraction of the head's channels that are rotated; 0.25 in GPT-NeoX.
      pairing: which channels form pair m: "half" is (m, m + R/2) (GPT-NeoX, transformers' Llama), "interleaved" is
        (2m, 2m + 1) (GPT-J, Meta's Llama). A checkpoint trained with one gives wrong results with the other; ``convert_pairing``
        reorders its channels.
      scaling: how frequencies are changed for sequences longer than those in training, such as ``yarn_scaling(factor=4.0,
        original_max_length=8192)``; None leaves them. ``posjax.encodings.frequencies`` lists the scalings.
      channels: which R channels of a head are rotated: the "first", or the "last" as in multi-head latent attention (DeepSeek).

    Raises:
      ValueError: theta is not one positive number (a traced theta that is not positive gives NaN), fraction is outside (0, 1],
        pairing or channels is unknown, scaling is not a scaling, or (in ``attend``) fraction * H is not an even number of channels
        or does not fit the scaling.

    Example:
      >>> encoding = pj.rope()
      >>> longer = pj.rope(scaling=pj.yarn_scaling(factor=4.0, original_max_length=8192))

    Su et al., arXiv:2104.09864, equation 34.
    """

    theta: Array | float = theta()
    fraction: float = bounded(1.0, above=0, most=1)
    pairing: Pairing = "half"
    scaling: Scaling | None = None
    channels: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        if self.scaling is not None and not isinstance(self.scaling, Scaling):
            is_class = isinstance(self.scaling, type) and issubclass(self.scaling, Scaling)
            got = f"the class {self.scaling.__name__}; call it" if is_class else short(self.scaling)
            raise ValueError(f"scaling must be a scaling such as linear_scaling(4.0), or None, got {got}")
        if isinstance(self.scaling, ProportionalScaling) and self.fraction != 1:
            raise ValueError(f"fraction must be 1.0 with {self.scaling!r}, which has a fraction of its own, got {self.fraction!r}")

    @property
    def cache(self) -> str:
        return "raw" if self.scaling is not None and self.scaling.depends_on_length else "transformed"

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        head_dim = inputs.query.shape[-1]
        width = rotated_width(head_dim, self.fraction)
        offset = head_dim - width if self.channels == "last" else 0
        scaling = self.scaling or Scaling()
        lengths = sequence_lengths(inputs.q, inputs.k) if scaling.depends_on_length else (None, None)
        sides = zip((inputs.q, inputs.k), lengths, strict=True)
        rotations = (scaling.rotation(self.theta, width, tokens.positions, length) for tokens, length in sides)
        phases, gains = zip(*(jax.tree.map(lambda x: x[:, :, None], both) for both in rotations), strict=True)  # no axis of heads
        return ScoreModifications((Rotate(*phases, *gains, pairing=self.pairing, offset=offset, learned=False),))


rope = Rope


def rotated_width(head_dim: int, fraction: float, name: str = "head_dim") -> int:
    """Returns the number of rotated channels per head; ``name`` is the name of ``head_dim`` in messages.

    Raises:
      ValueError: fraction * head_dim is odd, below 2 or not an integer.
    """
    width = round(head_dim * fraction)
    if width < 2 or width % 2 or abs(width - head_dim * fraction) > 1e-6:
        raise ValueError(
            f"fraction * {name} must be an even number of channels of at least 2, "
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

    Returns:
      The array with its last axis reordered.

    Raises:
      ValueError: a pairing is unknown, or fraction * H is not an even number of channels.

    Example:
      >>> kernel = jnp.arange(4.0)[None]
      >>> pj.convert_pairing(kernel, source="interleaved", target="half").tolist()
      [[0.0, 2.0, 1.0, 3.0]]
    """
    check("source", source, Pairing)
    check("target", target, Pairing)
    check("fraction", fraction, float, above=0, most=1)
    if not is_array(kernel, jnp.number, jnp.bool_) or not kernel.ndim:
        raise ValueError(f"kernel must be an array [..., H] whose last axis is a head's channels, got {short(kernel)}")
    width = rotated_width(kernel.shape[-1], fraction, "(the last axis of kernel)")
    channels = np.arange(kernel.shape[-1])
    if source == target:
        return kernel
    pairs = channels[:width].reshape(width // 2, 2) if source == "interleaved" else channels[:width].reshape(2, width // 2)
    return kernel[..., np.concatenate([pairs.T.reshape(-1), channels[width:]])]


def decay_bound(distances: Int[Array, " S"], head_dim: int, theta: float = 10_000.0) -> Float[Array, " S"]:
    """Returns RoFormer's upper bound on a rotated product: the mean over m of |S_m|, S_m = sum_{l<m} exp(i * distance * theta_l).

    Only this bound decays with distance; the product itself need not. Su et al., arXiv:2104.09864, section 3.4.3.
    """
    phase = angles(distances, geometric_frequencies(theta, head_dim))
    partial = jnp.hypot(jnp.cumsum(jnp.cos(phase), -1), jnp.cumsum(jnp.sin(phase), -1))
    return partial.mean(-1)
