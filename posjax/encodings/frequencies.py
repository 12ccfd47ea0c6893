"""Scalings: RoPE's frequencies, changed for sequences longer than those in training.

RoPE with R rotated channels has the frequencies f_m = theta^(-2m/R), m = 0 .. R/2 - 1. A scaling by a factor s returns

    linear              f_m / s                                       position interpolation: all pairs alike
    ntk                 f_m of the base theta * s^(R / (R-2))         fastest pair unchanged, slowest / s
    ntk_theta           f_m of the base theta * s                     fastest pair unchanged, slowest / s^((R-2) / R)
    ntk_fixed           f_m / s^(2(m+1)/R)                            slowest / s, fastest / s^(2/R)
    dynamic_ntk         ntk, by a factor that grows with the length of the sequence
    yarn                f_m for fast pairs, f_m / s for slow ones, a ramp by m between; scores times a constant
    llama3              f_m for fast pairs, f_m / s for slow ones, a ramp by wavelength between
    longrope            f_m / factor_m from one of two lists, by the length of the sequence; scores times a constant
    proportional        theta^(-2m/H) for the first pairs, 0 for the others (p-RoPE)

A scaling is a static value, an argument of ``rope``: ``rope(scaling=yarn_scaling(factor=4.0, original_max_length=2048))``. The
frequencies are float64 on the host, so that phases are exact at every position, unless they depend on a traced theta or on the
length of the sequence.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import bounded, check_fields
from posjax.core.encoding import Tokens
from posjax.encodings.phases import angles, geometric_frequencies, power
from posjax.typing import Array, Float

Theta = Array | float
ScalingClass = TypeVar("ScalingClass", bound=type["Scaling"])
SCALINGS: dict[str, type["Scaling"]] = {}  # by the name in the text form of encodings


class Scaling:
    """Base class of scalings: frozen, hashable values that compute the frequencies of a rotation. The base class changes nothing.

    Attributes:
      registered_name: the name in the text form, "yarn_scaling".
      depends_on_length: whether the frequencies depend on the length of the sequence, so that a decoder must cache unrotated keys.
    """

    registered_name: ClassVar[str]

    @property
    def depends_on_length(self) -> bool:
        return False

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        """Returns the frequencies of width / 2 pairs of channels in radians per position, slowest last.

        Args:
          theta: base of the unscaled frequencies; it may be traced.
          width: R, number of rotated channels.
          length: length of the sequence in tokens, for scalings that depend on it; None is a short one.

        Returns:
          [R / 2], a float64 NumPy array, or a float32 array if theta is traced.

        Raises:
          ValueError: the scaling does not fit theta or width; the message names its argument.
        """
        return geometric_frequencies(theta, width)

    def gain(self, length: int | None = None) -> float:
        """Returns the factor of rotated queries and of rotated keys; their products get its square."""
        return 1.0

    def rotation(self, theta: Theta, width: int, positions: Array, lengths: Array | None) -> tuple[Array, Array | None]:
        """Returns the phases of tokens [B or 1, T, R / 2], and their gains [B or 1, T, 1], None for gains of one.

        Args:
          theta, width: as in ``frequencies``.
          positions: [B or 1, T].
          lengths: [B or 1, T or 1], the length of every token's sequence, if the scaling depends on it.
        """
        phase, gain = angles(positions, self.frequencies(theta, width)), self.gain()
        return phase, None if gain == 1 else jnp.full((1, phase.shape[1], 1), gain, jnp.float32)

    def __repr__(self) -> str:
        """Returns the call that constructs the scaling, without default arguments."""
        fields = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{self.registered_name}({', '.join(f'{f.name}={x!r}' for f, x in fields if x != f.default)})"


@dataclass_transform(frozen_default=True)
def scaling(name: str) -> Callable[[ScalingClass], ScalingClass]:
    """Returns a class decorator that makes a subclass of Scaling a frozen dataclass with checked fields and registers its name."""

    def decorate(cls: ScalingClass) -> ScalingClass:
        own: Any = vars(cls).get("__post_init__")

        def __post_init__(self: Scaling) -> None:
            check_fields(self)
            if own is not None:
                own(self)

        setattr(cls, "__post_init__", __post_init__)  # noqa: B010, which type checkers accept
        made = dataclasses.dataclass(frozen=True, repr=False)(cls)
        made.registered_name = name
        SCALINGS[name] = made
        return made

    return decorate


def _factor(default: Any = dataclasses.MISSING) -> Any:
    return bounded(default, least=1, hint="4.0 makes the context four times as long")


def _length(default: Any = dataclasses.MISSING) -> Any:
    return bounded(default, least=1)


@scaling("linear_scaling")
class LinearScaling(Scaling):
    """Divides all frequencies by a factor, which is position interpolation: f_m / s.

    Args:
      factor: s, at least 1.

    Raises:
      ValueError: factor is below 1.

    Example:
      >>> pj.linear_scaling(4.0).frequencies(10_000.0, 4)
      array([0.25  , 0.0025])

    Chen et al., arXiv:2306.15595.
    """

    factor: float = _factor()

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        return geometric_frequencies(theta, width) / self.factor


@scaling("ntk_scaling")
class NtkScaling(Scaling):
    """Multiplies theta by s^(R / (R-2)), which leaves the fastest pair unchanged and divides the slowest frequency by s.

    This is "NTK-aware" scaling in x-transformers and rotary-embedding-torch, and HunYuan's ``alpha``. ``ntk_theta_scaling`` and
    ``ntk_fixed_scaling`` have the same name elsewhere and other frequencies, up to 7 % apart at s = 8.

    Args:
      factor: s, at least 1.

    Raises:
      ValueError: factor is below 1, or fewer than four channels are rotated.

    bloc97, "NTK-Aware Scaled RoPE", reddit.com/r/LocalLLaMA, 2023.

    Example:
      >>> pj.ntk_scaling(4.0).frequencies(10_000.0, 4)
      array([1.    , 0.0025])
    """

    factor: float = _factor()

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        return _with_larger_base(self, theta, width, self.factor)


@scaling("ntk_theta_scaling")
class NtkThetaScaling(Scaling):
    """Multiplies theta by s, which leaves the fastest pair unchanged and divides the slowest frequency by s^((R-2) / R).

    This is ``ntk_factor`` in diffusers.

    Args:
      factor: s, at least 1.

    Raises:
      ValueError: factor is below 1.

    Example:
      >>> pj.ntk_theta_scaling(4.0).frequencies(10_000.0, 4)
      array([1.   , 0.005])
    """

    factor: float = _factor()

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        frequencies = geometric_frequencies(theta, width)
        return frequencies * np.asarray(self.factor ** (-np.arange(0, width, 2) / width), frequencies.dtype)


@scaling("ntk_fixed_scaling")
class NtkFixedScaling(Scaling):
    """Divides frequency m by s^(2(m+1)/R), or by exp(ln s ((m+1) / (R/2))^b), so that the slowest is divided by s exactly.

    These are "NTK-RoPE-fixed" and "NTK-RoPE-mixed", which vLLM selects by the type "ntk".

    Args:
      factor: s, at least 1.
      mixed_b: b; None is 1, and 0.625 is recommended by the author.

    Raises:
      ValueError: factor is below 1, or mixed_b is not positive.

    Su, kexue.fm/archives/9706.

    Example:
      >>> pj.ntk_fixed_scaling(4.0).frequencies(10_000.0, 4)
      array([0.5   , 0.0025])
    """

    factor: float = _factor()
    mixed_b: float | None = bounded(None, above=0, hint="0.625 is usual")

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        place = np.arange(2, width + 2, 2) / width
        frequencies = geometric_frequencies(theta, width)
        divisors = self.factor**place ** (1.0 if self.mixed_b is None else self.mixed_b)
        return frequencies / divisors.astype(frequencies.dtype)


@scaling("dynamic_ntk_scaling")
class DynamicNtkScaling(Scaling):
    """Multiplies theta by g^(R / (R-2)), where g = s n / L - (s-1) grows with the length n of the sequence; not below n = L.

    n is one more than the largest position among the tokens of a segment, or of a row if there are no segments. All keys move with
    every token past L, so decoders cache them unrotated and rotate them again in every call. Attention of a new token then equals
    that of a call on the whole sequence. In a model with several layers, what earlier tokens passed on to the second layer is still
    that of the length at which they were read; only a new cache, filled at once, changes it. vLLM differs: it uses the one base of
    its longest sequence, which is ``ntk_scaling(factor=g)``.

    Up to L, phases are exact. Beyond, they are float32 products with a relative error of up to 2e-7.

    Args:
      factor: s, at least 1.
      original_max_length: L, in tokens; ``max_position_embeddings`` in a config.json.

    Raises:
      ValueError: an argument is below 1, or fewer than four channels are rotated.

    emozilla, "Dynamically Scaled RoPE", reddit.com/r/LocalLLaMA, 2023.

    Example:
      >>> scaling = pj.dynamic_ntk_scaling(4.0, original_max_length=4096)
      >>> scaling.frequencies(10_000.0, 4, length=4096)
      array([1.  , 0.01])
    """

    factor: float = _factor()
    original_max_length: int = _length()

    @property
    def depends_on_length(self) -> bool:
        return True

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        excess = 0 if length is None else max(length - self.original_max_length, 0)
        return _with_larger_base(self, theta, width, 1.0 + self.factor * excess / self.original_max_length)

    def rotation(self, theta: Theta, width: int, positions: Array, lengths: Array | None) -> tuple[Array, Array | None]:
        assert lengths is not None  # depends_on_length
        frequencies = self.frequencies(theta, width)
        # The difference first, because it is an integer, and exact.
        excess = jnp.maximum(lengths - self.original_max_length, 0).astype(jnp.float32)[..., None]
        stretched = power(1.0 + (self.factor / self.original_max_length) * excess, np.arange(0, width, 2) / (width - 2))
        moved = positions[..., None].astype(jnp.float32) * (stretched * jnp.asarray(frequencies, jnp.float32)[None, None])
        return jnp.where(excess > 0, moved, angles(positions, frequencies)), None


@scaling("yarn_scaling")
class YarnScaling(Scaling):
    """Divides slow frequencies by s and leaves fast ones, with a linear ramp between, and sharpens the scores (YaRN).

        f_m / s + (f_m - f_m / s) (1 - ramp_m),    ramp_m = clip((m - low) / (high - low), 0, 1)

    low and high are R ln(L / (2 pi b)) / (2 ln theta) for b = beta_fast and beta_slow: the pairs that make b turns in L positions.
    They are rounded down and up if ``truncate``, and clipped to [0, R - 1].

    Rotated queries and keys are multiplied by the attention factor a, so that their scores get a^2; channels that are not rotated
    keep their scores. a is ``attention_factor`` if it is given; f(s, mscale) / f(s, mscale_all_dim) if both of these are positive;
    else f(s, 1), with f(s, c) = 0.1 c ln s + 1.

    Args:
      factor: s, at least 1.
      original_max_length: L, the length of sequences in training, in tokens.
      attention_factor: a; None computes it.
      mscale, mscale_all_dim: c in the fraction above; None or 0 is absent. (Models with multi-head latent attention additionally
        multiply all scores by f(s, mscale_all_dim)^2; ``rope_from_config`` does.)
      beta_fast: turns in L positions from which a frequency is left alone.
      beta_slow: turns in L positions below which a frequency is divided by s.
      truncate: False keeps the fractions of low and high, as gpt-oss does. Frequencies then differ by up to 76 %.

    Raises:
      ValueError: factor or original_max_length is below 1, beta_fast is below beta_slow, another argument is out of range, or theta
        is not above 1.

    Example:
      >>> scaling = pj.yarn_scaling(factor=4.0, original_max_length=8192)
      >>> round(scaling.gain(), 4)
      1.1386

    Peng et al., arXiv:2309.00071.
    """

    factor: float = _factor()
    original_max_length: int = _length()
    attention_factor: float | None = bounded(None, above=0)
    mscale: float | None = bounded(None, least=0)
    mscale_all_dim: float | None = bounded(None, least=0)
    beta_fast: float = bounded(32.0, above=0)
    beta_slow: float = bounded(1.0, above=0)
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast must be at least beta_slow={self.beta_slow!r}, got {self.beta_fast!r}; 32 and 1 are usual: fast "
                "frequencies make more turns"
            )

    def gain(self, length: int | None = None) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor)

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        frequencies = geometric_frequencies(theta, width)
        xp, log_theta = (
            (np, np.log(np.asarray(theta, np.float64))) if isinstance(frequencies, np.ndarray) else (jnp, jnp.log(theta))
        )
        if xp is np and not log_theta > 0:
            raise ValueError(f"theta must be above 1 for yarn_scaling, got {theta!r}")

        def pair_with(turns: float) -> Any:
            return 0.5 * width * math.log(self.original_max_length / (2 * math.pi * turns)) / log_theta

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = xp.floor(low), xp.ceil(high)
        low, high = xp.maximum(low, 0.0), xp.minimum(high, width - 1.0)
        high = xp.where(low == high, high + 0.001, high)  # as released: no division by zero
        ramp = xp.clip((np.arange(width // 2, dtype=frequencies.dtype) - low) / (high - low), 0.0, 1.0)
        return frequencies / self.factor * ramp + frequencies * (1.0 - ramp)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns YaRN's f(s, c) = 0.1 c ln s + 1, by which the entropy of attention stays level as the context grows."""
    return 0.1 * mscale * math.log(factor) + 1.0


@scaling("llama3_scaling")
class Llama3Scaling(Scaling):
    """Divides frequencies with long wavelengths by s and leaves those with short ones, with a ramp between (Llama 3.1).

        f_m ((1 - t_m) / s + t_m),    t_m = clip((L / wavelength_m - low) / (high - low), 0, 1)

    Args:
      factor: s, at least 1; 8 in Llama 3.1, 32 in the small Llama 3.2.
      low_freq_factor: low; wavelengths above L / low are divided by s.
      high_freq_factor: high; wavelengths below L / high are left alone. If it equals low (Llama 4 Scout), there is no ramp.
      original_max_length: L, the length of sequences in training, in tokens.

    Raises:
      ValueError: an argument is out of range, or high_freq_factor is below low_freq_factor.

    Example:
      >>> encoding = pj.rope(theta=500_000.0, scaling=pj.llama3_scaling(factor=8.0))

    Grattafiori et al., arXiv:2407.21783; the ramp is that of the released code.
    """

    factor: float = _factor(8.0)
    low_freq_factor: float = bounded(1.0, above=0)
    high_freq_factor: float = bounded(4.0, above=0)
    original_max_length: int = _length(8192)

    def __post_init__(self) -> None:
        if self.high_freq_factor < self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor must be at least low_freq_factor={self.low_freq_factor!r}, got {self.high_freq_factor!r}; 4 and "
                "1 are usual"
            )

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        frequencies = geometric_frequencies(theta, width)
        xp = np if isinstance(frequencies, np.ndarray) else jnp
        turns = frequencies * (self.original_max_length / (2 * math.pi))
        span = self.high_freq_factor - self.low_freq_factor
        t = xp.clip((turns - self.low_freq_factor) / (span or 1e-30), 0.0, 1.0)  # without a span, a step
        return frequencies * ((1.0 - t) / self.factor + t)


@scaling("longrope_scaling")
class LongRopeScaling(Scaling):
    """Divides every frequency by a number of its own from one of two lists, and sharpens the scores (LongRoPE).

        f_m / short_factor_m up to a length of L tokens (L included),    f_m / long_factor_m beyond

    The length of a sequence is one more than the largest position among the tokens of its segment, or of its row if there are no
    segments. The rotation of all keys changes when a sequence grows past L, so decoders cache keys unrotated and rotate them again
    in every call; fill a new cache to also recompute what earlier tokens passed on to later layers. ``use`` selects one list at all
    lengths instead, and keys are cached rotated; vLLM selects "long" if its longest sequence is above L.

    Rotated queries and keys are multiplied by the attention factor a = sqrt(1 + ln s / ln L) at all lengths.

    Args:
      short_factor, long_factor: R / 2 positive numbers each.
      original_max_length: L, the length of sequences in training, in tokens.
      factor: s, at least 1: the longest sequence divided by L. It determines only a.
      attention_factor: a; None computes it. A pair is that of the short and of the long list (Phi-3.5-MoE's short_mscale and
        long_mscale).
      use: None selects the list by the length; "short" or "long" is that list at all lengths.

    Raises:
      ValueError: a list is empty or not of positive numbers, has not R / 2 numbers (when frequencies are computed), or another
        argument is out of range.

    Example:
      >>> scaling = pj.longrope_scaling((1.0, 1.5), (2.0, 8.0), original_max_length=4096, factor=32.0)
      >>> scaling.frequencies(10_000.0, 4, length=100_000)
      array([0.5    , 0.00125])

    Ding et al., arXiv:2402.13753; the attention factor is that of Phi-3.
    """

    short_factor: tuple[float, ...] = bounded(above=0)
    long_factor: tuple[float, ...] = bounded(above=0)
    original_max_length: int = bounded(least=2)
    factor: float = _factor(1.0)
    attention_factor: float | tuple[float, ...] | None = bounded(None, above=0)
    use: Literal["short", "long"] | None = None

    def __post_init__(self) -> None:
        counts = len(self.short_factor), len(self.long_factor)
        if counts[0] != counts[1] or not counts[0]:
            raise ValueError(
                "short_factor and long_factor must have one number for each pair of rotated channels, got "
                f"{counts[0]} and {counts[1]} numbers"
            )
        if isinstance(self.attention_factor, tuple) and len(self.attention_factor) != 2:
            raise ValueError(f"attention_factor must be one number, or a pair for short and long, got {self.attention_factor!r}")

    @property
    def depends_on_length(self) -> bool:
        return self.use is None

    def _is_long(self, length: int | None) -> bool:
        return self.use == "long" if self.use is not None else length is not None and length > self.original_max_length

    def gain(self, length: int | None = None) -> float:
        if isinstance(self.attention_factor, tuple):
            return self.attention_factor[self._is_long(length)]
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1.0 + math.log(self.factor) / math.log(self.original_max_length))

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        name = "long_factor" if self._is_long(length) else "short_factor"
        factors = getattr(self, name)
        if len(factors) != width // 2:
            raise ValueError(
                f"{name} must have a number for each of the {width // 2} pairs of rotated channels, got {len(factors)} numbers"
            )
        frequencies = geometric_frequencies(theta, width)
        return frequencies / np.asarray(factors, frequencies.dtype)

    def rotation(self, theta: Theta, width: int, positions: Array, lengths: Array | None) -> tuple[Array, Array | None]:
        if lengths is None:
            return super().rotation(theta, width, positions, lengths)
        long = self.original_max_length + 1
        is_long = (lengths > self.original_max_length)[..., None]
        phases = (angles(positions, self.frequencies(theta, width, n)) for n in (long, None))  # both exact
        gains = (jnp.full((1, positions.shape[1], 1), self.gain(n), jnp.float32) for n in (long, None))
        return jnp.where(is_long, *phases), jnp.where(is_long, *gains)


@scaling("proportional_scaling")
class ProportionalScaling(Scaling):
    """Rotates only the fastest pairs of a head and leaves the slowest alone (p-RoPE): theta^(-2m/H) for m < floor(p H / 2), else 0.

    This is not the partial rotation of ``rope(fraction=p)``: exponents are divided by H rather than by p H, and pair m of the half
    pairing consists of the channels m and m + H/2 rather than m + p H/2. Gemma 4 has p = 0.25 in its global layers.

    Args:
      fraction: p in (0, 1].
      factor: at least 1; all frequencies are divided by it.

    Raises:
      ValueError: an argument is out of range, or no pair is left to rotate.

    Example:
      >>> pj.proportional_scaling(0.5).frequencies(10_000.0, 8)
      array([1. , 0.1, 0. , 0. ])

    Barbero et al., arXiv:2410.06205.
    """

    fraction: float = bounded(above=0, most=1)
    factor: float = _factor(1.0)

    def frequencies(self, theta: Theta, width: int, length: int | None = None) -> np.ndarray | Array:
        pairs = int(self.fraction * width // 2)
        if not pairs:
            raise ValueError(f"fraction of proportional_scaling must leave a pair of {width} channels, got {self.fraction!r}")
        frequencies = geometric_frequencies(theta, width)
        return frequencies * (np.arange(width // 2) < pairs).astype(frequencies.dtype) / self.factor


linear_scaling, ntk_scaling, ntk_theta_scaling, ntk_fixed_scaling = LinearScaling, NtkScaling, NtkThetaScaling, NtkFixedScaling
dynamic_ntk_scaling, yarn_scaling, llama3_scaling = DynamicNtkScaling, YarnScaling, Llama3Scaling
longrope_scaling, proportional_scaling = LongRopeScaling, ProportionalScaling


def _with_larger_base(scaling: Scaling, theta: Theta, width: int, factor: float) -> np.ndarray | Array:
    """Returns the frequencies of the base theta * factor^(width / (width - 2))."""
    if width < 4:
        raise ValueError(f"{scaling.registered_name} needs at least 4 rotated channels, got {width}")
    frequencies = geometric_frequencies(theta, width)
    return frequencies * np.asarray(factor ** (-np.arange(0, width, 2) / (width - 2)), frequencies.dtype)


# Lengths of sequences ------------------------------------------------------------------------------------------------


def sequence_lengths(q: Tokens, k: Tokens) -> tuple[Float[Array, "_ _"], Float[Array, "_ _"]]:
    """Returns the length of the sequence of every query and every key: one more than the largest position in its segment.

    Sequences that are packed into a row have lengths of their own, and padding (another segment) does not count. Without segments
    it is the length of the row.

    Returns:
      [B or 1, T or 1] and [B or 1, S or 1], in the dtype of the positions.
    """
    positions = q.positions, k.positions
    if q.segments is None or k.segments is None:
        longest = jnp.maximum(*(p.max(axis=1, keepdims=True) for p in positions)) + 1
        return longest, longest
    batch, count = q.segments.shape
    segments = jnp.concatenate([q.segments, k.segments], axis=1)
    both = jnp.concatenate([jnp.broadcast_to(p, (batch, p.shape[1])) for p in positions], axis=1)
    lengths = _largest_of_segments(both, segments) + 1
    return lengths[:, :count], lengths[:, count:]


@jax.jit
def _largest_of_segments(x: Array, segments: Array) -> Array:
    """Returns the largest number of every token's segment; tokens [B, T] of a segment need not be contiguous."""
    order = jnp.lexsort((x, segments), axis=1)  # the last token of a segment then has its largest number
    found, x = (jnp.take_along_axis(array, order, axis=1) for array in (segments, x))
    is_last = jnp.concatenate([found[:, 1:] != found[:, :-1], jnp.ones_like(found[:, :1], bool)], axis=1)
    place = jnp.where(is_last, jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[1])
    last = jax.lax.cummin(place, axis=1, reverse=True)
    return jnp.take_along_axis(jnp.take_along_axis(x, last, axis=1), jnp.argsort(order, axis=1), axis=1)
