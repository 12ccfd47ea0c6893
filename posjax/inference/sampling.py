"""Drawing the next token from logits: temperature, top-k, top-p."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from posjax.checks import check_at_least
from posjax.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens; None: all. Applied before top_p. Of equal logits the lower token comes first.
      top_p: only the fewest likeliest tokens whose probabilities sum to p or more; None: all.

    Raises:
      ValueError: temperature below 0 or not finite, top_k below 1, top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}; 0 takes the likeliest token")
        if self.top_k is not None:
            check_at_least("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}; None keeps every token")


PLAIN = Sampling()  # the model's own distribution


def filtered_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits over the temperature, float32, and minus infinity for the tokens that top_k and top_p leave out.

    Temperature 0 leaves the likeliest token alone.
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
        # The first of all stays, whatever rounding makes of its own probability.
        ranked = jnp.where((before < sampling.top_p) | (jnp.arange(logits.shape[-1]) == 0), ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)


def sample(key: Array, logits: Float[Array, "B V"], sampling: Sampling = PLAIN) -> Int[Array, " B"]:
    """One token a row, int32. A row's draw depends on the key, on its number and on its own logits alone."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, filtered_logits(logits, sampling)).astype(jnp.int32)
