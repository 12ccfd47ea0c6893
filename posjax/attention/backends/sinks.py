"""Attention sinks: an additional key without a value, whose logit is a number per head (``posjax.core.structures.Softmax``).

The sink joins the denominator of the softmax after all keys, whichever backend or device they were on:

    out / (sum_j exp(s_ij) + exp(sink)) = out_without * sigmoid(lse_i - sink)

so backends only need to return the log-sum-exp of each row, differentiably.
"""

import jax
import jax.numpy as jnp

from posjax.attention.backends.constants import EMPTY_LSE, MASK_VALUE
from posjax.typing import Array, Float


def with_sink(out: Float[Array, "B T N V"], lse: Float[Array, "B T N"], sink: Float[Array, " N"] | None) -> Float[Array, "B T N V"]:
    """Returns the output of attention with a sink; None for no sink.

    Args:
      out: output without the sink.
      lse: log-sum-exp of the scores of each row, in nats; any large number for rows without an allowed key, where out is zero.
      sink: logits, 1 or N.
    """
    if sink is None:
        return out
    return (out.astype(jnp.float32) * jax.nn.sigmoid(lse - sink.astype(jnp.float32))[..., None]).astype(out.dtype)


def log_denominator(lse: Float[Array, "B T N"], sink: Float[Array, " N"] | None) -> Float[Array, "B T N"]:
    """Returns the logarithm of the softmax's denominator, from the log-sum-exp of a backend.

    It includes the sink. A row without any allowed key has ``MASK_VALUE`` or the sink's logit.

    Args:
      lse: log-sum-exp of the scores of each row, ``EMPTY_LSE`` where no key is allowed.
      sink: logits, 1 or N; None for no sink.
    """
    lse = jnp.where(lse == EMPTY_LSE, MASK_VALUE, lse)
    return lse if sink is None else jnp.logaddexp(lse, sink.astype(jnp.float32))
