"""Scans with one number per key as differences of prefix sums, which any backend evaluates like a bias of two positions.

The gates of such a ``Scan`` depend only on keys (a forgetting gate), so the sum between query and key is a difference of two sums
that are computed once per token. No walk that counts along the keys is needed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from posjax.attention.backends.bias_terms import per_head
from posjax.attention.call import AttentionCall
from posjax.checks import is_symbolic
from posjax.core.sequence import prefix_sum
from posjax.core.structures import Bias, Pair, Scan
from posjax.typing import Array


def with_prefix_sums(call: AttentionCall) -> AttentionCall:
    """Returns the call with its key-only scans replaced by equivalent pairs, if there are any.

    They are equivalent if queries and keys are the same tokens and each query attends to all keys of its segment back to the end of
    its window, i.e. not under a boolean mask.
    """
    is_known = not is_symbolic(call.key.shape[1])  # backends compute the sums over a symbolic length themselves
    if not (call.is_self and call.mask.is_causal and call.mask.boolean is None and is_known):
        return call
    return call.replace(biases=tuple(_as_pair(bias, call) for bias in call.biases))


def _as_pair(bias: Bias, call: AttentionCall) -> Bias:
    scan = bias.at
    if not isinstance(scan, Scan) or scan.key is None or scan.query is not None or not (scan.include_key or scan.include_query):
        return bias
    x = jnp.swapaxes(scan.key, 1, 2).astype(jnp.float32)  # [B, N or K, S, 1]
    gates = per_head(scan.gate, scan.args, call.query.shape[2] if _differs(scan) else x.shape[1], x)[..., 0]
    of_queries = prefix_sum(gates, call.mask.key_segments, exclusive=not scan.include_query)
    of_keys = prefix_sum(gates, call.mask.key_segments, exclusive=scan.include_key)
    heads = call.query.shape[2]
    of_queries = tuple(jnp.repeat(part, heads // part.shape[1], axis=1) for part in of_queries)
    return dataclasses.replace(bias, at=Pair(sum_of_differences, of_queries, of_keys))


def _differs(scan: Scan) -> bool:
    """Returns whether heads that share a key have different gates."""
    return any(leaf.shape[0] > 1 for leaf in jax.tree.leaves(scan.args))


def sum_of_differences(differences: tuple[Array, Array], args: tuple) -> Array:
    """Returns the sum of two differences, the parts of a difference of sums, for ``Pair``."""
    return differences[0] + differences[1]
