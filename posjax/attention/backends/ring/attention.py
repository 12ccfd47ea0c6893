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
meets its own chunk of keys first, then the one to its left, and so on. The chunks of keys move along one path through both slots of
every device, to the right through the low slots and back to the left through the high slots:

    low    chunk of keys  0 -> 1 -> 2 -> 3        (device 0 .. 3)
    high                  7 <- 6 <- 5 <- 4        2 C steps; at step s chunk of queries q meets chunk of keys q - s

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
which ``ring.xla_chunked`` documents.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from posjax.attention.backends import xla_chunked
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.ring import gpu as ring_gpu
from posjax.attention.backends.ring import tpu as ring_tpu
from posjax.attention.backends.ring import xla_chunked as ring_tiled
from posjax.attention.backends.shards import ShardSpec, infer_shard_spec, on_parts
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.xla_chunked import EMPTY_LSE, SAVED
from posjax.core.bias import BiasTerm, Rotation, apply_rotation, rotated
from posjax.core.masks import Mask
from posjax.typing import Array, Float, Int

CONTEXT_AXES = ("context", "sequence", "seq", "cp", "sp")  # names by which an automatic mesh axis shards sequences
_PIECES = 8  # per chunk of keys, at most
_PIECE = 2048  # keys per piece, at least: the setup of a query tile (expensive for CoPE) is repeated for every piece
_KERNELS = {"tpu": tpu, "cuda": gpu}
_PARTS = {"tpu": ring_tpu, "cuda": ring_gpu, "xla": ring_tiled}
_NO_KEYS_LSE = -EMPTY_LSE  # the log-sum-exp over no keys, while the partial results of a row are merged


@dataclasses.dataclass(frozen=True)
class Context:
    """Holds the mesh axes that shard a context-parallel call.

    Attributes:
      cut: the axes that shard B and the heads. Its mesh has more than one device along ``axis``.
      axis: the name of the axis that shards T and S.
    """

    cut: ShardSpec
    axis: str

    @property
    def parts(self) -> int:
        return self.cut.mesh.shape[self.axis]


def find_context(query: Array) -> Context | None:
    """Returns the Context of a call with this query [B, T, N, H]; None if no axis of the mesh shards the sequence.

    As in ``shards.infer_shard_spec``, an explicit axis is taken from the query's type, and an automatic axis is recognized by its
    name. A length that is not a multiple of twice the number of devices, such as the single token of a decoder, is not sharded.
    """
    cut = infer_shard_spec(query)
    if cut.mesh is None:
        return None
    types = dict(zip(cut.mesh.axis_names, cut.mesh.axis_types, strict=True))
    along = jax.typeof(query).sharding.spec[1:2]
    given = [name for part in along if part is not None for name in ((part,) if isinstance(part, str) else part)]
    names = [name for name in types if types[name] == AxisType.Auto and name in CONTEXT_AXES]
    names += [name for name in given if types[name] == AxisType.Explicit]
    fits = (n for n in names if cut.mesh.shape[n] > 1 and query.shape[1] % (2 * cut.mesh.shape[n]) == 0)
    axis = next(fits, None)
    return None if axis is None else Context(cut, axis)


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
    context: Context,
    kernel: str | None = None,
    block_sizes: Any = None,
) -> Float[Array, "B T N V"]:
    """Computes attention with T and S sharded over a mesh axis.

    Args:
      query, ..., logits_soft_cap: as in ``xla_chunked.attention``.
      rotation, raw: as in ``tpu.attention``.
      context: the mesh axes of the call. Twice its number of devices must divide T and S.
      kernel: "tpu" or "cuda" for that kernel, interpreted where the program is lowered for another platform; "xla" for plain XLA;
        None for the kernel of the platform that the program is lowered for, or "xla" if that platform has none that supports the
        call.
      block_sizes: as in ``posjax.attention``.

    Returns:
      The result of ``xla_chunked.attention``.

    Raises:
      NotImplementedError: if ``refusal`` returns a reason.
    """
    if (reason := refusal(query, key, terms, mask, context)) is not None:
        raise NotImplementedError(f"attention over the mesh axis {context.axis!r} cannot run this call: {reason}")
    if rotation is not None:  # rotate the keys once, before they move
        key, rotation = apply_rotation(key, rotation.key_phase, rotation.pairing), dataclasses.replace(rotation, key_phase=None)
    halves = _Halves(context.axis, context.parts, mask.is_causal)
    slots = functools.partial(halves.slots, split=any(term.carry is not None for term in terms))
    call = dict(query=query, key=key, value=value, terms=terms, mask=mask, scale=scale, rotation=rotation)
    call |= dict(query_positions=query_positions, key_positions=key_positions)
    static = dict(logits_soft_cap=logits_soft_cap, raw=raw)

    def by(name: str) -> Any:
        prepared = dict if name == "tpu" else rotated  # the TPU kernel rotates queries itself and then needs no unrotated copy

        def local(**part: Any) -> Array:
            calls = [prepared(slot | static) for slot in slots(part)]
            return halves.home(_around(context, _PARTS[name], calls, _own(name, block_sizes)))

        return lambda call: on_parts(local, context.cut, context.axis)(**prepared(call))

    if kernel is not None:
        return by(kernel)(call)
    can = {name: by(name) for name in _able(lambda part: slots(part)[0] | static, call, context, block_sizes)}
    # Wraps the entire computation of a device: further inside, the choice of branch would become an array that the backward pass
    # receives.
    return jax.lax.platform_dependent(call, **can, default=by("xla")) if can else by("xla")(call)


def _own(name: str, block_sizes: Any) -> Any:
    """Returns the block sizes of a call if they belong to that kernel, else None."""
    return block_sizes if name in _KERNELS and isinstance(block_sizes, _KERNELS[name].BLOCK_SIZES_CLS) else None


def _able(chunk: Any, call: dict[str, Any], context: Context, block_sizes: Any) -> list[str]:
    """Returns the platforms whose kernels support the call that each device makes: ``chunk`` of its part of the call."""
    able = []

    def ask(**part: Any) -> Array:
        whole = ShardSpec()
        refusals = {name: k.refusal(**chunk(part), block_sizes=_own(name, block_sizes), cut=whole) for name, k in _KERNELS.items()}
        able.extend(name for name, reason in refusals.items() if reason is None)
        return part["query"]

    jax.eval_shape(on_parts(ask, context.cut, context.axis), **call)
    return able


def _around(context: Context, walk: Any, calls: list[dict[str, Any]], block_sizes: Any) -> list[Array]:
    """Returns the result [B, t, N, V] of each chunk of this device. ``walk`` is a module such as ``ring.xla_chunked``."""
    made = [walk.cut_up(call, block_sizes) for call in calls]
    plan, x = made[0]
    length, keys, width = calls[0]["query"].shape[1], calls[0]["key"].shape[1], calls[0]["value"].shape[-1]
    most = max(1, min(_PIECES, keys // _PIECE))
    pieces, plan = next((n, cut) for n in range(most, 0, -1) if (cut := walk.in_parts(plan, x, n)) is not None)
    ring = _Ring(walk, plan, context.axis, context.parts, len(calls) == 2, pieces)
    out = _attend(ring, tuple(operands for _, operands in made))
    return [walk.joined(each, length, width) for each in out]


def refusal(query: Array, key: Array, terms: tuple[BiasTerm, ...], mask: Mask, context: Context, **_: Any) -> str | None:
    """Returns the reason why the ring does not support a call; None if it does."""
    parts = 2 * context.parts
    if query.shape[1] % parts or key.shape[1] % parts:
        found = f"{query.shape[1]} and {key.shape[1]}"
        return f"the lengths of query and key must be multiples of {parts}, twice its devices, got {found}"
    if mask.boolean is not None:
        return f"mask must be None, got one of shape {mask.boolean.shape}; segment_ids and local_window_size travel with the keys"
    if any(term.carry is not None for term in terms) and not (mask.is_causal and query.shape[1] == key.shape[1]):
        return "an encoding that counts needs is_causal=True and as many keys as queries"
    return None


# Layout and schedule ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Halves:
    """Describes the two chunks of device d: 2 d and 2 d + 1 in natural order, d and 2 C - 1 - d in the zig-zag layout."""

    axis: str
    parts: int
    is_zigzag: bool

    def _moves(self, odd: int) -> list[tuple[int, int]]:
        """Returns the (source, destination) devices of the first chunks, or the second if ``odd`` is 1, of all devices."""
        chunks = [2 * d + odd for d in range(self.parts)]
        return [(d, min(chunk, 2 * self.parts - 1 - chunk)) for d, chunk in enumerate(chunks)]

    def _spread(self, x: Array, axis: int) -> list[Array]:
        """Moves the two chunks of x to their devices, and returns the two that this device receives."""
        halves = jnp.split(x, 2, axis=axis)
        if not self.is_zigzag:
            return halves
        even, odd = (jax.lax.ppermute(half, self.axis, self._moves(i)) for i, half in enumerate(halves))
        is_even = jax.lax.axis_index(self.axis) % 2 == 0
        return [jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)]

    def slots(self, call: dict[str, Any], split: bool) -> list[dict[str, Any]]:
        """Returns the call's arguments for each chunk of this device if ``split``, else for both chunks as one."""

        def pieces(axis: int, x: Any) -> list[Any]:
            leaves, structure = jax.tree.flatten(x)
            spread = [self._spread(leaf, axis) for leaf in leaves]
            if not split:
                return [jax.tree.unflatten(structure, [jnp.concatenate(both, axis) for both in spread])]
            return [jax.tree.unflatten(structure, [both[i] for both in spread]) for i in range(2)]

        def of_term(term: BiasTerm) -> list[BiasTerm]:
            parts = [pieces(2, part) for part in (term.rows, term.columns, term.carry)]
            return [dataclasses.replace(term, rows=r, columns=c, carry=k) for r, c, k in zip(*parts, strict=True)]

        terms = list(zip(*map(of_term, call["terms"]), strict=True)) or [(), ()]
        along = {name: pieces(1, x) for name, x in call.items() if name not in ("terms", "scale")}
        rest = dict(scale=call["scale"])
        return [rest | dict(terms=terms[i]) | {name: x[i] for name, x in along.items()} for i in range(2 if split else 1)]

    def home(self, out: list[Array]) -> Array:
        """Converts the results of this device's chunks to [B, T / C, N, V] of the sequence in natural order."""
        low, high = out if len(out) == 2 else jnp.split(out[0], 2, axis=1)
        if self.is_zigzag:
            is_even = jax.lax.axis_index(self.axis) % 2 == 0
            halves = jnp.where(is_even, low, high), jnp.where(is_even, high, low)
            back = [[(there, here) for here, there in self._moves(i)] for i in range(2)]
            low, high = (jax.lax.ppermute(half, self.axis, moves) for half, moves in zip(halves, back, strict=True))
        return jnp.concatenate([low, high], axis=1)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Holds the static parameters of a call: the walk over a piece of keys, and the schedule by which pieces move."""

    walk: Any  # the module
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

    return {name: jax.tree.map(functools.partial(cut, axis=ring.walk.BY_KEY[name]), x) for name, x in by_key.items()}


def _stacked(ring: _Ring, slots: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the per-key arrays of all slots, with pieces along the first axis and slots along the second."""
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *(_in_pieces(ring, by_key) for by_key in slots))


def _taken(pieces: Any, at: Array | int) -> Any:
    return jax.tree.map(lambda x: x[at], pieces)


def _put(pieces: Any, at: Array, new: Any) -> Any:
    return jax.tree.map(lambda x, y: x.at[at].set(y), pieces, new)


# Forward and backward --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, slots: tuple[Any, ...]) -> tuple[Array, ...]:
    """Computes the result of every slot, in the walk's layout and the dtype of value. ``slots`` are the walk's operands."""
    return _forward(ring, slots)[0]


def _forward(ring: _Ring, slots: tuple[Any, ...]) -> tuple[tuple[Array, ...], Any]:
    def merged(so_far: tuple[Array, Array], part: tuple[Array, Array]) -> tuple[Array, Array]:
        (before, out), (lse, more) = so_far, part
        lse = jnp.where(lse < EMPTY_LSE, lse, _NO_KEYS_LSE)
        total = jnp.logaddexp(before, lse)
        return total, out * jnp.exp(before - total)[..., None] + more * jnp.exp(lse - total)[..., None]

    def step(state: Any, number: Array) -> tuple[Any, Any]:
        travelling, so_far, carries = state
        at = ring.at(number)
        pieces = _taken(travelling, at)
        travelling = _put(travelling, at, ring.moved(pieces))  # does not depend on the walk, so that the two overlap
        handed_on, kept, results = [], [], []
        for i, (x, own, carried) in enumerate(zip(slots, so_far, carries, strict=True)):
            out, lse, *rest = ring.walk.outputs(ring.plan, ring.walk.with_keys(x, _taken(pieces, i), carried))
            results.append(merged(own, (lse, out)))
            kept.append(rest[0])
            handed_on.append(rest[1])
        return (travelling, tuple(results), tuple(handed_on)), (tuple(handed_on), tuple(kept))

    def nothing(x: Any) -> tuple[Array, Array]:
        out, lse, *_ = jax.eval_shape(functools.partial(ring.walk.outputs, ring.plan), x)
        return jnp.full(lse.shape, _NO_KEYS_LSE, jnp.float32), jnp.zeros(out.shape, jnp.float32)

    start = _stacked(ring, map(ring.walk.by_key, slots)), tuple(map(nothing, slots)), tuple(map(ring.walk.carried, slots))
    (_, results, _), (carries, kept) = jax.lax.scan(step, start, jnp.arange(ring.steps))
    out = tuple(own.astype(x.value.dtype) for (_, own), x in zip(results, slots, strict=True))
    lses = tuple(jnp.where(total > 0.5 * _NO_KEYS_LSE, total, EMPTY_LSE) for total, _ in results)
    out, lses, carries, kept = checkpoint_name((out, lses, carries, kept), SAVED)
    return out, (slots, out, lses, carries, kept)


def _backward(ring: _Ring, saved: Any, d_out: tuple[Array, ...]) -> tuple[tuple[Any, ...]]:
    slots, out, lses, carries, kept = saved
    walk, deltas = ring.walk, tuple(map(xla_chunked.delta_of, out, d_out))

    def pair(i: int, number: Array, there: dict[str, Any], d_handed_on: list[Array], so_far: Any = None) -> Any:
        """Computes the gradients of slot i for one step. Those that stay on this device are added to ``so_far``."""
        x = slots[i]
        received = jax.tree.map(
            lambda first, later: jnp.where(number > 0, later[jnp.maximum(number - 1, 0)], first), walk.carried(x), carries[i]
        )
        own = _taken(kept[i], number), _taken(carries[i], number)
        met = walk.with_keys(x, there, received)
        return walk.gradients(ring.plan, met, lses[i], *own, d_out[i], deltas[i], d_handed_on, so_far)

    def step(state: Any, number: Array) -> tuple[Any, None]:
        travelling, d_travelling, d_stayed, d_carries = state
        at = ring.at(number)
        pieces, d_pieces = (ring.moved(_taken(x, at), back=True) for x in (travelling, d_travelling))
        made = [pair(i, number, _taken(pieces, i), *own) for i, own in enumerate(zip(d_carries, d_stayed, strict=True))]
        of_keys, d_stayed, d_carries = zip(*made, strict=True)
        of_keys = jax.tree.map(lambda *x: jnp.stack(x), *of_keys)
        return (
            _put(travelling, at, pieces),
            _put(d_travelling, at, jax.tree.map(jnp.add, d_pieces, of_keys)),
            d_stayed,
            d_carries,
        ), None

    def zeros(shapes: Any) -> Any:
        return jax.tree.map(lambda s: jnp.full(s.shape, xla_chunked.runtime_zero(deltas[0])), shapes)

    d_carries = tuple(zeros(xla_chunked.floats(walk.carried(x))[0]) for x in slots)
    travelling = _stacked(ring, map(walk.by_key, slots))
    first = _taken(travelling, 0)
    shapes = (jax.eval_shape(functools.partial(pair, i), jnp.int32(0), _taken(first, i), d) for i, d in enumerate(d_carries))
    stayed = tuple(rest for _, rest, _ in shapes)
    whole = tuple({name: xla_chunked.floats(tree)[0] for name, tree in walk.by_key(x).items()} for x in slots)
    whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), whole)
    stacked = functools.partial(_stacked, ring)
    start = travelling, zeros(jax.eval_shape(stacked, whole)), zeros(stayed), d_carries
    (_, sums, stayed, d_carries), _ = jax.lax.scan(step, start, jnp.arange(ring.steps), reverse=True)
    (of_keys,) = jax.linear_transpose(stacked, whole)(sums)
    return (tuple(map(walk.gradient_of, slots, of_keys, stayed, d_carries)),)


_attend.defvjp(_forward, _backward)
