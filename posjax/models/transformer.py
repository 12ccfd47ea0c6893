"""A Flax NNX Transformer that accepts any positional encoding: a decoder language model, or an encoder with a [CLS] token.

    tokens -> embedding -> encoding.embed -> [ q, k, v -> attention under the encoding; MLP ] x L -> logits

The parameters of all layers are stacked and the layers run in a ``lax.scan``, so compile time does not grow with depth. Layers may
have different encodings and windows: each run of consecutive layers with the same encoding and window is one scan.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from posjax.attention import kv_cache
from posjax.attention.arguments import canonicalize_coordinates, canonicalize_positions, check_segment_ids
from posjax.attention.backends.xla_chunked.attention import SAVED
from posjax.attention.linear import LinearCache
from posjax.checks import check_at_least, check_fits, is_array, is_traced, short
from posjax.core.encoding import Dims, PositionalEncoding, Tokens, what_is
from posjax.core.manual_axes import vary_alike
from posjax.models.config import TransformerConfig, check_memory
from posjax.models.layer import Layer, activate, dropout, norm
from posjax.models.losses import cross_entropy_of
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
        self.layers = nnx.vmap(lambda r: Layer(config, r), in_axes=0, out_axes=0)(rngs.split(config.num_layers))
        self.outer_norm = norm(config, width, rngs)
        if config.embedding_norm:
            self.embedding_norm = norm(config, width, rngs)
        if config.num_token_types is not None:
            self.token_type_embedding = nnx.Embed(
                config.num_token_types, width, dtype=dtype, embedding_init=embedding_init, rngs=rngs
            )
        if config.head_transform:
            self.head_transform = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
            self.head_norm = norm(config, width, rngs)
        if not config.tie_embeddings:
            self.head = nnx.Linear(width, config.vocab_size, use_bias="head" in config.biases, dtype=dtype, rngs=rngs)
        elif "head" in config.biases:
            self.head_bias = nnx.Param(jnp.zeros(config.vocab_size))
        if config.num_classes is not None:
            self.classifier = nnx.Linear(width, config.num_classes, dtype=dtype, rngs=rngs)
        # Initialized last, so that two models that differ only in their encoding have the same initial weights elsewhere.
        keys = jax.random.split(rngs.params(), len(self.encodings))
        made = [
            _init_layers(e, key, config.dims, self.layout.count(i))
            for i, (e, key) in enumerate(zip(self.encodings, keys, strict=True))
        ]
        self.encoding = nnx.data({str(i): jax.tree.map(nnx.Param, params) for i, params in enumerate(made)})

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> "Transformer":
        """Loads a checkpoint of another library, with its architecture, encoding and weights.

            model = Transformer.from_pretrained("models/SmolLM2-135M")

        Args:
          path: a folder with config.json and safetensors files, or a .gguf file.
          **options: encoding, dtype, mesh, seed and others of ``posjax.models.pretrained.from_pretrained``.

        Returns:
          The model, with the weights of the checkpoint.

        Raises:
          ValueError: the checkpoint is damaged, incomplete or of a model that posjax does not have, or an option does not fit it.
        """
        from posjax.models.pretrained.load import from_pretrained

        return from_pretrained(path, **options)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "_ T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
        token_types: Int[Array, "_ T"] | None = None,
        dropout_key: Array | None = None,
        place_key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns float32 logits over the vocabulary at every position.

        Args:
          tokens: token ids, integers [B, T] below V.
          positions: positions of the tokens, [B, T] or [1, T]. None means 0, 1, 2, ...
          segment_ids: segment of each token; tokens of different segments do not attend to each other. None means one segment.
          coordinates: [T, A] or [B, T, A], which encodings read in place of the positions, as in ``posjax.attention``.
          token_types: type of each token, [B, T] or [1, T], for a model with ``num_token_types``. None means type 0.
          dropout_key: PRNG key for dropout. None disables dropout.
          place_key: PRNG key for encodings that draw the coordinates of tokens while training, once for all layers. None gives the
            coordinates of evaluation.
        """
        keys = dict(dropout_key=dropout_key, place_key=place_key)
        return self._logits(self._hidden(tokens, positions, segment_ids, coordinates, token_types, **keys)[0])

    def classify(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "_ T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
        token_types: Int[Array, "_ T"] | None = None,
        dropout_key: Array | None = None,
        place_key: Array | None = None,
    ) -> Float[Array, "B C"]:
        """Returns float32 logits over ``num_classes`` computed from the first token, [CLS]. Takes the arguments of ``__call__``.

        Args:
          tokens, positions, segment_ids, coordinates, token_types, dropout_key, place_key: as in ``__call__``.

        Raises:
          ValueError: the model has no classification head.
        """
        if self.config.num_classes is None:
            raise ValueError("num_classes must be a number to classify, got None; set TransformerConfig(num_classes=...)")
        keys = dict(dropout_key=dropout_key, place_key=place_key)
        hidden = self._hidden(tokens, positions, segment_ids, coordinates, token_types, **keys)[0]
        return self.classifier(hidden[:, 0]).astype(jnp.float32)

    def losses(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B T"],
        weights: Float[Array, "B T"],
        positions: Int[Array, "_ T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
        token_types: Int[Array, "_ T"] | None = None,
    ) -> Float[Array, "B T"]:
        """Returns the weighted cross-entropy of every target in nats, in memory that does not grow with the length times V.

        Args:
          targets: the token to predict at every position, integers below V.
          weights: factors of the losses. Where one is zero, the loss is zero, whatever the target is.
          tokens, positions, segment_ids, coordinates, token_types: as in ``__call__``.

        Raises:
          ValueError: targets are not integers, or weights not numbers, of the shape of ``tokens``.
        """
        _check_tokens(tokens)
        for name, x, kind, what in (("targets", targets, jnp.integer, "integers"), ("weights", weights, jnp.floating, "floats")):
            if not is_array(x, kind) or x.shape != tokens.shape:
                got = f"{x.dtype}{list(x.shape)}" if is_array(x) else short(x)
                raise ValueError(f"{name} must be {what} {list(tokens.shape)}, the shape of tokens, got {got}")
        hidden = self._hidden(tokens, positions, segment_ids, coordinates, token_types)[0]
        return cross_entropy_of(self._logits, hidden, targets, weights, self.config.vocab_size)

    def records(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "_ T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
        token_types: Int[Array, "_ T"] | None = None,
    ) -> list[LayerRecord]:
        """Returns the attention inputs of every layer, from the first layer to the last.

        Args:
          tokens, positions, segment_ids, coordinates, token_types: as in ``__call__``.
        """
        return self._hidden(tokens, positions, segment_ids, coordinates, token_types, keep=True)[1]

    def init_cache(
        self, batch_size: int, max_length: int | None = None, *, window: int | None = None, coordinate_dtype: Any = None
    ) -> tuple[kv_cache.LayerCache, ...]:
        """Returns an empty key-value cache for ``decode``.

        The tuple has one entry for each run of consecutive layers with the same encoding and window: the caches of these layers,
        stacked.

        Args:
          batch_size: B, the number of sequences.
          max_length: number of tokens that the cache holds, padding included. None means ``config.max_length``. It has no effect on
            layers with a shorter local window, which cache only that window, or with linear attention, which cache running sums.
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

        def empty(index: int, own_window: int | None, layers: int) -> kv_cache.LayerCache:
            if config.attention == "linear":
                shape = (layers, batch_size, config.num_heads, config.dims.head_dim)
                check_fits(f"a cache of batch_size={batch_size}", jax.ShapeDtypeStruct((*shape, shape[-1]), jnp.float32))
                sums = jnp.zeros((*shape, shape[-1])), jnp.zeros(shape)
                return LinearCache(*sums, next_position=jnp.zeros(shape[:2], jnp.int32))
            nearest = min((w for w in (window, own_window) if w is not None), default=None)
            length = config.max_length if max_length is None else max_length
            # Not for a window of the caller, who may decode more than max_length tokens.
            is_full = nearest is None or (window is None and max_length is not None and nearest >= length)
            slots = dict(max_length=length) if is_full else dict(window=nearest)
            how = dict(coordinate_dtype=coordinate_dtype, dtype=jnp.dtype(config.compute_dtype))
            one = kv_cache.init_cache(self.encodings[index], config.dims, batch_size, **slots, **how)
            one = dataclasses.replace(one, local_window_size=nearest) if is_full else one
            return jax.tree.map(lambda x: jnp.repeat(x[None], layers, axis=0), one)

        return tuple(empty(index, own_window, rows.stop - rows.start) for index, own_window, rows in self._runs())

    def decode(
        self,
        tokens: Int[Array, "B T"],
        cache: tuple[kv_cache.LayerCache, ...],
        positions: Array | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        coordinates: Array | None = None,
        logits_at: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T V"], tuple[kv_cache.LayerCache, ...]]:
        """Processes the next tokens of each sequence, one or many, given a cache of the earlier ones.

        Args:
          tokens: token ids, integers [B, T] below V.
          cache: the cache returned by ``init_cache`` or by the previous call.
          positions: positions of the tokens, [B, T] or [1, T]. None continues from the last token of each row.
          segment_ids: segment of each token. 0 marks padding, which no token attends to. None puts all tokens in segment 1.
          coordinates: as in ``__call__``, for a cache that was made with a ``coordinate_dtype``. None continues each row from its
            own largest coordinate plus one, on all axes.
          logits_at: index below T of the token of each row whose logits are returned, [B, 1, V]; None returns those of all tokens.

        Returns:
          float32 logits [B, T, V], which match those of one call on the full sequence (NaN if a traced call exceeds the capacity of
          the cache), and the updated cache.

        Raises:
          ValueError: the cache does not belong to this model, or has no room for the tokens.
        """
        runs = len(self._runs())
        if not isinstance(cache, tuple) or len(cache) != runs or not all(isinstance(one, kv_cache.LayerCache) for one in cache):
            got = f"{len(cache)} runs of layers" if isinstance(cache, tuple) else short(cache)
            raise ValueError(f"cache must come from init_cache of this model, got {got}")
        _check_tokens(tokens)
        if logits_at is not None and (not is_array(logits_at, jnp.integer) or logits_at.shape != tokens.shape[:1]):
            got = f"{logits_at.dtype}{list(logits_at.shape)}" if is_array(logits_at) else short(logits_at)
            raise ValueError(f"logits_at must be integers [{tokens.shape[0]}], one for each row, got {got}")
        for one in cache:
            kv_cache.check_room(one, tokens.shape[1])
        first = jax.tree.map(lambda x: x[0], cache[0])
        positions, segments = kv_cache.next_positions(first, tokens.shape[1], positions, segment_ids)
        segments = None if segment_ids is None else segments
        if coordinates is None and isinstance(first, kv_cache.Cache) and first.next_coordinate is not None:
            axes = max(encoding.axes for encoding in self.encodings)
            coordinates = kv_cache.next_coordinates(first, positions, axes)
        hidden, _, cache = self._hidden(tokens, positions, segments, coordinates, cache=cache)
        if logits_at is not None:
            hidden = jnp.take_along_axis(hidden, logits_at[:, None, None], axis=1)
        return self._logits(hidden), cache

    def encoding_params(self, layer: int) -> Params:
        """Returns the encoding parameters of one layer, in the structure that ``encoding.init`` returns.

        Args:
          layer: index of the layer.
        """
        index = self.layout[layer]
        return _layer_params(self.encodings[index], self._encoding_params(index), self.layout[:layer].count(index))

    def _encoding_params(self, index: int) -> Params:
        return jax.tree.map(lambda p: p[...], self.encoding[str(index)], is_leaf=lambda p: isinstance(p, nnx.Param))

    def _runs(self) -> list[tuple[int, int | None, slice]]:
        """Returns encoding, window and layers of each run of consecutive layers with the same encoding and window."""
        kinds = list(zip(self.layout, self.config.windows, strict=True))
        runs = []
        for (index, window), run in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
            layers = list(run)
            runs.append((index, window, slice(layers[0], layers[-1] + 1)))
        return runs

    def _hidden(
        self,
        tokens: Array,
        positions: Array | None,
        segment_ids: Array | None,
        coordinates: Array | None,
        token_types: Array | None = None,
        *,
        dropout_key: Array | None = None,
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

        x = self._embed(tokens, segment_ids, token_types)
        placed: list[Array | None] = []  # the coordinates for each encoding; None if they are the positions
        for i, (encoding, p) in enumerate(zip(self.encodings, params, strict=True)):
            at = None if coordinates is None else canonicalize_coordinates("coordinates", coordinates, *tokens.shape)
            own = Tokens(positions, at, segment_ids)
            draw = None if place_key is None else jax.random.fold_in(place_key, i)
            own = dataclasses.replace(own, coordinates=encoding.place(own, draw))
            placed.append(own.coordinates)
            x = encoding.embed(_layer_params(encoding, p, 0), x, own)
        if config.embedding_norm:
            x = self.embedding_norm(x)
        x = in_rows(dropout(x, config.dropout_rate, embed_key))
        x = self.outer_norm(x) if config.norm_position == "post" else x

        records: list[LayerRecord] = []
        caches: list[kv_cache.LayerCache | None] = []
        for (index, window, rows), seen in itertools.zip_longest(self._runs(), cache):
            first = self.layout[: rows.start].count(index)  # index of the run's first layer among the layers with this encoding
            own = slice(first, first + rows.stop - rows.start)
            where = dict(positions=positions, coordinates=placed[index], segment_ids=segment_ids, window=window)
            x, kept, seen = self._run(x, rows, index, params[index], own, where, layer_keys, keep, seen)
            records += kept
            caches.append(seen)
        return (x if config.norm_position == "post" else self.outer_norm(x)), records, tuple(caches)

    def _embed(self, tokens: Array, segment_ids: Array | None, token_types: Array | None) -> Array:
        """Returns the embeddings of tokens and token types, [B, T, D]."""
        config = self.config
        if segment_ids is not None:
            unknown = (tokens < 0) | (tokens >= config.vocab_size)  # an embedding of NaN would reach every row, even from padding
            tokens = jnp.where((segment_ids == 0) & unknown, 0, tokens)
        x = self._part("token_embedding")(tokens)
        scale = math.sqrt(config.embed_dim) if config.embedding_scale is None else config.embedding_scale
        if scale != 1:
            x = x * jnp.asarray(scale, x.dtype)
        if config.num_token_types is None:
            if token_types is not None:
                raise ValueError(f"token_types must be None for a model without num_token_types, got {short(token_types)}")
            return x
        if token_types is None:
            token_types = jnp.zeros((1, tokens.shape[1]), jnp.int32)
        if not is_array(token_types, jnp.integer) or token_types.shape not in (tokens.shape, (1, tokens.shape[1])):
            shapes = f"[{tokens.shape[0]}, {tokens.shape[1]}] or [1, {tokens.shape[1]}]"
            raise ValueError(f"token_types must be integers {shapes}, got {short(token_types)}")
        return x + self._part("token_type_embedding")(token_types)

    def _run(
        self,
        x: Array,
        layers: slice,
        index: int,
        params: Params,
        own_rows: slice,
        where: dict[str, Any],
        layer_keys: Array | None,
        keep: bool,
        cache: kv_cache.LayerCache | None,
    ) -> tuple[Array, list[LayerRecord], kv_cache.LayerCache | None]:
        """Runs consecutive layers with the same encoding and window as one scan; ``where`` holds the other arguments of a layer."""
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
        config = self.config
        if config.head_transform:
            hidden = self.head_norm(activate(config, self._part("head_transform")(hidden)))
        logits = self._part("token_embedding").attend(hidden) if config.tie_embeddings else self._part("head")(hidden)
        if config.tie_embeddings and "head" in config.biases:
            logits = logits + self.head_bias[...].astype(logits.dtype)[None, None]
        logits = logits.astype(jnp.float32)
        cap = config.final_logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


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

    Args:
      model: the model, which is not changed.

    Returns:
      ``with_params``, which returns the model with the given parameters, and the current parameters, a nested dict of arrays.

    Example:
      >>> from flax import nnx
      >>> from posjax.models.transformer import Transformer, TransformerConfig, functional
      >>> config = TransformerConfig(vocab_size=16, num_layers=1, embed_dim=16, num_heads=2)
      >>> with_params, params = functional(Transformer(config, pj.rope(), rngs=nnx.Rngs(0)))
      >>> with_params(params)(jnp.zeros((1, 4), jnp.int32)).shape
      (1, 4, 16)
    """
    graph, state = nnx.split(model)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def with_params(params: Params) -> nnx.Module:
        filled = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(filled, params)
        return nnx.merge(graph, filled)

    return with_params, nnx.to_pure_dict(state)


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
