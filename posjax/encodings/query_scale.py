"""Scales of queries: constant, or growing with the logarithm of the position, so that attention stays sharp over long contexts."""

from typing import Literal

import jax.numpy as jnp

from posjax.checks import bounded
from posjax.core.encoding import AttentionInputs, PositionalEncoding, hyperparameter, register, traced_hparam
from posjax.core.structures import Replace, ScoreModifications
from posjax.typing import Array, Float, Params

Rule = Literal["llama4", "ministral3", "inkling"]


@register("log_scale")
class LogScale(PositionalEncoding):
    """Multiplies the query by a function of its position p, so that scores grow with the logarithm of the context.

        rule         factor of q                            models
        llama4       1 + beta ln(1 + floor((p + 1) / L))    Llama 4, in layers without RoPE; L = 8192
        ministral3   1 + beta ln(1 + floor(p / L))          Ministral 3, Mistral 4; L is the length of pretraining
        inkling      1 + beta ln max((p + 1) / L, 1)        Inkling; L = 128,000

    The factor is one in the first L tokens. Keys are unchanged, also in a cache. In a chain, place it first:
    ``chain(log_scale(), rope())`` multiplies by the same factors as ``chain(rope(), log_scale())``, and kernels can still rotate
    tiles as they load them.

    Args:
      length: L, in tokens.
      beta: growth with the logarithm. It may be a traced scalar; its gradient is zero.
      rule: the function of the position. The first two count whole multiples of L, one position apart.

    Raises:
      ValueError: length is below 1, beta is negative or not one number, or rule is unknown.

    Example:
      >>> encoding = pj.log_scale(length=16)
      >>> chained = pj.chain(encoding, pj.rope())

    Meta, Llama 4 (2025); Mistral AI, Ministral 3 (2025); after Nakanishi, arXiv:2501.19399.
    """

    length: int = bounded(8192, least=1)
    beta: Array | float = hyperparameter(default=0.1, least=0)
    rule: Rule = "llama4"

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        query = inputs.turned_query
        factor = self._factor(inputs.q.positions)[..., None, None]
        scaled = (query.astype(jnp.float32) * factor).astype(query.dtype)
        return ScoreModifications((Replace(scaled, inputs.turned_key),))

    def _factor(self, positions: Array) -> Float[Array, "_ T"]:
        """Returns the factor of the query at each position; multiples of the length are counted exactly in integers."""
        count = positions if self.rule == "ministral3" else positions + 1
        if self.rule == "inkling":
            ratio = jnp.maximum(count.astype(jnp.float32) / self.length, 1.0)
        elif jnp.issubdtype(count.dtype, jnp.integer):
            ratio = 1.0 + (count // self.length).astype(jnp.float32)
        else:
            ratio = 1.0 + jnp.floor(count / self.length)
        return 1.0 + traced_hparam(self.beta) * jnp.log(ratio)


log_scale = LogScale


@register("query_scale")
class QueryScale(PositionalEncoding):
    """Multiplies the query, and with it all scores, by a constant.

    Models with multi-head latent attention (DeepSeek V2 and V3) under YaRN multiply scores by (0.1 mscale_all_dim ln s + 1)^2,
    including those of channels that are not rotated. ``rope_from_config`` expresses that by a query_scale. Place it first in a
    chain, like ``log_scale``.

    Args:
      factor: factor of the query. It may be a traced scalar; its gradient is zero.

    Raises:
      ValueError: factor is not one positive number.

    Example:
      >>> encoding = pj.query_scale(1.25)
      >>> chained = pj.chain(encoding, pj.rope())

    DeepSeek-AI, arXiv:2405.04434, section 3.1.4.
    """

    factor: Array | float = hyperparameter(default=1.0, above=0)

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        query = inputs.turned_query
        scaled = (query.astype(jnp.float32) * traced_hparam(self.factor)).astype(query.dtype)
        return ScoreModifications((Replace(scaled, inputs.turned_key),))


query_scale = QueryScale
