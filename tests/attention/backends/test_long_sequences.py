"""Training on sequences of more than one tile: the walk learns what dense attention learns, without retraces or transfers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from suite import (
    equations,
)

import posjax as pj
from posjax.attention.backends.xla_chunked.layout import WIDE
from posjax.lab.run import make_loss
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.parallel.mesh import make_mesh
from posjax.parallel.steps import jit_train_step
from posjax.training.optimizer import make_optimizer
from posjax.training.state import init_state
from posjax.training.step import make_train_step

LENGTH, VOCABULARY = 160, 12


def batches(count: int, rows: int):
    """Packed rows of a noisy cycle, cut into two documents at a place of its own."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = (np.cumsum(rng.integers(1, 3, (rows, LENGTH + 1)), axis=1) % VOCABULARY).astype(np.int32)
        begins = rng.integers(20, LENGTH - 20, (rows, 1))
        at = np.arange(LENGTH)[None]
        second = at >= begins
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "weights": np.ones((rows, LENGTH), np.float32),
            "segment_ids": (1 + second).astype(np.int32),
            "positions": np.where(second, at - begins, at).astype(np.int32),
        }


def training(implementation: str | None):
    """A step and its first state."""
    config = TransformerConfig(
        VOCABULARY, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, mlp_dim=16, implementation=implementation
    )
    encoding = pj.chain(pj.rope(), pj.cope(max_position=16), pj.t5())
    with_params, params = functional(Transformer(config, encoding, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(3e-3)
    return make_train_step(make_loss(with_params, dropout=False), optimizer), init_state(params, optimizer, seed=0)


def test_wide_tiles_of_a_long_sequence():
    """From 4,096 tokens on, tiles are wider; lengths that are not whole tiles, groups of heads, segments and biases included."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 4100, heads, 8)).astype(np.float32) for heads in (2, 1, 1))
    segments = (np.arange(4100) >= 1500).astype(np.int32)[None]

    def loss(query, key, value, implementation):
        out = pj.attention(
            query, key, value, pj.alibi(), is_causal=True, segment_ids=(segments, segments), implementation=implementation
        )
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(functools.partial(loss, implementation="xla_chunked"), (0, 1, 2), has_aux=True))(
        query, key, value
    )
    # Dense attention in float64 for rows at the edges of tiles and segments.
    slopes = np.array([2.0**-4, 2.0**-8])  # ALiBi's for two heads
    for t in (0, WIDE - 1, WIDE, 1499, 1500, 4095, 4096, 4099):
        begin = 0 if t < 1500 else 1500
        keys, values = (x[0, begin : t + 1, 0].astype(np.float64) for x in (key, value))
        for head in range(2):
            scores = keys @ query[0, t, head].astype(np.float64) / np.sqrt(8) - slopes[head] * np.arange(t - begin, -1, -1)
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(out[0, t, head], weights @ values / weights.sum(), rtol=0, atol=1e-5)
    whole = jax.jit(jax.grad(functools.partial(loss, implementation="xla"), (0, 1, 2), has_aux=True))(query, key, value)[0]
    for ours, dense in zip(grads, whole, strict=True):
        np.testing.assert_allclose(ours, dense, rtol=0, atol=1e-4 * np.abs(dense).max())


@pytest.mark.thorough
def test_the_walk_and_dense_attention_learn_the_same():
    curves = {}
    for implementation in ("xla", "xla_chunked"):
        step, state = training(implementation)
        step, curve = jax.jit(step, donate_argnums=0), []
        for batch in batches(100, rows=2):
            state, metrics = step(state, batch)
            curve.append(float(metrics["loss"]))
        curves[implementation] = np.array(curve)
    assert curves["xla"][-10:].mean() < 0.6 * curves["xla"][0]  # there is something to agree on
    np.testing.assert_allclose(curves["xla_chunked"], curves["xla"], rtol=0, atol=1e-4)


def test_a_training_step_neither_traces_again_nor_talks_to_the_host():
    step, state = training(None)
    feed = [jax.device_put(batch) for batch in batches(4, rows=2)]
    used = {equation.primitive.name for equation in equations(jax.make_jaxpr(step)(state, feed[0]).jaxpr)}
    assert {"while", "scan", "dot_general"} <= used  # of the walk
    assert not [name for name in used if any(word in name for word in ("callback", "infeed", "outfeed", "print", "device_put"))]

    step = jit_train_step(step, make_mesh(1))
    state, _ = step(state, feed[0])
    state, _ = step(state, feed[1])  # the state has come back from a step
    with jax.no_tracing(), jax.transfer_guard("disallow"):
        for batch in feed[2:]:
            state, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"]) and int(state.step) == 4
