"""Evaluates any ``Bias`` one tile at a time, for dense attention, the tile walk and the ring.

A term holds the arrays of a bias per query (``rows``), per key (``columns``) and per head (``tables``), and maps one tile of these
to one tile of bias. The term of a ``Scan`` also carries one number per row, the sum of the gates so far: tiles are processed from
right to left; each receives the carry of the tile to its right and returns its own.

    keys ->  0   1   2   3
    row 3  [ c <- c <- c <- start ]        carry moves from the diagonal to the left

A term has saturated once its carry shows that no key further left can change a row's bias any more (a sum has reached the scan's
bound). From there on the bias is one number per row, and a walk may skip the term.

``BiasTerm.dense`` applies the same function to one tile that covers everything: the reference for every tiled kernel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends import reads
from posjax.attention.call import AttentionCall
from posjax.checks import round_up
from posjax.core.structures import Axes, Bias, Pair, Scan, Table, map_arrays
from posjax.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tile:
    """Holds one tile of attention scores, before any bias.

    Attributes:
      logits: [B, N, t, s] float32, scale * q.k after all transforms, not masked.
      allowed: bool, broadcastable to logits; False where the mask forbids attention.
      query_positions: [B or 1, t] integers.
      key_positions: [B or 1, s] integers.
    """

    logits: Float[Array, "B N t s"]
    allowed: Bool[Array, "_ _ t s"]
    query_positions: Int[Array, "_ t"]
    key_positions: Int[Array, "_ s"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BiasTerm:
    """Represents a bias in the form that a walk over tiles takes.

    Attributes:
      form: the bias with its arrays taken out.
      rows: arrays [B or 1, N or 1, T, ...] by their number among the leaves of the bias, sliced along T with the query tile; "z" is
        the result of ``load``.
      columns: arrays [B or 1, N or K or 1, S, ...], sliced along S with the key tile.
      tables: arrays [N or 1, ...], passed to every tile in full.
      carry: [B, N, T] float32, the sum of gates that the rightmost tile receives; None for a ``Pair``.
      is_loaded: whether ``load`` has been called.
    """

    form: Any = dataclasses.field(metadata={"static": True})
    rows: dict[str, Array]
    columns: dict[str, Array]
    tables: dict[str, Array]
    carry: Array | None = None
    is_loaded: bool = dataclasses.field(default=False, metadata={"static": True})

    def cut(self, row_start: Any, row_size: int, column_start: Any, column_size: int) -> "BiasTerm":
        """Returns the term for one tile: ``row_size`` queries from ``row_start`` and ``column_size`` keys from ``column_start``."""

        def along(start: Any, size: int) -> Callable[[Array], Array]:
            return lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=2)

        return dataclasses.replace(
            self,
            rows=jax.tree.map(along(row_start, row_size), self.rows),
            columns=jax.tree.map(along(column_start, column_size), self.columns),
            carry=jax.tree.map(along(row_start, row_size), self.carry),
        )

    def loaded(self) -> "BiasTerm":
        """Returns the term with the arrays that its read needs per query, computed once per query tile, to which it must be cut.

        Wide arrays (CoPE's q.e, one value per position) are computed here, so that they never exist for all queries at once.
        """
        if self.is_loaded:
            return self
        z = reads.load(_bias(self, self.rows, {}, self.tables).read)
        return dataclasses.replace(self, rows=self.rows if z is None else self.rows | {"z": z}, is_loaded=True)

    def function(self, tile: Tile, rows: dict, columns: dict, tables: dict, carry: Array | None) -> tuple[Array, Array | None]:
        """Returns the bias of one tile, broadcastable to [B, N, t, s] float32, and the carry for the tile to its left.

        A tile without any allowed pair returns the carry that it received, because walks skip such tiles.
        """
        bias = _bias(self, rows, columns, tables)
        if isinstance(bias.at, Pair):
            return reads.evaluate(bias.read, _pair(bias.at, tile), rows.get("z")), None
        assert carry is not None
        gates = scan_gates(bias.at, tile)
        sums = carry[..., None] + sum_to_the_right(gates)
        at = sums if bias.at.include_key else sums - gates
        return reads.evaluate(bias.read, at, rows.get("z")), sums[..., 0]

    def saturate(self, rows: dict, tables: dict, carry: Array) -> tuple[Array, Array]:
        """Returns which rows have saturated, bool [B, N, t], and their bias at every key further left, [B, N, t]."""
        bias = _bias(self, rows, {}, tables)
        assert isinstance(bias.at, Scan) and bias.at.bound is not None  # can_saturate
        value = reads.at_bound(bias.read, bias.at.bound, rows.get("z"))
        assert value is not None
        return carry >= bias.at.bound, jnp.broadcast_to(value, carry.shape)

    @property
    def can_saturate(self) -> bool:
        """Returns whether rows of a term with a carry can saturate."""
        bias: Bias = jax.tree.unflatten(self.form, [None] * self.form.num_leaves)
        return isinstance(bias.at, Scan) and bias.at.bound is not None and getattr(bias.read, "side", None) != "key"

    def tile(self, tile: Tile, carry: Array | None) -> tuple[Array, Array | None]:
        """Returns the bias of one tile and the carry for the tile to its left. The term must have been cut to the tile."""
        term = self.loaded()
        return term.function(tile, term.rows, term.columns, term.tables, carry)

    def dense(self, tile: Tile) -> Array:
        """Returns the full bias [B, N, T, S] for a ``tile`` that covers all queries and keys."""
        bias, _ = self.tile(tile, self.carry)
        return jnp.broadcast_to(bias, tile.logits.shape)


def bias_terms(call: AttentionCall) -> tuple[BiasTerm, ...]:
    """Returns the biases of a call whose transforms have been applied, as terms."""
    batch, length, heads, _ = call.query.shape
    zeros = jnp.zeros((batch, heads, length), jnp.float32)
    return tuple(_term(bias, zeros) for bias in call.filled().biases if getattr(bias.read, "side", None) != "value")


def value_terms(call: AttentionCall) -> tuple[BiasTerm, ...]:
    """Returns the tables that a call adds to its output, as terms; ``value_index`` computes the index of each pair."""
    return tuple(_term(bias, None) for bias in call.filled().biases if getattr(bias.read, "side", None) == "value")


def value_index(term: BiasTerm, tile: Tile) -> tuple[Int[Array, "_ _ t s"], Float[Array, "_ W V"]]:
    """Returns the index of every pair of a tile, to which the term must be cut, and the table that is read at it."""
    bias = _bias(term, term.rows, term.columns, term.tables)
    assert isinstance(bias.at, Pair) and isinstance(bias.read, Table)  # prepare has checked it
    return _pair(bias.at, tile).astype(jnp.int32), bias.read.table


def value_reads(call: AttentionCall, tile: Tile) -> list[tuple[Array, Array]]:
    """Returns ``value_index`` of every term that adds to the output, for a tile over all queries and keys."""
    return [value_index(term, tile) for term in value_terms(call)]


def _term(bias: Bias, zeros: Array | None) -> BiasTerm:
    form = jax.tree.structure(bias)
    parts: dict[Any, dict[str, Array]] = {"query": {}, "key": {}, None: {}}
    leaves = jax.tree.leaves(bias)

    def sort(number: int, axes: Axes) -> None:
        leaf = leaves[number]
        parts[axes.side][f"{number:02d}"] = jnp.swapaxes(leaf, 1, 2) if axes.tokens == 1 else leaf

    map_arrays(sort, jax.tree.unflatten(form, range(len(leaves))))
    return BiasTerm(form, parts["query"], parts["key"], parts[None], zeros if isinstance(bias.at, Scan) else None)


def _bias(term: BiasTerm, rows: dict, columns: dict, tables: dict) -> Bias:
    """Returns the bias with arrays in the layout of heads before tokens; arrays of missing rows or columns are None."""
    arrays = rows | columns | tables
    return jax.tree.unflatten(term.form, [arrays.get(f"{number:02d}") for number in range(term.form.num_leaves)])


# Pairs and scans -----------------------------------------------------------------------------------------------------------------


def per_head(function: Callable[..., Array], args: Any, heads: int, *features: Array | tuple[Array, ...]) -> Array:
    """Calls function(*features, args) for every head, with arrays [B or 1, N or K or 1, t, s] and args [N or 1, ...].

    All features have one number of heads in the result: those of key heads are repeated for their groups.
    """
    features = jax.tree.map(lambda x: reads.for_query_heads(x, heads), features)
    if all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(args)):
        return function(*features, jax.tree.map(lambda leaf: leaf[0], args))
    args = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (heads, *leaf.shape[1:])), args)
    shared = jax.tree.map(lambda x: None if x.shape[1] == 1 else 1, features)
    features = jax.tree.map(lambda x: x[:, 0] if x.shape[1] == 1 else x, features)
    return jax.vmap(function, in_axes=(*shared, 0), out_axes=1)(*features, args)


def _pair(pair: Pair, tile: Tile) -> Array:
    queries = (tile.query_positions[:, None],) if pair.query is None else pair.query
    keys = (tile.key_positions[:, None],) if pair.key is None else pair.key
    queries, keys = tuple(x[..., :, None] for x in queries), tuple(x[..., None, :] for x in keys)
    args = pair.args if pair.learned else jax.lax.stop_gradient(pair.args)
    heads = tile.logits.shape[1]
    if not pair.relative:
        return per_head(pair.function, args, heads, queries, keys)
    queries, keys = (tuple(reads.for_query_heads(x, heads) for x in side) for side in (queries, keys))
    differences = tuple(q - k for q, k in zip(queries, keys, strict=True))
    return per_head(pair.function, args, heads, differences)


def scan_gates(scan: Scan, tile: Tile) -> Float[Array, "B N t s"]:
    """Returns the gates of a scan on a tile, with heads before tokens in its arrays; zero where they do not count."""
    if scan.key is None:
        x = tile.logits
    elif scan.query is None:
        x = jnp.swapaxes(scan.key, 2, 3).astype(jnp.float32)
    else:
        x = _products(scan.query, scan.key)
        x = x if scan.scale is None else x * scan.scale[None, :, None, None]
    gates = per_head(scan.gate, scan.args, tile.logits.shape[1], x)
    counts = tile.allowed
    if not scan.include_query:
        counts &= tile.query_positions[:, None, :, None] != tile.key_positions[:, None, None, :]
    return jnp.broadcast_to(jnp.where(counts, gates, 0.0), tile.logits.shape)


def gates_and_sums(call: AttentionCall) -> list[tuple[Float[Array, "B N T S"], Float[Array, "B N T S"]]]:
    """Returns the gates and the sums of gates of every ``Scan`` of a call, from one tile over all queries and keys."""
    call = call.transformed()
    logits = _products(jnp.swapaxes(call.query, 1, 2), jnp.swapaxes(call.key, 1, 2)) * call.scale
    allowed = call.mask.allowed(call.query_positions, call.key_positions)
    tile = Tile(logits, allowed, call.query_positions, call.key_positions)
    found = []
    for term in bias_terms(call):
        if term.carry is not None:
            scan = _bias(term, term.rows, term.columns, term.tables).at
            assert isinstance(scan, Scan)
            gates = scan_gates(scan, tile)
            sums = sum_to_the_right(gates)
            found.append((gates, sums if scan.include_key else sums - gates))
    return found


def _products(query: Array, key: Array) -> Array:
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], length, width)
    products = jnp.einsum("bkgth,bksh->bkgts", grouped, key, preferred_element_type=jnp.float32)
    return products.reshape(batch, heads, length, key.shape[2])


def sum_to_the_right(gates: Array) -> Array:
    """Sums gates[..., k] over k >= j, by a product with a triangle of ones within blocks and a short sum over the blocks.

    This is faster than a scan on every device, and its rounding error grows only with the number of blocks.
    """
    block, columns = 32, gates.shape[-1]
    padded = jnp.pad(gates, [(0, 0)] * (gates.ndim - 1) + [(0, round_up(columns, block) - columns)])
    blocks = padded.reshape(*gates.shape[:-1], padded.shape[-1] // block, block)
    ones = jnp.tril(jnp.ones((block, block), gates.dtype))
    within = jnp.einsum("...k,kj->...j", blocks, ones, precision=jax.lax.Precision.HIGHEST)
    totals = within[..., 0]
    right = jax.lax.cumsum(totals, axis=totals.ndim - 1, reverse=True) - totals
    return (within + right[..., None]).reshape(padded.shape)[..., :columns]
