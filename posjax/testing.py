"""Checks of an encoding's behaviour, for the tests of anybody who writes one, and where an encoding runs.

    from posjax.testing import check_encoding

    def test_mine():
        check_encoding(mine(size=3), shift=7)

Every rule is a function whose docstring states the rule. ``check_encoding`` runs all rules that apply.
"""

import copy
import dataclasses
import functools
import math
import pickle
import types
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention import kv_cache
from posjax.attention.api import attention
from posjax.attention.backends import reference
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import AttentionCall, prepare, prepare_next
from posjax.core.encoding import Dims, PositionalEncoding, Tokens
from posjax.core.structures import Axes, Rotate, key_arrays, map_arrays
from posjax.typing import Array, Params

_BATCH, _LENGTH, _PAST = 2, 12, 5  # sequences, their tokens, and those that count as the past
_DIMS = Dims(num_heads=4, head_dim=8, embed_dim=24, max_length=64, num_kv_heads=2)
_WIDE = Dims(num_heads=4, head_dim=64, max_length=1024)
_FAR = 1e-3  # outputs that should differ do so by more than this


class _Layer:
    """One attention layer with fixed projections around an encoding, and random tokens.

    Attributes:
      params: of the encoding, with noise on every leaf: tables that start at zero would hide any fault.
      x: tokens [B, T, D].
    """

    def __init__(self, encoding: PositionalEncoding, dims: Dims, tolerance: float):
        self.encoding, self.dims, self.tolerance = encoding, dims, tolerance
        draw = np.random.default_rng(0).normal
        noise = functools.partial(jax.tree.map, lambda leaf: leaf + 0.3 * jnp.asarray(draw(size=leaf.shape), leaf.dtype))
        self.params: Params = noise(encoding.init(jax.random.key(0), dims))
        self.x = jnp.asarray(draw(size=(_BATCH, _LENGTH, dims.embed_dim)), jnp.float32)
        heads = dims.num_heads, dims.num_kv_heads, dims.num_kv_heads
        size = (dims.embed_dim, dims.head_dim)
        self.kernels = [jnp.asarray(draw(size=(size[0], n, size[1])) / math.sqrt(size[0]), jnp.float32) for n in heads]

    def operands(self, params: Params, x: Array, positions: Array) -> tuple[tuple[Array, Array, Array], Array]:
        """Returns query, key and value after ``embed`` and the projections, and the activations that were projected."""
        hidden = self.encoding.embed(params, x, self.tokens(positions))
        return tuple(jnp.einsum("btd,dnh->btnh", hidden, kernel.astype(hidden.dtype)) for kernel in self.kernels), hidden

    def tokens(self, positions: Array) -> Tokens:
        """Returns tokens at positions [T] or [B, T], with coordinates where the encoding places them."""
        tokens = Tokens.at(positions)
        return dataclasses.replace(tokens, coordinates=self.encoding.place(tokens))

    def call(self, params: Params, x: Array, positions: Array | None = None, **options: Any) -> AttentionCall:
        """Prepares the causal call of tokens x."""
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        operands, hidden = self.operands(params, x, positions)
        options = dict(is_causal=True, query_positions=positions, key_positions=positions, hidden=hidden) | options
        return prepare(*operands, self.encoding, params, **options)

    def __call__(self, params: Params, x: Array, positions: Array | None = None, backend: Any = None, **options: Any) -> Array:
        """Computes causal attention [B, T, N, H] of tokens x, with a backend's function or with ``posjax.attention``."""
        if backend is not None:
            return backend(self.call(params, x, positions, **options))
        positions = jnp.arange(x.shape[1])[None] if positions is None else positions
        operands, hidden = self.operands(params, x, positions)
        options = dict(is_causal=True, query_positions=positions, key_positions=positions, hidden=hidden) | options
        return attention(*operands, self.encoding, params, **options)

    @functools.cached_property
    def scrambled(self) -> Array:
        """Returns coordinates [B, T, A] that have nothing to do with the order of tokens."""
        drawn = np.random.default_rng(3).permuted(np.tile(np.arange(_LENGTH), (_BATCH, self.encoding.axes, 1)), axis=2)
        return jnp.asarray(np.moveaxis(drawn, 1, 2), jnp.int32)

    @functools.cached_property
    def skips_masks(self) -> bool:
        """Returns whether to skip boolean masks: a Transport does not support them, and a state does not depend on them."""
        positions = jnp.arange(_LENGTH)[None]
        operands, hidden = self.operands(self.params, self.x, positions)
        call, state = prepare_next(*operands, self.encoding, self.params, None, is_causal=True, hidden=hidden)
        return call.transport is not None or state is not None

    @functools.cached_property
    def out(self) -> Array:
        return self(self.params, self.x, backend=reference.attention)

    def same(self, got: Any, want: Any) -> None:
        """Raises AssertionError if two trees of arrays differ by more than rounding."""
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            assert a.shape == b.shape, f"{jax.tree_util.keystr(path)} has shape {a.shape}, not {b.shape}"
            off = float(np.abs(a - b).max(initial=0.0)) if np.isfinite(a).all() and np.isfinite(b).all() else math.nan
            assert off <= self.tolerance * max(1.0, float(np.abs(b).max(initial=0.0))), (
                f"{jax.tree_util.keystr(path) or 'the output'} differs by {off:.1e}"
            )


def values(layer: _Layer) -> None:
    """An encoding equals its copies, hashes as they do, and can be pickled; equal encodings share one compiled program."""
    encoding = layer.encoding
    copies = [copy.deepcopy(encoding), pickle.loads(pickle.dumps(encoding))]
    for one in copies:
        assert one == encoding, f"{one!r} is not equal to what it is a copy of"
        assert hash(one) == hash(encoding), "the hash of a copy differs"
    program = jax.jit(lambda encoding, x: encoding.embed(layer.params, x, Tokens.at(jnp.arange(_LENGTH))))
    for one in (encoding, *copies):
        program(one, layer.x)
    assert program._cache_size() == 1, f"{program._cache_size()} programs were compiled for equal encodings"


def parameters(layer: _Layer) -> None:
    """Params are a dict of float32 arrays, whose shapes do not depend on the key and whose values depend on nothing else."""
    first, second, other = (layer.encoding.init(jax.random.key(seed), layer.dims) for seed in (0, 0, 1))
    assert isinstance(first, dict), f"init returned {type(first).__name__}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(first):
        assert leaf.dtype == jnp.float32, f"{jax.tree_util.keystr(path)} is {leaf.dtype}"
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, other), "shapes depend on the key"
    jax.tree.map(np.testing.assert_array_equal, first, second)


def dtypes(layer: _Layer) -> None:
    """Embeddings and outputs keep the dtype of their inputs; in bfloat16 the output is near that in float32."""
    low = layer.x.astype(jnp.bfloat16)
    embedded = layer.encoding.embed(layer.params, low, layer.tokens(jnp.arange(_LENGTH)))
    assert embedded.dtype == low.dtype and embedded.shape == low.shape, f"embed returned {embedded.dtype}{list(embedded.shape)}"
    out = layer(layer.params, low)
    assert out.dtype == low.dtype, f"attention returned {out.dtype} for bfloat16"
    off = float(jnp.abs(out.astype(jnp.float32) - layer.out).mean() / jnp.abs(layer.out).mean())
    assert off < 0.1, f"the output in bfloat16 is off by {100 * off:.0f} % in the mean"
    call = layer.call(layer.params, low)

    def check(x: Array, axes: Axes) -> None:
        is_feature = axes.tokens == 2 or any(x is part for part in phases)
        assert not is_feature or x.dtype in (jnp.float32, jnp.int32), f"a phase, a gain or a feature is {x.dtype}"

    rotations = [transform for transform in call.transforms if isinstance(transform, Rotate)]
    phases = [getattr(t, name) for t in rotations for name in ("query_phase", "key_phase", "query_gain", "key_gain")]
    map_arrays(check, (*call.transforms, *call.biases))


def causality(layer: _Layer) -> None:
    """Under a causal mask no output depends on a later token, whatever the coordinates are: masks go by the order of tokens."""
    later = layer.x.at[:, _PAST:].add(1.0)
    layer.same(layer(layer.params, later)[:, :_PAST], layer.out[:, :_PAST])
    own = dict.fromkeys(("query_coordinates", "key_coordinates"), layer.scrambled)
    layer.same(layer(layer.params, later, **own)[:, :_PAST], layer(layer.params, layer.x, **own)[:, :_PAST])


def coordinates(layer: _Layer) -> None:
    """An encoding reads coordinates, not the order of tokens, and no more axes than it declares."""
    limit = layer.encoding.max_length(layer.dims)
    positions = jnp.arange(_LENGTH)[None] * (2 if limit is None or limit > 2 * _LENGTH else 1)
    operands, hidden = layer.operands(layer.params, layer.x, positions)
    at = jnp.broadcast_to(positions[..., None], (1, _LENGTH, layer.encoding.axes))

    def attend(**own: Array) -> Array:
        return attention(*operands, layer.encoding, layer.params, is_causal=True, hidden=hidden, **own)

    want = attend(query_positions=positions, key_positions=positions)
    for given in (at, jnp.concatenate([at, layer.scrambled[:1, :, :1]], -1)):
        layer.same(attend(query_coordinates=given, key_coordinates=given), want)


def finite(layer: _Layer) -> None:
    """Scores are finite for every pair, also where a mask forbids attention: kernels compute them and mask afterwards."""
    _, scores = reference.scores_of(layer.call(layer.params, layer.x))
    assert np.isfinite(scores).all(), "a score is not finite"


def transformations(layer: _Layer) -> None:
    """Calls under jit and vmap equal plain ones."""
    layer.same(jax.jit(layer)(layer.params, layer.x), layer.out)
    rows = jax.vmap(lambda row: layer(layer.params, row[None])[0])(layer.x)
    layer.same(rows, layer.out)


def tiles(layer: _Layer) -> None:
    """The walk over tiles equals dense attention, forward and backward; all gradients are finite."""
    weight = jnp.asarray(np.random.default_rng(1).normal(size=layer.out.shape), jnp.float32)

    def results(backend: Callable[..., Array]) -> Any:
        def loss(params: Params, x: Array) -> tuple[Array, Array]:
            out = layer(params, x, backend=backend)
            return (out * weight).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(layer.params, layer.x)

    dense = results(reference.attention)
    for path, leaf in jax.tree_util.tree_leaves_with_path(dense):
        assert np.isfinite(leaf).all(), f"{jax.tree_util.keystr(path)} of dense attention is not finite"
    layer.same(results(functools.partial(xla_chunked.attention, tile=(5, 4))), dense)


def masks(layer: _Layer) -> None:
    """Keys that are masked out have no influence, even on counts, and a query without any key gets zeros."""
    if layer.skips_masks:
        return
    allowed = np.tril(np.random.default_rng(2).random((1, 1, _LENGTH, _LENGTH)) < 0.6)
    allowed[..., 7, :] = False
    mask = jnp.asarray(allowed)
    for backend in (reference.attention, functools.partial(xla_chunked.attention, tile=(5, 4))):
        out = layer(layer.params, layer.x, backend=backend, mask=mask)
        assert not np.asarray(out[:, 7]).any(), "a query without any key does not get zeros"
    visible = jnp.asarray(np.arange(_LENGTH) != 3)[None, None, None]
    changed = layer.x.at[:, 3].add(1.0)
    others = np.arange(_LENGTH) != 3
    want = layer(layer.params, layer.x, mask=visible)[:, others]
    layer.same(layer(layer.params, changed, mask=visible)[:, others], want)


def packing(layer: _Layer) -> None:
    """Sequences that are packed into one row, with positions that restart, give what each gives alone."""
    lengths = _PAST, _LENGTH - _PAST
    segments = jnp.broadcast_to(jnp.repeat(1 + jnp.arange(2), np.asarray(lengths)), (_BATCH, _LENGTH))
    positions = jnp.concatenate([jnp.arange(n) for n in lengths])[None]
    packed = layer(layer.params, layer.x, positions, segment_ids=segments)
    alone = [layer(layer.params, part) for part in jnp.split(layer.x, [_PAST], axis=1)]
    layer.same(packed, jnp.concatenate(alone, axis=1))


def padding(layer: _Layer) -> None:
    """Padding (segment 0) among the tokens has no influence on the others, whatever it holds."""
    segments = jnp.broadcast_to(jnp.arange(_LENGTH) != 3, (_BATCH, _LENGTH)).astype(jnp.int32)
    others = np.arange(_LENGTH) != 3
    want, got = (layer(layer.params, x, segment_ids=segments)[:, others] for x in (layer.x, layer.x.at[:, 3].add(1.0)))
    layer.same(got, want)


def decoding(layer: _Layer) -> None:
    """Decoding in chunks of any size matches one full-sequence call; if raw keys are cached, one on the sequence so far."""
    for sizes in ((_LENGTH,), (_PAST, 1, 1, _LENGTH - _PAST - 2)):
        cache = kv_cache.init_cache(layer.encoding, layer.dims, _BATCH, max_length=_LENGTH)
        outs, start = [], 0
        for size in sizes:
            positions = jnp.arange(start, start + size)[None]
            operands, hidden = layer.operands(layer.params, layer.x[:, start : start + size], positions)
            own = dict(positions=positions, hidden=hidden)
            out, cache = kv_cache.attend(*operands, layer.encoding, layer.params, cache, **own)
            outs.append(out)
            start += size
            if layer.encoding.cache == "raw":
                layer.same(out, layer(layer.params, layer.x[:, :start])[:, -size:])
        if layer.encoding.cache == "raw":
            continue
        layer.same(jnp.concatenate(outs, axis=1), layer.out)


def columns(layer: _Layer) -> None:
    """The arrays of a structure for a key depend only on that token and earlier ones, not on the length, unless keys are raw."""
    if layer.encoding.cache == "raw":
        return

    def made(x: Array) -> Any:
        call = layer.call(layer.params, x)
        return [(x, axes.tokens) for _, x, axes in key_arrays(call.transforms) + key_arrays(call.biases)]

    part, whole = made(layer.x[:, :_PAST]), made(layer.x)
    layer.same([x for x, _ in part], [jax.lax.slice_in_dim(x, 0, _PAST, axis=axis) for x, axis in whole])


def heads(layer: _Layer) -> None:
    """A device with a shard of the heads computes the same as with all heads, from the parts of all arrays for its heads."""
    call, group = layer.call(layer.params, layer.x), layer.dims.num_heads // layer.dims.num_kv_heads

    def part(x: Array, axes: Axes) -> Array:
        size = x.shape[axes.heads]
        return x if size == 1 else jax.lax.slice_in_dim(x, 0, group if size == layer.dims.num_heads else 1, axis=axes.heads)

    first = call.replace(
        query=call.query[:, :, :group],
        key=call.key[:, :, :1],
        value=call.value[:, :, :1],
        transforms=map_arrays(part, call.transforms),
        biases=map_arrays(part, call.biases),
        weights=map_arrays(part, call.weights),
    )
    layer.same(reference.attention(first), reference.attention(call)[:, :, :group])


def order(layer: _Layer) -> None:
    """Exchanging two earlier tokens changes the last output."""
    swapped = layer.x.at[:, jnp.asarray([1, 4])].set(layer.x[:, jnp.asarray([4, 1])])
    off = float(jnp.abs(layer(layer.params, swapped)[:, -1] - layer.out[:, -1]).max())
    assert off > _FAR, f"the last output changes by {off:.1e}"


RULES = (
    values,
    parameters,
    dtypes,
    finite,
    causality,
    coordinates,
    columns,
    heads,
    transformations,
    tiles,
    padding,
    masks,
    packing,
    decoding,
)


def check_encoding(
    encoding: PositionalEncoding,
    dims: Dims = _DIMS,
    *,
    shift: int | None = None,
    sees_order: bool = True,
    tolerance: float = 1e-4,
) -> None:
    """Checks that an encoding behaves as models, backends, caches and meshes expect of it. It takes seconds.

    Args:
      encoding: what is checked.
      dims: sizes of the layer that it is checked in; max_length must be at least 12, and num_kv_heads should be 2 or more, less
        than num_heads.
      shift: a number of positions; adding it to all of them must change nothing. None if the encoding does not claim that.
      sees_order: whether the order of the tokens before a query changes its output, as it does for every encoding but NoPE.
      tolerance: largest difference, relative to the largest number, between results that should be equal.

    Raises:
      AssertionError: a rule does not hold; the message quotes it and says by how much.
      TypeError: ``encoding`` is not a PositionalEncoding.
    """
    if not isinstance(encoding, PositionalEncoding):
        raise TypeError(f"encoding must be a PositionalEncoding such as rope(), got {encoding!r}")
    layer = _Layer(encoding, dims, tolerance)
    for rule in RULES + ((order,) if sees_order else ()):
        _check(rule, layer)
    if shift is not None:

        def shifted(layer: _Layer) -> None:
            layer.same(layer(layer.params, layer.x, shift + jnp.arange(_LENGTH)[None]), layer.out)

        shifted.__doc__ = f"Adding {shift} to all positions changes nothing."
        _check(shifted, layer)


def _check(rule: Callable[[_Layer], None], layer: _Layer) -> None:
    said = f"{layer.encoding!r} breaks the rule {rule.__name__!r}: {(rule.__doc__ or '').strip()}"
    try:
        rule(layer)
    except AssertionError as error:
        raise AssertionError(f"{said} Here {error}.") from None
    except Exception as error:
        raise AssertionError(f"{said} Here an error was raised: {type(error).__name__}: {error}") from error


# Where an encoding runs ----------------------------------------------------------------------------------------------------------


def where_it_runs(encoding: PositionalEncoding, dims: Dims = _WIDE, **options: Any) -> dict[str, str | None]:
    """Returns which backends run an encoding, for a causal call in bfloat16 of 1,024 tokens, without running anything.

    >>> import posjax as pj
    >>> {backend for backend, reason in where_it_runs(pj.cope_mlp()).items() if reason is not None} == {"tpu", "gpu"}
    True

    Args:
      encoding: the encoding.
      dims: sizes of the heads, and the longest sequence of an encoding with a table.
      **options: further arguments of ``posjax.attention``, such as ``local_window_size=256``. ``segment_ids=True`` packs several
        sequences into each row.

    Returns:
      {backend: reason}: "xla", "xla_chunked", "tpu" and "gpu" for the backends on one device, "ring" for a sequence that is sharded
      over four devices, and "decoding" for ``posjax.attend`` with a cache. A reason is None where the call is supported.

    Raises:
      ValueError: an option is not an argument of ``posjax.attention`` or has a wrong value.
    """
    from posjax.attention.backends.gpu import attention as gpu
    from posjax.attention.backends.ring import attention as ring
    from posjax.attention.backends.tpu import attention as tpu
    from posjax.attention.prefix_sums import with_prefix_sums

    length, reasons = 1024, {}
    backends = {"xla": reference, "xla_chunked": xla_chunked, "tpu": tpu, "gpu": gpu}

    def ask(query: Array, key: Array, hidden: Array, segment_ids: Array) -> Array:
        params = encoding.init(jax.random.key(0), dims)
        given = options | ({"segment_ids": segment_ids} if options.get("segment_ids") is True else {})
        given |= {"hidden": hidden} if encoding.needs_hidden else {}
        call = with_prefix_sums(prepare(query, key, key, encoding, params, is_causal=True, **given))
        reasons.update({name: backend.unsupported_reason(call) for name, backend in backends.items()})
        reasons["ring"] = ring.unsupported_reason(call, cast(Any, types.SimpleNamespace(parts=4)))
        reasons["decoding"] = _unsupported_decoding(encoding, dims, params, options.get("local_window_size"))
        return query

    heads, keys = (jax.ShapeDtypeStruct((1, length, n, dims.head_dim), jnp.bfloat16) for n in (dims.num_heads, dims.num_kv_heads))
    hidden = jax.ShapeDtypeStruct((1, length, dims.embed_dim), jnp.bfloat16)
    jax.eval_shape(ask, heads, keys, hidden, jax.ShapeDtypeStruct((1, length), jnp.int32))
    return reasons


def _unsupported_decoding(encoding: PositionalEncoding, dims: Dims, params: Params, window: int | None) -> str | None:
    """Returns why a token cannot be decoded with a cache, or None if it can."""
    sizes = dict(max_length=8) if window is None else dict(window=window)
    try:
        cache = kv_cache.init_cache(encoding, dims, batch_size=1, **sizes)
        query = jnp.zeros((1, 1, dims.num_heads, dims.head_dim))
        key = jnp.zeros((1, 1, dims.num_kv_heads, dims.head_dim))
        hidden = jnp.zeros((1, 1, dims.embed_dim)) if encoding.needs_hidden else None
        kv_cache.attend(query, key, key, encoding, params, cache, hidden=hidden)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None
