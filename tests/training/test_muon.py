"""Muon against float64 NumPy, written from singular values instead of products of matrices; and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posjax.encodings.spec import parse_encoding
from posjax.lab.config import Config
from posjax.lab.run import make_loss
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.parallel.mesh import make_mesh
from posjax.parallel.partition_rules import SHARDED_RULES
from posjax.parallel.steps import jit_train_step
from posjax.training.checkpoints import Checkpoints
from posjax.training.optimizer import decay_mask, make_optimizer, matrix_mask, orthogonalized
from posjax.training.schedule import learning_rate_schedule
from posjax.training.state import init_state
from posjax.training.step import make_train_step

# Leaves of the Transformer, and how each is cut into matrices; None: AdamW's. Of two layers, width 6, two heads of 4, one of keys.
SHAPES = {
    "layers/query/kernel": ((2, 6, 2, 4), (2, 6, 8)),
    "layers/key/kernel": ((2, 6, 1, 4), (2, 6, 4)),
    "layers/value/kernel": ((2, 6, 1, 4), (2, 6, 4)),
    "layers/out/kernel": ((2, 2, 4, 6), (2, 8, 6)),
    "layers/up/kernel": ((2, 6, 10), (2, 6, 10)),
    "layers/gate/kernel": ((2, 6, 10), (2, 6, 10)),
    "layers/down/kernel": ((2, 10, 6), (2, 10, 6)),
    "layers/mlp_norm/scale": ((2, 6), None),
    "layers/up/bias": ((2, 10), None),
    "token_embedding/embedding": ((7, 6), None),
    "head/kernel": ((6, 7), None),
    "outer_norm/scale": ((6,), None),
    "encoding/0/cope/embedding": ((5, 4), None),
}
NUMBERS = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.25, "momentum": 0.9}


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = leaf
    return tree


def flat(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def drawn(seed, dtype):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(dtype) for path, (shape, _) in SHAPES.items()}


def newton_schulz(matrix):
    """Five times a x + b x^3 + c x^5, on each singular value."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def numpy_steps(params, gradients, rate, beta1, beta2, eps, weight_decay, momentum, optimizer="muon"):
    decaying = {path for path in params if path.endswith(("kernel", "token_embedding/embedding"))}
    x = {path: leaf.astype(np.float64) for path, leaf in params.items()}
    m, v = ({path: np.zeros_like(leaf) for path, leaf in x.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, start=1):
        for path, g in gradient.items():
            g, matrices = g.astype(np.float64), SHAPES[path][1]
            if matrices is not None and optimizer == "muon":
                m[path] = momentum * m[path] + g
                whole = (g + momentum * m[path]).reshape(matrices)
                update = np.stack([0.2 * np.sqrt(max(matrices[1:])) * newton_schulz(layer) for layer in whole]).reshape(g.shape)
            else:
                m[path] = beta1 * m[path] + (1 - beta1) * g
                v[path] = beta2 * v[path] + (1 - beta2) * g**2
                update = m[path] / (1 - beta1**t) / (np.sqrt(v[path] / (1 - beta2**t)) + eps)
            x[path] = x[path] - rate * (update + (weight_decay * x[path] if path in decaying else 0))
    return x


def inner_product(params, batch, key):
    """Its gradient is the batch."""
    return sum(jnp.sum(p * g) for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(batch), strict=True)), jnp.ones(())


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-6)])
def test_steps_equal_muon_in_float64(steps, dtype, tolerance):
    params, gradients = drawn(0, dtype), [drawn(1 + t, dtype) for t in range(steps)]
    expected = numpy_steps(params, gradients, 0.125, **NUMBERS)
    with jax.enable_x64(dtype == np.float64):
        optimizer = make_optimizer(0.125, **NUMBERS, clip_norm=None, optimizer="muon")
        state = init_state(nested(params), optimizer, 0)
        step = jax.jit(make_train_step(inner_product, optimizer))
        for gradient in gradients:
            state, metrics = step(state, nested(gradient))
        found = flat(state.params)
    assert float(metrics["learning_rate"]) == 0.125
    for path, leaf in expected.items():
        assert found[path].dtype == dtype
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=tolerance * np.abs(leaf).max(), err_msg=path)
    adamw = numpy_steps(params, gradients, 0.125, **NUMBERS, optimizer="adamw")
    differ = {path for path in SHAPES if np.abs(adamw[path] - expected[path]).max() > 1e-2}
    assert differ == {path for path, (_, matrices) in SHAPES.items() if matrices is not None}


def test_singular_values_end_near_one():
    matrices = np.random.default_rng(0).normal(size=(3, 16, 40)).astype(np.float32)
    for x in (matrices, matrices.swapaxes(1, 2)):
        values = np.linalg.svd(np.asarray(orthogonalized(x)), compute_uv=False)
        assert values.shape == (3, 16) and values.min() > 0.6 and values.max() < 1.3
    assert not np.any(orthogonalized(jnp.zeros((4, 5))))  # a leaf without a gradient


def test_matrices_are_those_of_layers():
    params = nested(drawn(0, np.float32))
    assert flat(matrix_mask(params)) == {path: matrices is not None for path, (_, matrices) in SHAPES.items()}
    others = {
        "dense": {"kernel": np.ones((3, 4)), "bias": np.ones(4)},
        "layers": [{"out": {"kernel": np.ones((2, 4, 6))}, "conv": {"kernel": np.ones((3, 4, 6))}}],  # a list: not stacked
        "MultiHeadDotProductAttention_0": {"query": {"kernel": np.ones((6, 2, 4))}},
        "position_table": np.ones((8, 4)),
        "classifier": {"kernel": np.ones((4, 2))},
    }
    named = {path for path, chosen in flat(matrix_mask(others)).items() if chosen}
    assert named == {"dense/kernel", "layers/0/out/kernel", "MultiHeadDotProductAttention_0/query/kernel"}


def test_the_model_has_no_other_matrices():
    config = TransformerConfig(32, num_layers=2, embed_dim=16, num_heads=2, activation="swiglu", tie_embeddings=False)
    params = functional(nnx.eval_shape(lambda: Transformer(config, parse_encoding("tupe / cope(5)"), rngs=nnx.Rngs(0))))[1]
    named = {path for path, chosen in flat(matrix_mask(params)).items() if chosen}
    assert named == {f"layers/{name}/kernel" for name in ("query", "key", "value", "out", "up", "gate", "down")}
    decaying = {path for path, chosen in flat(decay_mask(params)).items() if chosen}
    assert decaying - named == {"token_embedding/embedding", "head/kernel"}


@pytest.mark.thorough
def test_settings_may_be_traced():
    params, *each = (nested(drawn(seed, np.float32)) for seed in range(3))
    gradients = jax.tree.map(lambda *steps: np.stack(steps), *each)

    def after(numbers):
        rate = learning_rate_schedule(numbers["peak"], 10, numbers["warmup"])
        own = {name: x for name, x in numbers.items() if name not in ("peak", "warmup")}
        optimizer = make_optimizer(rate, **own, optimizer="muon")
        return jax.lax.scan(make_train_step(inner_product, optimizer), init_state(params, optimizer, 0), gradients)[0].params

    pair = [NUMBERS | own for own in ({"peak": 0.1, "warmup": 2, "clip_norm": 0.5}, {"peak": 0.05, "warmup": 5, "clip_norm": 9.0})]
    pair[1] |= {"momentum": 0.5, "beta1": 0.5, "weight_decay": 0.9}
    traced = jax.jit(jax.vmap(after))({name: jnp.array([numbers[name] for numbers in pair], jnp.float32) for name in pair[0]})
    alone = [jax.jit(lambda numbers=numbers: after(numbers))() for numbers in pair]
    for path, leaf in flat(traced).items():
        for row, single in zip(leaf, alone, strict=True):
            np.testing.assert_allclose(row, flat(single)[path], rtol=0, atol=2e-6, err_msg=path)
        assert np.abs(leaf[0] - leaf[1]).max() > 1e-3, path


def test_a_checkpoint_of_muon_comes_back(tmp_path):
    optimizer = make_optimizer(0.1, optimizer="muon")
    before = init_state(nested(drawn(0, np.float32)), optimizer, 0, ema=True)
    state, _ = jax.jit(make_train_step(inner_product, optimizer, ema_decay=0.5))(before, nested(drawn(1, np.float32)))
    Checkpoints(tmp_path).save(1, state)
    found = Checkpoints(tmp_path).restore_latest(before).state
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for part in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, part), getattr(state, part))
    assert np.any(found.ema["head"]["kernel"] != found.params["head"]["kernel"])


def test_there_is_no_other_optimizer():
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        make_optimizer(0.1, optimizer="sgd")
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        Config(optimizer="sgd")


@pytest.mark.thorough
def test_a_mesh_computes_what_one_device_does_and_the_average_lies_where_the_parameters_do():
    config = TransformerConfig(32, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=48, activation="swiglu")
    with_params, params = functional(Transformer(config, parse_encoding("rope + cope(5)"), rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(1e-2, eps=1e-3, weight_decay=0.1, optimizer="muon")
    loss = make_loss(with_params, dropout=False, z_weight=1e-2)
    tokens = np.random.default_rng(0).integers(0, 32, (8, 17), np.int32)
    ones, positions = np.ones((8, 16), np.int32), np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
    weights = np.linspace(0, 1, 128, dtype=np.float32).reshape(8, 16)
    batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights, segment_ids=ones, positions=positions)
    states = []
    for mesh in (make_mesh(1), make_mesh(fsdp=2, context=2, tensor=2)):
        step = jit_train_step(make_train_step(loss, optimizer, ema_decay=0.5), mesh, SHARDED_RULES)
        state = init_state(params, optimizer, 0, ema=True)
        for _ in range(3):
            state, metrics = step(state, batch)
        states.append((state, metrics))
    (one, its), (cut, own) = states
    np.testing.assert_allclose(own["loss"], its["loss"], rtol=1e-5)
    for a, b, start in zip(*map(jax.tree.leaves, ((one.params, one.ema), (cut.params, cut.ema), (params, params))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
        assert np.abs(a - start).max() > 1e-3
    shards = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in flat(cut).items()}
    for path, shape in {"query/kernel": (2, 4, 2, 4), "layers/out/kernel": (2, 2, 4, 4), "down/kernel": (2, 24, 4)}.items():
        same = [name for name in shards if name.endswith(path)]
        assert len(same) == 3, same  # the parameter, its momentum and its average
        assert {shards[name] for name in same} == {shape}
