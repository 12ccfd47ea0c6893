"""Parts of the TPU kernels by themselves, on references outside of a kernel, against closed forms in plain jax."""

import jax
import jax.numpy as jnp
import numpy as np
from suite import (
    normal,
)

from posjax.attention.backends.constants import INIT_MAX, LOG2E, MASK_VALUE
from posjax.attention.backends.tpu.backward_counting import BackwardCounting, GradientPiece
from posjax.attention.backends.tpu.backward_tile import BackwardTile
from posjax.attention.backends.tpu.band import CountingRegion, QueryGroupState, StripCursor
from posjax.attention.backends.tpu.blocks import Blocks
from posjax.attention.backends.tpu.forward import ForwardTile
from posjax.attention.backends.tpu.step import Groups, Plan, Step
from posjax.attention.backends.tpu.tiles import LANES, Counting, doubled_gates
from posjax.core.masks import Rules

EVERY = Groups(0, 2)


def step_with(soft_cap=None, counting=None, **arrays):
    """A query tile of two groups and two strips whose references hold the arrays."""
    plan = Plan(
        blocks=Blocks(block_q=256, block_kv=256, block_kv_count=128, block_kv_resident=256),
        rules=Rules(False, None, None, False),
        soft_cap=soft_cap,
        counting=counting,
        index=None,
        uniform=None,
        pairs=(),
        rotates_keys=False,
        vmem=2**27,
        interpret=False,
    )
    return Step(plan, None, {name: jax.new_ref(array) for name, array in arrays.items()}, 0, 1, 0, 0)


def with_a_row_that_sees_nothing(scores):
    """Scores [s, t] in units of log2 e, with half of the pairs masked, and all of those of query 5."""
    allowed = np.random.default_rng(0).random(scores.shape) < 0.5
    allowed[:, 5] = False
    return jnp.where(allowed, scores * LOG2E, MASK_VALUE), jnp.asarray(allowed)


def test_the_online_softmax_over_two_strips_equals_the_softmax_of_both():
    scores, value = 3.0 * normal(0, 256, 256), normal(1, 256, 16)
    in_log2, allowed = with_a_row_that_sees_nothing(scores)

    @jax.jit
    def online(scores, value):
        shapes = dict(m=(1, 256), l=(1, 256), acc=(16, 256), out=(256, 16), lse=(2, LANES))
        state = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        s = step_with(value=value, **state | {"m": jnp.full((1, 256), INIT_MAX)})
        tile = ForwardTile(s, jnp.float32(1.0))
        for start in (128, 0):
            strip = scores[start : start + 128]
            tile.update_softmax([strip[:, :128], strip[:, 128:]], jnp.int32(start), 128, EVERY)
        tile.finish()
        return s.out[...], s.lse[...]

    out, lse = online(in_log2, value)
    weights = np.where(allowed, np.exp(np.float64(scores)), 0.0)
    total = weights.sum(0)
    seen = np.arange(256) != 5
    np.testing.assert_allclose(out[seen], (weights.T @ np.float64(value))[seen] / total[seen, None], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse.ravel()[seen], np.log2(total[seen]), rtol=1e-5)
    assert not out[5].any()
    assert lse.ravel()[5] == -np.float32(MASK_VALUE)


def test_the_gradient_of_scores_under_a_soft_cap_equals_that_of_a_softmax():
    cap = 2.0
    scores, d_weights = 3.0 * normal(0, 128, 256), normal(1, 128, 256)
    in_log2, allowed = with_a_row_that_sees_nothing(scores)

    def capped(scores):
        return jnp.where(allowed, cap * jnp.tanh(scores / cap), -jnp.inf)

    def softmax(scores):
        weights = jnp.where(allowed, jnp.exp(capped(scores)), 0.0)
        return weights / jnp.maximum(weights.sum(0), 1e-30)

    @jax.jit
    def wanted(scores, d_weights):
        weights, pull = jax.vjp(softmax, scores)
        lse = jnp.where(allowed.any(0), jax.nn.logsumexp(capped(scores), 0) * LOG2E, -MASK_VALUE)
        return weights, pull(d_weights)[0], lse, (weights * d_weights).sum(0)

    @jax.jit
    def gradients(scores, d_weights, lse, delta):
        s = step_with(soft_cap=cap, lse=lse.reshape(2, LANES), delta=delta.reshape(2, LANES))
        return BackwardTile(s, None, jnp.float32(1.0)).score_gradients(scores, d_weights, jnp.int32(0), 128, EVERY)

    want, d_want, *rows = wanted(scores, d_weights)
    weights, d_scores = gradients(in_log2, d_weights, *rows)
    np.testing.assert_allclose(weights, want, atol=1e-6)
    np.testing.assert_allclose(d_scores, d_want, atol=1e-6)


def test_gradients_of_counts_reach_the_gates_of_all_keys_from_their_own_on():
    """A count is the sum of the gates of its key and of all keys to the right."""
    logits, d_scores, d_counts, gathered = normal(0, 256, 256), normal(1, 256, 256), normal(2, 256, 256), normal(3, 1, 256)

    def counts(logits):
        return jnp.cumsum(jax.nn.sigmoid(logits)[::-1], 0)[::-1], jax.nn.sigmoid(logits)

    to_gates = jnp.broadcast_to(gathered, logits.shape)  # of keys further left
    want = d_scores + jax.vjp(counts, logits)[1]((d_counts, to_gates))[0]

    @jax.jit
    def walked(logits, d_scores, d_counts, gathered):
        s = step_with(key=jnp.zeros((256, 16)), counting=Counting(last=11, rows=16, exact=True, has_sublane_gather=True))
        state = QueryGroupState(s, StripCursor(EVERY, 0, True, True), True, None, None)
        state.gathered = gathered * LOG2E
        walk, found = BackwardCounting(BackwardTile(s, None, None), CountingRegion(s, None, is_backward=True)), []
        for index in range(2):
            at = slice(index * LANES, (index + 1) * LANES)
            gates = doubled_gates(logits[at] * LOG2E, exact=True)
            piece = GradientPiece(state, index)
            piece.gates, piece.d_scores, piece.d_counts = gates, d_scores[at], d_counts[at] * LOG2E
            walk.backprop_gates(piece)
            found.append(piece.d_logits)
        return jnp.concatenate(found), state.gathered / LOG2E

    found, left = walked(logits, d_scores, d_counts, gathered)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(left, gathered + d_counts.sum(0), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_table_sums_over_equal_indices():
    index = np.sort(np.random.default_rng(0).integers(3, 6, (128, LANES)), axis=0)
    gradient = np.asarray(normal(0, 128, LANES))

    @jax.jit
    def summed(index, gradient):
        s = step_with(d_table_acc=jnp.zeros((LANES, 8, LANES)))
        BackwardTile(s, None, None).add_to_table(index, gradient)
        return s.d_table_acc[...].sum(1)

    want = np.zeros((LANES, LANES))
    np.add.at(want, (index, np.arange(LANES)[None]), gradient)
    np.testing.assert_allclose(summed(jnp.asarray(index), gradient), want, atol=1e-5)
