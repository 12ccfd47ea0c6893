"""A static bias: a penalty proportional to the square root of the distance, with a learned slope per head."""

import jax.numpy as jnp

import posjax as pj


def penalty(differences, slope):
    """Returns the bias of one head, given the difference of query and key on each axis of the coordinates."""
    return -slope * jnp.sqrt(jnp.abs(differences[0]).astype(jnp.float32))


@pj.register("root_distance")
class RootDistance(pj.PositionalEncoding):
    """Adds -m_n sqrt(|i - j|) to the scores; params["slope"] [N] is m, initially ``slope``."""

    slope: float = 0.5

    def init(self, key, dims):
        return {"slope": jnp.full(dims.num_heads, self.slope)}

    def attend(self, params, inputs):
        return pj.ScoreModifications(biases=(pj.Bias(pj.Pair(penalty, args=params["slope"])),))
