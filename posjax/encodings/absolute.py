"""Absolute encodings, added to the embeddings: sinusoidal and learned."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import bounded, is_symbolic, is_traced
from posjax.core.encoding import Dims, PositionalEncoding, Tokens, get_param, hyperparameter, register
from posjax.encodings.phases import angles, geometric_frequencies
from posjax.typing import Array, Params


def theta() -> Any:
    """Declares the field theta, the base of frequencies: one positive number, which may be traced."""
    return hyperparameter(10_000.0, above=0, hint="10_000.0 is usual")


@register("sinusoidal")
class Sinusoidal(PositionalEncoding):
    """Adds sinusoids of geometrically spaced wavelengths to the embeddings.

        PE[p, 2m] = sin(p / theta^(2m/D)),    PE[p, 2m+1] = cos(p / theta^(2m/D))

    Args:
      theta: base of the frequencies; wavelengths range from 2 pi to 2 pi theta positions. It may be a traced scalar, such as a
        swept hyperparameter; its gradient is zero. Phases are then float32 products with a relative error of up to 2e-7.

    Raises:
      ValueError: theta is not one positive number (a traced theta that is not positive gives NaN), or (in ``embed``) D is odd.

    Example:
      >>> encoding = pj.sinusoidal()

    Vaswani et al., arXiv:1706.03762, section 3.5.
    """

    theta: Array | float = theta()

    def embed(self, params: Params, x: Array, tokens: Tokens) -> Array:
        width = x.shape[-1]
        if width % 2:
            raise ValueError(f"embed_dim must be even for sinusoidal, got {width}")
        phase = angles(tokens.positions, geometric_frequencies(self.theta, width))
        table = jnp.stack([jnp.sin(phase), jnp.cos(phase)], axis=-1).reshape(*phase.shape[:-1], width)
        return x + table.astype(x.dtype)


@register("learned")
class Learned(PositionalEncoding):
    """Adds a learned vector per position to the embeddings: x_p + E[p].

    params["embedding"] is E, [max_length, D].

    Args:
      init_scale: standard deviation of the initial vectors (0.02 in GPT-2 and BERT).

    Raises:
      ValueError: init_scale is negative, ``Dims.max_length`` is not given, or (in ``embed``) a position is past the table.

    Example:
      >>> encoding = pj.learned()
      >>> params = encoding.init(jax.random.key(0), pj.Dims(num_heads=4, head_dim=8, max_length=16))
      >>> params["embedding"].shape
      (16, 32)

    Gehring et al., arXiv:1705.03122; Devlin et al., arXiv:1810.04805.
    """

    init_scale: float = bounded(0.02, least=0)

    def init(self, key: Array, dims: Dims) -> Params:
        length = require_max_length(self.registered_name, dims)
        return {"embedding": self.init_scale * jax.random.normal(key, (length, dims.embed_dim), jnp.float32)}

    def embed(self, params: Params, x: Array, tokens: Tokens) -> Array:
        table = get_param(params, "embedding", self.registered_name, (None, x.shape[-1]))
        check_within(self.registered_name, tokens.positions, table.shape[0])
        return x + jnp.take(table, tokens.positions, axis=0).astype(x.dtype)

    def max_length(self, dims: Dims) -> int | None:
        return dims.max_length


sinusoidal, learned = Sinusoidal, Learned


def require_max_length(name: str, dims: Dims) -> int:
    """Returns the length of a table of positions, ``dims.max_length``.

    Raises:
      ValueError: max_length is None.
    """
    if dims.max_length is None:
        raise ValueError(f"max_length must be a number for {name}, got None; set Dims(..., max_length=1024)")
    return dims.max_length


def check_within(name: str, positions: Array, length: int) -> None:
    """Raises ValueError if positions are fractions or fall outside a table of ``length`` rows, as far as shapes and values show."""
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(
            f"coordinates must be integers for {name}, which has a vector per position, got {positions.dtype}; "
            "rope() and alibi() accept fractions"
        )
    reach = positions.shape[-1]
    if not is_traced(positions) and positions.size:
        # NumPy, because inside jit a jax operation returns a tracer even for a concrete array.
        known = np.asarray(positions)
        if known.min() < 0:
            raise ValueError(f"positions must not be negative, got {known.min()}; exclude padding by mask or segment_ids")
        reach = int(known.max()) + 1
    if not is_symbolic(reach) and reach > length:
        raise ValueError(
            f"positions must be below the max_length of {name}, {length}, got a sequence that needs {reach}; "
            f"train with Dims(max_length={reach}) or use an encoding without a table, such as rope() or alibi()"
        )
