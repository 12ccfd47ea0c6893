"""A Flax NNX Transformer that accepts any positional encoding: a decoder language model, or an encoder with a [CLS] token.

    tokens -> embedding -> encoding.embed -> [ q, k, v -> attention under the encoding; MLP ] x L -> logits

The parameters of all layers are stacked and the layers run in a ``lax.scan``, so compile time does not grow with depth. Layers may
have different encodings: each run of consecutive layers with the same encoding is one scan.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from posjax.attention import kv_cache
from posjax.attention.api import attention
from posjax.attention.arguments import canonicalize_coordinates, canonicalize_positions, check_segment_ids
from posjax.attention.backends.xla_chunked.attention import SAVED
from posjax.attention.linear import LinearCache, linear_attend, linear_attention
from posjax.checks import check_at_least, check_fits, is_array, is_traced, short
from posjax.core.encoding import Dims, PositionalEncoding, Tokens, what_is
from posjax.core.manual_axes import vary_alike
from posjax.models.config import TransformerConfig, check_memory, mlp_dim
from posjax.parallel.gather import gather_params, in_rows
from posjax.parallel.mesh import mesh_of
from posjax.typing import Array, Float, Int, Params


class LayerRecord(NamedTuple):
    """Holds the attention inputs of one layer, for probes.

    Attributes:
      query: [B, T, N, H].
      key, value: [B, T, K, H].
      hidden: [B, T, D]; None unless the encoding needs it.
      encoding, params: the encoding of the layer and its parameters.
    """

    query: Array
    key: Array
    value: Array
    hidden: Array | None
    encoding: PositionalEncoding
    params: Params


class _Layer(nnx.Module):
    """Applies one attention branch and one MLP branch.

    ``Transformer`` builds all L layers in one vmapped call, so every parameter has a leading axis of layers.
    """

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
        dims, dtype = config.dims, jnp.dtype(config.compute_dtype)
        width = config.embed_dim

        def linear(source: int | tuple[int, ...], target: int | tuple[int, ...], gain: float = 1.0) -> nnx.LinearGeneral:
            axis = tuple(range(-len(source), 0)) if isinstance(source, tuple) else -1
            init = nnx.initializers.variance_scaling(gain, "fan_in", "normal")
            return nnx.LinearGeneral(source, target, axis=axis, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs)

        # 2L branches are added to the residual stream: this gain keeps its variance near one at initialization (GPT-2).
        last = 1.0 / (2 * config.num_layers)
        heads = (dims.num_heads, dims.head_dim)
        kv_heads = (dims.num_kv_heads, dims.head_dim)
        self.query = linear(width, heads)
        self.key = linear(width, kv_heads)
        self.value = linear(width, kv_heads)
        self.out = linear(heads, width, last)
        hidden = mlp_dim(config)
        self.up = linear(width, hidden)
        if config.activation == "swiglu":
            self.gate = linear(width, hidden)
        self.down = linear(hidden, width, last)
        self.attention_norm = _norm(config, rngs)
        self.mlp_norm = _norm(config, rngs)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoding: PositionalEncoding,
        params: Params,
        positions: Int[Array, "_ T"],
        coordinates: Array | None,
        segment_ids: Int[Array, "B T"] | None,
        dropout_key: Array | None,
        cache: kv_cache.LayerCache | None = None,
    ) -> tuple[Array, tuple[Array, Array, Array, Array | None, Params], kv_cache.LayerCache | None]:
        config = self.config
        pre = config.norm_position == "pre"
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)

        hidden = self.attention_norm(x) if pre else x
        query, key, value = checkpoint_name((self.query(hidden), self.key(hidden), self.value(hidden)), SAVED)
        shared = dict(is_causal=config.is_causal, segment_ids=segment_ids, query_positions=positions, key_positions=positions)
        source = hidden if encoding.needs_hidden else None
        how = dict(logits_soft_cap=config.logits_soft_cap, implementation=config.implementation)
        if config.attention == "linear" and cache is not None:
            positions, segments = kv_cache.next_positions(cache, x.shape[1], positions, segment_ids)
            mixed, cache = linear_attend(query, key, value, encoding, params, cache, positions=positions, real=segments != 0)
            after = kv_cache.position_after(positions, segments, cache.next_position)
            cache = dataclasses.replace(cache, next_position=after)
        elif config.attention == "linear":
            mixed = linear_attention(query, key, value, encoding, params, **shared)
        elif cache is not None:
            own = dict(positions=positions, coordinates=coordinates, segment_ids=segment_ids, hidden=source)
            mixed, cache = kv_cache.attend(query, key, value, encoding, params, cache, **own, **how)
        else:
            own = dict(query_coordinates=coordinates, key_coordinates=coordinates, hidden=source)
            how["local_window_size"] = config.local_window_size
            mixed = attention(query, key, value, encoding, params, **shared, **own, **how)
        x = x + _dropout(self.out(mixed), config.dropout_rate, keys[0])
        x = x if pre else self.attention_norm(x)

        hidden = self.mlp_norm(x) if pre else x
        up = self.up(hidden)
        active = jax.nn.gelu(up) if config.activation == "gelu" else jax.nn.silu(self.gate(hidden)) * up
        x = x + _dropout(self.down(active), config.dropout_rate, keys[1])
        x = x if pre else self.mlp_norm(x)
        return x, (query, key, value, source, params), cache


class Transformer(nnx.Module):
    """Transformer with a positional encoding: a causal language model or a bidirectional encoder.

    Args:
      config: architecture of the model.
      encoding: one encoding for all layers, or a sequence of encodings that is repeated over the layers: ``[cope(64), identity()]``
        alternates. The length of the sequence must divide the number of layers.
      rngs: random number generators, ``nnx.Rngs(seed)``. The initial weights of the layers do not depend on the encoding.

    Raises:
      ValueError: the number of encodings does not divide the number of layers, or the weights do not fit the memory of the machine.
      TypeError: ``config`` is no TransformerConfig, ``encoding`` no encoding and no sequence of them, or ``rngs`` no ``nnx.Rngs``.
    """

    def __init__(self, config: TransformerConfig, encoding: PositionalEncoding | Sequence[PositionalEncoding], *, rngs: nnx.Rngs):
        if not isinstance(config, TransformerConfig):
            raise TypeError(f"config must be a TransformerConfig, got {short(config)}")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be flax.nnx.Rngs(seed), got {short(rngs)}")
        pattern = (encoding,) if isinstance(encoding, PositionalEncoding) else encoding
        if not isinstance(pattern, Sequence) or not all(isinstance(one, PositionalEncoding) for one in pattern):
            raise TypeError(f"encoding must be a PositionalEncoding such as rope(), or a sequence of them, got {what_is(encoding)}")
        pattern = tuple(pattern)
        if not pattern or config.num_layers % len(pattern):
            raise ValueError(
                f"encoding must be one, or a sequence whose length divides num_layers={config.num_layers}, got {len(pattern)}"
            )
        if not is_traced(rngs.params.key[...]):  # arrays are made at once
            check_memory(config)
        self.config = config
        self.encodings = tuple(dict.fromkeys(pattern))
        self.layout = tuple(map(self.encodings.index, pattern)) * (config.num_layers // len(pattern))

        width = config.embed_dim
        dtype = jnp.dtype(config.compute_dtype)
        embedding_init = nnx.initializers.normal(width**-0.5)
        self.token_embedding = nnx.Embed(config.vocab_size, width, dtype=dtype, embedding_init=embedding_init, rngs=rngs)
        self.layers = nnx.vmap(lambda r: _Layer(config, r), in_axes=0, out_axes=0)(rngs.split(config.num_layers))
        self.outer_norm = _norm(config, rngs)
        if not config.tie_embeddings:
            self.head = nnx.Linear(width, config.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)
        if config.num_classes is not None:
            self.classifier = nnx.Linear(width, config.num_classes, dtype=dtype, rngs=rngs)
        # Initialized last, so that two models that differ only in their encoding have the same initial weights elsewhere.
        keys = jax.random.split(rngs.params(), len(self.encodings))
        made = [
            _init_layers(e, key, config.dims, self.layout.count(i))
            for i, (e, key) in enumerate(zip(self.encodings, keys, strict=True))
        ]
        self.encoding = nnx.data({str(i): jax.tree.map(nnx.Param, params) for i, params in enumerate(made)})

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "_ T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
        dropout_key: Array | None = None,
        place_key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits over the vocabulary at every position.

        Args:
          tokens: token ids, integers [B, T] below V.
          positions: positions of the tokens, [B, T] or [1, T]. None means 0, 1, 2, ...
          segment_ids: segment of each token; tokens of different segments do not attend to each other. None means one segment.
          coordinates: [T, A] or [B, T, A], which encodings read in place of the positions, as in ``posjax.attention``.
          dropout_key: PRNG key for dropout. None disables dropout.
          place_key: PRNG key for encodings that draw the coordinates of tokens while training, once for all layers. None gives the
            coordinates of evaluation.
        """
        return self._logits(self._hidden(tokens, positions, segment_ids, dropout_key, coordinates, place_key)[0])

    def classify(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "_ T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
        dropout_key: Array | None = None,
        place_key: Array | None = None,
    ) -> Float[Array, "B C"]:
        """Returns float32 logits over ``num_classes`` computed from the first token, [CLS]. Takes the arguments of ``__call__``.

        Raises:
          ValueError: the model has no classification head.
        """
        if self.config.num_classes is None:
            raise ValueError("num_classes must be a number to classify, got None; set TransformerConfig(num_classes=...)")
        hidden = self._hidden(tokens, positions, segment_ids, dropout_key, coordinates, place_key)[0]
        return self.classifier(hidden[:, 0]).astype(jnp.float32)

    def records(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "_ T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
    ) -> list[LayerRecord]:
        """Returns the attention inputs of every layer, from the first layer to the last."""
        return self._hidden(tokens, positions, segment_ids, None, coordinates, keep=True)[1]

    def init_cache(
        self, batch_size: int, max_length: int | None = None, *, window: int | None = None, coordinate_dtype: Any = None
    ) -> tuple[kv_cache.LayerCache, ...]:
        """Returns an empty key-value cache for ``decode``.

        The tuple has one entry for each run of consecutive layers with the same encoding: the caches of these layers, stacked.

        Args:
          batch_size: B, the number of sequences.
          max_length: number of tokens that the cache holds, padding included. None means ``config.max_length``. It has no effect on
            a model with a local window, which caches only that window, or with linear attention, which caches only running sums.
          window: number of earlier tokens that are kept and attended to; ``config.local_window_size`` applies if it is smaller.
          coordinate_dtype: dtype of the coordinates that calls of ``decode`` will receive; None if none will receive any.

        Raises:
          ValueError: the model is an encoder, window is set with linear attention, or a size is below 1.
        """
        config = self.config
        if not config.is_causal:
            raise ValueError("is_causal must be True to decode, got False; an encoder cannot decode")
        if config.attention == "linear" and window is not None:
            raise ValueError(f"window must be None with attention='linear', got {window}; its running sums cannot drop tokens")
        check_at_least("batch_size", batch_size, 1)
        for name, size in (("max_length", max_length), ("window", window)):
            if size is not None:
                check_at_least(name, size, 1)
        window = min((w for w in (window, config.local_window_size) if w is not None), default=None)
        length = None if window is not None else config.max_length if max_length is None else max_length

        def empty(index: int, layers: int) -> kv_cache.LayerCache:
            if config.attention == "linear":
                shape = (layers, batch_size, config.num_heads, config.dims.head_dim)
                check_fits(f"a cache of batch_size={batch_size}", jax.ShapeDtypeStruct((*shape, shape[-1]), jnp.float32))
                sums = jnp.zeros((*shape, shape[-1])), jnp.zeros(shape)
                return LinearCache(*sums, next_position=jnp.zeros(shape[:2], jnp.int32))
            dtypes = dict(coordinate_dtype=coordinate_dtype, dtype=jnp.dtype(config.compute_dtype))
            one = kv_cache.init_cache(self.encodings[index], config.dims, batch_size, max_length=length, window=window, **dtypes)
            return jax.tree.map(lambda x: jnp.repeat(x[None], layers, axis=0), one)

        return tuple(empty(index, len(list(run))) for index, run in itertools.groupby(self.layout))

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: tuple[kv_cache.LayerCache, ...],
        positions: Array | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
    ) -> tuple[Float[Array, "B T V"], tuple[kv_cache.LayerCache, ...]]:
        """Processes the next tokens of each sequence, one or many, given a cache of the earlier ones.

        Args:
          tokens: token ids, integers [B, T] below V.
          cache: the cache returned by ``init_cache`` or by the previous call.
          positions: positions of the tokens, [B, T] or [1, T]. None continues from the last token of each row.
          segment_ids: segment of each token. 0 marks padding, which no token attends to. None puts all tokens in segment 1.
          coordinates: as in ``__call__``, for a cache that was made with a ``coordinate_dtype``. None continues each row from its
            own largest coordinate plus one, on all axes.

        Returns:
          float32 logits [B, T, V], which match those of one call on the full sequence (NaN if a traced call exceeds the capacity of
          the cache), and the updated cache.

        Raises:
          ValueError: the cache does not belong to this model, or has no room for the tokens.
        """
        runs = len(list(itertools.groupby(self.layout)))
        if not isinstance(cache, tuple) or len(cache) != runs or not all(isinstance(one, kv_cache.LayerCache) for one in cache):
            got = f"{len(cache)} runs of layers" if isinstance(cache, tuple) else short(cache)
            raise ValueError(f"cache must come from init_cache of this model, got {got}")
        _check_tokens(tokens)
        kv_cache.check_room(cache[0], tokens.shape[1])
        first = jax.tree.map(lambda x: x[0], cache[0])
        positions, segments = kv_cache.next_positions(first, tokens.shape[1], positions, segment_ids)
        segments = None if segment_ids is None else segments
        if coordinates is None and isinstance(first, kv_cache.Cache) and first.next_coordinate is not None:
            axes = max(encoding.axes for encoding in self.encodings)
            coordinates = kv_cache.next_coordinates(first, positions, axes)
        hidden, _, cache = self._hidden(tokens, positions, segments, None, coordinates, cache=cache)
        return self._logits(hidden), cache

    def encoding_params(self, layer: int) -> Params:
        """Returns the encoding parameters of one layer, in the structure that ``encoding.init`` returns."""
        index = self.layout[layer]
        return _layer_params(self.encodings[index], self._encoding_params(index), self.layout[:layer].count(index))

    def _encoding_params(self, index: int) -> Params:
        return jax.tree.map(lambda p: p[...], self.encoding[str(index)], is_leaf=lambda p: isinstance(p, nnx.Param))

    def _hidden(
        self,
        tokens: Array,
        positions: Array | None,
        segment_ids: Array | None,
        dropout_key: Array | None,
        coordinates: Array | None = None,
        place_key: Array | None = None,
        keep: bool = False,
        cache: tuple[kv_cache.LayerCache, ...] = (),
    ) -> tuple[Array, list[LayerRecord], tuple[kv_cache.LayerCache | None, ...]]:
        config = self.config
        _check_tokens(tokens)
        positions = canonicalize_positions("positions", positions, *tokens.shape)
        if segment_ids is not None:
            check_segment_ids(segment_ids, *tokens.shape)
        params = [self._encoding_params(i) for i in range(len(self.encodings))]
        embed_key, layers_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        layer_keys = None if dropout_key is None else jax.random.split(layers_key, config.num_layers)

        if segment_ids is not None:
            unknown = (tokens < 0) | (tokens >= config.vocab_size)  # an embedding of NaN would reach every row, even from padding
            tokens = jnp.where((segment_ids == 0) & unknown, 0, tokens)
        x = self._part("token_embedding")(tokens) * jnp.asarray(math.sqrt(config.embed_dim), jnp.dtype(config.compute_dtype))
        placed: list[Array | None] = []  # the coordinates for each encoding; None if they are the positions
        for i, (encoding, p) in enumerate(zip(self.encodings, params, strict=True)):
            at = None if coordinates is None else canonicalize_coordinates("coordinates", coordinates, *tokens.shape)
            own = Tokens(positions, at, segment_ids)
            draw = None if place_key is None else jax.random.fold_in(place_key, i)
            own = dataclasses.replace(own, coordinates=encoding.place(own, draw))
            placed.append(own.coordinates)
            x = encoding.embed(_layer_params(encoding, p, 0), x, own)
        x = in_rows(_dropout(x, config.dropout_rate, embed_key))
        x = x if config.norm_position == "pre" else self.outer_norm(x)

        records: list[LayerRecord] = []
        caches: list[kv_cache.LayerCache | None] = []
        runs = itertools.groupby(range(config.num_layers), key=self.layout.__getitem__)
        for (index, run), seen in itertools.zip_longest(runs, cache):
            run = list(run)
            first = self.layout[: run[0]].count(index)  # index of the run's first layer among the layers with this encoding
            own = slice(first, first + len(run))
            rows = slice(run[0], run[-1] + 1)
            where = dict(positions=positions, coordinates=placed[index], segment_ids=segment_ids)
            x, kept, seen = self._run(x, rows, index, params[index], own, where, layer_keys, keep, seen)
            records += kept
            caches.append(seen)
        return (self.outer_norm(x) if config.norm_position == "pre" else x), records, tuple(caches)

    def _run(
        self,
        x: Array,
        layers: slice,
        index: int,
        params: Params,
        own_rows: slice,
        where: dict[str, Array | None],
        layer_keys: Array | None,
        keep: bool,
        cache: kv_cache.LayerCache | None,
    ) -> tuple[Array, list[LayerRecord], kv_cache.LayerCache | None]:
        """Runs consecutive layers with the same encoding as one scan; ``where`` holds positions, coordinates and segment ids."""
        encoding = self.encodings[index]
        shared, own = _split_params(encoding, params)
        graph, stacked, structure = self._weights("layers")

        def layer(carry: tuple[Array, Any], xs: tuple[Any, Params, Array | None, Array]) -> tuple[Any, Any]:
            x, cache = carry  # the cache is in the carry, so that each layer updates its slice of one buffer in place
            weights, own, key, i = xs
            mine = jax.tree.map(lambda all: jax.lax.dynamic_index_in_dim(all, i, keepdims=False), cache)
            params = _join_params(shared, own)
            weights = gather_params(weights, "layers")
            call = nnx.merge(graph, jax.tree.unflatten(structure, jax.tree.leaves(weights)))
            x, record, mine = call(x, encoding, params, **where, dropout_key=key, cache=mine)
            cache = None if cache is None else kv_cache.store(cache, i, mine, x.shape[1])
            return (in_rows(x), cache), record if keep else None

        xs = (
            jax.tree.map(lambda w: w[layers], stacked),
            jax.tree.map(lambda p: p[own_rows], own),
            None if layer_keys is None else layer_keys[layers],
            jnp.arange(layers.stop - layers.start),
        )
        if cache is None and (self.config.remat != "none" or mesh_of(x) is not None):
            layer = jax.checkpoint(layer, prevent_cse=False, policy=_POLICIES[self.config.remat])
        (x, cache), kept = jax.lax.scan(layer, vary_alike((x, cache), xs), xs, unroll=not self.config.scan_layers)
        if not keep:
            return x, [], cache
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], kept) for i in range(layers.stop - layers.start)]
        return x, [LayerRecord(*arrays, encoding, params) for *arrays, params in each], cache

    def _weights(self, name: str) -> tuple[Any, Params, Any]:
        """Returns a submodule's graph definition, its parameters, and the tree structure that ``nnx.merge`` expects them in.

        Matrices are cast to compute_dtype here, before they are communicated between devices.
        """
        graph, state = nnx.split(getattr(self, name))
        dtype = jnp.dtype(self.config.compute_dtype)

        def cast(path: Any, leaf: Array) -> Array:
            return leaf.astype(dtype) if path[-1].key in ("kernel", "embedding") else leaf

        return graph, jax.tree_util.tree_map_with_path(cast, nnx.to_pure_dict(state)), jax.tree.structure(state)

    def _part(self, name: str) -> nnx.Module:
        """Returns a submodule with its weights all-gathered."""
        graph, weights, structure = self._weights(name)
        return nnx.merge(graph, jax.tree.unflatten(structure, jax.tree.leaves(gather_params(weights, name))))

    def _logits(self, hidden: Array) -> Array:
        logits = self._part("token_embedding").attend(hidden) if self.config.tie_embeddings else self._part("head")(hidden)
        return logits.astype(jnp.float32)


# Policies that select what a layer saves for the backward pass. None of them saves the all-gathered weights.
_POLICIES = {
    "none": lambda operation, *_, **__: operation.name != "sharding_constraint",
    "attention": lambda operation, *_, **how: operation.name == "posjax_kernel" or how.get("name") == SAVED,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _check_tokens(tokens: Any) -> None:
    if not is_array(tokens, jnp.integer) or tokens.ndim != 2:
        got = f"{tokens.dtype}{list(tokens.shape)}" if is_array(tokens) else short(tokens)
        raise ValueError(f"tokens must be integers [B, T], got {got}")


def functional(model: nnx.Module) -> tuple[Callable[[Params], nnx.Module], Params]:
    """Splits a model into a pure function and its parameters, for use with jit, grad, vmap, scan and pmap.

    ``with_params(params)(tokens)`` is a pure function of the parameters.

    Returns:
      ``with_params``, which returns the model with the given parameters, and the current parameters, a nested dict of arrays.
    """
    graph, state = nnx.split(model)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def with_params(params: Params) -> nnx.Module:
        filled = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)

    return with_params, nnx.to_pure_dict(state)


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.Module:
    kind = nnx.RMSNorm if config.norm == "rmsnorm" else nnx.LayerNorm
    return kind(config.embed_dim, dtype=jnp.dtype(config.compute_dtype), rngs=rngs)


def _dropout(x: Array, rate: float, key: Array | None) -> Array:
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0.0).astype(x.dtype)


# Encoding parameters: some leaves are shared by all layers, the others have a leading axis of layers ---------------------


def _flags(per_layer: Any, params: Params) -> Params:
    """Broadcasts per_layer to one bool per leaf of params."""
    if isinstance(per_layer, bool):
        return jax.tree.map(lambda _: per_layer, params)
    return {name: _flags(per_layer[name], part) for name, part in params.items()}


def _init_layers(encoding: PositionalEncoding, key: Array, dims: Dims, count: int) -> Params:
    params = jax.vmap(lambda k: encoding.init(k, dims))(jax.random.split(key, count))
    return jax.tree.map(lambda flag, p: p if flag else p[0], _flags(encoding.per_layer, params), params)


def _split_params(encoding: PositionalEncoding, params: Params) -> tuple[Params, Params]:
    flags = _flags(encoding.per_layer, params)
    shared = jax.tree.map(lambda flag, p: None if flag else p, flags, params)
    own = jax.tree.map(lambda flag, p: p if flag else None, flags, params)
    return shared, own


def _join_params(shared: Params, own: Params) -> Params:
    return jax.tree.map(lambda a, b: b if a is None else a, shared, own, is_leaf=lambda leaf: leaf is None)


def _layer_params(encoding: PositionalEncoding, params: Params, layer: int) -> Params:
    shared, own = _split_params(encoding, params)
    return _join_params(shared, jax.tree.map(lambda p: p[layer], own))
