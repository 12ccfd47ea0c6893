"""Gradients of one query tile on TPU: products, softmax, accumulators, and the key tiles outside the counting region."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from posjax.attention.backends.constants import LOG2E
from posjax.attention.backends.tpu.step import (
    Groups,
    PairInputs,
    Step,
    apply_rotary,
    apply_soft_cap,
    as_row,
    masked_or_not,
    soft_cap_derivative,
)
from posjax.attention.backends.tpu.tiles import LANES, NN, NT, SUBLANES, TN, matmul_bf16x3, product, to_sublanes
from posjax.typing import Array


@dataclasses.dataclass(frozen=True)
class BackwardTile:
    """Computes the gradients of one query tile of one head and one resident block of keys.

    Scratch holds float32 sums: ``dk_acc`` [S, C], before it is scaled, and ``dv_acc`` [S, V] over the query tiles of all heads that
    share the keys, ``dq_acc`` [C, t], before it is scaled, over the keys, and ``d_table_acc`` [128, 8, 128], by table index and
    query lane, over the query tiles of a head.

    Attributes:
      step: the query tile, with the references to operands, results and scratch.
      scale: reference to the scale of the scores, [1].
      factor: the scale in units of log2 e, a scalar.
    """

    step: Step
    scale: Any
    factor: Array

    @property
    def every(self) -> Groups:
        return Groups(0, self.step.plan.groups)

    # Before the keys

    def initialise_keys(self) -> None:
        """Rotates the keys and clears their gradients, before the first query tile that they meet."""
        s = self.step
        if s.plan.rotates_keys:
            s.prepare_keys()
        s.dk_acc[...] = jnp.zeros(s.dk_acc.shape, jnp.float32)
        s.dv_acc[...] = jnp.zeros(s.dv_acc.shape, jnp.float32)

    def initialise_head(self) -> None:
        """Clears the gradients that are summed over the query tiles of a head, before the first of them."""
        s = self.step
        for name in ("d_numbers", "d_key_features"):
            if s.refs.get(name) is not None:
                s.refs[name][...] = jnp.zeros(s.refs[name].shape, jnp.float32)
        s.d_scale[...] = jnp.zeros(s.d_scale.shape, jnp.float32)
        if s.plan.counting is not None:
            s.d_embedding[...] = jnp.zeros(s.d_embedding.shape, jnp.float32)
        if s.plan.index is not None:
            s.d_table_acc[...] = jnp.zeros(s.d_table_acc.shape, jnp.float32)

    def initialise(self) -> None:
        """Rotates the queries, multiplies them with the embedding, and clears their gradients."""
        s = self.step
        s.prepare_queries()
        s.dq_acc[...] = jnp.zeros(s.dq_acc.shape, jnp.float32)
        if s.refs.get("d_query_features") is not None:
            s.d_query_features[...] = jnp.zeros(s.d_query_features.shape, jnp.float32)

    def start_copies(self, batch: Array, head: Array, group: Array) -> dict[str, Any]:
        """Starts copies of earlier gradients of the queries to the output blocks, for ``finish``; returns the copies by name."""
        s, size, copies = self.step, self.step.plan.blocks.block_q, {}
        for n, name in enumerate(name for name in ("query", "counted_query") if f"before_{name}" in s.refs):
            rows_here = pl.ds(pl.multiple_of(s.tile * size, size), size)
            before = s.refs[f"before_{name}"].at[batch, head, group, rows_here]
            copies[name] = pltpu.make_async_copy(before, s.refs[f"d_{name}"].at[0, 0, 0], s.arrivals.at[n])
            copies[name].start()
        return copies

    # For some keys

    def products(self, start: Array, size: int, groups: Groups) -> tuple[Array, Array]:
        """Computes the scores before any bias and the gradient of the weights, [s, t] each."""
        s = self.step
        key, value = s.keys(start, size), s.value[pl.ds(start, size), :]
        exact = key.dtype == jnp.float32
        logits = product(key, s.queries(groups), NT, exact) * self.factor
        return logits, product(value, s.d_out[groups.lanes, :], NT, exact)

    def score_gradients(self, scores: Array, d_weights: Array, start: Array, size: int, groups: Groups) -> tuple[Array, Array]:
        """Computes the weights and the gradient of the scores, [s, t] each.

        Args:
          scores: [s, t], with CoPE and T5 biases, masked.
          d_weights: [s, t], the gradient of the weights.
          start, size: the keys.
          groups: the query groups.
        """
        s, pulls = self.step, []
        for x in s.pair_inputs(start, size, groups):
            bias, pull = _bias_and_pull(x)
            scores = scores + bias
            pulls += [] if pull is None else [(x, pull)]
        scores = apply_soft_cap(s.plan, scores)
        weights = jnp.exp2(scores - as_row(s.lse, groups))
        d_scores = weights * (d_weights - as_row(s.delta, groups))
        d_scores = d_scores if s.plan.soft_cap is None else d_scores * soft_cap_derivative(s.plan, scores)
        for x, pull in pulls:
            d_numbers, d_queries, d_keys = pull(d_scores)
            self.add_to_pair(x, d_numbers, d_queries, d_keys, start, groups)
        return weights, d_scores

    def add_to_pair(
        self, x: PairInputs, d_numbers: list[Array], d_queries: list[Array], d_keys: list[Array], start: Array, groups: Groups
    ) -> None:
        """Adds to the gradients of a pair's numbers [1, t] and float features of queries [1, t] and keys [s, t]."""
        s = self.step
        for n, gradient in enumerate(d_numbers, x.first_number):
            for part in range(0, gradient.shape[1], LANES):
                s.d_numbers[n : n + 1, :] += gradient[:, part : part + LANES]
        for n, of_queries, of_keys in zip(x.program.float_features, d_queries, d_keys, strict=True):
            feature = x.first_feature + n
            for g, part in groups.lane_slices():
                s.d_query_features[feature, pl.ds(g, 1), :] += of_queries[:, part]
            # A product with ones sums over the lanes and leaves the keys in lanes.
            ones = jnp.ones((SUBLANES, of_keys.shape[1]), jnp.float32)
            total = product(ones, of_keys, NT, exact=True)[:1]
            s.d_key_features[feature : feature + 1, pl.ds(start, of_keys.shape[0])] += total

    def accumulate(self, start: Array, size: int, weights: Array, d_logits: Array, groups: Groups) -> None:
        """Adds the contribution of ``size`` keys, from [s, t] each, to the gradients of key, value and query."""
        s = self.step
        at, key, d_out, queries = pl.ds(start, size), s.keys(start, size), s.d_out[groups.lanes, :], s.queries(groups)
        exact = key.dtype == jnp.float32
        weights, d_logits = weights.astype(d_out.dtype), d_logits.astype(key.dtype)
        s.dv_acc[at, :] += product(weights, d_out, NN, exact)
        s.dk_acc[at, :] += product(d_logits, queries, NN, exact)
        s.dq_acc[:, groups.lanes] += product(key, d_logits, TN, exact)

    def add_past_last(self, d_bias: Array) -> None:
        """Adds the gradient of the bias of saturated counts, [1, t], to that of the last position."""
        for g, part in self.every.lane_slices():
            self.step.d_last[pl.ds(g, 1), :] += d_bias[:, part]

    def add_to_table(self, index: Array, gradient: Array) -> None:
        """Adds to the gradient of the table: sums gradient [s, 128] over equal indices, of which a piece has one or a few."""
        low, high = jnp.min(index), jnp.max(index)

        def add(n: Array, _: None) -> None:
            self.step.d_table_acc[n] += to_sublanes(jnp.where(index == n, gradient, 0.0))

        jax.lax.fori_loop(low, high + 1, add, None)

    def add_strips_to_table(self, strip_of: Any) -> None:
        """Adds ``d_scores`` of each query group g, in its strip ``strip_of(g)``, to the gradient of the table."""
        s = self.step

        def one_group(g: Array, _: None) -> None:
            self.add_to_table(s.index_of(strip_of(g), g), s.d_scores[g])

        jax.lax.fori_loop(0, s.plan.groups, one_group, None)

    # Key tiles

    def key_tiles(self) -> None:
        """Processes the keys of the block outside the counting region."""
        self.step.for_key_tiles(lambda j, is_full: self.step.dispatch_tile(j, is_full, self.plain_tile, self.lookup_tile))

    def plain_tile(self, j: Array, masked: bool) -> None:
        """Processes key tile j, in which the bias is constant along a row."""
        s, size = self.step, self.step.plan.blocks.block_kv
        start = pl.multiple_of(j * size, size)
        scores, d_weights = self.products(start, size, self.every)
        queries, keys = s.query_extent(), s.key_extent(j)
        constant = s.constant(queries, keys)
        if constant is not None:
            scores = scores + constant
        scores = s.apply_mask(scores, start) if masked else scores
        weights, d_scores = self.score_gradients(scores, d_weights, start, size, self.every)
        if constant is not None:
            d_constant = d_scores.sum(0, keepdims=True)
            if s.plan.counting is not None:
                self.add_past_last(d_constant)
            if s.plan.index is not None:
                for _, part in self.every.lane_slices():
                    s.d_table_acc[s.common_index(queries, keys), pl.ds(0, 1), :] += d_constant[:, part]
        self.accumulate(start, size, weights, d_scores, self.every)

    def lookup_tile(self, j: Array, is_full: Array) -> None:
        """Processes key tile j strip by strip, with T5 lookups; ``is_full`` is True if its pairs need no mask."""

        def one(n: Array, _: None) -> None:
            strip = j * self.step.plan.per_tile + n
            masked_or_not(functools.partial(self.lookup_strip, strip), is_full)

        jax.lax.fori_loop(0, self.step.plan.per_tile, one, None)

    def lookup_strip(self, strip: Array, masked: bool) -> None:
        """Processes a strip of a key tile, with T5 lookups."""
        s, size = self.step, self.step.plan.blocks.block_kv_count
        start = s.start_of(strip)
        scores, d_weights = self.products(start, size, self.every)
        scores = scores + s.lookup_biases(lambda g: strip)
        scores = scores if s.plan.counting is None else scores + s.last_bias()
        scores = s.apply_mask(scores, start) if masked else scores
        weights, d_scores = self.score_gradients(scores, d_weights, start, size, self.every)
        if s.plan.counting is not None:
            self.add_past_last(d_scores.sum(0, keepdims=True))
        s.by_group(s.d_scores, d_scores)
        self.add_strips_to_table(lambda g: strip)
        self.accumulate(start, size, weights, d_scores, self.every)

    # After the keys

    def finish(self, copies: dict[str, Any]) -> None:
        """Writes the gradients of the queries, and their contributions to the gradients of a head.

        Args:
          copies: the result of ``start_copies``.
        """
        s, plan = self.step, self.step.plan
        d_rotated = s.dq_acc[...].T
        s.d_scale[...] += (d_rotated * s.queries().astype(jnp.float32)).sum(0, keepdims=True)
        d_query = d_rotated * self.scale[0]
        if s.query_cos_sin is not None:
            d_query = apply_rotary(d_query, s.query_cos_sin, s.rotate_half_matrix[...], inverse=True)
        if plan.counting is not None:
            d_counted = self.embedding_gradients()
            if s.counted_query is None:
                d_query += d_counted
            else:
                self.write("counted_query", d_counted, copies)
            for name in ("high", "low", "gathered"):
                getattr(s, f"out_{name}")[...] = getattr(s, name)[...]
        self.write("query", d_query, copies)
        if plan.index is not None:

            @pl.when(s.tile == pl.num_programs(3) - 1)
            def _() -> None:
                s.d_table[...] = s.d_table_acc[...].sum(1)

    def embedding_gradients(self) -> Array:
        """Adds to the gradient of the embedding; returns that of the queries that multiply it, [t, H]."""
        s, counting = self.step, self.step.counting
        s.d_z[:, pl.ds(counting.last, 1), :] += s.d_last[...][:, None, :]
        counted = (s.query if s.counted_query is None else s.counted_query)[...]
        d_z = s.all_groups(s.d_z)
        s.d_embedding[...] += matmul_bf16x3(d_z, counted, NN, counting.exact)
        return matmul_bf16x3(d_z, s.embedding[0], TN, counting.exact)

    def write(self, name: str, gradient: Array, copies: dict[str, Any]) -> None:
        """Writes the gradient of ``query`` or ``counted_query``, added to the earlier gradient if there is a copy."""
        out = self.step.refs[f"d_{name}"].at[0, 0, 0]
        if name in copies:
            copies[name].wait()
            gradient = out[...] + gradient
        out[...] = gradient.astype(out.dtype)

    def finish_keys(self) -> None:
        """Writes the gradients of keys and values, after the last query tile that they meet."""
        s, size = self.step, self.step.plan.blocks.block_kv
        s.d_value[...] = s.dv_acc[...].astype(s.d_value.dtype)

        def one(n: Array, _: None) -> None:
            at = pl.ds(pl.multiple_of(n * size, size), size)
            d_key = s.dk_acc[at, :] * self.scale[0]
            if s.plan.rotates_keys:
                d_key = apply_rotary(
                    d_key, (s.key_cos_sin[0, at, :], s.key_cos_sin[1, at, :]), s.rotate_half_matrix[...], inverse=True
                )
            s.d_key[at, :] = d_key.astype(s.d_key.dtype)

        jax.lax.fori_loop(0, s.key.shape[0] // size, one, None)


def _bias_and_pull(x: PairInputs) -> tuple[Array, Any]:
    """Returns the bias of a pair in units of log2 e, [s, t], and the function from its gradient to those of what has gradients.

    The function returns the gradients of the numbers [1, t], and of the float features of queries [1, t] and of keys [s, t]; it is
    None if nothing has gradients.
    """
    program, floats = x.program, x.program.float_features
    if not (program.learned or floats):
        return program.in_log2(x.queries, x.keys, x.numbers), None

    def bias(numbers: list[Array], queries: list[Array], keys: list[Array]) -> Array:
        of_queries, of_keys = list(x.queries), list(x.keys)
        for side, new in ((of_queries, queries), (of_keys, keys)):
            for n, feature in zip(floats, new, strict=True):
                side[n] = feature
        return program(tuple(of_queries), tuple(of_keys), numbers)

    numbers = x.numbers if program.learned else []
    evaluate = bias if program.learned else lambda _, queries, keys: bias(x.numbers, queries, keys)
    value, pull = jax.vjp(evaluate, numbers, [x.queries[n] for n in floats], [x.keys[n] for n in floats])
    return value * LOG2E, pull
