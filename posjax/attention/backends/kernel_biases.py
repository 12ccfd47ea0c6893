"""Biases in the Pallas kernels: the form in which each is evaluated, and the functions that are traced in a tile."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from posjax.attention.backends.constants import LOG2E
from posjax.attention.backends.reads import for_query_heads
from posjax.attention.call import AttentionCall
from posjax.core.structures import Bias, Pair, Scan, Table, sigmoid
from posjax.typing import Array


class Biases(NamedTuple):
    """Holds the biases of a call by the form in which the kernels evaluate them.

    Attributes:
      counting: a sum of sigmoid gates of the scores that interpolates products of the query with a table, as in CoPE; or None.
      lookup: a table of numbers at an index that is a function of two positions, as in T5; or None. Kernels read it once per
        tile if all pairs have one index.
      pairs: all others, whose functions are traced in the tile.
    """

    counting: Bias | None
    lookup: Bias | None
    pairs: tuple[Bias, ...]

    @property
    def counting_table(self) -> Table | None:
        """Returns the table of ``counting``."""
        return self.counting.read if self.counting is not None and isinstance(self.counting.read, Table) else None

    @property
    def lookup_table(self) -> Table | None:
        """Returns the table of ``lookup``."""
        return self.lookup.read if self.lookup is not None and isinstance(self.lookup.read, Table) else None


_MOST_NUMBERS = 64  # numbers per head of a pair and its read, each of which is a separate operand in the tile


def _form(bias: Bias) -> str | None:
    """Returns the field of ``Biases`` that a bias may belong to, or None if the kernels do not evaluate it."""
    at, read = bias.at, bias.read
    if isinstance(at, Scan):
        counts = at.gate is sigmoid and at.key is None and at.include_key and at.include_query
        if counts and isinstance(read, Table) and read.side == "query" and read.interpolate:
            return "counting" if at.bound == read.table.shape[1] - 1 else None
        return None
    if read is not None and read.side != "none":
        return None
    if isinstance(read, Table):
        if read.interpolate:
            return None
        if at.query is None and not jax.tree.leaves(at.args):
            return "lookup"
    return "pairs" if sum(math.prod(x.shape[1:]) for x in _numbers(bias)) <= _MOST_NUMBERS else None


def biases_by_form(biases: tuple[Bias, ...]) -> Biases:
    """Returns the biases of a call that ``unsupported_biases`` accepts, by form."""
    forms = [(bias, _form(bias)) for bias in biases]
    counting, lookup = (next((bias for bias, form in forms if form == name), None) for name in ("counting", "lookup"))
    return Biases(counting, lookup, tuple(bias for bias in biases if bias is not counting and bias is not lookup))


def unsupported_biases(call: AttentionCall) -> str | None:
    """Returns why the kernels do not support the biases of a call, naming the argument at fault, or None if they do."""
    if (reason := call.needs_order()) is not None:
        return f"encoding has a structure that the kernel does not support: {reason}"
    for bias in call.biases:
        if _form(bias) is None:
            return f"encoding has a bias that the kernel does not evaluate ({_described(bias)})"
        if call.query_coordinates is not None and isinstance(bias.at, Pair) and bias.at.query is None:
            return f"query_coordinates are given, and the kernel evaluates a bias ({_described(bias)}) at positions"
    if sum(_form(bias) == "counting" for bias in call.biases) > 1:
        return "encoding has two biases that count by gates"
    for bias in biases_by_form(call.biases).pairs:
        if sum(math.prod(x.shape[1:]) for x in _numbers(bias)) > _MOST_NUMBERS:
            return f"encoding reads a second table of more than {_MOST_NUMBERS} numbers ({_described(bias)})"
    return None


def _described(bias: Bias) -> str:
    function = bias.at.function if isinstance(bias.at, Pair) else bias.at.gate
    parts = [f"{type(bias.at).__name__} of {getattr(function, '__name__', function)}"]
    if isinstance(bias.at, Scan) and bias.at.key is not None:
        parts.append("of keys" if bias.at.query is None else "of vectors of query and key")
    if bias.read is not None:
        parts.append(f"read by a {type(bias.read).__name__}")
    return ", ".join(parts)


def pair_of(bias: Bias) -> Pair:
    """Returns the ``Pair`` at which a bias without a ``Scan`` is read."""
    assert isinstance(bias.at, Pair)
    return bias.at


def index_of(lookup: Bias | None) -> Callable[[Array, Array], Array] | None:
    """Returns the function from positions of queries and keys to the index of a lookup; None if there is no lookup."""
    return None if lookup is None else _Index(pair_of(lookup).function, pair_of(lookup).relative)


def uniform_of(lookup: Bias | None) -> Callable[..., Any] | None:
    """Returns the test of whether all pairs in ranges of positions have one index; always False if the function has no test."""
    return None if lookup is None else getattr(pair_of(lookup).function, "uniform", _unsure)


def _unsure(first_query: Array, last_query: Array, first_key: Array, last_key: Array) -> Array:
    return (first_query - first_query) != 0


@dataclasses.dataclass(frozen=True)
class _Index:
    function: Callable[..., Array]
    relative: bool

    def __call__(self, query_positions: Array, key_positions: Array) -> Array:
        if self.relative:
            return self.function((query_positions - key_positions,), ())
        return self.function((query_positions,), (key_positions,), ())


# Pairs whose functions are traced in the tile -----------------------------------------------------------------------------------


def _read_arrays(bias: Bias) -> tuple[Array, ...]:
    read = bias.read
    if read is None:
        return ()
    if isinstance(read, Table):
        return (read.table,)
    return (read.weight_in, read.bias_in, read.table) + (() if read.offset is None else (read.offset,))


def _numbers(bias: Bias) -> list[Array]:
    """Returns the arrays per head of a ``Pair`` and its read, [N or 1, ...] each."""
    return jax.tree.leaves((bias.at.args, _read_arrays(bias)))


@dataclasses.dataclass(frozen=True)
class PairProgram:
    """Holds the static part of a ``Pair`` and its read, for one head in one tile.

    Attributes:
      function, relative: as in ``Pair``.
      structure: tree of the args and of the arrays of the read.
      shapes: shapes of its leaves for one head.
      reads: "number", "table" or "hinges".
      features: dtypes of the features of a token; () if they are its position.
      learned: whether the numbers have gradients.
    """

    function: Callable[..., Array]
    relative: bool
    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    reads: str
    features: tuple[str, ...]
    learned: bool

    @classmethod
    def of(cls, bias: Bias) -> "PairProgram":
        at, leaves = pair_of(bias), _numbers(bias)
        reads = "number" if bias.read is None else "table" if isinstance(bias.read, Table) else "hinges"
        kinds = () if at.query is None else at.query
        features = tuple("int32" if jnp.issubdtype(x.dtype, jnp.integer) else "float32" for x in kinds)
        learned = bias.read is not None or (at.learned and bool(leaves))
        shapes = tuple(x.shape[1:] for x in leaves)
        return cls(at.function, at.relative, jax.tree.structure((at.args, _read_arrays(bias))), shapes, reads, features, learned)

    @property
    def size(self) -> int:
        """Returns the number of numbers per head."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def float_features(self) -> tuple[int, ...]:
        """Returns which features have gradients."""
        return tuple(n for n, dtype in enumerate(self.features) if dtype == "float32")

    def __call__(self, queries: tuple[Array, ...], keys: tuple[Array, ...], numbers: Sequence[Array | float]) -> Array:
        """Returns the bias in nats, float32, from features and numbers that broadcast together."""
        remaining = iter(numbers)

        def nested(shape: tuple[int, ...]) -> Any:
            return [nested(shape[1:]) for _ in range(shape[0])] if shape else next(remaining)

        args, read = jax.tree.unflatten(self.structure, [nested(shape) for shape in self.shapes])
        if self.relative:
            at = self.function(tuple(q - k for q, k in zip(queries, keys, strict=True)), args)
        else:
            at = self.function(queries, keys, args)
        if self.reads == "number":
            return at.astype(jnp.float32)
        if self.reads == "table":
            return functools.reduce(jnp.add, (jnp.where(at == n, entry, 0.0) for n, entry in enumerate(read[0])))
        weights, offsets, units, *more = read
        inner = (w * at + b for w, b in zip(weights, offsets, strict=True))
        terms = (
            z * jnp.where(x > 0.0, x, 0.0) for z, x in zip(units, inner, strict=True)
        )  # relu, with its gradient of zero at zero
        return functools.reduce(jnp.add, (*terms, *more))

    def in_log2(self, queries: tuple[Array, ...], keys: tuple[Array, ...], numbers: list[Array]) -> Array:
        """Returns the bias in units of log2 e."""
        if self.reads == "number" and getattr(self.function, "scales_with_args", False):
            return self(queries, keys, [number * LOG2E for number in numbers])  # scales a few numbers instead of all biases
        return self(queries, keys, numbers) * LOG2E


def numbers_of(pairs: tuple[Bias, ...], heads: int) -> Array | None:
    """Returns the numbers of all pairs, [N, A] float32 in the order of ``PairProgram``; None if there are none."""

    def of_pair(bias: Bias) -> list[Array]:
        args = bias.at.args if pair_of(bias).learned else jax.lax.stop_gradient(bias.at.args)
        leaves = jax.tree.leaves((args, _read_arrays(bias)))
        return [jnp.broadcast_to(x.astype(jnp.float32).reshape(x.shape[0], -1), (heads, math.prod(x.shape[1:]))) for x in leaves]

    columns = [x for bias in pairs for x in of_pair(bias) if x.size]
    return jnp.concatenate(columns, -1) if columns else None


def features_of(pairs: tuple[Bias, ...], side: str) -> Array | None:
    """Returns the features of all pairs on one side, [F, B or 1, N or K or 1, T or S] float32; None if all are positions.

    Integers are stored by their bits, because a float32 does not hold them all; ``as_feature`` restores them.
    """
    given = [x for bias in pairs if bias.at.query is not None for x in getattr(bias.at, side)]
    if not given:
        return None
    heads = max(x.shape[1] for x in given)
    given = [for_query_heads(x, heads) for x in given]
    shape = jnp.broadcast_shapes(*(x.shape for x in given))
    integer = [jnp.issubdtype(x.dtype, jnp.integer) for x in given]
    stored = [
        jax.lax.bitcast_convert_type(x.astype(jnp.int32), jnp.float32) if i else x.astype(jnp.float32)
        for x, i in zip(given, integer, strict=True)
    ]
    return jnp.stack([jnp.broadcast_to(x, shape) for x in stored])


def as_feature(x: Array, dtype: str) -> Array:
    """Converts a stored feature back to float32 or int32."""
    return x if dtype == "float32" else jax.lax.bitcast_convert_type(x, jnp.int32)
