"""Score modifications: the structures by which an encoding describes its effect on attention, and which backends implement.

    transforms   Rotate | Replace | Transport        query and key, before their product
    biases       Bias(at, read)                      added to the scores
      at         Pair | Scan                         index: a function of two tokens, or a sum along the keys between them
      read       None | Table | Hinges               value at the index: the index itself, a table, or a network of one number
    weights      Softmax | StickBreaking             converts scores to weights

The score of query i and key j is ``scale * q_i.k_j`` of the transformed query and key, plus all biases. No structure is a [T, S]
array: each holds arrays per query, per key and per head, and pure functions that are evaluated on tiles.

The layout of an array is fixed by its field, so that meshes, caches and rings can split every leaf of a structure:

    vectors    [B or 1, T or S, N or K or 1, ...]
    features   [B or 1, N or K or 1, T or S]
    tables and args   [N or 1, ...]

An axis of length 1 is shared by all. The axis of keys has length 1 only if there is one key, and entry j must depend only on key j,
because decoders cache it. Phases, gains, gates and features are float32 or int32; vectors have the dtype of query and key.

The functions in structures are part of the compiled program. They must compare equal when they are created twice: use functions at
module level, or frozen dataclasses with ``__call__``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from posjax.checks import Bounds, check_fields, is_array, short
from posjax.typing import Array, Float

Side = Literal["query", "key"]
Pairing = Literal["half", "interleaved"]
StructureT = TypeVar("StructureT")
Leaf = Any  # an array, or its replacement in a tree of specs, of numbers or of None
HEAD_AXES = ("tensor", "model", "heads", "tp", "mp")  # names of mesh axes that shard the axes of heads


@dataclasses.dataclass(frozen=True)
class Axes:
    """Describes the axes of the arrays in a field of a structure.

    Attributes:
      side: the tokens along ``tokens``; None for an array that has no tokens.
      tokens: the axis of tokens; 1 in vectors, 2 in features.
      heads: the axis of heads.
    """

    side: Side | None
    tokens: int | None
    heads: int


def vectors(side: Side, default: Any = dataclasses.MISSING) -> Any:
    """Declares a field of arrays [B or 1, T or S, N or K or 1, ...]."""
    return dataclasses.field(default=default, metadata={"axes": Axes(side, 1, 2)})


def features(side: Side, default: Any = dataclasses.MISSING) -> Any:
    """Declares a field of arrays [B or 1, N or K or 1, T or S]."""
    return dataclasses.field(default=default, metadata={"axes": Axes(side, 2, 1)})


def per_head(default: Any = dataclasses.MISSING) -> Any:
    """Declares a field of arrays [N or 1, ...]."""
    return dataclasses.field(default=default, metadata={"axes": Axes(None, None, 0)})


def static(default: Any = dataclasses.MISSING, **bounds: Any) -> Any:
    """Declares a field that is part of the compiled program: hashable and compared; ``bounds`` as in ``posjax.checks.Bounds``."""
    return dataclasses.field(default=default, metadata={"static": True, "bounds": Bounds(**bounds)})


@dataclass_transform(frozen_default=True, field_specifiers=(vectors, features, per_head, static))
def structure(cls: type[StructureT]) -> type[StructureT]:
    """Makes a class a frozen dataclass and a pytree with the fields that are not static as children.

    Static fields are checked by their annotations; arrays are checked when an encoding is applied, by ``check_structures``.
    """
    setattr(cls, "__post_init__", check_fields)  # noqa: B010, which type checkers accept
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def map_arrays(function: Callable[[Any, Axes], Any], tree: Any) -> Any:
    """Maps function(leaf, axes) over the leaves of a tree of structures."""
    if isinstance(tree, tuple):
        return tuple(map_arrays(function, part) for part in tree)

    def of_field(field: dataclasses.Field) -> Any:
        value = getattr(tree, field.name)
        if field.metadata.get("static"):
            return value
        if (axes := field.metadata.get("axes")) is not None:
            return jax.tree.map(lambda leaf: function(leaf, axes), value)
        return None if value is None else map_arrays(function, value)

    return type(tree)(**{field.name: of_field(field) for field in dataclasses.fields(tree)})


def check_structures(encoding: str, mods: "ScoreModifications", query: Array, key: Array) -> None:
    """Raises ValueError if a part of ``ScoreModifications`` is not a structure, or an array does not have the declared axes.

    Args:
      encoding: name of the encoding, for messages.
      mods: the result of its ``attend``.
      query, key: [B, T, N, H] and [B, S, K, H] of the call.
    """
    if not isinstance(mods, ScoreModifications):
        raise ValueError(f"attend of {encoding} must return ScoreModifications, got {short(mods)}")
    transforms, biases, read = (Rotate, Replace, Transport), (Bias,), (Table, Hinges, type(None))
    _check_parts(encoding, "transforms", mods.transforms, transforms)
    _check_parts(encoding, "biases", mods.biases, biases)
    _check_parts(encoding, "weights", (mods.weights,), (Softmax, StickBreaking))
    for bias in mods.biases:
        _check_parts(encoding, "at of a Bias", (bias.at,), (Pair, Scan))
        _check_parts(encoding, "read of a Bias", (bias.read,), read)
    batch, lengths, heads = query.shape[0], {"query": query.shape[1], "key": key.shape[1]}, (1, query.shape[2], key.shape[2])

    def check(name: str, leaf: Any, axes: Axes) -> None:
        allowed: dict[Any, tuple[int, ...]] = {axes.heads: heads if axes.side else heads[:2]}
        if axes.side is not None:
            is_cached = axes.side == "key" and name.startswith("biases")  # and is then an array of each key
            allowed |= {0: (1, batch), axes.tokens: (lengths[axes.side],) if is_cached else (1, lengths[axes.side])}
        most = {None: math.inf, 1: 4, 2: 3}[axes.tokens]  # vectors have four axes, features three
        is_right = is_array(leaf, jnp.floating, jnp.integer) and max(allowed) < leaf.ndim <= most
        if not is_right or any(leaf.shape[axis] not in sizes for axis, sizes in allowed.items()):
            words = [" or ".join(map(str, sorted(set(allowed[axis])))) for axis in range(max(allowed) + 1)]
            words += ["..."] * (axes.tokens != 2)
            got = f"{leaf.dtype}{list(leaf.shape)}" if is_array(leaf) else short(leaf)
            raise ValueError(f"{name} of {encoding} must be an array of numbers [{', '.join(words)}], got {got}")

    def visit(name: str, part: Any) -> None:
        for field in dataclasses.fields(part):
            value, axes = getattr(part, field.name), field.metadata.get("axes")
            if axes is not None and value is not None:
                leaves = jax.tree.leaves(value) if axes.tokens is None else value if isinstance(value, tuple) else [value]
                for leaf in leaves:
                    check(f"{name}.{field.name}", leaf, axes)
            elif axes is None and dataclasses.is_dataclass(value) and not field.metadata.get("static"):
                visit(f"{name}.{field.name}", value)

    for name in ("transforms", "biases"):
        for number, part in enumerate(getattr(mods, name)):
            visit(f"{name}[{number}]", part)
            if isinstance(part, Rotate) and part.query_phase is not None and part.key_phase is not None:
                pairs, of_keys = part.query_phase.shape[-1], part.key_phase.shape[-1]
                if pairs != of_keys:
                    raise ValueError(
                        f"query_phase of {encoding} must have the {of_keys} pairs of channels of key_phase, got {pairs}"
                    )
    visit("weights", mods.weights)


def _check_parts(encoding: str, name: str, parts: Any, classes: tuple[type, ...]) -> None:
    wrong = [parts] if not isinstance(parts, tuple) else [part for part in parts if not isinstance(part, classes)]
    if wrong:
        words = " or ".join("None" if cls is type(None) else cls.__name__ for cls in classes)
        kind = "a tuple, each " if name in ("transforms", "biases") else ""
        raise ValueError(f"{name} of {encoding} must be {kind}{words}, got {short(wrong[0])}")


def take_tokens(tree: Any, side: Side, start: Any, size: int) -> Any:
    """Slices ``size`` queries or keys from ``start`` on out of a tree of structures; axes of length 1 are kept."""

    def part(leaf: Array, axes: Axes) -> Array:
        if axes.side != side or axes.tokens is None or leaf.shape[axes.tokens] == 1:
            return leaf
        return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=axes.tokens)

    return map_arrays(part, tree)


def key_arrays(tree: Any) -> list[tuple[str, Array, Axes]]:
    """Returns the arrays per key of a tree of structures, which decoders cache, with names such as "at.key"."""
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    found: list[tuple[str, Array, Axes]] = []
    remaining = iter(names)

    def visit(leaf: Array, axes: Axes) -> Array:
        name = next(remaining)
        if axes.side == "key":
            found.append((name, leaf, axes))
        return leaf

    map_arrays(visit, tree)
    return found


# Transforms of query and key -----------------------------------------------------------------------------------------------------


@structure
class Rotate:
    """Rotates pairs of query and key channels by a phase, and multiplies them by a gain.

        (x_a, x_b) -> gain * (x_a cos - x_b sin, x_a sin + x_b cos)

    Keys are cached rotated.

    Attributes:
      query_phase: [B or 1, T, N or 1, R / 2] float32 radians, R the number of channels that are rotated; None leaves queries alone.
      key_phase: [B or 1, S, K or 1, R / 2]; None leaves keys alone.
      query_gain, key_gain: four axes that broadcast to those of the phase; None is a gain of one.
      pairing: "half" pairs channel c of the R with c + R / 2, "interleaved" pairs 2c with 2c + 1.
      offset: the first of the R channels.
      learned: whether phases and gains have gradients. If False these are zero, and a kernel may rotate tiles as it loads them.
    """

    query_phase: Leaf = vectors("query")
    key_phase: Leaf = vectors("key")
    query_gain: Leaf = vectors("query", default=None)
    key_gain: Leaf = vectors("key", default=None)
    pairing: Pairing = static(default="half")
    offset: int = static(default=0, least=0)
    learned: bool = static(default=True)

    def applied(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Returns query [B, T, N, H] and key [B, S, K, H] rotated, in their own dtypes.

        Args:
          query, key: [B, T, N, H] and [B, S, K, H].
        """

        def rotated(x: Array, phase: Array | None, gain: Array | None) -> Array:
            if phase is None:
                return x
            if not self.learned:
                phase, gain = jax.lax.stop_gradient((phase, gain))
            return apply_rotation(x, phase, self.pairing, gain=gain, offset=self.offset)

        return rotated(query, self.query_phase, self.query_gain), rotated(key, self.key_phase, self.key_gain)


@structure
class Replace:
    """Replaces query and key, usually by ``AttentionInputs.turned_query`` and ``turned_key`` with additional channels.

    The replacement takes place before any kernel.

    Attributes:
      query: the new query, [B, T, N, C].
      key: the new key, [B, S, K, C].
    """

    query: Leaf = vectors("query")
    key: Leaf = vectors("key")

    def applied(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Returns the new query and key.

        Args:
          query, key: [B, T, N, H] and [B, S, K, H].
        """
        return self.query, self.key


@structure
class Transport:
    """Transforms every key by one linear map per token between it and the query.

        score_ij = scale * q_i . M_i M_{i-1} .. M_{j+1} k_j

    M is I - strength w w^T with ``direction`` and ``strength``, or diag(exp(log_decay)). Only tokens of the query's segment move a
    key, so padding moves none. A call may have at most one Transport, and no boolean mask; attention must be causal. (PaTH,
    arXiv:2505.16381.)

    Attributes:
      direction: w, vectors of length one [B, S, K or 1, H].
      strength: [B, S, K or 1, 1].
      log_decay: [B, S, K or 1, H].
    """

    direction: Leaf = vectors("key", default=None)
    strength: Leaf = vectors("key", default=None)
    log_decay: Leaf = vectors("key", default=None)

    def applied(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Returns query and key unchanged, because the effect depends on the pair.

        Args:
          query, key: [B, T, N, H] and [B, S, K, H].
        """
        return query, key


Transform = Rotate | Replace | Transport


def apply_rotation(
    x: Float[Array, "B T N H"],
    phase: Float[Array, "_ T _ R2"],
    pairing: Pairing = "half",
    *,
    gain: Array | None = None,
    offset: int = 0,
) -> Float[Array, "B T N H"]:
    """Rotates channels ``offset`` to ``offset + 2 * phase.shape[-1]`` of x in float32; the result has x's dtype."""
    end = offset + 2 * phase.shape[-1]
    cos, sin = jnp.cos(phase), jnp.sin(phase)
    if gain is not None:
        cos, sin = gain * cos, gain * sin
    x_rot, half = x[..., offset:end], phase.shape[-1]
    pair = (x_rot[..., :half], x_rot[..., half:]) if pairing == "half" else (x_rot[..., 0::2], x_rot[..., 1::2])
    first, second = (part.astype(jnp.float32) for part in pair)  # cast after the split, or XLA would keep a float32 copy of x
    pair = [part.astype(x.dtype) for part in (first * cos - second * sin, first * sin + second * cos)]
    rotated = jnp.concatenate(pair, -1) if pairing == "half" else jnp.stack(pair, -1).reshape(x_rot.shape)
    return jnp.concatenate([x[..., :offset], rotated, x[..., end:]], axis=-1)


# Indices of biases --------------------------------------------------------------------------------------------------------------


@structure
class Pair:
    """Computes the index of a pair by a function of features of its two tokens.

    ``function`` receives one head and must be elementwise on arrays that broadcast together: arithmetic, comparisons, ``where``,
    ``exp``, ``log``, ``sqrt``, ``cos``, ``floor`` and loops of fixed length over scalars ``args[n]``. Two optional attributes of a
    function save work in kernels. ``uniform`` maps (first query position, last, first key position, last) to True if all pairs in
    these ranges have the index of the first query and the last key, so that a table is read once per tile. ``scales_with_args`` is
    True if f(d, c * args) = c * f(d, args).

    Attributes:
      function: relative: function(differences, args) of a tuple of arrays, query feature minus key feature; otherwise
        function(query_features, key_features, args) of two tuples.
      query: features of queries, each [B or 1, N or 1, T]; None: the coordinates of the call, one feature per axis.
      key: features of keys, each [B or 1, N or K or 1, S]; None: likewise.
      args: arrays [N or 1, ...], passed to the function without their first axis.
      relative: whether the function receives only differences.
      learned: whether ``args`` have gradients. If False these are zero, and a kernel may evaluate the function in its tiles.
    """

    function: Callable[..., Array] = static()
    query: tuple[Leaf, ...] | None = features("query", default=None)
    key: tuple[Leaf, ...] | None = features("key", default=None)
    args: Any = per_head(default=())
    relative: bool = static(default=True)
    learned: bool = static(default=True)


@structure
class Scan:
    """Computes the index of a pair as the sum of gates over the keys from the query back to the key: CoPE's contextual position.

        at_ij = sum of gate(x_il) over the keys l from j to i that query i may attend to

    Keys must be ordered along their axis, and attention must be causal or masked.

    Attributes:
      gate: elementwise function(x, args) of one head.
      query, key: source of x. Neither: the scores scale * q.k of the transformed query and key, before any bias. Both: the product
        scale * query.key of vectors [B, T, N, R] and [B, S, K, R]. Only key, [B, S, N or K, 1]: a number per key.
      scale: [1] float32, the factor of the product; None is one.
      args: arrays [N or 1, ...], passed to the gate without their first axis.
      include_key: whether the gate of key j itself counts.
      include_query: whether the gate of the query's own key, at its own position, counts.
      bound: index from which on the value read is constant, for gates that are not negative; None if there is none.
    """

    gate: Callable[..., Array] = static()
    query: Leaf = vectors("query", default=None)
    key: Leaf = vectors("key", default=None)
    scale: Leaf = per_head(default=None)
    args: Any = per_head(default=())
    include_key: bool = static(default=True)
    include_query: bool = static(default=True)
    bound: float | None = static(default=None)


# Reads of biases --------------------------------------------------------------------------------------------------------------


@structure
class Table:
    """Reads a table at an index.

    Attributes:
      table: side "none": numbers [N or 1, W]. Side "query" or "key": vectors [N or 1, W, R], whose product with a vector of the
        query or of the key is read. Side "value": vectors [N or 1, W, V] that are added to the output with the weight of the pair,
        not to the score: out_i += sum_j p_ij table[at_ij].
      query: side "query": vectors [B, T, N or 1, R] to multiply with the table; None: the query of the call before any transform.
      key: side "key": vectors [B, S, K or 1, R]; None: the key before any transform.
      side: "none", "query", "key" or "value".
      interpolate: False reads at integers, with zero outside [0, W). True interpolates between the two nearest entries and clamps
        to the ends.
    """

    table: Leaf = per_head()
    query: Leaf = vectors("query", default=None)
    key: Leaf = vectors("key", default=None)
    side: Literal["none", "query", "key", "value"] = static(default="none")
    interpolate: bool = static(default=False)


@structure
class Hinges:
    """Evaluates a piecewise linear function of the index, sum_f z[f] relu(weight_in[f] at + bias_in[f]) + offset.

    Attributes:
      weight_in, bias_in: [N or 1, F].
      table: z, [N or 1, F]; with ``side`` "query", vectors [N or 1, F, R] to multiply with the query.
      offset: [N or 1]; None is zero.
      query: side "query": vectors [B, T, N or 1, R]; None: the query of the call before any transform.
      side: "none" or "query".
    """

    weight_in: Leaf = per_head()
    bias_in: Leaf = per_head()
    table: Leaf = per_head()
    offset: Leaf = per_head(default=None)
    query: Leaf = vectors("query", default=None)
    side: Literal["none", "query"] = static(default="none")


@structure
class Bias:
    """Adds a float32 value to the score of a pair, after the scale and before the soft cap and the mask.

    Attributes:
      at: the index: ``Pair`` or ``Scan``.
      read: the value at the index: ``Table``, ``Hinges``, or None for the index itself.
    """

    at: Pair | Scan
    read: Table | Hinges | None = None


@structure
class Softmax:
    """Converts scores to weights by a softmax over the allowed keys.

    Attributes:
      sink: logits [N or 1] of an additional key without a value, so that the weights of a row may sum to less than one; None: no
        such key.
    """

    sink: Leaf = per_head(default=None)


@structure
class StickBreaking:
    """Converts scores to stick-breaking weights, from the query back: w_ij = sigmoid(z_ij) prod_{j < l < i} (1 - sigmoid(z_il)).

    z are the scores with all biases; l runs over the allowed keys in between. The weights of a row sum to at most one and favor
    recent keys, so that no positions are needed. Attention must be causal. (Tan et al., arXiv:2410.17980.)

    Attributes:
      attend_current: whether j and l may be the query's own token, at its own position.
    """

    attend_current: bool = static(default=False)


@structure
class ScoreModifications:
    """Describes the effect of an encoding on one attention call.

    Attributes:
      transforms: transforms of query and key, applied in order.
      biases: biases added to the scores.
      weights: how scores are converted to weights.
      state: ``AttentionInputs.state`` of the next call on the same sequences, while decoding: arrays [B, ...] with the same shapes
        and dtypes in every call. None for encodings that do not sum or convolve along the sequence.
    """

    transforms: tuple[Transform, ...] = ()
    biases: tuple[Bias, ...] = ()
    weights: Softmax | StickBreaking = Softmax()
    state: Any = None


def sigmoid(x: Array, args: Any = ()) -> Array:
    """Returns 1 / (1 + exp(-x)), the gate of CoPE, for which kernels have a fast path."""
    return jax.nn.sigmoid(x)
