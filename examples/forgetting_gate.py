"""A forgetting bias: every token has a gate per head that reduces the weight of all tokens before it (arXiv:2503.02130)."""

import jax
import jax.numpy as jnp

import posjax as pj


def log_gate(x, args):
    """Returns the logarithm of the gate sigmoid(x)."""
    return jax.nn.log_sigmoid(x)


@pj.register("forgetting_gate")
class ForgettingGate(pj.PositionalEncoding):
    """Adds the sum of log f_l over the tokens l = j + 1 .. i to the score of query i and key j, f_l = sigmoid(W h_l + b).

    h is the input of the attention layer. params["kernel"] [D, N] is W; params["bias"] [N] is b, initially ``gate_bias``.
    """

    gate_bias: float = 2.0

    needs_hidden = True
    needs_causal = True

    def init(self, key, dims):
        kernel = jax.random.normal(key, (dims.embed_dim, dims.num_heads)) * dims.embed_dim**-0.5
        return {"kernel": kernel, "bias": jnp.full(dims.num_heads, self.gate_bias)}

    def attend(self, params, inputs):
        logits = inputs.k.hidden.astype(jnp.float32) @ params["kernel"] + params["bias"]
        scan = pj.Scan(log_gate, key=logits[..., None], include_key=False)
        return pj.ScoreModifications(biases=(pj.Bias(scan),))
