"""Attention on TPU: the entry point of the Pallas kernels, their operand layout, and the calls that they do not support.

``forward.py`` and ``backward.py`` hold one kernel each.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends.deferred import deferred
from posjax.attention.backends.shards import ShardSpec, exact, infer_shard_spec, per_shard
from posjax.attention.backends.tpu.backward import backward
from posjax.attention.backends.tpu.blocks import Blocks, Chip, chip_at_hand
from posjax.attention.backends.tpu.forward import forward
from posjax.attention.backends.tpu.step import Operands, Plan
from posjax.attention.backends.tpu.tiles import LANES, SUBLANES, Counting
from posjax.attention.backends.tpu.vmem import SMEM, needed, scalars, smaller
from posjax.core.bias import BiasTerm, Interpolation, Lookup, Penalty, Rotation, apply_rotation
from posjax.core.masks import Mask, Rules, with_padding
from posjax.typing import Array, Float, Int

BLOCK_SIZES_CLS = Blocks  # type of this backend's ``block_sizes``
_MOST_POSITIONS = 512  # CoPE positions; the tables of more fill VMEM
_MOST_COMPARED = 128  # CoPE positions on a chip without a sublane gather, where lookups compare indices instead


def refusal(
    query: Array,
    key: Array,
    value: Array,
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    *,
    block_sizes: Blocks | None = None,
    cut: ShardSpec | None = None,
    **rest: Any,
) -> str | None:
    """Returns why the kernel does not support a call, naming the argument at fault, or None if it does.

    ``block_sizes`` and ``cut`` are ``tile`` and ``cut`` of ``attention``.
    """
    chip = chip_at_hand(query)
    if mask.boolean is not None:
        return "mask is an array (is_causal, segment_ids and local_window_size are made inside of the tile)"
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"query has dtype {query.dtype} (bfloat16 and float32 are supported)"
    if max(query.shape[-1], value.shape[-1]) > 1024:
        return f"query has {query.shape[-1]} channels and value {value.shape[-1]} (at most 1024)"
    kinds = [type(term.fused) for term in terms]
    for term in terms:
        if term.fused is None:
            return f"encoding has a bias that the kernel does not know ({term.function})"
        most = _MOST_POSITIONS if chip.has_sublane_gather else _MOST_COMPARED
        if isinstance(term.fused, Interpolation) and (count := term.tables[1].shape[-2]) > most:
            return f"max_position={count} of cope (at most {most} on this chip)"
        if isinstance(term.fused, Lookup) and (width := term.tables.shape[0]) >= LANES:
            return f"num_buckets={width} (fewer than {LANES})"
    for kind, name in ((Interpolation, "cope"), (Lookup, "t5"), (Penalty, "alibi")):
        if kinds.count(kind) > 1:
            return f"encoding chains {name} twice"
    call = dict(query=query, key=key, value=value, terms=terms, mask=mask) | rest
    return _too_much(chip, block_sizes, call) or _too_many(chip, block_sizes, infer_shard_spec(query) if cut is None else cut, call)


def _too_many(chip: Chip, block_sizes: Blocks | None, cut: ShardSpec, call: dict[str, Any]) -> str | None:
    """Returns why the scalars of a call do not fit the chip's SMEM, or None if they do."""
    taken = scalars(*_shapes(block_sizes or fitting(chip, call), chip, call), cut.batch_parts)
    if taken <= SMEM:
        return None
    of = dict(segment_ids=call["mask"].query_segments, query_positions=call["query_positions"], key_positions=call["key_positions"])
    rows = {name: array.shape[0] for name, array in of.items() if array is not None and array.shape[0] > 1} or {"query": 1}
    tokens = f"{max(rows.values())} x {call['query'].shape[1]} tokens"
    return f"{' and '.join(rows)} of {tokens} takes {taken / 2**20:.1f} MiB of 1 MiB of SMEM (fewer on a device fit)"


def _too_much(chip: Chip, block_sizes: Blocks | None, call: dict[str, Any]) -> str | None:
    """Returns why a call does not fit the chip's VMEM, or None if it does."""
    if block_sizes is not None and (taken := _vmem_of(block_sizes, chip, call)) <= chip.vmem:
        return None
    smaller_ones = fitting(chip, call)
    width, there = call["query"].shape[-1], f"{chip.vmem / 2**20:.0f} MiB of VMEM"
    if smaller_ones is None:
        counts = [term for term in call["terms"] if isinstance(term.fused, Interpolation)]
        others = tuple(term for term in call["terms"] if term not in counts)
        if counts and fitting(chip, call | {"terms": others}) is not None:
            return f"max_position={counts[0].tables[1].shape[-2]} of cope on heads of {width} channels does not fit {there}"
        return f"query has {width} channels and value {call['value'].shape[-1]}, of which no tile fits {there}"
    if block_sizes is None:
        return None
    return f"block_sizes={block_sizes} takes about {taken / 2**20:.0f} MiB of {there}; block_sizes={smaller_ones} fits"


def fitting(chip: Chip, call: dict[str, Any]) -> Blocks | None:
    """Returns the chip's default block sizes, or the first smaller ones that fit its VMEM; None if none fit."""
    own = chip.blocks(call["query"].dtype, max(call["query"].shape[-1], call["value"].shape[-1]))
    return next((blocks for blocks in smaller(own) if _vmem_of(blocks, chip, call) <= chip.vmem), None)


def _vmem_of(blocks: Blocks, chip: Chip, call: dict[str, Any]) -> int:
    """Returns an upper estimate of the VMEM that a call takes, in bytes."""
    return needed(*_shapes(blocks, chip, call))


def _shapes(blocks: Blocks, chip: Chip, call: dict[str, Any]) -> tuple[Plan, Operands]:
    """Returns the results of ``laid_out`` with shapes in place of arrays."""
    plans = []

    def operands() -> Operands:
        plan, x = laid_out(blocks, chip, ShardSpec(), None, **call)
        plans.append(plan)
        return x

    shapes = jax.eval_shape(operands)
    return plans[0], shapes


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    query_positions: Int[Array, "_ T"],
    key_positions: Int[Array, "_ S"],
    scale: Array | float,
    logits_soft_cap: float | None = None,
    rotation: Rotation | None = None,
    raw: bool = False,
    *,
    tile: Blocks | None = None,
    chip: Chip | None = None,
    cut: ShardSpec | None = None,
    interpret: Any = None,
) -> Float[Array, "B T N V"]:
    """Computes attention with the Pallas kernels, each device on its shard of batch and heads.

    Args:
      query, ..., logits_soft_cap: as in ``reference.attention``. Calls that ``refusal`` rejects are not checked again.
      rotation: the rotation of query and key that the kernel applies; None: none.
      raw: whether ``query`` is the query that CoPE multiplies with its embedding (the one before any rotation). If False, the rows
        of the CoPE term hold that query.
      tile: block sizes; None: the defaults of the chip, or smaller ones that fit its VMEM.
      chip: the TPU generation; None: that of the query's mesh, of the mesh in context, or of this process.
      cut: how the mesh shards batch and heads; None: inferred from the type of the query.
      interpret: as in ``pallas_call``; None interprets the kernel only where the program is lowered for a CPU.

    Returns:
      [B, T, N, V] in the dtype of value; rows without an allowed key are zero.
    """
    cut = infer_shard_spec(query) if cut is None else cut
    chip = chip_at_hand(query) if chip is None else chip
    call = dict(query=query, key=key, value=value, terms=terms, mask=mask, scale=scale, logits_soft_cap=logits_soft_cap)
    call |= dict(query_positions=query_positions, key_positions=key_positions, rotation=rotation, raw=raw)
    if tile is None:
        tile = fitting(chip, call) or Blocks(LANES, LANES, LANES, LANES)
    plan, operands = laid_out(tile, chip, cut, interpret, **call)
    return joined(_attend(plan, cut, operands), query.shape[1])


def joined(out: Array, length: int) -> Array:
    """Reshapes the kernel's output [B, K, G, T, V] to [B, T, N, V] and removes the padding of T."""
    batch, kv_heads, group, _, width = out.shape
    return jnp.moveaxis(out, 3, 1).reshape(batch, -1, kv_heads * group, width)[:, :length]


def laid_out(
    tile: Blocks,
    chip: Chip,
    cut: ShardSpec,
    interpret: Any,
    *,
    query: Array,
    key: Array,
    value: Array,
    terms: tuple[BiasTerm, ...],
    mask: Mask,
    query_positions: Array,
    key_positions: Array,
    scale: Array | float,
    logits_soft_cap: float | None = None,
    rotation: Rotation | None = None,
    raw: bool = False,
) -> tuple[Plan, Operands]:
    """Converts a call to the static plan and the padded operands of the kernel; arguments as in ``attention``."""
    blocks = _fitted(tile, query.shape[1], key.shape[1])
    kinds = {type(term.fused): term for term in terms}
    counts, looks, penalty = (kinds.get(kind) for kind in (Interpolation, Lookup, Penalty))
    length = query.shape[1]

    # Grouped heads: repeat the key heads until the head shards divide their number.
    repeats = math.lcm(key.shape[2], cut.num_head_shards) // key.shape[2]
    if repeats > 1:
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]
    keys = _up(key.shape[1], blocks.keys)
    keys = _up(keys, min(blocks.resident, keys))

    def by_query(x: Array) -> Array:
        x = _padded(x, blocks.queries, 1)
        return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, group, -1), 1, 3)

    def by_key(x: Array) -> Array:
        return jnp.swapaxes(_padded(x, keys, 1), 1, 2)

    def by_head(x: Array) -> Array:
        return x.reshape(kv_heads, group, *x.shape[1:])

    def by_tile(x: Array) -> Array:
        x = _padded(x, blocks.queries, 1)
        return x.reshape(x.shape[0], -1, blocks.queries // LANES, LANES)

    def lanes(x: Array) -> Array:
        return by_head(jnp.pad(x, [(0, 0), (0, LANES - x.shape[1])])[:, None])

    def turn(phase: Array, to: int) -> Array:
        """Returns the cosine and sine of every channel, 1 and 0 for channels that are not rotated: [B or 1, 2, L, C]."""
        both = jnp.stack([jnp.cos(phase), jnp.sin(phase)], 1)
        both = jnp.concatenate([both, both], -1) if rotation.pairing == "half" else jnp.repeat(both, 2, axis=-1)
        rest = jnp.broadcast_to(jnp.asarray([1.0, 0.0])[:, None, None], (*both.shape[:3], query.shape[-1] - both.shape[-1]))
        return _padded(jnp.concatenate([both, rest], -1), to, 2)

    key_positions, *segments = with_padding(mask, length, key_positions, keys - key.shape[1])
    turn_keys = rotation is not None and rotation.key_phase is not None
    if turn_keys and keys > blocks.resident:  # inside the kernel each query tile would rotate the blocks again
        key, turn_keys = apply_rotation(key, rotation.key_phase, rotation.pairing), False
    counting = None
    if counts is not None:
        positions = counts.tables[1].shape[-2]
        counting = Counting(
            last=positions - 1,
            rows=_up(positions, SUBLANES),
            exact=query.dtype == jnp.float32,
            has_sublane_gather=chip.has_sublane_gather,
        )
    plan = Plan(
        blocks=blocks,
        rules=Rules(mask.is_causal, *mask.window, segmented=segments[0] is not None),
        soft_cap=logits_soft_cap,
        counting=counting,
        index=looks.fused.index if looks else None,
        uniform=looks.fused.uniform if looks else None,
        penalised=penalty is not None,
        turn_keys=turn_keys,
        vmem=chip.vmem,
        interpret=interpret,
    )
    operands = Operands(
        query=by_query(query),
        key=by_key(key),
        value=by_key(value),
        scale=jnp.asarray(scale, jnp.float32).reshape(1),
        query_positions=by_tile(query_positions),
        key_positions=key_positions[:, None],
        query_segments=None if segments[0] is None else by_tile(segments[0]),
        key_segments=None if segments[1] is None else segments[1][:, None],
        counted_query=None if counts is None or raw else by_query(jnp.swapaxes(counts.rows["query"], 1, 2)),
        embedding=None if counts is None else _embedding(counts.tables[1], counting.rows, by_head),
        table=None if looks is None else lanes(looks.tables.astype(jnp.float32).T),
        slopes=None if penalty is None else lanes(jnp.broadcast_to(penalty.tables[:, None], (query.shape[2], LANES))),
        query_turn=None if rotation is None else turn(rotation.query_phase, blocks.queries),
        key_turn=turn(rotation.key_phase, keys) if turn_keys else None,
        partner=None if rotation is None else _partner(query, 2 * rotation.query_phase.shape[-1], rotation.pairing),
    )
    return plan, operands


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


def _fitted(blocks: Blocks, queries: int, keys: int) -> Blocks:
    """Shrinks block sizes to the lengths of the call, so that little is padding."""
    rows = _up(-(-queries // -(-queries // blocks.queries)), LANES)
    columns = _up(-(-keys // -(-keys // blocks.keys)), blocks.strip)
    strip = blocks.strip
    if columns >= keys + LANES:  # short calls: the shortest strips
        strip = LANES
        columns = _up(-(-keys // -(-keys // blocks.keys)), strip)
    tiles = -(-keys // columns)
    held = max(1, blocks.resident // columns)
    held = -(-tiles // -(-tiles // held))
    return Blocks(rows, columns, strip, held * columns)


def _padded(x: Array, to: int, axis: int) -> Array:
    """Pads x to a multiple of ``to`` along an axis by repeating its last entry."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % to)
    return jnp.pad(x, widths, mode="edge") if widths[axis][1] else x


def _embedding(embedding: Array, rows: int, by_head: Any) -> Array:
    """Stacks the embedding and its steps to the next position, with P padded to whole sublanes: [K or 1, G or 1, 2, P, H]."""
    embedding = embedding.astype(jnp.float32)
    steps = jnp.concatenate([jnp.diff(embedding, axis=-2), jnp.zeros_like(embedding[..., :1, :])], -2)
    both = _padded(jnp.stack([embedding, steps], -3), rows, embedding.ndim - 1)
    return by_head(both) if embedding.ndim == 3 else both[None, None]


def _partner(query: Array, turned: int, pairing: str) -> Array:
    """Returns the rotate-half matrix [C, C]: ``x @ partner`` maps each pair of channels (a, b) to (-b, a), the others to 0."""
    first = np.arange(turned // 2) if pairing == "half" else np.arange(0, turned, 2)
    second = first + (turned // 2 if pairing == "half" else 1)
    partner = np.zeros((query.shape[-1],) * 2, np.float32)
    partner[second, first] = -1.0
    partner[first, second] = 1.0
    return jnp.asarray(partner, query.dtype)


# Forward and backward, on each device's shard -----------------------------------------------------------------------------------

_LETTERS = dict(  # axes of the operands, as in ``per_shard``
    query="bn...",
    key="bn..",
    value="bn..",
    scale=".",
    query_positions="b...",
    key_positions="b..",
    query_segments="b...",
    key_segments="b..",
    counted_query="bn...",
    embedding="n....",
    table="n...",
    slopes="n...",
    query_turn="b...",
    key_turn="b...",
    partner="..",
    high="bn....",
    low="bn....",
)
_ROWS = "bn...."


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(function: Any, plan: Plan, present: tuple[str, ...], interpret: Any, *arrays: Array) -> tuple[Array, ...]:
    """Calls ``function(plan, operands, *more)``, where ``arrays`` are the operands named in ``present``, then ``more``.

    The cache of this jit avoids tracing the kernel, ten thousand operations, again.
    """
    fields = dict.fromkeys(field.name for field in dataclasses.fields(Operands)) | dict(zip(present, arrays, strict=False))
    return function(dataclasses.replace(plan, interpret=interpret), Operands(**fields), *arrays[len(present) :])


def sharded(
    function: Any, plan: Plan, cut: ShardSpec, x: Operands, more: tuple[Array, ...], letters: tuple[str, ...], results: Any
) -> Any:
    """Calls ``function(plan, operands, *more)`` on each device's shard; the kernel is interpreted where it is lowered for a CPU."""
    present = tuple(field.name for field in dataclasses.fields(x) if getattr(x, field.name) is not None)
    if plan.interpret is None:
        part = functools.partial(deferred, _run, (function, plan, present))
    else:
        part = functools.partial(_run, function, plan, present, plan.interpret)
    arrays = [getattr(x, name) for name in present]
    return per_shard(part, cut, (*[_LETTERS[name] for name in present], *letters), results)(*arrays, *more)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(plan: Plan, cut: ShardSpec, x: Operands) -> Array:
    """Computes attention on the operands, differentiably: [B, K, G, T, V] in the dtype of value."""
    return _forward(plan, cut, x)[0]


def _outputs(plan: Plan, x: Operands) -> tuple[Array, ...]:
    return tuple(forward(plan, x))


def _forward(plan: Plan, cut: ShardSpec, x: Operands) -> tuple[Array, Any]:
    rows = 1 if plan.counting is None else 5
    out, *saved = sharded(_outputs, plan, cut, x, (), (), ("bn...", *[_ROWS] * rows))
    return out, (x, out, tuple(saved))


def learned(x: Operands) -> list[str]:
    """Returns the names of the operands that have gradients."""
    names = ["query", "key", "value", "scale"]
    return names + [name for name in ("counted_query", "embedding", "table") if getattr(x, name) is not None]


def _gradients(plan: Plan, x: Operands, d_out: Array, delta: Array, *saved: Array) -> tuple[Array, ...]:
    found = summed_up(x, backward(plan, x, saved, d_out, delta))
    return tuple(found[name] for name in learned(x))


def summed_up(x: Operands, found: dict[str, Array]) -> dict[str, Array]:
    """Reduces the results of ``backward`` to the shapes of the operands."""
    found["scale"] = found["scale"].sum().reshape(1)
    if "embedding" in found:
        over = tuple(n for n, size in enumerate(x.embedding.shape[:2]) if size == 1)
        of_positions = found["embedding"].sum(0).sum(over, keepdims=True)
        # The whole gradient goes to the positions and none to the steps, which are differences of positions.
        found["embedding"] = jnp.stack([of_positions, jnp.zeros_like(of_positions)], 2)
    if "table" in found:  # by table index and query lane
        found["table"] = found["table"].sum((0, -1))[:, :, None]
    return found


def _backward(plan: Plan, cut: ShardSpec, kept: Any, d_out: Array) -> tuple[Operands]:
    x, out, saved = kept
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    names = learned(x)
    results = tuple(exact(_LETTERS[name], getattr(x, name)) for name in names)
    more = d_out, by_tile(plan, delta), *saved
    found = sharded(_gradients, plan, cut, x, more, ("bn...", *[_ROWS] * (1 + len(saved))), results)
    return (gradient_of(x, dict(zip(names, found, strict=True))),)


def by_tile(plan: Plan, rows: Array) -> Array:
    """Reshapes row values [B, K, G, T] to the layout of the kernels, [B, K, G, I, t / 128, 128]."""
    return rows.reshape(*rows.shape[:3], -1, plan.groups, LANES)


def gradient_of(x: Operands, given: dict[str, Array]) -> Operands:
    """Returns the cotangent of the operands from gradients by name, in the operands' dtypes; float0 for integer operands."""

    def like(name: str) -> Any:
        primal = getattr(x, name)
        if primal is None:
            return None
        if name in given:
            return given[name].astype(primal.dtype)
        if jnp.issubdtype(primal.dtype, jnp.inexact):
            return jnp.zeros_like(primal)
        return np.zeros(primal.shape, jax.dtypes.float0)

    return Operands(**{field.name: like(field.name) for field in dataclasses.fields(x)})


_attend.defvjp(_forward, _backward)
