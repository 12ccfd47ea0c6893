"""The zig-zag layout of a sequence on a ring of devices, which balances the work under a causal mask."""

import dataclasses

import jax
import jax.numpy as jnp

from posjax.attention.backends.shards import BY_TOKEN
from posjax.attention.call import AttentionCall
from posjax.core.structures import Axes, map_arrays
from posjax.typing import Array


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Describes the two chunks of device d: 2 d and 2 d + 1 in natural order, d and 2 C - 1 - d in the zig-zag layout.

    Its methods run inside a ``shard_map``.

    Attributes:
      axis: the mesh axis of the ring.
      parts: C, its number of devices.
      is_zigzag: False leaves the chunks where they are.
    """

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

    def split(self, call: AttentionCall, separate: bool) -> list[AttentionCall]:
        """Returns the call of each chunk of this device if ``separate``, else that of both chunks as one."""

        def pieces(x: Array, axis: int) -> list[Array]:
            if x.shape[axis] == 1:  # shared by all tokens
                return [x, x] if separate else [x]
            both = self._spread(x, axis)
            return both if separate else [jnp.concatenate(both, axis)]

        spread: list[list[Array]] = []  # the pieces of every array with tokens, in the order in which they are visited

        def spread_array(x: Array, axes: Axes) -> Array:
            if axes.tokens is not None:
                spread.append(pieces(x, axes.tokens))
            return x

        by_token = {name: getattr(call, name) for name in ("query", "key", "value", *BY_TOKEN, "mask")}
        leaves, structure = jax.tree.flatten(by_token)
        along = [pieces(leaf, 1) for leaf in leaves]
        changed = {name: getattr(call, name) for name in ("transforms", "biases")}
        for part in changed.values():
            map_arrays(spread_array, part)

        def chunk(n: int) -> AttentionCall:
            remaining = iter(spread)

            def take(x: Array, axes: Axes) -> Array:
                return x if axes.tokens is None else next(remaining)[n]

            parts = {name: map_arrays(take, part) for name, part in changed.items()}
            return call.replace(**jax.tree.unflatten(structure, [both[n] for both in along]), **parts)

        return [chunk(n) for n in range(2 if separate else 1)]

    def unsplit(self, out: list[Array]) -> Array:
        """Converts the results of this device's chunks to [B, T / C, N, V] of the sequence in natural order."""
        low, high = out if len(out) == 2 else jnp.split(out[0], 2, axis=1)
        if self.is_zigzag:
            is_even = jax.lax.axis_index(self.axis) % 2 == 0
            halves = jnp.where(is_even, low, high), jnp.where(is_even, high, low)
            back = [[(there, here) for here, there in self._moves(i)] for i in range(2)]
            low, high = (jax.lax.ppermute(half, self.axis, moves) for half, moves in zip(halves, back, strict=True))
        return jnp.concatenate([low, high], axis=1)
