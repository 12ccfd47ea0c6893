"""Losses computed from logits, as weighted sums over tokens."""

from collections.abc import Callable

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


_MOST_LOGITS = 2**26  # that ``cross_entropy_of`` holds at a time: 256 MiB in float32


def cross_entropy_of(
    logits_of: Callable[[Array], Float[Array, "B C V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    vocab_size: int,
) -> Float[Array, "B T"]:
    """Computes the losses of ``cross_entropy`` without the logits of all tokens at once, which a long text has no memory for.

    The tokens are divided into as few equal chunks as keep the logits of each below 256 MiB. Derivatives compute a chunk's logits
    again.

    Args:
      logits_of: the output layer, which acts on each token by itself.
      hidden: the results of the last layer.
      vocab_size: V.
    """
    batch, length = targets.shape
    if batch * length * vocab_size <= _MOST_LOGITS:
        return cross_entropy(logits_of(hidden), targets, weights)[0]
    size = max(1, _MOST_LOGITS // (batch * vocab_size))
    size = -(-length // -(-length // size))
    missing = -length % size

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    losses = jax.lax.map(
        jax.checkpoint(lambda x: cross_entropy(logits_of(x[0]), *x[1:])[0]), tuple(map(chunks, (hidden, targets, weights)))
    )
    return jnp.moveaxis(losses, 0, 1).reshape(batch, -1)[:, :length]


def z_loss(logits: Float[Array, "B T V"], weights: Float[Array, "B T"]) -> Float[Array, ""]:
    """Computes the weighted sum of logsumexp(logits)^2, which keeps log-normalizers near zero (PaLM, arXiv:2204.02311, sec. 5)."""
    return (jax.nn.logsumexp(_counted(logits, weights), axis=-1) ** 2 * weights).sum()


def _counted(logits: Float[Array, "B T V"], weights: Float[Array, "B T"]) -> Float[Array, "B T V"]:
    """Returns logits in float32, zero for tokens without weight, because a product of zero and NaN would be NaN."""
    return jnp.where((weights == 0)[..., None], 0.0, logits.astype(jnp.float32))
