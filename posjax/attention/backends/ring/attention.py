"""Context parallelism: attention over a sequence whose pieces lie on the devices of one axis of a mesh, forward and backward.

Queries stay, keys and values travel (Ring Attention, Liu et al., arXiv:2310.01889); each device attends to the keys that are with
it, in the kernel of its platform or in plain XLA, and merges what comes out by the log-sum-exp of its rows. No device ever holds
more than its share of the sequence. What bias terms hold by key travels with the keys. Under a causal mask the work is balanced by
a zig-zag: the sequence is cut into 2 C chunks for C devices, and device d has chunks d and 2 C - 1 - d. They go there and come back
inside this call, at the price of one step of the ring each way; outside, a sequence is in its own order.

Without a term that carries, any order of visits will do, and all pieces move around the ring together:

    C steps; at step s device d has the keys of device d - s

A term that carries (CoPE counts the gates between key and query) must see keys from the right to the left, so each chunk of queries
must meet its own chunk of keys first, then the one on its left, and so on. The chunks of keys travel on a belt through both chunks
of every device, to the right through the low ones and back to the left through the high ones:

    low    chunk of keys  0 -> 1 -> 2 -> 3        (device 0 .. 3)
    high                  7 <- 6 <- 5 <- 4        2 C steps; at step s chunk of queries q meets chunk of keys q - s

Keys are cut into some pieces once more: one piece is on its way while another is looked at, and what is made of it is added to what
comes. So the room for what comes and goes is a fraction of a device's share, and sending still does not wait for the walk.

What a term has carried stays with its queries. A step in which nothing is to be seen visits no tile, and where all rows of a term
have saturated a chunk is plain flash attention. From step C on the low chunks have no keys left: the belt takes the
time of 3 C - 1 full pairs of chunks, for 2 C where the order is free, and 4 C - 2 without the zig-zag.

The backward pass goes the same way back: keys and values return with what has been collected of their gradients, and the gradient
of what was carried flows from the left to the right. It is given the carries that every step handed on, a number a row and step.

What a device does with a part of the keys is in ``ring_tiled``, ``ring_tpu`` and ``ring_gpu``, which have one interface.
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

CONTEXT_AXES = ("context", "sequence", "seq", "cp", "sp")  # names of a mesh's axis that cuts sequences, where it is automatic
_PIECES = 8  # of the keys of a chunk at most
_PIECE = 2048  # keys of one at least: what a query tile prepares, CoPE above all, it prepares for every piece
_KERNELS = {"tpu": tpu, "cuda": gpu}
_PARTS = {"tpu": ring_tpu, "cuda": ring_gpu, "xla": ring_tiled}
_NO_KEYS_LSE = -EMPTY_LSE  # the log-sum-exp of no keys, while parts of a row are merged


@dataclasses.dataclass(frozen=True)
class Context:
    """Over which axes of a mesh a call goes.

    Attributes:
      cut: of B and of heads; its mesh has more than one device along ``axis``.
      axis: cuts T and S.
    """

    cut: ShardSpec
    axis: str

    @property
    def parts(self) -> int:
        return self.cut.mesh.shape[self.axis]


def find_context(query: Array) -> Context | None:
    """That of a call with this query [B, T, N, H]; None where no axis of the mesh cuts sequences.

    As in ``shards.infer_shard_spec``, the query's type says which axis it is where axes are explicit, and its name where they are
    the compiler's. A length without two chunks for every device, one token of a decoder say, is whole everywhere.
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
    """What ``xla_chunked.attention`` computes, T and S cut over an axis of a mesh.

    Args:
      rotation, raw: as in ``tpu.attention``.
      kernel: "tpu" or "cuda", interpreted where the program is lowered for another platform; "xla"; or None: the kernel of the
        platform that the program is lowered for, or "xla" where there is none that can do the call.
      block_sizes: as in ``posjax.attention``.
      context: whose number of devices, twice, divides T and S.

    Raises:
      NotImplementedError: see ``refusal``.
    """
    if (reason := refusal(query, key, terms, mask, context)) is not None:
        raise NotImplementedError(f"attention over the mesh axis {context.axis!r} cannot run this call: {reason}")
    if rotation is not None:  # the keys once, before they travel
        key, rotation = apply_rotation(key, rotation.key_phase, rotation.pairing), dataclasses.replace(rotation, key_phase=None)
    halves = _Halves(context.axis, context.parts, mask.is_causal)
    slots = functools.partial(halves.slots, split=any(term.carry is not None for term in terms))
    call = dict(query=query, key=key, value=value, terms=terms, mask=mask, scale=scale, rotation=rotation)
    call |= dict(query_positions=query_positions, key_positions=key_positions)
    static = dict(logits_soft_cap=logits_soft_cap, raw=raw)

    def by(name: str) -> Any:
        prepared = dict if name == "tpu" else rotated  # that kernel rotates queries itself, and then needs no second, raw one

        def local(**part: Any) -> Array:
            calls = [prepared(slot | static) for slot in slots(part)]
            return halves.home(_around(context, _PARTS[name], calls, _own(name, block_sizes)))

        return lambda call: on_parts(local, context.cut, context.axis)(**prepared(call))

    if kernel is not None:
        return by(kernel)(call)
    can = {name: by(name) for name in _able(lambda part: slots(part)[0] | static, call, context, block_sizes)}
    # Around all that a device does. Within, the backward pass would be handed the choice as one of the arrays that it is given.
    return jax.lax.platform_dependent(call, **can, default=by("xla")) if can else by("xla")(call)


def _own(name: str, block_sizes: Any) -> Any:
    """The block sizes of a call if they are of that kernel."""
    return block_sizes if name in _KERNELS and isinstance(block_sizes, _KERNELS[name].BLOCK_SIZES_CLS) else None


def _able(chunk: Any, call: dict[str, Any], context: Context, block_sizes: Any) -> list[str]:
    """The platforms whose kernels can do what a device is given: ``chunk`` of its part of the call."""
    able = []

    def ask(**part: Any) -> Array:
        whole = ShardSpec()
        refusals = {name: k.refusal(**chunk(part), block_sizes=_own(name, block_sizes), cut=whole) for name, k in _KERNELS.items()}
        able.extend(name for name, reason in refusals.items() if reason is None)
        return part["query"]

    jax.eval_shape(on_parts(ask, context.cut, context.axis), **call)
    return able


def _around(context: Context, walk: Any, calls: list[dict[str, Any]], block_sizes: Any) -> list[Array]:
    """[B, t, N, V] of each chunk of this device, by a walk: a module such as ``ring_tiled``."""
    made = [walk.cut_up(call, block_sizes) for call in calls]
    plan, x = made[0]
    length, keys, width = calls[0]["query"].shape[1], calls[0]["key"].shape[1], calls[0]["value"].shape[-1]
    most = max(1, min(_PIECES, keys // _PIECE))
    pieces, plan = next((n, cut) for n in range(most, 0, -1) if (cut := walk.in_parts(plan, x, n)) is not None)
    ring = _Ring(walk, plan, context.axis, context.parts, len(calls) == 2, pieces)
    out = _attend(ring, tuple(operands for _, operands in made))
    return [walk.joined(each, length, width) for each in out]


def refusal(query: Array, key: Array, terms: tuple[BiasTerm, ...], mask: Mask, context: Context, **_: Any) -> str | None:
    """Why a call cannot go around the ring; None: it can."""
    parts = 2 * context.parts
    if query.shape[1] % parts or key.shape[1] % parts:
        found = f"{query.shape[1]} and {key.shape[1]}"
        return f"the lengths of query and key must be multiples of {parts}, twice its devices, got {found}"
    if mask.boolean is not None:
        return f"mask must be None, got one of shape {mask.boolean.shape}; segment_ids and local_window_size travel with the keys"
    if any(term.carry is not None for term in terms) and not (mask.is_causal and query.shape[1] == key.shape[1]):
        return "an encoding that counts needs is_causal=True and as many keys as queries"
    return None


# Where the pieces are --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Halves:
    """The two chunks of a device: 2 d and 2 d + 1 of a sequence in its own order, d and 2 C - 1 - d of one in zig-zag."""

    axis: str
    parts: int
    is_zigzag: bool

    def _moves(self, odd: int) -> list[tuple[int, int]]:
        """From which device to which the first (or second) chunks of all devices move."""
        chunks = [2 * d + odd for d in range(self.parts)]
        return [(d, min(chunk, 2 * self.parts - 1 - chunk)) for d, chunk in enumerate(chunks)]

    def _spread(self, x: Array, axis: int) -> list[Array]:
        """The two chunks that this device shall have."""
        halves = jnp.split(x, 2, axis=axis)
        if not self.is_zigzag:
            return halves
        even, odd = (jax.lax.ppermute(half, self.axis, self._moves(i)) for i, half in enumerate(halves))
        is_even = jax.lax.axis_index(self.axis) % 2 == 0
        return [jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)]

    def slots(self, call: dict[str, Any], split: bool) -> list[dict[str, Any]]:
        """The call's arguments for each chunk of this device, or for both as one."""

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
        """[B, T / C, N, V] of a sequence in its own order, from the chunks of this device."""
        low, high = out if len(out) == 2 else jnp.split(out[0], 2, axis=1)
        if self.is_zigzag:
            is_even = jax.lax.axis_index(self.axis) % 2 == 0
            halves = jnp.where(is_even, low, high), jnp.where(is_even, high, low)
            back = [[(there, here) for here, there in self._moves(i)] for i in range(2)]
            low, high = (jax.lax.ppermute(half, self.axis, moves) for half, moves in zip(halves, back, strict=True))
        return jnp.concatenate([low, high], axis=1)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What is known before compilation: the walk over a piece, and how pieces move."""

    walk: Any  # the module
    plan: Any  # of its
    axis: str
    parts: int
    is_ordered: bool
    pieces: int  # of a chunk's keys, looked at from the right to the left

    @property
    def steps(self) -> int:
        return self.pieces * (2 * self.parts if self.is_ordered else self.parts)

    def at(self, step: Array) -> Array:
        """The piece of a step."""
        return self.pieces - 1 - step % self.pieces

    def moved(self, pieces: Any, back: bool = False) -> Any:
        """What travels, the pieces of all slots along the first axis, one step further on its way, or back."""
        right, left = [(d, d + 1) for d in range(self.parts - 1)], [(d + 1, d) for d in range(self.parts - 1)]
        if not self.is_ordered:
            last = self.parts - 1
            moves = [*left, (0, last)] if back else [*right, (last, 0)]
            return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, moves), pieces)
        # The ends of the belt: at the last device it turns, and from the high chunk of the first it begins anew.
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
    """What belongs to keys, or gradients of it, as pieces along a new first axis."""

    def cut(x: Array, axis: int) -> Array:
        if x.shape[axis] == 1 and axis > 0:  # the same for all keys
            return jnp.broadcast_to(x, (ring.pieces, *x.shape))
        return jnp.moveaxis(x.reshape(*x.shape[:axis], ring.pieces, -1, *x.shape[axis + 1 :]), axis, 0)

    return {name: jax.tree.map(functools.partial(cut, axis=ring.walk.BY_KEY[name]), x) for name, x in by_key.items()}


def _stacked(ring: _Ring, slots: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What belongs to the keys of all slots: pieces lead, slots follow."""
    return jax.tree.map(lambda *x: jnp.stack(x, axis=1), *(_in_pieces(ring, by_key) for by_key in slots))


def _taken(pieces: Any, at: Array | int) -> Any:
    return jax.tree.map(lambda x: x[at], pieces)


def _put(pieces: Any, at: Array, new: Any) -> Any:
    return jax.tree.map(lambda x, y: x.at[at].set(y), pieces, new)


# Forward and backward --------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, slots: tuple[Any, ...]) -> tuple[Array, ...]:
    """The result of every slot as the walk has it, in the dtype of value. ``slots`` are its operands."""
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
        travelling = _put(travelling, at, ring.moved(pieces))  # does not wait for the walk
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
        """The gradients of the pair of pieces that slot i saw at a step, those that do not travel added to ``so_far``."""
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
