"""Operations of the Triton kernels within a tile: matrix products, counts, and their gradients.

Between two positions the bias is linear in the count, so each count needs two numbers of its cell. Triton cannot index into
registers, so these numbers are selected in a loop over the cells that the counts of a row span in a strip; the row with the widest
span determines the length of the loop. The transpose is a loop over the nodes between cells: the gradient of z_n is the sum of
g max(0, 1 - |count - n|).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from posjax.attention.backends.gpu.plan import Plan
from posjax.attention.backends.gpu.scores import Keys, Rows
from posjax.typing import Array

NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))


def product(plan: Plan, a: Array, b: Array, form: Any = NN) -> Array:
    """Multiplies two matrices on tensor cores, accumulating in float32; float32 inputs take three products of 11 bits each."""
    exact = jax.lax.Precision.HIGHEST if plan.interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    precision = exact if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, form, precision=precision, preferred_element_type=jnp.float32)


Channels = tuple[Array, ...]  # [t, C] split into pieces whose widths are powers of two, the only sizes that Triton has


def channel_slices(channels: int) -> list[Any]:
    """Splits a number of channels, a multiple of 16, into slices of powers of two up to 128, the largest first."""
    sizes = [128] * (channels // 128) + [1 << n for n in (6, 5, 4) if channels >> n & 1]
    return [pl.ds(sum(sizes[:n]), size) for n, size in enumerate(sizes)]


def load_channels(ref: Any, *at: Any) -> Channels:
    return tuple(ref[(*at, piece)] for piece in channel_slices(ref.shape[-1]))


def store_channels(ref: Any, x: Channels) -> None:
    for piece, part in zip(channel_slices(ref.shape[-1]), x, strict=True):
        ref[:, piece] = part


def zeros_like(x: Channels) -> Channels:
    return tuple(jnp.zeros(part.shape, jnp.float32) for part in x)


def matmul_nt(plan: Plan, a: Channels, b: Channels) -> Array:
    """Computes a b^T."""
    return functools.reduce(jnp.add, [product(plan, p, q, NT) for p, q in zip(a, b, strict=True)])


def accumulate(plan: Plan, acc: Channels, weights: Array, x: Channels) -> Channels:
    """Returns total + weights x, with weights cast to the dtype of x."""
    weights = weights.astype(x[0].dtype)
    return tuple(part_acc + product(plan, weights, part) for part_acc, part in zip(acc, x, strict=True))


def two_sum(high: Array, low: Array, x: Array) -> tuple[Array, Array]:
    """Adds x to high + low and returns the sum as two floats: the rounding error of high + x is added to low."""
    total = high + x
    part = total - high
    return total, low + ((high - (total - part)) + (x - part))


class ScoreLayout(NamedTuple):
    """Describes the layout of a tile of scores: [queries, keys] or, if ``transposed``, [keys, queries]."""

    transposed: bool

    @property
    def keys_axis(self) -> int:
        return 0 if self.transposed else 1

    def queries(self, x: Array) -> Array:
        """Reshapes x, a number per query, to broadcast over keys."""
        return x[None, :] if self.transposed else x[:, None]

    def keys(self, x: Array) -> Array:
        return x[:, None] if self.transposed else x[None, :]

    def cumsum(self, plan: Plan, x: Array, later: bool, parts: int) -> Array:
        """Sums x, for each key, over that key and all later ones or, if not ``later``, over that key and all earlier ones.

        The sum is a product with a triangular matrix of ones. x is split into bfloat16 parts of 8 bits each, so that this product
        does not round.
        """
        size = x.shape[self.keys_axis]
        row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
        target, source = (row, column) if self.transposed else (column, row)
        ones = jnp.where((source >= target) if later else (source <= target), 1.0, 0.0).astype(jnp.bfloat16)
        sums = []
        for n in range(parts):
            part = x.astype(jnp.bfloat16)
            x = x - part.astype(jnp.float32) if n < parts - 1 else x
            sums.append(product(plan, ones, part) if self.transposed else product(plan, part, ones))
        return functools.reduce(jnp.add, sums)


def rows_of(plan: Plan, r: Any, start: Any, size: int, head: Any = None) -> Rows:
    """Loads ``size`` queries of a program's arrays, from ``start`` on; ``head`` is None if the arrays hold a single head."""
    at = pl.ds(start, size)
    segments = r.query_segments[at] if plan.rules.segmented else None
    features = _features_of(plan, r, "query_features", at, head)
    num_entries = 0 if plan.index is None else r.table.shape[-1]

    def lookup(n: Array) -> Array:
        return r.table[n if head is None else (head, n)]

    args = {n: r.numbers[0 if head is None else head, n] for n in plan.args}  # few: they stay in registers

    def number(n: Any) -> Array:
        return args[n] if isinstance(n, int) and n in args else r.numbers[0 if head is None else head, n]

    return Rows(r.query_positions[at], segments, number, features, lookup, num_entries, row_index=start + jnp.arange(size))


def keys_of(plan: Plan, r: Any, start: Any, size: int, is_full_block: bool = False, head: Any = None) -> Keys | None:
    """Loads ``size`` keys from ``start`` on; returns None if the block is full and no bias is a function of single keys.

    ``head`` is that of the queries as in ``rows_of``: each may have its own features of the keys.
    """
    if is_full_block and not plan.pairs:
        return None
    at = pl.ds(start, size)
    segments = r.key_segments[at] if plan.rules.segmented else None
    return Keys(r.key_positions[at], segments, _features_of(plan, r, "key_features", at, head))


def _features_of(plan: Plan, r: Any, name: str, at: Any, head: Any) -> list[Array]:
    """Loads the features of all pairs; row 0 of the heads stands for all if the array has no other."""
    features = range(sum(len(program.features) for program in plan.pairs))
    if head is None:
        return [getattr(r, name)[n, at] for n in features]
    return [getattr(r, name)[head if getattr(r, name).shape[0] > 1 else 0, n, at] for n in features]


# Counting ----------------------------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """Holds the counts of a query tile at the keys of a strip.

    Attributes:
      base: [t] int32, the lowest cell of each query.
      inside: the counts less ``base``, clamped at the last position.
      cells: int32, ``inside`` rounded down.
      most: the largest of the cells.
    """

    base: Array
    inside: Array
    cells: Array
    most: Array


def gates_of(scores: Array, allowed: Array) -> Array:
    """Computes gates, the sigmoid of scores in units of log2 e; masked pairs have gate zero."""
    return jnp.where(allowed, 1.0 / (1.0 + jnp.exp2(-scores)), 0.0)


def counts_in_strip(plan: Plan, layout: ScoreLayout, high: Array, low: Array, later: Array) -> Counts:
    """Computes the counts in a strip: high + low [t], the counts to its right, plus ``later``, the sums of its own gates."""
    before = jnp.clip(high + low, 0.0, plan.last_position)
    base = before.astype(jnp.int32)
    offset = (high - base.astype(jnp.float32)) + low
    inside = jnp.minimum(layout.queries(offset) + later, layout.queries((plan.last_position - base).astype(jnp.float32)))
    inside = jnp.maximum(inside, 0.0)
    cells = inside.astype(jnp.int32)
    return Counts(base, inside, cells, cells.max(1).max(0))


def interpolate(plan: Plan, layout: ScoreLayout, z_at: Callable[[Array], Array], counts: Counts) -> tuple[Array, Array]:
    """Interpolates the bias at the counts, and returns it with its slope; ``z_at(n)`` is z [t] at positions n [t]."""

    def choose(n: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        start, slope, here = carry
        beyond = z_at(jnp.minimum(counts.base + n + 1, plan.last_position))
        is_cell = counts.cells == n
        return jnp.where(is_cell, layout.queries(here), start), jnp.where(is_cell, layout.queries(beyond - here), slope), beyond

    zeros = jnp.zeros_like(counts.inside)
    start, slope, _ = jax.lax.fori_loop(0, counts.most + 1, choose, (zeros, zeros, z_at(counts.base)))
    return start + slope * (counts.inside - counts.cells.astype(jnp.float32)), slope
