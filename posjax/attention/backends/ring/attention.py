"""Context parallelism: attention over a sequence that is sharded over one axis of a mesh, forward and backward.

Queries stay on their device, and keys and values move around the ring (Ring Attention, Liu et al., arXiv:2310.01889). Each device
attends to the keys that it currently holds, in the kernel of its platform or in plain XLA, and merges the partial results by the
log-sum-exp of each row. No device ever holds more than its share of the sequence. The per-key arrays of bias terms move with the
keys. Under a causal mask, a zig-zag layout balances the work: the sequence is split into 2 C chunks for C devices, and device d
holds chunks d and 2 C - 1 - d. This call converts to the layout and back, at the cost of one ring step each way; its arguments and
its result are in natural order.

Without a term that has a carry, the order of visits does not matter, and all pieces move around the ring together:

    C steps; at step s device d has the keys of device d - s

A term with a carry (CoPE counts the gates between key and query) must process keys from right to left, so each chunk of queries
is processed with its own chunk of keys first, then with the one to its left, and so on. The chunks of keys move along one path
through both slots of every device, to the right through the low slots and back to the left through the high slots:

    low    chunk of keys  0 -> 1 -> 2 -> 3        (device 0 .. 3)
    high                  7 <- 6 <- 5 <- 4        2 C steps; at step s chunk of queries q has chunk of keys q - s

Each chunk of keys is split further into pieces. One piece is in transit while another is processed, and the gradients computed for
a piece are added to those that arrive with it. The communication buffers are thus a fraction of a device's share, and communication
still overlaps with computation.

The carry of a term stays with its queries. A step in which the mask allows no pair visits no tile, and a chunk in which all rows of
a term have saturated is plain flash attention. From step C on, the low chunks of queries have no keys left: the ordered schedule
takes the time of 3 C - 1 full pairs of chunks, compared with 2 C where the order is free, and 4 C - 2 without the zig-zag.

The backward pass runs the schedule in reverse: keys and values move back together with their accumulated gradients, and the
gradient of the carry flows from left to right. The forward pass saves the carries of every step for it, one number per row and
step.

The modules ``ring.xla_chunked``, ``ring.tpu`` and ``ring.gpu`` process one part of the keys on a device. They share one interface,
which ``ring.xla_chunked`` documents. ``ring.layout`` converts to the zig-zag layout and back, and
``ring.context`` finds the axis of the mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from posjax.attention.backends.constants import EMPTY_LSE
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.kernel_call import block_sizes_for
from posjax.attention.backends.ring import gpu as ring_gpu
from posjax.attention.backends.ring import tpu as ring_tpu
from posjax.attention.backends.ring import xla_chunked as ring_xla_chunked
from posjax.attention.backends.ring.context import Context
from posjax.attention.backends.ring.layout import Chunks
from posjax.attention.backends.shards import ShardSpec, on_shards
from posjax.attention.backends.sinks import with_sink
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.xla_chunked.attention import SAVED
from posjax.attention.backends.xla_chunked.backward import delta_of, floats, runtime_zero
from posjax.attention.call import AttentionCall
from posjax.core.structures import Scan
from posjax.typing import Array, Float

_PIECES = 8  # per chunk of keys, at most
_PIECE = 2048  # keys per piece, at least: the setup of a query tile (expensive for CoPE) is repeated for every piece
_KERNELS = (tpu, gpu)
_PARTS = {tpu.NAME: ring_tpu, gpu.NAME: ring_gpu, "xla": ring_xla_chunked}
_NO_KEYS_LSE = -EMPTY_LSE  # the log-sum-exp over no keys, while the partial results of a row are merged


def attention(
    call: AttentionCall, context: Context, *, kernel: str | None = None, block_sizes: Any = None
) -> Float[Array, "B T N V"]:
    """Computes attention with T and S sharded over a mesh axis.

    Args:
      call: a prepared call. Twice the number of devices of ``context`` must divide T and S.
      context: the mesh axes of the call.
      kernel: "tpu" or "cuda" for that kernel, interpreted where the program is lowered for another platform; "xla" for plain XLA;
        None for the kernel of the platform that the program is lowered for, or "xla" if that platform has none that supports the
        call.
      block_sizes: as in ``posjax.attention``.

    Returns:
      The result of ``xla_chunked.attention``.

    Raises:
      NotImplementedError: if ``unsupported_reason`` returns one.
    """
    if (reason := unsupported_reason(call, context)) is not None:
        raise NotImplementedError(f"attention over the mesh axis {context.axis!r} cannot run this call: {reason}")
    call = call.with_transformed_keys()  # once, before the keys move around the ring
    chunks = Chunks(context.axis, context.parts, call.mask.is_causal)
    split = functools.partial(chunks.split, separate=_sums(call))

    def with_kernel(name: str, platforms: tuple[str, ...] | None = None) -> Callable[[AttentionCall], Array]:
        sizes = next((block_sizes_for(k, block_sizes) for k in _KERNELS if name == k.NAME), None)

        def on_device(part: AttentionCall) -> Array:
            return chunks.unsplit(_around(context, _PARTS[name], split(part), sizes, platforms))

        # Only the TPU kernel rotates queries itself, and then needs no unrotated copy.
        is_rotated = name != tpu.NAME
        return lambda call: on_shards(on_device, context.spec, context.axis)(call.transformed() if is_rotated else call)

    if kernel is not None:
        return with_kernel(kernel)(call)
    supported = {name: with_kernel(name, (name,)) for name in _supported(lambda part: split(part)[0], call, context, block_sizes)}
    # Wraps the entire computation of a device: further inside, the choice of branch would become an array that the backward pass
    # receives.
    default = with_kernel("xla")
    return jax.lax.platform_dependent(call, **supported, default=default) if supported else default(call)


def _supported(
    chunk_of: Callable[[AttentionCall], AttentionCall], call: AttentionCall, context: Context, block_sizes: Any
) -> list[str]:
    """Returns the platforms whose kernels support the call on each device; ``chunk_of`` returns a device's part of the call."""
    supported = []

    def ask(part: AttentionCall) -> Array:
        chunk = chunk_of(part)
        for kernel in _KERNELS:
            sizes = block_sizes_for(kernel, block_sizes)
            if kernel.unsupported_reason(chunk, block_sizes=sizes, spec=ShardSpec()) is None:
                supported.append(kernel.NAME)
        return part.query

    jax.eval_shape(on_shards(ask, context.spec, context.axis), call)
    return supported


def _around(
    context: Context, backend: Any, calls: list[AttentionCall], block_sizes: Any, platforms: tuple[str, ...] | None
) -> list[Array]:
    """Returns the result [B, t, N, V] of each chunk of this device.

    ``backend`` is a module such as ``ring.xla_chunked``; ``platforms`` are those on which its kernels may run (see ``deferred``).
    """
    plans, slots = zip(*(backend.to_operands(call, block_sizes) for call in calls), strict=True)
    length, keys, width = calls[0].query.shape[1], calls[0].key.shape[1], calls[0].value.shape[-1]
    max_pieces = max(1, min(_PIECES, keys // _PIECE))
    splits = ((n, backend.in_parts(plans[0], slots[0], n)) for n in range(max_pieces, 0, -1))
    pieces, plan = next((n, plan) for n, plan in splits if plan is not None)
    plan = plan if platforms is None else dataclasses.replace(plan, platforms=platforms)
    ring = _Ring(backend, plan, context.axis, context.parts, len(calls) == 2, pieces)

    def finished(out: Array, lse: Array, call: AttentionCall) -> Array:
        lse = backend.from_blocks(lse[..., None], length, 1)[..., 0]
        return with_sink(backend.from_blocks(out, length, width), lse, call.sink)

    return list(map(finished, *_attend(ring, slots), calls))


def unsupported_reason(call: AttentionCall, context: Context) -> str | None:
    """Returns the reason why the ring does not support a call; None if it does."""
    queries, keys, parts = call.query.shape[1], call.key.shape[1], 2 * context.parts
    if queries % parts or keys % parts:
        return f"the lengths of query and key must be multiples of {parts}, twice its devices, got {queries} and {keys}"
    if (reason := call.needs_order()) is not None:
        return f"encoding has a structure that the ring does not support: {reason}"
    if (mask := call.mask.boolean) is not None:
        return f"mask must be None, got one of shape {mask.shape}; segment_ids and local_window_size are supported"
    if call.bias is not None:
        return f"bias must be None, got an array of shape {call.bias.shape}; biases of an encoding are supported"
    if _sums(call) and not (call.mask.is_causal and queries == keys):
        return "an encoding that sums over keys needs is_causal=True and as many keys as queries"
    return None


def _sums(call: AttentionCall) -> bool:
    """Returns whether a bias carries a sum along the keys, which must then be visited in order."""
    return any(isinstance(bias.at, Scan) for bias in call.biases)


# Schedule ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Holds the static parameters of a call: the backend, and the schedule by which pieces move."""

    backend: Any  # the module
    plan: Any  # its Plan
    axis: str
    parts: int
    is_ordered: bool
    pieces: int  # per chunk of keys, processed from right to left

    @property
    def steps(self) -> int:
        return self.pieces * (2 * self.parts if self.is_ordered else self.parts)

    def at(self, step: Array) -> Array:
        """Returns the index of the piece that a step processes."""
        return self.pieces - 1 - step % self.pieces

    def moved(self, pieces: Any, back: bool = False) -> Any:
        """Moves pieces, with the slots of this device along their first axis, one step forward, or back."""
        right, left = [(d, d + 1) for d in range(self.parts - 1)], [(d + 1, d) for d in range(self.parts - 1)]
        if not self.is_ordered:
            last = self.parts - 1
            moves = [*left, (0, last)] if back else [*right, (last, 0)]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, moves), pieces)
        # The path turns at its ends: from low to high on the last device, and from high to low on the first.
        here = jax.lax.axis_index(self.axis)
        first, last = here == 0, here == self.parts - 1
        turned_low, turned_high = (last, first) if back else (first, last)
        if back:
            right, left = left, right

        def moved(x: Array) -> Array:
            low, high = (jax.lax.ppermute(x[i], self.axis, moves) for i, moves in enumerate((right, left)))
            return jnp.stack([jnp.where(turned_low, x[1], low), jnp.where(turned_high, x[0], high)])

        return jax.tree.map(moved, pieces)


def _in_pieces(ring: _Ring, by_key: dict[str, Any]) -> dict[str, Any]:
    """Splits per-key arrays, or their gradients, into pieces along a new first axis."""

    def cut(x: Array, axis: int) -> Array:
        if x.shape[axis] == 1 and axis > 0:  # shared by all keys
            return jnp.broadcast_to(x, (ring.pieces, *x.shape))
        return jnp.moveaxis(x.reshape(*x.shape[:axis], ring.pieces, -1, *x.shape[axis + 1 :]), axis, 0)

    return {name: jax.tree.map(functools.partial(cut, axis=ring.backend.BY_KEY[name]), x) for name, x in by_key.items()}


def _stacked(ring: _Ring, slots: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the per-key arrays of all slots, with pieces along the first axis and slots along the second."""
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *(_in_pieces(ring, by_key) for by_key in slots))


def _take_piece(pieces: Any, at: Array | int) -> Any:
    return jax.tree.map(lambda x: x[at], pieces)


def _put_piece(pieces: Any, at: Array, new: Any) -> Any:
    return jax.tree.map(lambda x, y: x.at[at].set(y), pieces, new)


# Forward and backward --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, slots: tuple[Any, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Computes the result of every slot, in the backend's layout and the dtype of value, and the log-sum-exp of its rows.

    ``slots`` are the backend's operands.
    """
    return _forward(ring, slots)[0]


def _forward(ring: _Ring, slots: tuple[Any, ...]) -> tuple[Any, Any]:
    def merge(acc: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[Array, Array]:
        (before, out), (lse, more) = acc, part
        lse = jnp.where(lse < EMPTY_LSE, lse, _NO_KEYS_LSE)
        total = jnp.logaddexp(before, lse)
        return total, out * jnp.exp(before - total)[..., None] + more * jnp.exp(lse - total)[..., None]

    def step(state: Any, number: Array) -> tuple[Any, Any]:
        kv, acc, carries = state
        at = ring.at(number)
        pieces = _take_piece(kv, at)
        kv = _put_piece(kv, at, ring.moved(pieces))  # does not depend on the outputs, so that the two overlap
        carries_out, step_residuals, results = [], [], []
        for i, (x, partial, carried) in enumerate(zip(slots, acc, carries, strict=True)):
            out, lse, *rest = ring.backend.outputs(ring.plan, ring.backend.with_keys(x, _take_piece(pieces, i), carried))
            results.append(merge(partial, (lse, out)))
            step_residuals.append(rest[0])
            carries_out.append(rest[1])
        return (kv, tuple(results), tuple(carries_out)), (tuple(carries_out), tuple(step_residuals))

    def empty(x: Any) -> tuple[Array, Array]:
        out, lse, *_ = jax.eval_shape(functools.partial(ring.backend.outputs, ring.plan), x)
        return jnp.full(lse.shape, _NO_KEYS_LSE, jnp.float32), jnp.zeros(out.shape, jnp.float32)

    start = _stacked(ring, map(ring.backend.by_key, slots)), tuple(map(empty, slots)), tuple(map(ring.backend.carried, slots))
    (_, results, _), (carries, step_residuals) = jax.lax.scan(step, start, jnp.arange(ring.steps))
    out = tuple(partial.astype(x.value.dtype) for (_, partial), x in zip(results, slots, strict=True))
    lses = tuple(jnp.where(total > 0.5 * _NO_KEYS_LSE, total, EMPTY_LSE) for total, _ in results)
    out, lses, carries, step_residuals = checkpoint_name((out, lses, carries, step_residuals), SAVED)
    return (out, lses), (slots, out, lses, carries, step_residuals)


def _backward(ring: _Ring, saved: Any, gradients_out: Any) -> tuple[tuple[Any, ...]]:
    slots, out, lses, carries, step_residuals = saved
    d_out, d_lses = gradients_out
    backend, deltas = ring.backend, tuple(delta_of(o, d) - d_lse for o, d, d_lse in zip(out, d_out, d_lses, strict=True))

    def pair(i: int, number: Array, kv_piece: dict[str, Any], d_carries_out: list[Array], acc: Any = None) -> Any:
        """Computes the gradients of slot i for one step. Those that stay on this device are added to ``acc``."""
        x = slots[i]
        received = jax.tree.map(
            lambda initial, later: jnp.where(number > 0, later[jnp.maximum(number - 1, 0)], initial), backend.carried(x), carries[i]
        )
        residuals = _take_piece(step_residuals[i], number), _take_piece(carries[i], number)
        operands = backend.with_keys(x, kv_piece, received)
        return backend.gradients(ring.plan, operands, lses[i], *residuals, d_out[i], deltas[i], d_carries_out, acc)

    def step(state: Any, number: Array) -> tuple[Any, None]:
        kv, d_kv, d_local, d_carries = state
        at = ring.at(number)
        pieces, d_pieces = (ring.moved(_take_piece(x, at), back=True) for x in (kv, d_kv))
        grads = [pair(i, number, _take_piece(pieces, i), *d_slot) for i, d_slot in enumerate(zip(d_carries, d_local, strict=True))]
        of_keys, d_local, d_carries = zip(*grads, strict=True)
        of_keys = jax.tree.map(lambda *x: jnp.stack(x), *of_keys)
        return (
            _put_piece(kv, at, pieces),
            _put_piece(d_kv, at, jax.tree.map(jnp.add, d_pieces, of_keys)),
            d_local,
            d_carries,
        ), None

    def zeros(shapes: Any) -> Any:
        return jax.tree.map(lambda s: jnp.full(s.shape, runtime_zero(deltas[0])), shapes)

    d_carries = tuple(zeros(floats(backend.carried(x))[0]) for x in slots)
    kv = _stacked(ring, map(backend.by_key, slots))
    first = _take_piece(kv, 0)
    shapes = (jax.eval_shape(functools.partial(pair, i), jnp.int32(0), _take_piece(first, i), d) for i, d in enumerate(d_carries))
    local = tuple(rest for _, rest, _ in shapes)
    key_structs = tuple({name: floats(tree)[0] for name, tree in backend.by_key(x).items()} for x in slots)
    key_structs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), key_structs)
    stacked = functools.partial(_stacked, ring)
    start = kv, zeros(jax.eval_shape(stacked, key_structs)), zeros(local), d_carries
    (_, sums, local, d_carries), _ = jax.lax.scan(step, start, jnp.arange(ring.steps), reverse=True)
    (of_keys,) = jax.linear_transpose(stacked, key_structs)(sums)
    return (tuple(map(backend.cotangent, slots, of_keys, local, d_carries)),)


_attend.defvjp(_forward, _backward)
