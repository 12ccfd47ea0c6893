"""The mathematics of the TPU kernels inside a tile: biases, counts, and their gradients.

Scores are transposed, [s, t], with keys along sublanes and queries along lanes. Row statistics are then lane vectors [1, t] that
broadcast for free, products need no transposes, and CoPE gathers from its embedding along sublanes, which the chip does in one
operation. Scores are in units of log2 e, so that the exponential is a power of two.

The embedding products of the queries, z_n = q.e_n, have shape [P, t]. Between two of them the bias is linear, so a count c needs
two numbers of its cell n = floor c: z_n and the slope z_{n+1} - z_n. Where gates are small, the cells of many keys lie within a
window of eight. The window is fetched once, into one register for 128 queries, and each pair then gathers from it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.constants import LOG2E
from posjax.typing import Array

SUBLANES, LANES = 8, 128
NARROW, MEDIUM, WIDE = range(3)  # how many cells the queries cross in a strip: see ``WindowedCounts.cell_span``
FEW = 2  # crossed cells per quarter of a strip for which ``spread_within`` suffices
QUARTER = 64  # keys

NN = (((1,), (0,)), ((), ()))  # a b
NT = (((1,), (1,)), ((), ()))  # a b^T
TN = (((0,), (0,)), ((), ()))  # a^T b


def product(a: Array, b: Array, form: Any = NN, exact: bool = False) -> Array:
    """Multiplies two matrices with accumulation in float32; ``exact`` also multiplies in float32."""
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, form, precision=precision, preferred_element_type=jnp.float32)


def matmul_bf16x3(a: Array, b: Array, form: Any, exact: bool) -> Array:
    """Multiplies two matrices in float32 if ``exact``, else with 16 bits of each float32 and the 8 bits of each bfloat16 number."""
    if exact:
        return product(a, b, form, exact)

    def halves(x: Array) -> list[Array]:
        if x.dtype == jnp.bfloat16:
            return [x]
        high = x.astype(jnp.bfloat16)
        return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]

    pairs = [(p, q) for n, p in enumerate(halves(a)) for m, q in enumerate(halves(b)) if n + m < 2]
    return functools.reduce(jnp.add, [product(p, q, form) for p, q in pairs[::-1]])


def column(row: Array, width: int) -> Array:
    """Transposes and broadcasts [1, s] to [s, width], the same in every lane."""
    square = jnp.broadcast_to(row, (LANES, row.shape[1])).T
    return square if width == LANES else jnp.tile(square, (1, width // LANES))


def to_sublanes(x: Array) -> Array:
    """Sums the blocks of eight rows, [s, t] -> [8, t]."""
    return x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1]).sum(0)


# Counting --------------------------------------------------------------------------------------------------------------


class Counting(NamedTuple):
    """Holds the static properties of a CoPE term.

    Attributes:
      last: P - 1, where counts saturate.
      rows: P rounded up to whole sublanes.
      exact: whether gates are summed in full float32, for float32 calls; if not, gates are split into two bfloat16 parts, 16 bits.
      has_sublane_gather: whether the chip gathers along sublanes in one operation (all but the v4 do).
    """

    last: int
    rows: int
    exact: bool
    has_sublane_gather: bool


def suffix_sums(gates: Array, counting: Counting) -> Array:
    """Returns for each key of [s, t] the sum of the gates of itself and of later keys, from ``doubled_gates``.

    The sum is a product with a triangular matrix, exact in its float32 sums.
    """
    return _cumulative_sums(gates, True, 3 if counting.exact else 2, 0.5)


def prefix_sums(gradient: Array, counting: Counting) -> Array:
    """Returns for each key of [s, t] the sum over itself and earlier keys; bfloat16 calls round it like every other gradient."""
    return _cumulative_sums(gradient, False, 3 if counting.exact else 1, 1.0)


def _cumulative_sums(x: Array, is_suffix: bool, parts: int, factor: float) -> Array:
    """Sums x cumulatively by a product with a triangular matrix.

    x is split into bfloat16 parts of 8 bits. The entries of the triangle are a power of two, so no product is rounded. One product
    sums two parts. Three parts take one product each, since the smallest would be lost in the sums of the largest.
    """
    if x.shape[0] > LANES:  # a triangle of twice the size takes four times the work
        pieces = [_cumulative_sums(x[at : at + LANES], is_suffix, parts, factor) for at in range(0, x.shape[0], LANES)]
        for n in range(1, len(pieces)):
            if is_suffix:
                pieces[-n - 1] = pieces[-n - 1] + pieces[-n][:1]
            else:
                pieces[n] = pieces[n] + pieces[n - 1][-1:]
        return jnp.concatenate(pieces, 0)
    row, col = (jax.lax.broadcasted_iota(jnp.int32, (x.shape[0],) * 2, axis) for axis in (0, 1))
    ones = jnp.where((col >= row) if is_suffix else (col <= row), factor, 0.0).astype(jnp.bfloat16)
    pieces = []
    for n in range(parts):
        pieces.append(x.astype(jnp.bfloat16))
        x = x - pieces[-1].astype(jnp.float32) if n < parts - 1 else x
    if parts > 2:
        return functools.reduce(jnp.add, [product(ones, piece) for piece in pieces[::-1]])
    return product(jnp.concatenate([ones] * parts, axis=1), jnp.concatenate(pieces, axis=0))


def doubled_gates(logits: Array, exact: bool) -> Array:
    """Returns twice the sigmoid of scores in units of log2 e; zero where they are MASK_VALUE. The sums remove the factor two."""
    return 2.0 / (1.0 + jnp.exp2(-logits)) if exact else jnp.tanh(logits * (0.5 / LOG2E)) + 1.0


def gate_slope(doubled: Array) -> Array:
    """Returns the derivative of the gates with respect to their logits in units of log2 e."""
    return doubled * (0.5 / LOG2E - (0.25 / LOG2E) * doubled)


def two_sum(high: Array, low: Array, x: Array) -> tuple[Array, Array]:
    """Adds x to high + low with compensation: low keeps the rounding error of high, so that subtracting x later undoes the sum."""
    total = high + x
    part = total - high
    return total, low + ((high - (total - part)) + (x - part))


def register_gather(table: Array, index: Array, axis: int) -> Array:
    """Applies ``jnp.take_along_axis`` to a register [8, 128] in the only form that the chip supports, without extra operations."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=(1 - axis,),
        start_indices_batching_dims=(1 - axis,),
    )
    return jax.lax.gather(table, index[..., None], numbers, (1, 1), mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)


def sublane_gather(table: Array, index: Array, has_sublane_gather: bool) -> Array:
    """Gathers from a table [8, t] at the sublanes ``index`` [r, t] of the same lane."""
    if not has_sublane_gather:
        result = jnp.broadcast_to(table[:1], index.shape)
        for n in range(1, SUBLANES):
            result = jnp.where(index == n, table[n : n + 1], result)
        return result

    def gather_block(row: int, lane: int) -> Array:
        return register_gather(table[:, lane : lane + LANES], index[row : row + SUBLANES, lane : lane + LANES], 0)

    lanes = range(0, index.shape[1], LANES)
    return concatenate(
        [concatenate([gather_block(row, lane) for lane in lanes], 1) for row in range(0, index.shape[0], SUBLANES)], 0
    )


def concatenate(parts: list[Array], axis: int) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def sublane_groups(table: Array) -> list[Array]:
    """Splits a table [P, t] into blocks of eight rows."""
    return [table[at : at + SUBLANES] for at in range(0, table.shape[0], SUBLANES)]


def barrel_shift_down(rows: list[Array], by: Array, keep: int) -> list[Array]:
    """Returns blocks ``by`` .. ``by + keep - 1`` of ``rows`` [8, t], per lane (``by`` is [1, t]); past the last, any block."""
    for bit in reversed(range((len(rows) - 1).bit_length())):
        step = 1 << bit
        is_set, needed = (by & step) != 0, min(len(rows), keep + step - 1)
        rows = [jnp.where(is_set, rows[n + step], rows[n]) if n + step < len(rows) else rows[n] for n in range(needed)]
    return [rows[min(n, len(rows) - 1)] for n in range(keep)]


def barrel_shift_up(rows: list[Array], by: Array, most: int, keep: int) -> list[Array]:
    """Returns ``keep`` blocks [8, t] of zeros with ``rows`` placed from block ``by`` on, per lane: [1, t], at most ``most``."""
    rows = rows[:keep]
    for bit in range(most.bit_length()):
        step = 1 << bit
        is_set, padded = (by & step) != 0, [*rows, *[jnp.zeros_like(rows[0])] * step]
        rows = [jnp.where(is_set, padded[n - step] if n >= step else 0.0, row) for n, row in enumerate(padded[:keep])]
    return [*rows, *[jnp.zeros_like(rows[0])] * (keep - len(rows))]


def window_rows(table: Array, start: Array, counting: Counting) -> Array:
    """Returns rows start .. start + 7 of a table [P, t], with one start [1, t] per lane; rows past the last repeat the last."""
    start = jnp.minimum(start, counting.last)
    index = jnp.minimum(start + jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, table.shape[1]), 0), counting.last)
    block = jnp.maximum(start, 0) >> 3
    first, second = (
        sublane_gather(rows, index & (SUBLANES - 1), counting.has_sublane_gather)
        for rows in barrel_shift_down(sublane_groups(table), block, 2)
    )
    return jnp.where(index >> 3 == block, first, second)


# Adding a large constant rounds a count to the nearest integer. Subtracting 1/2 first makes that the floor, the cell. The offset is
# a little less than 1/2, because ties round to even.
OFFSET = 0.5 - 2.0**-19
_WHOLE = 1.5 * 2.0**23  # floats of this size are integers; their last bits are those of the added number


def cell(inside: Array) -> Array:
    """Returns the cell relative to the base of the window, for counts ``inside`` + ``OFFSET`` above the base."""
    return (inside + _WHOLE) - _WHOLE


def cells_crossed(inside: Array) -> Array:
    """Returns the number of cells that each query crosses from the first to the last key, [1, t], from counts in a window."""
    return cell(inside[:1]) - cell(inside[-1:])


class Window(NamedTuple):
    """Holds the bias in eight cells from a base on, linear in each: start + slope * inside."""

    start: Array  # [8, t]
    slope: Array


def window(z: Array, slope: Array, base: Array, counting: Counting) -> Window:
    """Builds the window at ``base`` from z and its steps [P, t]; cells below 0 are arbitrary, cells past the last repeat it."""
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, z.shape[1]), 0).astype(jnp.float32)
    steep = window_rows(slope, base, counting)
    return Window(window_rows(z, base, counting) - (row - OFFSET) * steep, steep)


def interpolate_in_window(window: Window, inside: Array, counting: Counting) -> tuple[Array, Array]:
    """Returns the bias and its slope at counts ``inside`` [s, t], which all lie in the window's eight cells."""
    at = jax.lax.bitcast_convert_type(inside + _WHOLE, jnp.int32) & (SUBLANES - 1)
    slope = sublane_gather(window.slope, at, counting.has_sublane_gather)
    return sublane_gather(window.start, at, counting.has_sublane_gather) + inside * slope, slope


def software_pipeline(pieces: Sequence[Any], stages: Sequence[Callable[[Any], None]]) -> None:
    """Calls each stage for each piece in software-pipelined order: every stage runs one piece behind the stage before it.

    In branch-free code, independent stages of neighboring pieces are then adjacent and can overlap.
    """
    for n in range(len(pieces) + len(stages) - 1):
        for behind, stage in enumerate(stages):
            if 0 <= n - behind < len(pieces):
                stage(pieces[n - behind])


def positions(counts: Array, counting: Counting) -> Array:
    """Clamps counts to the last position. The cell that begins there has slope zero, which stops the gradient as well."""
    return jnp.minimum(counts, counting.last)


def spans(positions: Array) -> Array:
    """Returns the number of cells that each query crosses from the first to the last key, [1, t] int32."""
    return positions[:1].astype(jnp.int32) - positions[-1:].astype(jnp.int32)


def interpolate(positions: Array, z: Array, slope: Array, counting: Counting, few: bool) -> tuple[Array, Array]:
    """Interpolates the bias and its slope, [s, t] each, at positions [s, t], from z and its steps [P, t].

    Args:
      few: each query crosses fewer than eight cells here, so that one fetch of eight cells from the smallest on covers them all.
    """
    if few:
        base = positions[-1:].astype(jnp.int32)
        inside = positions - base.astype(jnp.float32)
        cells = inside.astype(jnp.int32)
        start, steep = (
            sublane_gather(window_rows(table, base, counting), cells, counting.has_sublane_gather) for table in (z, slope)
        )
        return start + (inside - cells.astype(jnp.float32)) * steep, steep
    parts = [_interpolate_wide(positions[at : at + _ROWS], z, slope, counting) for at in range(0, positions.shape[0], _ROWS)]
    return concatenate([bias for bias, _ in parts], 0), concatenate([steep for _, steep in parts], 0)


_ROWS = 2 * SUBLANES  # keys; they cross fewer than 16 cells, as no gate exceeds one, so three blocks of eight hold them


def _interpolate_wide(positions: Array, z: Array, slope: Array, counting: Counting) -> tuple[Array, Array]:
    """Interpolates at ``_ROWS`` keys, for any number of cells."""
    cells = positions.astype(jnp.int32)
    first = cells[-1:] >> 3
    row, number = cells & (SUBLANES - 1), (cells >> 3) - first
    start, steep = (barrel_shift_down(sublane_groups(table), first, 1 + _ROWS // SUBLANES) for table in (z, slope))
    values = [
        sublane_gather(start[0], row, counting.has_sublane_gather),
        sublane_gather(steep[0], row, counting.has_sublane_gather),
    ]
    for n in range(1, len(start)):
        next_values = [sublane_gather(table[n], row, counting.has_sublane_gather) for table in (start, steep)]
        values = [jnp.where(number == n, a, b) for a, b in zip(next_values, values, strict=True)]
    return values[0] + (positions - cells.astype(jnp.float32)) * values[1], values[1]


def spread_within(inside: Array, gradient: Array) -> Array:
    """Applies the transpose of the interpolation in a window: gradients of 64 keys to those of the window's nodes, [8, t].

    It covers counts ``inside`` that cross up to ``FEW`` cells; ``spread_beyond`` adds the rest.
    """
    gradient_sum = to_sublanes(gradient).sum(0, keepdims=True)
    first = cell(inside[-1:])
    nodes = [first + (n - OFFSET) for n in range(FEW + 1)]
    ramps = [gradient * (jnp.maximum(inside, node) if n else inside) for n, node in enumerate(nodes)]
    ramps = [to_sublanes(ramp).sum(0, keepdims=True) - node * gradient_sum for ramp, node in zip(ramps, nodes, strict=True)]
    ramps = [gradient_sum + ramps[0], *ramps, 0.0, 0.0]
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, inside.shape[1]), 0) - first.astype(jnp.int32)
    d_nodes = jnp.zeros((SUBLANES, inside.shape[1]), jnp.float32)
    for n in range(FEW + 2):
        d_nodes = jnp.where(row == n, ramps[n] - 2.0 * ramps[n + 1] + ramps[n + 2], d_nodes)
    return d_nodes


def spread_beyond(inside: Array, gradient: Array, most: Array) -> Array:
    """Returns the part that ``spread_within`` omits where a query crosses more than ``FEW`` cells, up to ``most`` (a scalar)."""
    first = cell(inside[-1:])
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, inside.shape[1]), 0) - first.astype(jnp.int32)

    def ramp(m: Array, d_nodes: Array) -> Array:
        node = first + (m.astype(jnp.float32) - OFFSET)
        ramp_sum = to_sublanes(jnp.maximum(inside - node, 0.0) * gradient).sum(0, keepdims=True)
        return d_nodes + jnp.where(row == m, -2.0 * ramp_sum, jnp.where(jnp.abs(row - m) == 1, ramp_sum, 0.0))

    return jax.lax.fori_loop(FEW + 1, most + 1, ramp, jnp.zeros((SUBLANES, inside.shape[1]), jnp.float32))


def window_to_table(nodes: Array, base: Array, counting: Counting) -> Array:
    """Places the gradient [8, t] of a window's nodes in that of z, [P, t]; nodes past the last position add to the last."""
    row = jax.lax.broadcasted_iota(jnp.int32, nodes.shape, 0)
    saturated = jnp.where(row + base >= counting.last, nodes, 0.0).sum(0, keepdims=True)
    table_row = jax.lax.broadcasted_iota(jnp.int32, (counting.rows, nodes.shape[1]), 0)
    offset = table_row - base
    d_table = sublane_gather(nodes, offset & (SUBLANES - 1), counting.has_sublane_gather)
    d_table = jnp.where(((offset & -SUBLANES) == 0) & (table_row < counting.last), d_table, 0.0)
    return d_table + jnp.where(table_row == counting.last, saturated, 0.0)


def spread(positions: Array, gradient: Array, most: Any, counting: Counting) -> Array:
    """Applies the transpose of the interpolation where few cells are crossed: gradients [s, t] of the bias to [P, t] of z.

    A gradient g at position u, relative to the smallest cell, contributes g max(0, 1 - |u - m|) to node m. That is the second
    difference of sums of g max(0, u - m), which take one product and one sum per node.

    Args:
      positions: [s, t], clamped.
      gradient: [s, t], of the bias.
      most: the greatest number of cells that a query crosses, a scalar below 8.
    """
    base = positions[-1:].astype(jnp.int32)
    inside = positions - base.astype(jnp.float32)
    row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, positions.shape[1]), 0)

    def ramps(m: Any, sums: Array) -> Array:
        """Sets row m to the sum of g max(0, u - m)."""
        ramp_sum = to_sublanes(jnp.maximum(inside - m.astype(jnp.float32), 0.0) * gradient).sum(0, keepdims=True)
        return jnp.where(row == m, ramp_sum, sums)

    first = to_sublanes(inside * gradient).sum(0, keepdims=True)
    sums = jax.lax.fori_loop(1, most + 1, ramps, jnp.where(row == 0, first, 0.0))
    window = _nodes(sums, first + to_sublanes(gradient).sum(0, keepdims=True), base, counting)
    return _place_in_table(base >> 3, window, counting)


def spread_widely(positions: Any, gradient: Any, counting: Counting) -> Array:
    """Computes ``spread`` for any number of cells, from references, since a load broadcasts a row of memory to eight sublanes.

    Eight keys cross at most eight nodes. Their windows are merged in pairs, up to windows of 32 keys.
    """
    size, tables = min(32, positions.shape[0]), []
    for end in range(size, positions.shape[0] + 1, size):
        windows, previous_base = [], None
        for at in range(end - SUBLANES, end - size - 1, -SUBLANES):  # smallest counts first
            base = positions[at + SUBLANES - 1 : at + SUBLANES, :].astype(jnp.int32)
            if previous_base is not None:  # rounding can make counts grow by more than one per key
                base = jnp.minimum(base, previous_base + SUBLANES)
            previous_base = base
            windows.append((base >> 3, _window_of_eight_keys(positions, gradient, at, base, counting)))
        rows = SUBLANES
        while len(windows) > 1:
            pairs, rows = zip(windows[::2], windows[1::2], strict=True), 2 * rows
            windows = [_merge_windows(low, high, rows) for low, high in pairs]
        tables.append(_place_in_table(*windows[0], counting))
    return functools.reduce(jnp.add, tables)


def _window_of_eight_keys(positions: Any, gradient: Any, at: int, base: Array, counting: Counting) -> list[Array]:
    """Returns the gradients of the nodes from ``base`` on that come from eight keys."""
    node = (jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, base.shape[1]), 0) + base).astype(jnp.float32)
    before, sums = [], []
    for n in range(at, at + SUBLANES):
        count, value = (jnp.broadcast_to(x[n : n + 1, :], node.shape) for x in (positions, gradient))
        before.append(value)
        sums.append(jnp.maximum(count - node, 0.0) * value)
    before, sums = functools.reduce(jnp.add, before), functools.reduce(jnp.add, sums)
    return _nodes(sums, before[:1] + sums[:1], base, counting)


def _nodes(sums: Array, before: Array, base: Array, counting: Counting) -> list[Array]:
    """Returns the gradients of nine nodes from ``base`` [1, t] on, as two blocks of eight rows from the block that contains base.

    They are the second differences of the ramp sums: ``before`` [1, t] at the node before base, ``sums`` [8, t] from base on.
    """
    beyond = sums[SUBLANES - 1 :]  # only the ramp from node 7 on reaches node 8
    left = jnp.concatenate([before, sums[:-1]], 0)
    right = jnp.concatenate([sums[1:], jnp.zeros_like(before)], 0)
    row, offset = jax.lax.broadcasted_iota(jnp.int32, sums.shape, 0), base & (SUBLANES - 1)
    rolled = sublane_gather(left - 2.0 * sums + right, (row - offset) & (SUBLANES - 1), counting.has_sublane_gather)
    is_first_group = row >= offset
    return [jnp.where(is_first_group, rolled, 0.0), jnp.where(row == offset, beyond, jnp.where(is_first_group, 0.0, rolled))]


def _merge_windows(low: tuple[Array, list[Array]], high: tuple[Array, list[Array]], rows: int) -> tuple[Array, list[Array]]:
    """Merges the windows of two adjacent runs of keys, ``rows`` keys in total, into one."""
    (first, window), (first_high, shifted) = low, high
    shifted = barrel_shift_up(shifted, first_high - first, rows // 2 // SUBLANES, 1 + rows // SUBLANES)
    return first, [a + b for a, b in zip(window, shifted, strict=False)] + shifted[len(window) :]


def _place_in_table(first: Array, window: list[Array], counting: Counting) -> Array:
    """Places a window in a table [P, t] of zeros, from the block of eight rows ``first`` [1, t] on."""
    size = counting.rows // SUBLANES
    return concatenate(barrel_shift_up(window, first, size - 1, size), 0)
