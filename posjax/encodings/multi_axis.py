"""Rotations by several coordinates: M-RoPE of time, height and width, axial RoPE of grids, and learned RoPE-Mixed.

All of them rotate pairs of channels as ``rope`` does, pair m by coordinate axis(m) times a frequency. They differ in the axis and
the frequency of each pair:

    R / 2 pairs, axes t h w                 mrope blocks       t t t t h h h w w w     one ladder of frequencies over all pairs
                                            mrope interleaved  t h w t h w t h w t
                                            mrope alternating  h w h w h w t t t t
    R / 2 pairs, axes y x                   axial shared       y y y y y x x x x x     the same ladder for each axis
                                            axial split        y y y y y x x x x x     y has frequencies 0, 2, 4, ... of one ladder
                                            axial blocks       pairs are formed in the block of channels of their own axis
                                            axial widths       likewise, in blocks of different widths

Functions that create coordinates, ``mrope_positions`` and ``axial_coordinates``, run on the host.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import INT32, bounded, check, checked, short
from posjax.core.encoding import MOST_CHANNELS, AttentionInputs, Dims, PositionalEncoding, Tokens, get_param, register
from posjax.core.structures import Pairing, Rotate, ScoreModifications
from posjax.encodings.absolute import theta
from posjax.encodings.frequencies import Scaling
from posjax.encodings.phases import angles_by_channel, angles_of_learned, geometric_frequencies
from posjax.encodings.rotary import rotated_width
from posjax.typing import Array, Float, Params

MRopeLayout = Literal["blocks", "interleaved", "alternating"]
AxialLayout = Literal["shared", "split", "blocks", "widths"]
MOST_TOKENS = 2**24  # of a part or a grid


@register("mrope")
class MRope(PositionalEncoding):
    """Rotates pairs of channels by time, height and width (M-RoPE of vision-language models).

    Pair m of the R / 2, with R = fraction * H rotated channels, turns by coordinate axis(m) times theta^(-2m/R). Coordinates are
    [B, T, 3], in the order time, height, width; ``mrope_positions`` computes those of a text with images and videos. Without
    coordinates, all three are the order of the token, and every layout equals ``rope``. Tests on text therefore do not distinguish
    layouts.

    Args:
      sections: the numbers of pairs that turn by time, height and width. Their sum is R / 2.
      layout: which pairs these are. "blocks" places time first, then height, then width (Qwen2-VL, Qwen2.5-VL; GLM-4V with
        pairing="interleaved"). "interleaved" gives pairs 1, 4, 7, ... to height and 2, 5, 8, ... to width, as many as the sections
        say, and the rest to time (Qwen3-VL, Qwen3.5). "alternating" alternates height and width in the fast pairs and gives the
        slowest to time (Ernie 4.5 VL with pairing="interleaved", whose configuration lists sections as height, width, time;
        VideoRoPE with pairing="half").
      theta, fraction, pairing, scaling: as in ``rope``; the scaling may not depend on the length of the sequence.

    Raises:
      ValueError: sections are not three numbers of pairs, do not fit the layout, or (in ``attend``) do not sum to R / 2; or
        ``rope`` rejects an argument.

    Example:
      >>> encoding = pj.mrope((8, 12, 12))
      >>> interleaved = pj.mrope((12, 10, 10), layout="interleaved")
      >>> coordinates, following = pj.mrope_positions([7, (1, 28, 42), 12])  # a text, an image in patches, a text
      >>> coordinates.shape
      (313, 3)

    Wang et al., arXiv:2409.12191, section 2.1; interleaved: Qwen3-VL, arXiv:2511.21631; alternating: Wei et al., arXiv:2502.05173.
    """

    sections: tuple[int, ...]
    layout: MRopeLayout = "blocks"
    theta: Array | float = theta()
    fraction: float = bounded(1.0, above=0, most=1)
    pairing: Pairing = "half"
    scaling: Scaling | None = None
    axes = 3

    def __post_init__(self) -> None:
        if self.scaling is not None and (not isinstance(self.scaling, Scaling) or self.scaling.depends_on_length):
            hint = "None, or a scaling that does not depend on the length, such as yarn_scaling(4.0, original_max_length=32_768)"
            raise ValueError(f"scaling of mrope must be {hint}, got {short(self.scaling)}")
        if len(self.sections) != 3 or min(self.sections) < 0 or not 0 < sum(self.sections) < MOST_CHANNELS:
            raise ValueError(
                f"sections must be numbers of pairs for time, height and width, such as (16, 24, 24), got {self.sections}"
            )
        got = tuple(np.bincount(_mrope_axes(self.sections, self.layout), minlength=3).tolist())
        if got != tuple(self.sections):
            hint = {
                "interleaved": "pairs 1, 4, ... of height and 2, 5, ... of width must exist",
                "alternating": "height and width must have the same number of pairs",
            }[self.layout]
            raise ValueError(f"sections must fit layout={self.layout!r}, in which {hint}, got {self.sections}")

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        width = rotated_width(inputs.query.shape[-1], self.fraction)
        if 2 * sum(self.sections) != width:
            raise ValueError(
                f"sections of mrope must sum to {width // 2}, half of the {width} rotated channels, got {self.sections} with the "
                f"sum {sum(self.sections)}"
            )
        scaling = self.scaling or Scaling()
        frequencies = scaling.frequencies(self.theta, width)
        axis_of = _mrope_axes(self.sections, self.layout)
        phases = (angles_by_channel(_by_pair(tokens.on_axes(3), axis_of), frequencies) for tokens in (inputs.q, inputs.k))
        return ScoreModifications((_rotation(*phases, gain=scaling.gain(), pairing=self.pairing),))


mrope = MRope


def _mrope_axes(sections: Sequence[int], layout: MRopeLayout) -> np.ndarray:
    """Returns the axis of each pair, [R / 2] integers: 0 is time, 1 height, 2 width."""
    time, height, width = sections
    pairs = sum(sections)
    if layout == "blocks":
        return np.repeat(np.arange(3), sections)
    if layout == "alternating":
        return np.concatenate([1 + np.arange(height + width) % 2, np.zeros(time, int)])
    axis_of = np.zeros(pairs, int)
    axis_of[1 : 3 * height : 3] = 1
    axis_of[2 : 3 * width : 3] = 2
    return axis_of


def _by_pair(coordinates: Array, axis_of: np.ndarray) -> Array:
    """Returns the coordinate by which each pair turns, [B, T, R / 2], from coordinates [B, T, A]."""
    chosen = coordinates[..., :1]
    for axis in range(1, int(axis_of.max()) + 1):  # selects, because a gather along the last axis is slow on TPUs
        here = jnp.asarray(axis_of == axis).reshape((1,) * (coordinates.ndim - 1) + (-1,))
        chosen = jnp.where(here, coordinates[..., axis : axis + 1], chosen)
    return jnp.broadcast_to(chosen, (*coordinates.shape[:-1], len(axis_of)))


def _rotation(query_phase: Array, key_phase: Array, *, gain: float = 1.0, **how: Any) -> Rotate:
    """Returns a rotation by phases [B, T, R / 2] that all heads share, with one gain."""

    def gain_of(phase: Array) -> Array | None:
        return None if gain == 1 else jnp.full((1, phase.shape[1], 1, 1), gain, jnp.float32)

    query_gain, key_gain = gain_of(query_phase), gain_of(key_phase)
    return Rotate(query_phase[:, :, None], key_phase[:, :, None], query_gain, key_gain, learned=False, **how)


def mrope_positions(
    parts: Sequence[int | Sequence[float]], *, merge_size: int = 2, tokens_per_second: float = 1.0
) -> tuple[np.ndarray, int]:
    """Returns the coordinates of a text with images and videos for ``mrope``, and the offset with which decoding continues.

    Text has equal coordinates on all axes. An image or a video that starts at s has t = s + floor(frame * interval),
    h = s + row and w = s + column, and what follows starts at the largest coordinate plus one (Qwen2-VL, section 2.1):

        coordinates, offset = mrope_positions([7, (1, 28, 42), 12])         # 7 tokens, an image of 14 x 21 tokens, 12 tokens

    transformers (5.24) continues after a video at s + max(height, width) instead, and so places text inside videos with more frames
    than rows and columns. To match it, pass each frame as a grid of its own, or edit the coordinates.

    Args:
      parts: in the order of the sequence: an integer is that many tokens of text; (frames, height, width) is an image (one frame)
        or a video in patches, as ``grid_thw`` of the processors; (frames, height, width, seconds) also has the seconds per frame
        (Qwen2.5-VL). Models that insert timestamps (Qwen3-VL) have one grid per frame.
      merge_size: patches that become one token, along height and along width.
      tokens_per_second: steps of the time axis per second. The interval is tokens_per_second * seconds, or one without seconds.

    Returns:
      int32 [T, 3] coordinates, in the order time, height, width; and the offset: the coordinate on all axes of a later token of
      text minus its position in the sequence. A cache with a ``coordinate_dtype`` tracks it.

    Raises:
      ValueError: a part is neither a number of tokens nor a grid, or is too large, or a grid is not a multiple of merge_size.
    """
    merge_size = check("merge_size", merge_size, int, least=1)
    tokens_per_second = check("tokens_per_second", tokens_per_second, float, above=0)
    if isinstance(parts, str | bytes) or not isinstance(parts, Sequence):
        raise ValueError(f"parts must be a list such as [7, (1, 28, 42), 12], got {short(parts)}")
    blocks, start, total = [np.zeros((0, 3), np.int64)], 0, 0
    for part in parts:
        if isinstance(part, int | np.integer) and not isinstance(part, bool):
            if not 0 <= part <= MOST_TOKENS:
                raise ValueError(f"parts must have 0 to {MOST_TOKENS} tokens each, got {short(part)}")
            block = np.repeat(np.arange(part)[:, None], 3, axis=1)
        else:
            block = _grid_positions(part, merge_size, tokens_per_second)
        blocks.append(start + block)
        start += int(block.max(initial=-1)) + 1
        total += len(block)
    if start > INT32:
        raise ValueError(f"coordinates must be below 2^31 - 1, got {start}; use fewer parts, or fewer tokens per second")
    return np.concatenate(blocks).astype(np.int32), start - total


def _grid_positions(part: Any, merge_size: int, tokens_per_second: float) -> np.ndarray:
    """Returns the coordinates [frames * rows * columns, 3] of an image or a video that starts at zero."""
    grid: tuple[Any, ...] = tuple(np.asarray(part, object).tolist()) if isinstance(part, Sequence | np.ndarray) else ()
    is_grid = len(grid) in (3, 4) and all(isinstance(n, int | np.integer) and n > 0 for n in grid[:3])
    if not is_grid or isinstance(part, str):
        raise ValueError(f"parts must be numbers of tokens or grids such as (frames, height, width), got {short(part)}")
    frames, height, width = grid[0], grid[1], grid[2]
    if height % merge_size or width % merge_size:
        raise ValueError(f"height and width of parts must be multiples of merge_size={merge_size}, got {grid}")
    if frames * height * width > MOST_TOKENS:
        raise ValueError(f"parts must have 0 to {MOST_TOKENS} patches each, got {short(grid)}")
    interval = 1.0 if len(grid) == 3 else check("seconds", grid[3], float, least=0) * tokens_per_second
    times = np.floor(np.minimum(np.arange(frames) * interval, INT32)).astype(np.int64)
    axes = np.meshgrid(times, np.arange(height // merge_size), np.arange(width // merge_size), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 3)


@register("axial_rope")
class AxialRope(PositionalEncoding):
    """Rotates pairs of channels by the coordinates of a grid, each pair by one axis (axial RoPE of images, videos and volumes).

    Coordinates are [B, T, A], integers or real numbers, from ``axial_coordinates``; a pair turns by scale * coordinate * frequency.
    With R = fraction * H rotated channels of which an axis has R / A:

        layout   pairs of axis a                                frequencies                     models
        shared   a R/(2A) to (a + 1) R/(2A) of all R            theta^(-2m/(R/A)), each axis    Qwen-VL's vision, SAM 2, EVA, DINOv3
        split    likewise                                       every A-th of theta^(-2m/R)     Pixtral
        blocks   those of its own block of R/A channels         theta^(-2m/(R/A))               Gemma 4
        widths   those of its own block of widths[a] channels   theta^(-2m/widths[a])           FLUX, Wan

    With pairing="interleaved", "shared" and "blocks" are equal. A model trained with one pairing, layout or order of axes gives
    wrong results with another.

    Args:
      axes: A, from 2 to 4.
      layout: as above.
      theta: base of the frequencies; 100 in DINOv3, Gemma 4 and rope-vit. It may be a traced scalar, as in ``rope``.
      fraction: R / H; not used by "widths".
      pairing: as in ``rope``: "half" in Qwen-VL, DINOv3, Pixtral and Gemma 4; "interleaved" in SAM 2, EVA, rope-vit, FLUX and Wan.
      widths: layout "widths": channels of each axis, even numbers with a sum of at most H; channels beyond are not rotated.
      order: the axes in the order of their channels; None is 0, 1, ... Coordinates usually begin with the row, so that (1, 0)
        rotates the first channels by the column, "x first" (rope-vit, SAM 2).
      num_prefix_tokens: number of tokens at the start of a sequence that are not rotated, [CLS] and registers: ``place`` sets their
        coordinates to zero. Without a model, ``axial_coordinates(..., num_prefix_tokens=...)`` does the same.
      scale: factor of coordinates: 2 pi in DINOv3, whose coordinates are turns.
      shift, jitter, rescale: augmentation in training (DINOv3), drawn in ``place`` once per call and not per image. Coordinates
        move by U(-shift, shift) and are multiplied by exp U(-ln jitter, ln jitter), both drawn for each axis, and by
        exp U(-ln rescale, ln rescale), drawn once. None: not applied.

    Raises:
      ValueError: an argument is out of bounds, widths do not fit the layout, order is not a permutation of the axes, or (in
        ``attend``) channels cannot be distributed over the axes.

    Example:
      >>> encoding = pj.axial_rope(theta=100.0)
      >>> coordinates = pj.axial_coordinates((4, 4))
      >>> coordinates.shape
      (16, 2)

    Heo et al., arXiv:2403.13298; Siméoni et al., arXiv:2508.10104 (DINOv3); Fang et al., arXiv:2303.11331 (EVA-02).
    """

    axes: int = bounded(2, least=2, most=4)
    layout: AxialLayout = "shared"
    theta: Array | float = theta()
    fraction: float = bounded(1.0, above=0, most=1)
    pairing: Pairing = "half"
    widths: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None
    num_prefix_tokens: int = bounded(0, least=0)
    scale: float = bounded(1.0, above=0)
    shift: float | None = bounded(None, least=0)
    jitter: float | None = bounded(None, least=1)
    rescale: float | None = bounded(None, least=1)

    def __post_init__(self) -> None:
        if (self.widths is None) != (self.layout != "widths"):
            raise ValueError(f"widths must be given for layout='widths' and no other, got {self.widths} for {self.layout!r}")
        if self.widths is not None and (len(self.widths) != self.axes or any(n < 2 or n % 2 for n in self.widths)):
            raise ValueError(
                f"widths must be even numbers of channels for {self.axes} axes, such as (16, 56, 56), got {self.widths}"
            )
        if self.order is not None and sorted(self.order) != list(range(self.axes)):
            raise ValueError(f"order must be a permutation of {tuple(range(self.axes))}, got {self.order}")

    def place(self, tokens: Tokens, key: Array | None = None) -> Array | None:
        if key is None or (self.shift, self.jitter, self.rescale) == (None, None, None):
            return _without_prefix(tokens, tokens.coordinates, self.axes, self.num_prefix_tokens)
        coordinates = tokens.on_axes(self.axes).astype(jnp.float32)
        keys = jax.random.split(key, 3)
        size = (1, 1, coordinates.shape[-1])
        if self.shift is not None:
            coordinates += jax.random.uniform(keys[0], size, minval=-self.shift, maxval=self.shift)
        for draw, factor, shape in ((keys[1], self.jitter, size), (keys[2], self.rescale, (1, 1, 1))):
            if factor is not None:
                coordinates *= jnp.exp(jax.random.uniform(draw, shape, minval=-math.log(factor), maxval=math.log(factor)))
        return _without_prefix(tokens, coordinates, self.axes, self.num_prefix_tokens)

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        widths = self._widths(inputs.query.shape[-1])
        order = range(self.axes) if self.order is None else self.order
        if self.layout == "split":
            ladder = geometric_frequencies(self.theta, sum(widths))
            parts = [ladder[place :: self.axes] for place in range(self.axes)]
        else:
            parts = [geometric_frequencies(self.theta, width) for width in widths]
        at = [tokens.on_axes(self.axes) for tokens in (inputs.q, inputs.k)]
        if self.layout in ("blocks", "widths") and self.pairing == "half":  # each axis has pairs of its own
            blocks = [(np.array([axis]).repeat(len(part)), part) for axis, part in zip(order, parts, strict=True)]
        else:
            axis_of = np.repeat(np.array(order), [len(part) for part in parts])
            concatenate = np.concatenate if all(isinstance(part, np.ndarray) for part in parts) else jnp.concatenate
            blocks = [(axis_of, concatenate(parts))]
        rotations, offset = [], 0
        for axis_of, frequencies in blocks:
            phases = (angles_by_channel(_by_pair(coordinates, axis_of), self.scale * frequencies) for coordinates in at)
            rotations.append(_rotation(*phases, pairing=self.pairing, offset=offset))
            offset += 2 * len(axis_of)
        return ScoreModifications(tuple(rotations))

    def _widths(self, head_dim: int) -> tuple[int, ...]:
        """Returns the channels of each axis, in the order of the channels."""
        if self.widths is not None:
            if sum(self.widths) > head_dim:
                raise ValueError(f"widths of axial_rope must sum to at most head_dim={head_dim}, got {self.widths}")
            return self.widths
        width = rotated_width(head_dim, self.fraction)
        if width % (2 * self.axes):
            raise ValueError(
                f"fraction * head_dim must be a multiple of {2 * self.axes} for {self.axes} axes of axial_rope, got {width}; "
                "layout='widths' distributes any number of channels"
            )
        return (width // self.axes,) * self.axes


axial_rope = AxialRope


def _without_prefix(tokens: Tokens, coordinates: Array | None, axes: int, num_prefix_tokens: int) -> Array | None:
    """Returns coordinates that are zero, and thus rotate by nothing, for the first tokens of a sequence."""
    if not num_prefix_tokens:
        return coordinates
    coordinates = tokens.on_axes(axes) if coordinates is None else coordinates
    return jnp.where((tokens.order < num_prefix_tokens)[..., None], jnp.zeros((), coordinates.dtype), coordinates)


@checked(num_prefix_tokens=dict(least=0))
def axial_coordinates(
    sizes: tuple[int, ...],
    *,
    normalize: Literal["separate", "min", "max"] | None = None,
    pretrained: tuple[int, ...] | None = None,
    num_prefix_tokens: int = 0,
) -> np.ndarray:
    """Returns the coordinates of a grid of patches in row-major order, for ``axial_rope`` and ``rope_mixed``.

        axial_coordinates((14, 14))                                          # rows and columns, integers
        axial_coordinates((16, 24), normalize="separate", num_prefix_tokens=5)     # DINOv3, after [CLS] and four registers

    Args:
      sizes: number of patches along each axis, such as rows and columns.
      normalize: None numbers the patches r = 0, 1, ... "separate" is DINOv3's 2 (r + 1/2) / n - 1, with the size n of each axis;
        "min" and "max" take the smallest and the largest size for all axes, which keeps the aspect ratio.
      pretrained: sizes of the grid of pretraining, onto which the coordinates are rescaled, r * pretrained / n (EVA-02).
      num_prefix_tokens: number of rows of zeros before those of the patches, for [CLS] and registers.

    Returns:
      [num_prefix_tokens + the product of the sizes, A], int32, or float32 with ``normalize`` or ``pretrained``.

    Raises:
      ValueError: there are not 1 to 4 sizes of at least 1, or normalize and pretrained are both given, or pretrained has another
        length.
    """
    if not 1 <= len(sizes) <= 4 or min(sizes) < 1 or math.prod(sizes) + num_prefix_tokens > MOST_TOKENS:
        raise ValueError(f"sizes must be 1 to 4 numbers of patches such as (14, 14), up to {MOST_TOKENS} in all, got {sizes}")
    if pretrained is not None and (normalize is not None or len(pretrained) != len(sizes) or min(pretrained) < 1):
        raise ValueError(f"pretrained must be {len(sizes)} sizes, without normalize, got {pretrained} and normalize={normalize!r}")
    axes = [np.arange(n) for n in sizes]
    if normalize is not None:
        lengths = sizes if normalize == "separate" else [{"min": min, "max": max}[normalize](sizes)] * len(sizes)
        axes = [2 * (r + 0.5) / n - 1 for r, n in zip(axes, lengths, strict=True)]
    elif pretrained is not None:
        axes = [r * (before / n) for r, before, n in zip(axes, pretrained, sizes, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(sizes))
    grid = np.concatenate([np.zeros((num_prefix_tokens, len(sizes)), grid.dtype), grid])
    return grid.astype(np.int32 if np.issubdtype(grid.dtype, np.integer) else np.float32)


@register("rope_mixed")
class RopeMixed(PositionalEncoding):
    """Rotates pairs of channels by a learned combination of row and column (RoPE-Mixed of vision Transformers).

        phase = row * frequencies[0] + column * frequencies[1]

    params["frequencies"] is [2, K, H / 2], learned in every layer and by every head; heads that share a key share it. rope-vit and
    timm store the frequency of the column first. Coordinates are [B, T, 2], from ``axial_coordinates``.

    The initial frequencies of a head are those of two axes at right angles, turned by one random angle:
    theta^(-4m/H) (cos, sin) of the angle for m = 0 .. H/4 - 1, and the same a quarter turn further in the other H/4 pairs.

    Args:
      theta: base of the initial frequencies.
      pairing: as in ``rope``; "interleaved" in rope-vit.
      num_prefix_tokens: number of tokens at the start of a sequence that are not rotated, as in ``axial_rope``.

    Raises:
      ValueError: theta is not one positive number, or (in ``init``) H is not a multiple of 4.

    Example:
      >>> encoding = pj.rope_mixed()
      >>> encoding.init(jax.random.key(0), pj.Dims(num_heads=4, head_dim=8))["frequencies"].shape
      (2, 4, 4)

    Heo et al., arXiv:2403.13298, section 3.2.
    """

    theta: float = bounded(10.0, above=0)
    pairing: Pairing = "interleaved"
    num_prefix_tokens: int = bounded(0, least=0)
    axes = 2
    per_layer = True

    def init(self, key: Array, dims: Dims) -> Params:
        if dims.head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 for rope_mixed, got {dims.head_dim}")
        angle = jax.random.uniform(key, (dims.num_kv_heads, 1), maxval=2 * math.pi)
        magnitude = jnp.asarray(geometric_frequencies(self.theta, dims.head_dim // 2), jnp.float32)[None]
        column = jnp.concatenate([magnitude * jnp.cos(angle), magnitude * -jnp.sin(angle)], axis=1)
        row = jnp.concatenate([magnitude * jnp.sin(angle), magnitude * jnp.cos(angle)], axis=1)
        return {"frequencies": jnp.stack([row, column])}

    def place(self, tokens: Tokens, key: Array | None = None) -> Array | None:
        return _without_prefix(tokens, tokens.coordinates, self.axes, self.num_prefix_tokens)

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        heads, kv_heads, head_dim = *(x.shape[2] for x in (inputs.query, inputs.key)), inputs.query.shape[-1]
        frequencies = get_param(params, "frequencies", self.registered_name, (2, kv_heads, head_dim // 2)).astype(jnp.float32)

        def phase(tokens: Tokens, of_heads: Float[Array, "2 N R2"]) -> Array:
            coordinates = tokens.on_axes(2)[..., None, None]
            row, column = (angles_of_learned(coordinates[:, :, axis], of_heads[axis][None, None]) for axis in range(2))
            return row + column

        repeated = jnp.repeat(frequencies, heads // kv_heads, axis=1)
        return ScoreModifications((Rotate(phase(inputs.q, repeated), phase(inputs.k, frequencies), pairing=self.pairing),))


rope_mixed = RopeMixed
