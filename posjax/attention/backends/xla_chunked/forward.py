"""The forward pass of the tile walk: an online softmax over the key tiles of every query tile, from right to left."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from posjax.attention.backends.constants import EMPTY_LSE, INIT_MAX, MASK_VALUE
from posjax.attention.backends.xla_chunked.layout import Operands, Plan
from posjax.attention.backends.xla_chunked.query_tile import (
    can_saturate,
    multiply_by_group,
    one_by_one,
    saturated_biases,
    take_query_tile,
    tile_scores,
)
from posjax.typing import Array


@one_by_one
def outputs(plan: Plan, x: Operands) -> tuple[Array, Any]:
    """Runs the forward walk of every query tile.

    Returns:
      The result [I, B, N, t, V], and the residuals that ``backward.gradients`` needs: the log-sum-exp of every row [I, B, N, t]
      (``EMPTY_LSE`` where a row has no allowed key), the number of plain tiles among the visited tiles of each query tile [I], and
      the carry of every term after its leftmost tile, [I, B, N, t, ...].
    """

    def one(index: Array) -> tuple[Array, Array, Array, Any]:
        row = take_query_tile(plan, x, index)
        loaded = [term.loaded() for term in row.terms]
        rows, tables = [term.rows for term in loaded], [term.tables for term in loaded]

        def step(at: Array, softmax: tuple[Array, Array, Array], carries: list[Any], saturated: list[Array | None]) -> Any:
            kv_tile = row.key_tile(at)
            logits = row.logits(kv_tile.key)
            scores, carries = tile_scores(row, kv_tile, logits, kv_tile.bias, rows, kv_tile.columns, tables, carries, saturated)
            scores = jnp.where(kv_tile.allowed, scores, MASK_VALUE)
            m, l, acc = softmax
            m_new = jnp.maximum(m, scores.max(-1))
            weights, alpha = jnp.exp(scores - m_new[..., None]), jnp.exp(m - m_new)
            product = multiply_by_group("bkgts,bksv->bkgtv", weights.astype(kv_tile.value.dtype), kv_tile.value)
            return at - 1, (m_new, l * alpha + weights.sum(-1), acc * alpha[..., None] + product), carries

        batch, heads, height, _ = row.query.shape
        m, l = (jnp.full((batch, heads, height), value, jnp.float32) for value in (INIT_MAX, 0.0))
        softmax = m, l, jnp.zeros((batch, heads, height, x.value.shape[-1]), jnp.float32)
        state = row.count - 1, softmax, [term.carry for term in loaded]
        unsaturated: list[Array | None] = [None] * len(loaded)
        if any(term.carry is not None for term in loaded):

            def counts(state: Any) -> Array:
                at, _, carries = state
                if not can_saturate(row.terms):
                    return at >= 0
                is_exhausted = (row.kv_tiles[at] < row.leftmost)[:, None]  # rows with no allowed key from here on
                saturated = [s for s in saturated_biases(row.terms, rows, tables, carries)[0] if s is not None]
                return (at >= 0) & ~functools.reduce(jnp.logical_and, [(s | is_exhausted).all() for s in saturated])

            state = jax.lax.while_loop(counts, lambda state: step(*state, unsaturated), state)
        first = state[0] + 1  # the number of visited tiles that are plain
        if can_saturate(row.terms):
            at, softmax, carries = state
            constants = saturated_biases(row.terms, rows, tables, carries)[1]
            at, softmax = jax.lax.while_loop(
                lambda state: state[0] >= 0, lambda state: step(*state, carries, constants)[:2], (at, softmax)
            )
            state = at, softmax, carries
        m, l, acc = state[1]
        is_empty = l == 0.0
        out = acc / jnp.where(is_empty, 1.0, l)[..., None]
        lse = jnp.where(is_empty, EMPTY_LSE, m + jnp.log(jnp.where(is_empty, 1.0, l)))
        return out if plan.is_part else out.astype(x.value.dtype), lse, first, state[2]

    out, *saved = jax.lax.map(one, jnp.arange(x.query.shape[0]))
    return out, saved
