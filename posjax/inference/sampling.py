"""Sampling of the next token from logits, with temperature, top-k and top-p."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from posjax.checks import bounded, check_fields
from posjax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Configures how the next token is drawn.

    Attributes:
      temperature: divisor of the logits. 0 selects the most likely token (greedy decoding).
      top_k: restricts sampling to the k most likely tokens. None means all. Applied before top_p. Ties go to the lower token id.
      top_p: restricts sampling to the smallest set of most likely tokens whose probabilities sum to p or more. None means all.

    Raises:
      ValueError: temperature is below 0 or not finite, top_k is below 1, or top_p lies outside (0, 1].
    """

    temperature: float = bounded(1.0, least=0, hint="0 takes the most likely token")
    top_k: int | None = bounded(None, least=1)
    top_p: float | None = bounded(None, above=0, most=1, hint="None keeps all tokens")

    def __post_init__(self) -> None:
        check_fields(self)


PLAIN = Sampling()  # the model's unmodified distribution


def filtered_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Divides logits by the temperature and masks the tokens that top_k and top_p exclude with minus infinity, in float32.

    With temperature 0, only the most likely token is not masked.

    Args:
      logits: [B, V].
      sampling: the temperature, top_k and top_p.

    Returns:
      [B, V] float32.
    """
    logits = logits.astype(jnp.float32)
    greedy = sampling.temperature == 0
    logits = logits if greedy else logits / sampling.temperature
    top_k = 1 if greedy else sampling.top_k
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    if top_k is not None:
        ranked = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ranked, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        # The most likely token is always kept, whatever its rounded probability is.
        ranked = jnp.where((before < sampling.top_p) | (jnp.arange(logits.shape[-1]) == 0), ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def sample(key: Array, logits: Float[Array, "B V"], sampling: Sampling = PLAIN) -> Int[Array, " B"]:
    """Draws one int32 token per row. The draw of a row depends only on the key, the row's index and the row's logits.

    Args:
      key: PRNG key.
      logits: [B, V].
      sampling: how tokens are drawn.

    Returns:
      [B] int32.

    Example:
      >>> from posjax.inference.sampling import Sampling, sample
      >>> logits = jnp.asarray([[0.0, 3.0, 1.0]])
      >>> sample(jax.random.key(0), logits, Sampling(temperature=0.0)).tolist()
      [1]
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, filtered_logits(logits, sampling)).astype(jnp.int32)
