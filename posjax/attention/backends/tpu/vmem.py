"""Estimates of the VMEM and SMEM that the TPU kernels need, before anything is compiled, and smaller block sizes to try.

The backward pass needs more of everything than the forward pass, so the estimate of a call is that of its backward pass:

    windows   blocks of operands and results, double-buffered: one is in use while the next is loaded or the last is stored
    scratch   the buffers of both passes, and those of the backward pass alone: their gradients, and sums for queries and keys
    spilled   values of a tile that do not fit into registers, estimated as an upper bound on the amounts that the compiler reported

The compiler may need less if operands fit into VMEM as a whole or blocks never change.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends.tpu.blocks import Blocks
from posjax.attention.backends.tpu.step import Operands, Plan, inputs_of, make_scalars, queries_of, scratch_of
from posjax.attention.backends.tpu.tiles import LANES, SUBLANES
from posjax.checks import round_up

SMEM = 2**20 - 2**14  # bytes; every generation has 1 MiB
# Bytes by itemsize: per pair of a tile, per channel of its queries and keys, and per query and position of CoPE or key of a strip.
# Fitted as upper bounds to the ``Kernel.vmem`` that ``posjax.compile.aot`` reports.
_SPILLED = {2: (11, 5, 8), 4: (16, 16, 24)}
_SPILLED_BY_ROTATION = 12  # per query and channel
_SPILLED_BY_COMPARING = 40  # per query and position, on chips without a sublane gather


def size(shape: Any, dtype: Any) -> int:
    """Returns the bytes of an array in VMEM, its last two axes padded to whole registers; axes that are None are omitted."""
    item = jnp.dtype(dtype).itemsize
    *outer, rows, columns = (1, 1, *(n for n in shape if n is not None))
    return math.prod(outer) * round_up(rows, SUBLANES * 4 // item) * round_up(columns, LANES) * item


def needed(plan: Plan, x: Operands) -> int:
    """Returns an upper estimate of the VMEM of a call in bytes, from its plan and the shapes of its operands."""
    return buffers(plan, x) + _spilled(plan, x)


def buffers(plan: Plan, x: Operands) -> int:
    """Returns the bytes of the windows and scratch buffers of the backward pass."""
    blocks, width, value_width = plan.blocks, x.query.shape[-1], x.value.shape[-1]
    resident = min(blocks.block_kv_resident, x.key.shape[2])
    names, arrays, specs = inputs_of(plan, x, lambda *_: 0)
    windows = {name: size(spec.block_shape, array.dtype) for name, array, spec in zip(names, arrays, specs, strict=True)}
    summed = ("key", "value", "embedding", "numbers", "query_features", "key_features")
    windows |= {f"d_{name}": windows[name] for name in summed if name in windows}
    windows["d_out"] = size((blocks.block_q, value_width), x.value.dtype)
    for name in queries_of(x):
        dtype = x.query.dtype if resident == x.key.shape[2] else jnp.float32  # float32 if summed over blocks of keys
        windows[f"d_{name}"] = size((blocks.block_q, getattr(x, name).shape[-1]), dtype)
    windows["rows"] = 14 * size((plan.groups, LANES), jnp.float32)  # statistics and the state of counts
    scratch = {name: size(a.shape, a.dtype) for name, a in scratch_of(plan, x).items() if "vmem" in str(a.memory_space)}
    scratch |= {f"d_{name}": n for name, n in scratch.items() if not name.startswith("rotated")}
    for name, shape in {"dk_acc": (resident, width), "dv_acc": (resident, value_width), "dq_acc": (width, blocks.block_q)}.items():
        scratch[name] = size(shape, jnp.float32)
    if plan.index is not None:
        windows["d_table"], scratch["d_table_acc"] = (size((*n, LANES, LANES), jnp.float32) for n in ((), (SUBLANES,)))
    return 2 * sum(windows.values()) + sum(scratch.values())


def _spilled(plan: Plan, x: Operands) -> int:
    blocks, width = plan.blocks, x.query.shape[-1]
    by_pair, by_channel, by_count = _SPILLED[jnp.dtype(x.query.dtype).itemsize]
    spilled = by_pair * blocks.block_q * blocks.block_kv + by_channel * (blocks.block_q + blocks.block_kv) * width
    if x.query_cos_sin is not None:
        spilled += _SPILLED_BY_ROTATION * blocks.block_q * width
    if plan.counting is not None:
        by_position = by_count if plan.counting.has_sublane_gather else _SPILLED_BY_COMPARING
        spilled += blocks.block_q * (by_count * blocks.block_kv_count + by_position * plan.counting.rows)
    return spilled


def scalars(plan: Plan, x: Operands, parts: int) -> int:
    """Returns the bytes of SMEM that the results of ``make_scalars`` take where ``parts`` devices share the batch."""
    shapes = jax.eval_shape(lambda x: make_scalars(plan, x), x)
    given = [x.query_positions, x.key_positions, x.query_segments, x.key_segments]
    rows = max(array.shape[0] for array in given if array is not None)
    return sum(4 * array.size for array in shapes) // min(rows, parts)


def smaller(blocks: Blocks) -> Iterator[Blocks]:
    """Yields the blocks, then ever smaller ones: fewer resident keys, down to those of a tile, then a smaller tile."""
    while True:
        yield from (
            blocks._replace(block_kv_resident=blocks.block_kv * n) for n in _halved(blocks.block_kv_resident // blocks.block_kv)
        )
        if max(blocks.block_q, blocks.block_kv) <= LANES:
            return
        if blocks.block_q >= blocks.block_kv:
            blocks = blocks._replace(block_q=_half(blocks.block_q))
        else:
            keys, strip = _half(blocks.block_kv), min(blocks.block_kv_count, _half(blocks.block_kv))
            strip = strip if keys % strip == 0 else LANES
            blocks = Blocks(blocks.block_q, keys, strip, max(1, blocks.block_kv_resident // keys) * keys)


def _halved(n: int) -> list[int]:
    return [n] if n < 2 else [n, *_halved(n // 2)]


def _half(n: int) -> int:
    """Halves a multiple of 128, rounding down to a multiple of 128 (at least 128)."""
    return max(1, n // LANES // 2) * LANES
