"""Score modifications: the structures in which an encoding says what it does to attention, and which backends know.

    transforms   Rotate | Replace | Transport        query and key, before their product
    biases       Bias(at, read)                      added to the scores
      at         Pair | Scan                         where: a function of two tokens, or a sum along the keys between them
      read       None | Table | Hinges               what is read there: the number itself, a table, or a network of one number
    weights      Softmax | StickBreaking             what turns scores into weights

The score of query i and key j is ``scale * q_i.k_j`` of the transformed query and key, plus all biases. No structure is a [T, S]
array: each holds arrays per query, per key and per head, and pure functions that are evaluated on tiles.

The layout of an array tells its axes, so that meshes, caches and rings know how to split every leaf from the class alone:

    vectors    [B or 1, T or S, N or K or 1, ...]
    features   [B or 1, N or K or 1, T or S]
    tables and args   [N or 1, ...]

A 1 is shared by all. The axis of keys is never 1 unless there is one key: entry j depends on key j alone, because a decoder caches
it. Phases, gains, gates and features are float32 or int32; vectors have the dtype of query and key.

The functions in structures are part of the compiled program. They must compare equal when they are made twice: functions at the
level of a module, or frozen dataclasses with ``__call__``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from posjax.checks import Bounds, check_fields, is_array, short
from posjax.typing import Array, Float

Side = Literal["query", "key"]
Pairing = Literal["half", "interleaved"]
StructureT = TypeVar("StructureT")
Leaf = Any  # an array, or what stands for it in a tree of specs, of numbers or of None
HEAD_AXES = ("tensor", "model", "heads", "tp", "mp")  # names of mesh axes that shard the axes of heads


@dataclasses.dataclass(frozen=True)
class Axes:
    """Tells the axes of the arrays in a field of a structure.

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


def structure(cls: type[StructureT]) -> type[StructureT]:
    """Makes a class a frozen dataclass and a pytree, whose leaves are the fields that are not static.

    Static fields are checked by their annotations; the arrays are checked where an encoding is applied, by ``check_structures``.
    """
    cls.__post_init__ = check_fields
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def map_arrays(function: Callable[[Any, Axes], Any], tree: Any) -> Any:
    """Returns a tree of structures with function(leaf, axes) in place of every leaf."""
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
    """Raises ValueError if the parts of a ``ScoreModifications`` are not structures, or their arrays have other axes than declared.

    Args:
      encoding: what messages call the encoding that made them.
      mods: what its ``attend`` returned.
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
        allowed = {axes.heads: heads if axes.side else heads[:2]}
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
    """Returns a tree of structures for ``size`` of its queries or keys, from ``start`` on; an axis of length 1 stays."""

    def part(leaf: Array, axes: Axes) -> Array:
        if axes.side != side or leaf.shape[axes.tokens] == 1:
            return leaf
        return jax.lax.dynamic_slice_in_dim(leaf, start, size, axis=axes.tokens)

    return map_arrays(part, tree)


def key_arrays(tree: Any) -> list[tuple[str, Array, Axes]]:
    """Returns the arrays per key of a tree of structures, by name such as "at.key": what a decoder caches."""
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
    query_gain: Leaf = vectors("query", None)
    key_gain: Leaf = vectors("key", None)
    pairing: Pairing = static("half")
    offset: int = static(0, least=0)
    learned: bool = static(True)

    def applied(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Returns query [B, T, N, H] and key [B, S, K, H] rotated, in their own dtypes."""

        def rotated(x: Array, phase: Array | None, gain: Array | None) -> Array:
            if phase is None:
                return x
            if not self.learned:
                phase, gain = jax.lax.stop_gradient((phase, gain))
            return apply_rotation(x, phase, self.pairing, gain=gain, offset=self.offset)

        return rotated(query, self.query_phase, self.query_gain), rotated(key, self.key_phase, self.key_gain)


@structure
class Replace:
    """Replaces query and key by others, usually with new channels behind the old ones, made from ``AttentionInputs.turned_query``
    and ``turned_key``. It is done before any kernel.

    Attributes:
      query: [B, T, N, C].
      key: [B, S, K, C].
    """

    query: Leaf = vectors("query")
    key: Leaf = vectors("key")

    def applied(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Returns the query and the key that it holds."""
        return self.query, self.key


@structure
class Transport:
    """Moves every key along the tokens between it and the query, by one linear map per token.

        score_ij = scale * q_i . M_i M_{i-1} .. M_{j+1} k_j

    M is I - strength w w^T with ``direction`` and ``strength``, or diag(exp(log_decay)). Only tokens of the query's segment move a
    key, so padding moves none. One call takes at most one Transport, and no boolean mask; attention must be causal. (PaTH,
    arXiv:2505.16381.)

    Attributes:
      direction: w, vectors of length one [B, S, K or 1, H].
      strength: [B, S, K or 1, 1].
      log_decay: [B, S, K or 1, H].
    """

    direction: Leaf = vectors("key", None)
    strength: Leaf = vectors("key", None)
    log_decay: Leaf = vectors("key", None)

    def applied(self, query: Array, key: Array) -> tuple[Array, Array]:
        """Returns query and key as they are: what it does depends on the pair."""
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


# Where a bias is read -------------------------------------------------------------------------------------------------------------


@structure
class Pair:
    """Locates a pair by a function of features that its two tokens have.

    ``function`` sees one head and must be elementwise on arrays that broadcast together: arithmetic, comparisons, ``where``,
    ``exp``, ``log``, ``sqrt``, ``cos``, ``floor`` and loops of fixed length over scalars ``args[n]``. Two attributes of a function
    let kernels do less. ``uniform`` maps (first query position, last, first key position, last) to True if all pairs in these
    ranges have the index of the first query and the last key, and a table is then read once a tile. ``scales_with_args`` is True
    if f(d, c * args) = c * f(d, args).

    Attributes:
      function: relative: function(differences, args) of a tuple of arrays, query feature minus key feature; otherwise
        function(query_features, key_features, args) of two tuples.
      query: features of queries, each [B or 1, N or 1, T]; None: the coordinates of the call, one feature an axis.
      key: features of keys, each [B or 1, N or K or 1, S]; None likewise.
      args: arrays [N or 1, ...], passed to the function without their first axis.
      relative: whether the function sees differences alone.
      learned: whether ``args`` have gradients. If False these are zero, and a kernel may evaluate the function in its tiles.
    """

    function: Callable[..., Array] = static()
    query: tuple[Leaf, ...] | None = features("query", None)
    key: tuple[Leaf, ...] | None = features("key", None)
    args: Any = per_head(())
    relative: bool = static(True)
    learned: bool = static(True)


@structure
class Scan:
    """Locates a pair by the sum of gates over the keys from the query back to the key: CoPE's contextual position.

        at_ij = sum of gate(x_il) over the keys l from j to i that query i may attend to

    Keys must be ordered along their axis, and attention must be causal or masked.

    Attributes:
      gate: elementwise function(x, args) of one head.
      query, key: source of x. Neither: the scores scale * q.k of the transformed query and key, before any bias. Both: the product
        scale * query.key of vectors [B, T, N, R] and [B, S, K, R]. Key alone, [B, S, N or K, 1]: the key's own number.
      scale: [1] float32, the factor of the product; None is one.
      args: arrays [N or 1, ...], passed to the gate without their first axis.
      include_key: whether the gate of key j itself counts.
      include_query: whether the gate of the query's own key, at its own position, counts.
      bound: number from which on what is read is constant along the keys, for gates that are not negative; None if there is none.
    """

    gate: Callable[..., Array] = static()
    query: Leaf = vectors("query", None)
    key: Leaf = vectors("key", None)
    scale: Leaf = per_head(None)
    args: Any = per_head(())
    include_key: bool = static(True)
    include_query: bool = static(True)
    bound: float | None = static(None)


# What is read there ---------------------------------------------------------------------------------------------------------------


@structure
class Table:
    """Reads a table at an index.

    Attributes:
      table: side "none": numbers [N or 1, W]. Side "query" or "key": vectors [N or 1, W, R], whose product with a vector of the
        query or of the key is read. Side "value": vectors [N or 1, W, V] that add nothing to the score, but with the weight of the
        pair to the output, as a value of the pair: out_i += sum_j p_ij table[at_ij].
      query: side "query": vectors [B, T, N or 1, R] that meet the table; None: the query of the call before any transform.
      key: side "key": vectors [B, S, K or 1, R]; None: the key before any transform.
      side: "none", "query", "key" or "value".
      interpolate: False reads at integers and finds zero outside [0, W). True interpolates between the two nearest entries and
        clamps to the ends.
    """

    table: Leaf = per_head()
    query: Leaf = vectors("query", None)
    key: Leaf = vectors("key", None)
    side: Literal["none", "query", "key", "value"] = static("none")
    interpolate: bool = static(False)


@structure
class Hinges:
    """Reads a network of one number, sum_f z[f] relu(weight_in[f] at + bias_in[f]) + offset: a piecewise linear function.

    Attributes:
      weight_in, bias_in: [N or 1, F].
      table: z, [N or 1, F]; with ``side`` "query" vectors [N or 1, F, R] that meet the query.
      offset: [N or 1]; None is zero.
      query: side "query": vectors [B, T, N or 1, R]; None: the query of the call before any transform.
      side: "none" or "query".
    """

    weight_in: Leaf = per_head()
    bias_in: Leaf = per_head()
    table: Leaf = per_head()
    offset: Leaf = per_head(None)
    query: Leaf = vectors("query", None)
    side: Literal["none", "query"] = static("none")


@structure
class Bias:
    """Adds to a score what is read at a pair: float32, after the scale and before the soft cap and the mask.

    Attributes:
      at: where: ``Pair`` or ``Scan``.
      read: what is read there: ``Table``, ``Hinges``, or None for the number itself.
    """

    at: Pair | Scan
    read: Table | Hinges | None = None


@structure
class Softmax:
    """Turns scores into weights by a softmax over the allowed keys.

    Attributes:
      sink: logits [N or 1] of one more key that has no value, so that the weights of a row may sum to less than one; None for none.
    """

    sink: Leaf = per_head(None)


@structure
class StickBreaking:
    """Turns scores into weights by breaking a stick from the query back: w_ij = sigmoid(z_ij) prod_{j < l < i} (1 - sigmoid(z_il)).

    z are the scores with all biases; l runs over the allowed keys between. Weights of a row sum to at most one, recent keys come
    first, and no positions are needed. Attention must be causal. (Tan et al., arXiv:2410.17980.)

    Attributes:
      attend_current: whether j and l may be the query's own token, at its own position.
    """

    attend_current: bool = static(False)


@structure
class ScoreModifications:
    """Says what an encoding does in one attention call.

    Attributes:
      transforms: applied to query and key in their order.
      biases: added to the scores.
      weights: what turns scores into weights.
      state: what ``AttentionInputs.state`` will be in the next call on the same sequences, while decoding: arrays [B, ...], of the
        same shapes and dtypes in every call. None for encodings that sum or convolve nothing along the sequence.
    """

    transforms: tuple[Transform, ...] = ()
    biases: tuple[Bias, ...] = ()
    weights: Softmax | StickBreaking = Softmax()
    state: Any = None


def sigmoid(x: Array, args: Any = ()) -> Array:
    """Returns 1 / (1 + exp(-x)): the gate of CoPE, which kernels know."""
    return jax.nn.sigmoid(x)
