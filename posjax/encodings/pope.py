"""PoPE: polar coordinate position embedding, in which content sets magnitudes and position sets angles."""

import math

import jax
import jax.numpy as jnp

from posjax.core.encoding import AttentionInputs, Dims, PositionalEncoding, get_param, register
from posjax.core.structures import Replace, ScoreModifications
from posjax.encodings.absolute import theta
from posjax.encodings.phases import angles, geometric_frequencies
from posjax.typing import Array, Params


@register("pope")
class PoPE(PositionalEncoding):
    """Scores by content alone in the magnitudes and by position alone in the angles of H complex channels (PoPE).

        score_ij = scale * sum_m softplus(q_im) softplus(k_jm) cos((j - i) theta^(-m/H) + delta_m),    m = 0 .. H - 1

    Query and key are widened to 2 H channels, magnitude times cosine and sine, and so are cached keys. The scale stays
    1 / sqrt(H) of the head as given. params["delta"] is [N, H], zeros, clipped to [-2 pi, 0], learned in every layer. It shifts the
    angles of queries, so that a key that several heads share is cached once; the reference shifts those of keys by the opposite,
    which gives the same scores.

    Args:
      theta: base of the frequencies; it may be a traced scalar, as in ``rope``.

    Raises:
      ValueError: theta is not one positive number.

    Example:
      >>> encoding = pj.pope()

    Gopalakrishnan et al., arXiv:2509.10534.
    """

    theta: Array | float = theta()
    per_layer = True

    def init(self, key: Array, dims: Dims) -> Params:
        return {"delta": jnp.zeros((dims.num_heads, dims.head_dim), jnp.float32)}

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        query, key = inputs.turned_query, inputs.turned_key
        heads, head_dim = query.shape[2:]
        delta = get_param(params, "delta", self.registered_name, (heads, head_dim)).astype(jnp.float32)
        # Not jnp.clip, whose gradient at the bounds is one half: delta begins at a bound.
        delta = jnp.where(delta > 0, 0.0, jnp.where(delta < -2 * math.pi, -2 * math.pi, delta))
        frequencies = geometric_frequencies(self.theta, 2 * head_dim)  # theta^(-m/H) for m = 0 .. H - 1
        query_angle, key_angle = (angles(tokens.positions, frequencies)[:, :, None] for tokens in (inputs.q, inputs.k))
        return ScoreModifications((Replace(_polar(query, query_angle - delta[None, None]), _polar(key, key_angle)),))


pope = PoPE


def _polar(x: Array, angle: Array) -> Array:
    """Returns softplus(x) times the cosine and the sine of an angle, [B, T, N, 2 H], in the dtype of x."""
    magnitude = jax.nn.softplus(x.astype(jnp.float32))
    return jnp.concatenate([magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)], axis=-1).astype(x.dtype)
