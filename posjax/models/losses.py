"""Losses computed from logits, as weighted sums over tokens."""

import jax
import jax.numpy as jnp

from posjax.typing import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, ""], Float[Array, ""]]:
    """Computes the weighted cross-entropy of logits and integer targets, in nats and in float32.

    Returns:
      The weighted loss of each token [B, T] (zero if its weight is zero, whatever its target and logits), its sum over all tokens,
      and the sum of the weights.
    """
    logits, targets = _counted(logits, weights), jnp.where(weights == 0, 0, targets)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = (jax.nn.logsumexp(logits, axis=-1) - chosen) * weights
    return losses, losses.sum(), weights.sum()


def z_loss(logits: Float[Array, "B T V"], weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """Computes the weighted sum of logsumexp(logits)^2, which keeps log-normalizers near zero (PaLM, arXiv:2204.02311, sec. 5)."""
    return (jax.nn.logsumexp(_counted(logits, weights), axis=-1) ** 2 * weights).sum()


def _counted(logits: Float[Array, "B T V"], weights: Float[Array, "B T"]) -> Float[Array, "B T V"]:
    """Returns logits in float32, zero for tokens without weight, because a product of zero and NaN would be NaN."""
    return jnp.where((weights == 0)[..., None], 0.0, logits.astype(jnp.float32))
