"""Attention as a walk over tiles, in plain XLA: memory grows with T, not with T * S, forward and backward, on any device.

A query tile visits its key tiles from right to left and maintains an online softmax (Milakov & Gimelshein, arXiv:1805.02867;
Dao et al., arXiv:2205.14135). Tiles in which the mask allows no pair are skipped. Bias terms are evaluated in each tile, and the
carry of a term, one number per row, is passed from tile to tile. Once every row has saturated, the rest of the walk is plain: the
bias is one constant per row.

    keys ->      0       1       2       3
    queries 2  [plain] [plain] [count] .......      counting leftward from the diagonal until all rows have saturated
    queries 3  [plain] [plain] [count] [count]

The backward pass recomputes the softmax weights of each tile from its scores and the log-sum-exp of its rows, and differentiates
the function of a term by ``jax.vjp`` on that one tile. Tables therefore get table-sized gradients, and a term needs no hand-written
backward pass. The gradient of a carry flows from left to right, so for each query tile the carries that its key tiles received, one
number per row and tile, are recomputed first.
"""

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from posjax.attention.backends.sinks import log_denominator, with_sink
from posjax.attention.backends.xla_chunked import ordered
from posjax.attention.backends.xla_chunked.backward import cotangent, delta_of, floats, gradients, zeros_like
from posjax.attention.backends.xla_chunked.forward import outputs
from posjax.attention.backends.xla_chunked.layout import Operands, Plan, from_blocks, to_operands, unblock
from posjax.attention.call import AttentionCall
from posjax.core.manual_axes import untracked
from posjax.typing import Array, Float

NAME: str = "xla_chunked"
SAVED = "posjax_attention"  # checkpoint name of the residuals of the backward pass, for policies of jax.checkpoint


def unsupported_reason(call: AttentionCall, **_: Any) -> None:
    """Returns None: every call is supported."""


@untracked
def attention(call: AttentionCall, *, tile: tuple[int, int] | None = None) -> Float[Array, "B T N V"]:
    """Computes attention tile by tile, with first-order gradients for every floating-point array of the call.

    Args:
      tile: (queries, keys) per tile; None chooses both.

    Returns:
      The result of ``reference.attention``.
    """
    return _attention(call, tile)[0]


def attention_and_lse(call: AttentionCall) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns the results of ``reference.attention_and_lse``, computed tile by tile."""
    out, lse = _attention(call)
    return out, log_denominator(lse, call.sink)


def _attention(call: AttentionCall, tile: tuple[int, int] | None = None) -> tuple[Array, Array]:
    """Returns the output, and the log-sum-exp of every row without a sink, ``EMPTY_LSE`` where no key is allowed."""
    length, call = call.query.shape[1], call.transformed()
    if call.needs_order() is not None:
        return ordered.attention(call, tile=tile)
    out, lse = _attend(*to_operands(call, tile=tile))
    lse = from_blocks(lse[..., None], length)[..., 0]
    return with_sink(from_blocks(out, length), lse, call.sink), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, operands: Operands) -> tuple[Array, Array]:
    """Computes attention on tiles, [I, B, N, t, V] in the dtype of value, and the log-sum-exp of each row, [I, B, N, t]."""
    return _forward(plan, operands)[0]


def _forward(plan: Plan, x: Operands) -> tuple[tuple[Array, Array], tuple[Operands, Array, Any]]:
    out, saved = checkpoint_name(outputs(plan, x), SAVED)
    return (out, saved[0]), (x, out, saved)


def _backward(plan: Plan, saved: tuple[Operands, Array, Any], gradients_out: tuple[Array, Array]) -> tuple[Operands]:
    (x, out, residuals), (d_out, d_lse) = saved, gradients_out
    d_final = zeros_like(floats(residuals[2])[0])
    grads = gradients(plan, x, residuals, d_out, delta_of(out, d_out) - d_lse, d_final)
    return (cotangent(x, grads | dict(carries=[unblock(tiles) for tiles in grads["carries"]])),)


_attend.defvjp(_forward, _backward)
