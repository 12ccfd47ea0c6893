"""Attention on TPU: the entry point of the Pallas kernels, their operand layout, and the calls that they do not support.

``forward.py`` and ``backward.py`` hold one kernel each.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends import kernel_call
from posjax.attention.backends.kernel_biases import (
    PairProgram,
    biases_by_form,
    features_of,
    index_of,
    numbers_of,
    uniform_of,
    unsupported_biases,
)
from posjax.attention.backends.kernel_call import pad_to_multiple
from posjax.attention.backends.shards import ShardSpec, infer_shard_spec
from posjax.attention.backends.sinks import with_sink
from posjax.attention.backends.tpu.backward import backward
from posjax.attention.backends.tpu.blocks import Blocks, Chip, chip_at_hand
from posjax.attention.backends.tpu.forward import forward
from posjax.attention.backends.tpu.step import Operands, Plan
from posjax.attention.backends.tpu.tiles import LANES, SUBLANES, Counting
from posjax.attention.backends.tpu.vmem import SMEM, needed, scalars, smaller
from posjax.attention.call import AttentionCall
from posjax.checks import round_up
from posjax.core.manual_axes import untracked
from posjax.core.masks import Rules, with_padding
from posjax.core.structures import Rotate
from posjax.typing import Array, Float

NAME: str = "tpu"  # the platform in jax.lax.platform_dependent
BLOCK_SIZES_CLS = Blocks  # type of this backend's ``block_sizes``
_MOST_POSITIONS = 512  # CoPE positions; tables of more positions would fill VMEM
_MOST_COMPARED = 128  # CoPE positions on a chip without a sublane gather, where lookups compare indices instead


def unsupported_reason(call: AttentionCall, *, block_sizes: Blocks | None = None, spec: ShardSpec | None = None) -> str | None:
    """Returns why the kernel does not support a call, naming the argument at fault, or None if it does; see ``attention``."""
    query, value, chip = call.query, call.value, chip_at_hand(call.query)
    if (reason := kernel_call.unsupported_sizes(call.query, call.key, call.value)) is not None:
        return reason
    if (reason := kernel_call.unsupported_arrays(call)) is not None:
        return reason
    if query.dtype not in (jnp.float32, jnp.bfloat16):
        return f"query has dtype {query.dtype} (bfloat16 and float32 are supported)"
    if max(query.shape[-1], value.shape[-1]) > 1024:
        return f"query has {query.shape[-1]} channels and value {value.shape[-1]} (at most 1024)"
    if (reason := unsupported_biases(call)) is not None:
        return reason
    forms = biases_by_form(call.biases)
    counts, looks = forms.counting_table, forms.lookup_table
    max_positions = _MOST_POSITIONS if chip.has_sublane_gather else _MOST_COMPARED
    if counts is not None and (positions := counts.table.shape[1]) > max_positions:
        return f"max_position={positions} of cope (at most {max_positions} on this chip)"
    if looks is not None and (width := looks.table.shape[1]) >= LANES:
        return f"num_buckets={width} (fewer than {LANES})"
    spec = infer_shard_spec(query) if spec is None else spec
    return _exceeds_vmem(chip, block_sizes, call) or _exceeds_smem(chip, block_sizes, spec, call)


def _exceeds_smem(chip: Chip, block_sizes: Blocks | None, spec: ShardSpec, call: AttentionCall) -> str | None:
    """Returns why the scalars of a call do not fit the chip's SMEM, or None if they do."""
    blocks = block_sizes or fitting(chip, call)
    assert blocks is not None  # _exceeds_vmem
    smem_bytes = scalars(*_shapes(call, blocks, chip), spec.num_batch_shards)
    if smem_bytes <= SMEM:
        return None
    arrays = dict(segment_ids=call.mask.query_segments, query_positions=call.query_positions, key_positions=call.key_positions)
    rows = {name: array.shape[0] for name, array in arrays.items() if array is not None and array.shape[0] > 1} or {"query": 1}
    tokens = f"{max(rows.values())} x {call.query.shape[1]} tokens"
    return f"{' and '.join(rows)} of {tokens} takes {smem_bytes / 2**20:.1f} MiB of 1 MiB of SMEM (fewer on a device fit)"


def _exceeds_vmem(chip: Chip, block_sizes: Blocks | None, call: AttentionCall) -> str | None:
    """Returns why a call does not fit the chip's VMEM, or None if it does."""
    if block_sizes is not None and (vmem_bytes := _vmem_of(call, block_sizes, chip)) <= chip.vmem:
        return None
    fitting_blocks = fitting(chip, call)
    width, vmem = call.query.shape[-1], f"{chip.vmem / 2**20:.0f} MiB of VMEM"
    if fitting_blocks is None:
        forms = biases_by_form(call.biases)
        others, counts = tuple(bias for bias in call.biases if bias is not forms.counting), forms.counting_table
        if counts is not None and fitting(chip, call.replace(biases=others)) is not None:
            return f"max_position={counts.table.shape[1]} of cope on heads of {width} channels does not fit {vmem}"
        return f"query has {width} channels and value {call.value.shape[-1]}, of which no tile fits {vmem}"
    if block_sizes is None:
        return None
    return f"block_sizes={block_sizes} takes about {vmem_bytes / 2**20:.0f} MiB of {vmem}; block_sizes={fitting_blocks} fits"


def fitting(chip: Chip, call: AttentionCall) -> Blocks | None:
    """Returns the chip's default block sizes, or the first smaller ones that fit its VMEM; None if none fit."""
    default = chip.blocks(call.query.dtype, max(call.query.shape[-1], call.value.shape[-1]))
    return next((blocks for blocks in smaller(default) if _vmem_of(call, blocks, chip) <= chip.vmem), None)


def _vmem_of(call: AttentionCall, blocks: Blocks, chip: Chip) -> int:
    """Returns an upper estimate of the VMEM that a call takes, in bytes."""
    return needed(*_shapes(call, blocks, chip))


def _shapes(call: AttentionCall, blocks: Blocks, chip: Chip) -> tuple[Plan, Operands]:
    """Returns the results of ``to_operands`` with shapes in place of arrays."""
    plans = []

    def operands() -> Operands:
        plan, x = to_operands(call, blocks, chip, ShardSpec())
        plans.append(plan)
        return x

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(operands))  # without mesh axes
    return plans[0], shapes


@untracked
def attention(
    call: AttentionCall,
    *,
    block_sizes: Blocks | None = None,
    spec: ShardSpec | None = None,
    chip: Chip | None = None,
    interpret: Any = None,
    platforms: tuple[str, ...] | None = None,
) -> Float[Array, "B T N V"]:
    """Computes attention with the Pallas kernels, each device on its shard of batch and heads.

    Args:
      call: a call for which ``unsupported_reason`` returns None, which is not checked again. The kernel applies pending rotations
        that all heads share and that are not learned.
      block_sizes: None takes the defaults of the chip, or smaller ones that fit its VMEM.
      spec: how the mesh shards batch and heads; None infers it from the type of the query.
      chip: the TPU generation; None takes that of the query's mesh, of the mesh in context, or of this process.
      interpret: as in ``pallas_call``; None interprets the kernel only if the program is lowered for a CPU.
      platforms: as in ``deferred``.

    Returns:
      [B, T, N, V] in the dtype of value; rows without an allowed key are zero.
    """
    spec = infer_shard_spec(call.query) if spec is None else spec
    chip = chip_at_hand(call.query) if chip is None else chip
    if block_sizes is None:
        block_sizes = fitting(chip, call) or Blocks(LANES, LANES, LANES, LANES)
    plan, operands = to_operands(call, block_sizes, chip, spec, interpret)
    length = call.query.shape[1]
    out, lse = kernel_call.attend(_KERNELS, dataclasses.replace(plan, platforms=platforms), spec, operands)
    return with_sink(from_blocks(out, length), from_blocks(lse.reshape(*out.shape[:4], 1), length)[..., 0], call.sink)


def from_blocks(out: Array, length: int) -> Array:
    """Reshapes the kernel's output [B, K, G, T, V] to [B, T, N, V] and removes the padding of T."""
    batch, kv_heads, group, _, width = out.shape
    return jnp.moveaxis(out, 3, 1).reshape(batch, -1, kv_heads * group, width)[:, :length]


def to_operands(
    call: AttentionCall, block_sizes: Blocks, chip: Chip, spec: ShardSpec, interpret: Any = None
) -> tuple[Plan, Operands]:
    """Converts a call to the static plan and the padded operands of the kernel; arguments as in ``attention``."""
    channels = sorted(_channels_of(rotation) for rotation in call.rotations if rotation.query_phase is not None)
    overlap = any(later[0] < earlier[1] for earlier, later in itertools.pairwise(channels))
    if overlap or not all(map(_rotates_tiles, call.rotations)):
        call = call.transformed()
    blocks = _fitted(block_sizes, call.query.shape[1], call.key.shape[1])
    keys = round_up(call.key.shape[1], blocks.block_kv)
    keys = round_up(keys, min(blocks.block_kv_resident, keys))
    rotates_keys = any(rotation.key_phase is not None for rotation in call.rotations)
    if rotates_keys and keys > blocks.block_kv_resident:  # inside the kernel each query tile would rotate the blocks again
        call, rotates_keys = call.with_transformed_keys(), False
    query, key, value, rotations = call.query, call.key, call.value, call.rotations
    length = query.shape[1]
    forms = biases_by_form(call.biases)
    counts, looks, pairs = forms.counting_table, forms.lookup_table, forms.pairs

    # Grouped heads: repeat the key heads until the head shards divide their number.
    repeats = math.lcm(key.shape[2], spec.num_head_shards) // key.shape[2]
    if repeats > 1:
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    kv_heads, group = key.shape[2], query.shape[2] // key.shape[2]

    def by_query(x: Array) -> Array:
        x = pad_to_multiple(x, blocks.block_q, 1)
        return jnp.moveaxis(x.reshape(*x.shape[:2], kv_heads, group, -1), 1, 3)

    def by_key(x: Array) -> Array:
        return jnp.swapaxes(pad_to_multiple(x, keys, 1), 1, 2)

    def by_head(x: Array) -> Array:
        return x.reshape(kv_heads, group, *x.shape[1:])

    def by_tile(x: Array) -> Array:
        x = pad_to_multiple(x, blocks.block_q, 1)
        return x.reshape(x.shape[0], -1, blocks.block_q // LANES, LANES)

    def of_heads(x: Array) -> Array:
        """Converts features [F, B or 1, N or K or 1, T or S] to [B or 1, K or 1, G or 1, F, T or S]."""
        heads = x.shape[2]
        if 1 < heads < kv_heads:  # key heads that have been repeated
            x = jnp.repeat(x, kv_heads // heads, axis=2)
        shape = (kv_heads, group) if heads == kv_heads * group else (x.shape[2], 1)
        return jnp.moveaxis(x.reshape(*x.shape[:2], *shape, x.shape[3]), 0, 3)

    def by_tiles(x: Array | None) -> Array | None:
        if x is None:
            return None
        x = pad_to_multiple(of_heads(x), blocks.block_q, 4)
        return x.reshape(*x.shape[:4], -1, blocks.block_q // LANES, LANES)

    def by_blocks(x: Array | None) -> Array | None:
        return None if x is None else pad_to_multiple(of_heads(x), keys, 4)

    def lanes(x: Array) -> Array:
        return by_head(jnp.pad(x, [(0, 0), (0, LANES - x.shape[1])])[:, None])

    key_positions, query_segments, key_segments = with_padding(call.mask, length, call.key_positions, keys - key.shape[1])
    counting = embedding = None
    if counts is not None:
        positions = counts.table.shape[1]
        counting = Counting(
            last=positions - 1,
            rows=round_up(positions, SUBLANES),
            exact=query.dtype == jnp.float32,
            has_sublane_gather=chip.has_sublane_gather,
        )
        embedding = _embedding(counts.table, counting.rows, by_head)
    plan = Plan(
        blocks=blocks,
        rules=Rules(call.mask.is_causal, *call.mask.window, segmented=query_segments is not None),
        soft_cap=call.logits_soft_cap,
        counting=counting,
        index=index_of(forms.lookup),
        uniform=uniform_of(forms.lookup),
        pairs=tuple(map(PairProgram.of, pairs)),
        rotates_keys=rotates_keys,
        vmem=chip.vmem,
        interpret=interpret,
    )
    counted_query = None if counts is None else counts.query
    numbers = numbers_of(pairs, query.shape[2])
    width = query.shape[-1]
    operands = Operands(
        query=by_query(query),
        key=by_key(key),
        value=by_key(value),
        scale=call.scale.reshape(1),
        query_positions=by_tile(call.query_positions),
        key_positions=key_positions[:, None],
        query_segments=None if query_segments is None else by_tile(query_segments),
        key_segments=None if key_segments is None else key_segments[:, None],
        counted_query=None if counted_query is None else by_query(_of_heads(counted_query, query.shape[2], 2)),
        embedding=embedding,
        table=None if looks is None else lanes(_of_heads(looks.table.astype(jnp.float32), query.shape[2])),
        numbers=None if numbers is None else by_head(jnp.broadcast_to(numbers[..., None], (*numbers.shape, LANES))),
        query_features=by_tiles(features_of(pairs, "query")),
        key_features=by_blocks(features_of(pairs, "key")),
        query_cos_sin=_cos_sin(rotations, "query", width, blocks.block_q) if rotations else None,
        key_cos_sin=_cos_sin(rotations, "key", width, keys) if rotates_keys else None,
        rotate_half_matrix=_rotate_half_matrix(rotations, width).astype(query.dtype) if rotations else None,
    )
    return plan, operands


def _fitted(blocks: Blocks, queries: int, keys: int) -> Blocks:
    """Shrinks block sizes to the lengths of the call, so that little is padding."""
    rows = round_up(-(-queries // -(-queries // blocks.block_q)), LANES)
    columns = round_up(-(-keys // -(-keys // blocks.block_kv)), blocks.block_kv_count)
    strip = blocks.block_kv_count
    if columns >= keys + LANES:  # short calls: the shortest strips
        strip = LANES
        columns = round_up(-(-keys // -(-keys // blocks.block_kv)), strip)
    tiles = -(-keys // columns)
    tiles_per_block = max(1, blocks.block_kv_resident // columns)
    tiles_per_block = -(-tiles // -(-tiles // tiles_per_block))
    return Blocks(rows, columns, strip, tiles_per_block * columns)


def _of_heads(x: Array, heads: int, axis: int = 0) -> Array:
    """Broadcasts the axis of heads, N or 1."""
    return jnp.broadcast_to(x, (*x.shape[:axis], heads, *x.shape[axis + 1 :]))


def _embedding(embedding: Array, rows: int, by_head: Any) -> Array:
    """Stacks the embedding and its steps to the next position, with P padded to whole sublanes: [K or 1, G or 1, 2, P, H]."""
    embedding = embedding.astype(jnp.float32)
    steps = jnp.concatenate([jnp.diff(embedding, axis=1), jnp.zeros_like(embedding[:, :1])], 1)
    both = pad_to_multiple(jnp.stack([embedding, steps], 1), rows, 2)
    return by_head(both) if embedding.shape[0] > 1 else both[None]


def _rotates_tiles(rotation: Rotate) -> bool:
    """Returns whether the kernel can apply a rotation to tiles as it loads them: it computes no gradients of phases."""
    arrays = (rotation.query_phase, rotation.key_phase, rotation.query_gain, rotation.key_gain)
    shared = all(x is None or x.shape[2] == 1 for x in arrays)
    return shared and not rotation.learned and rotation.query_phase is not None


def _channels_of(rotation: Rotate) -> tuple[int, int]:
    return rotation.offset, rotation.offset + 2 * rotation.query_phase.shape[-1]


def _cos_sin(rotations: tuple[Rotate, ...], side: str, width: int, multiple: int) -> Array:
    """Returns the cosine and sine of every channel times its gain, 1 and 0 for channels that are not rotated.

    Returns:
      [B or 1, 2, L, width], with L padded.
    """
    made = []
    for rotation in rotations:
        phase, gain = (getattr(rotation, f"{side}_{name}") for name in ("phase", "gain"))
        both = jnp.stack([jnp.cos(phase), jnp.sin(phase)], 1)[:, :, :, 0]
        if gain is not None:
            both = both * jnp.broadcast_to(gain, (*gain.shape[:3], phase.shape[-1]))[:, None, :, 0]
        both = jnp.concatenate([both, both], -1) if rotation.pairing == "half" else jnp.repeat(both, 2, axis=-1)
        made.append((rotation.offset, jax.lax.stop_gradient(both)))
    shape = jnp.broadcast_shapes(*(both.shape[:3] for _, both in made))
    pieces, end = [], 0
    for offset, both in [*sorted(made, key=lambda part: part[0]), (width, None)]:
        rest = jnp.asarray([1.0, 0.0])[:, None, None]
        pieces.append(jnp.broadcast_to(rest, (*shape, offset - end)))
        if both is not None:
            pieces.append(jnp.broadcast_to(both, (*shape, both.shape[-1])))
            end = offset + both.shape[-1]
    return pad_to_multiple(jnp.concatenate([piece for piece in pieces if piece.shape[-1]], -1), multiple, 2)


def _rotate_half_matrix(rotations: tuple[Rotate, ...], width: int) -> Array:
    """Returns the matrix [width, width] with which ``x @ matrix`` maps each pair of channels (a, b) to (-b, a), the others to 0."""
    matrix = np.zeros((width, width), np.float32)
    for rotation in rotations:
        start, end = _channels_of(rotation)
        half = (end - start) // 2
        first = np.arange(start, start + half) if rotation.pairing == "half" else np.arange(start, end, 2)
        second = first + (half if rotation.pairing == "half" else 1)
        matrix[second, first] = -1.0
        matrix[first, second] = 1.0
    return jnp.asarray(matrix)


# Forward and backward, on each device's shard -----------------------------------------------------------------------------------

LETTERS = dict(  # axes of the operands, as in ``per_shard``
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
    numbers="n...",
    query_features="bn.....",
    key_features="bn...",
    query_cos_sin="b...",
    key_cos_sin="b...",
    rotate_half_matrix="..",
    high="bn....",
    low="bn....",
)


def _outputs(plan: Plan, x: Operands) -> tuple[Array, ...]:
    return tuple(forward(plan, x))


def differentiable_operands(plan: Plan, x: Operands) -> list[str]:
    """Returns the names of the operands that have gradients."""
    names = ["query", "key", "value", "scale"]
    names += [name for name in ("counted_query", "embedding", "table") if getattr(x, name) is not None]
    names += ["numbers"] if any(program.learned for program in plan.pairs) else []
    return names + (["query_features", "key_features"] if any(program.float_features for program in plan.pairs) else [])


def _gradients(plan: Plan, x: Operands, d_out: Array, delta: Array, *saved: Array) -> tuple[Array, ...]:
    grads = reduce_gradients(x, backward(plan, x, saved, d_out, delta))
    return tuple(grads[name] for name in differentiable_operands(plan, x))


def reduce_gradients(x: Operands, grads: dict[str, Array]) -> dict[str, Array]:
    """Reduces the results of ``backward`` to the shapes of the operands."""
    grads["scale"] = grads["scale"].sum().reshape(1)
    if x.embedding is not None and "embedding" in grads:
        over = tuple(n for n, size in enumerate(x.embedding.shape[:2]) if size == 1)
        of_positions = grads["embedding"].sum(0).sum(over, keepdims=True)
        # The full gradient goes to the positions and none to the steps, which are differences of positions.
        grads["embedding"] = jnp.stack([of_positions, jnp.zeros_like(of_positions)], 2)
    if "table" in grads:  # by table index and query lane
        grads["table"] = grads["table"].sum((0, -1))[:, :, None]
    if "numbers" in grads:
        grads["numbers"] = grads["numbers"].sum(0)
    for name in ("query_features", "key_features"):
        if name in grads:
            over = tuple(n for n, size in enumerate(getattr(x, name).shape[:3]) if size == 1)
            grads[name] = grads[name].sum(over, keepdims=True)
    return grads


def by_tile(plan: Plan, rows: Array) -> Array:
    """Reshapes row values [B, K, G, T] to the layout of the kernels, [B, K, G, I, t / 128, 128]."""
    return rows.reshape(*rows.shape[:3], -1, plan.groups, LANES)


_KERNELS = kernel_call.Kernels(
    letters=LETTERS,
    out="bn...",
    rows="bn....",
    forward=_outputs,
    num_residuals=lambda plan: 1 if plan.counting is None else 5,
    backward=_gradients,
    differentiable=differentiable_operands,
    to_rows=by_tile,
)
