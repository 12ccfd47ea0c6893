"""RoPE with an amplitude, which also scales query and key, as methods for context extension do."""

import jax.numpy as jnp

import posjax as pj
from posjax.encodings.phases import angles, geometric_frequencies


@pj.register("amplified_rope")
class AmplifiedRope(pj.PositionalEncoding):
    """Rotates all channels as ``rope`` does and multiplies query and key by ``amplitude`` each."""

    amplitude: float = 1.1
    theta: float = 10_000.0

    def attend(self, params, inputs):
        frequencies = geometric_frequencies(self.theta, inputs.query.shape[-1])
        phases = (angles(tokens.positions, frequencies)[:, :, None] for tokens in (inputs.q, inputs.k))
        gain = jnp.full((1, 1, 1, 1), self.amplitude)
        return pj.ScoreModifications((pj.Rotate(*phases, gain, gain, learned=False),))
