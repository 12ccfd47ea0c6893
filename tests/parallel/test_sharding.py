"""A state cut over a mesh with two axes: the step computes what it does on one device, and every part lies where the rules say."""

import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from posjax.encodings.spec import parse_encoding
from posjax.lab.config import Config, load_config
from posjax.lab.run import abstract_step, make_loss
from posjax.lab.source import open_source, train_batches
from posjax.models.transformer import Transformer, TransformerConfig, functional
from posjax.parallel.mesh import make_mesh, parse_mesh, shard_batch
from posjax.parallel.partition_rules import SHARDED_RULES, shard_state
from posjax.parallel.steps import abstract_train_step, jit_train_step
from posjax.training.optimizer import make_optimizer
from posjax.training.state import init_state
from posjax.training.step import make_train_step

BATCH, LENGTH, WIDTH = 24, 20, 16
MODEL = TransformerConfig(32, num_layers=2, embed_dim=WIDTH, num_heads=4, num_kv_heads=2, mlp_dim=48, activation="swiglu")
# eps far above the rounding of gradients that are zero but for rounding: Adam would make whole steps of them.
OPTIMIZER = make_optimizer(1e-2, eps=1e-3, weight_decay=0.1)


@functools.cache
def model():
    """The pure form of the model, and its parameters on the host, with CoPE's embedding not zero."""
    with_params, params = functional(Transformer(MODEL, parse_encoding("rope + cope(5)"), rngs=nnx.Rngs(0)))
    embedding = params["encoding"]["0"]["cope"]["embedding"]
    params["encoding"]["0"]["cope"]["embedding"] = jax.random.normal(jax.random.key(1), embedding.shape)
    return with_params, jax.device_get(params)


def make_state():
    return init_state(model()[1], OPTIMIZER, 0), make_loss(model()[0], dropout=False)


def make_batch(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 32, (BATCH, LENGTH + 1), np.int32)
    segments = np.repeat(np.arange(1, 3, dtype=np.int32), LENGTH // 2)[None].repeat(BATCH, 0)
    positions = np.arange(LENGTH, dtype=np.int32)[None].repeat(BATCH, 0) % (LENGTH // 2)
    weights = np.linspace(0, 1, BATCH * LENGTH, dtype=np.float32).reshape(BATCH, LENGTH)
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], weights=weights, segment_ids=segments, positions=positions)


def leaves_by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def compiled_step(mesh, rules):
    """A compiled step that takes host arrays, and its program."""
    state, loss = make_state()
    jitted, arguments = abstract_train_step(make_train_step(loss, OPTIMIZER), mesh, state, make_batch(), rules)
    compiled = jitted.lower(*arguments).compile()
    return lambda state, batch: compiled(shard_state(state, mesh, rules), shard_batch(batch, mesh)), compiled.as_text()


def two_steps(step):
    state = make_state()[0]
    for number in range(2):
        state, metrics = step(state, make_batch(number))
    return state, metrics


@pytest.fixture(scope="module")
def one_device():
    return two_steps(jit_train_step(make_train_step(make_state()[1], OPTIMIZER), make_mesh(1)))


def agrees(found, expected):
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, err_msg=name)
    whole = leaves_by_path(expected[0].params)
    for path, leaf in leaves_by_path(found[0].params).items():
        np.testing.assert_allclose(leaf, whole[path], atol=1e-5, err_msg=path)
    for path, leaf in leaves_by_path(model()[1]).items():
        assert np.abs(leaf - whole[path]).max() > 1e-3, path  # or the comparison would say nothing


def lies(state, parts):
    leaves = leaves_by_path(state)
    for path, shape in parts.items():
        same = [name for name in leaves if name.endswith(path)]
        assert len(same) == 3, same  # the parameter and Adam's two moments
        for name in same:
            assert {shard.data.shape for shard in leaves[name].addressable_shards} == {shape}, name


@pytest.mark.thorough
def test_one_axis_cuts_batch_and_state(one_device):
    _, loss = make_state()
    step = make_train_step(loss, OPTIMIZER, accumulate_steps=1)
    found = two_steps(jit_train_step(step, make_mesh(fsdp=8), SHARDED_RULES))
    agrees(found, one_device)
    lies(found[0], {"query/kernel": (2, 2, 4, 4), "down/kernel": (2, 48, 2), "token_embedding/embedding": (32, 2)})


BIASES = ("qkv", "out", "mlp", "head")
OTHERS = (
    dict(norm="layernorm", norm_position="post", is_causal=False, biases=BIASES, head_transform=True, num_token_types=2),
    dict(norm_position="sandwich", qk_norm="full", activation="geglu", local_window_size=(3, None), final_logits_soft_cap=2.0),
    dict(parallel_residual=True, qk_norm="head", biases=("mlp", "head"), tie_embeddings=False, embedding_norm=True),
)


@pytest.mark.thorough
@pytest.mark.parametrize("options", OTHERS, ids=["post", "sandwich", "parallel"])
def test_two_axes_cut_the_weights_of_other_families(options):
    config = TransformerConfig(32, num_layers=2, embed_dim=WIDTH, num_heads=4, mlp_dim=48, **options)
    with_params, params = functional(Transformer(config, parse_encoding("rope"), rngs=nnx.Rngs(0)))
    loss = make_loss(with_params, dropout=False)
    states = []
    for mesh in (make_mesh(1), make_mesh(fsdp=2, tensor=4)):
        state, step = init_state(params, OPTIMIZER, 0), jit_train_step(make_train_step(loss, OPTIMIZER), mesh, SHARDED_RULES)
        for number in range(2):
            state, metrics = step(state, make_batch(number))
        states.append((state, metrics))
    (one, expected), (cut, found) = states
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    cut_leaves = leaves_by_path(cut.params)
    for path, leaf in leaves_by_path(one.params).items():
        np.testing.assert_allclose(cut_leaves[path], leaf, atol=1e-5, err_msg=path)
    shards = {path: leaf.sharding.shard_shape(leaf.shape) for path, leaf in cut_leaves.items()}
    parts = {"layers/query/bias": (2, 1, 4), "layers/up/bias": (2, 12), "head_bias": (8,), "head/bias": (8,)}
    parts |= {"head_transform/kernel": (8, 16)}
    for path in parts.keys() & shards.keys():
        assert shards[path] == parts[path], path


@pytest.mark.thorough
def test_two_axes_cut_batch_heads_and_state_and_no_device_holds_the_whole_batch(one_device):
    whole = re.compile(rf"f32\[{BATCH},(\d+,)*{LENGTH}\b|f32\[\d+,{BATCH},{LENGTH},")
    step, program = compiled_step(make_mesh(fsdp=2, tensor=4), SHARDED_RULES)
    assert not whole.search(program)
    found = two_steps(step)
    agrees(found, one_device)
    parts = {
        "query/kernel": (2, 8, 1, 4),
        "key/kernel": (2, 8, 2, 4),  # 4 devices do not divide 2 heads: not cut
        "layers/out/kernel": (2, 1, 4, 8),
        "up/kernel": (2, 8, 12),
        "gate/kernel": (2, 8, 12),
        "down/kernel": (2, 12, 8),
        "token_embedding/embedding": (8, 8),
        "cope/embedding": (5, 4),
        "outer_norm/scale": (16,),
    }
    lies(found[0], parts)


def test_one_axis_takes_what_the_others_leave():
    assert dict(make_mesh(fsdp=-1, tensor=2).shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert dict(make_mesh(data=-1, context=4).shape) == {"data": 2, "fsdp": 1, "context": 4, "tensor": 1}
    assert dict(make_mesh(**parse_mesh("data=2,context=-1")).shape) == {"data": 2, "fsdp": 1, "context": 4, "tensor": 1}


@pytest.mark.thorough
def test_no_device_has_more_than_a_layer_whole():
    """Weights are put together in the loop over layers, forward and again backward: what the backward pass keeps of them are parts,
    also where it keeps all else. Twice the layers need the memory of twice the parts, and not of any layer."""

    def temporary(layers):
        config = Config(
            tokenizer="bpe", vocab_size=512, seq_length=16, batch_size=8, num_layers=layers, embed_dim=256, num_heads=4,
            encoding="rope", remat="none", steps=10, warmup_steps=1,
        )  # fmt: skip
        jitted, (state, batch) = abstract_step(config, jax.devices(), mesh="fsdp=8")
        part = sum(leaf.size for leaf in jax.tree.leaves(state.params["layers"])) * 4 / layers / 8
        return jitted.lower(state, batch).compile().memory_analysis().temp_size_in_bytes, part

    few, part = temporary(4)
    many, _ = temporary(8)
    activations = 4 * 16 * 256 * 24 * 4  # four more layers keep less than 24 arrays [1, 16, D] each
    assert many - few < 4 * 3 * part + activations < 4 * 8 * part  # gradients in parts, and what the loop passes on


def test_a_configuration_becomes_a_step_for_any_devices():
    config = Config(
        task="counting", seq_length=16, batch_size=8, num_layers=2, embed_dim=32, num_heads=2, encoding="rope + cope(4)"
    )
    jitted, (state, batch) = abstract_step(config, jax.devices(), mesh="fsdp=4,tensor=2", compute_dtype="bfloat16")
    assert state.params["layers"]["query"]["kernel"].sharding.shard_shape((2, 32, 2, 16)) == (2, 8, 1, 16)
    found = next(train_batches(config, open_source(config), 0))
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in batch.items()} == {n: (x.shape, x.dtype) for n, x in found.items()}
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in batch.values()} == {2}
    new, metrics = jitted.eval_shape(state, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert metrics["loss"].shape == ()


def test_the_configuration_of_a_billion():
    _, (state, batch) = abstract_step("pretrain_1b", jax.devices(), mesh="fsdp=2,tensor=4", batch_size=2)
    config = load_config("pretrain_1b")
    assert 1.0e9 < sum(leaf.size for leaf in jax.tree.leaves(state.params)) < 1.2e9
    assert batch["tokens"].shape == (2, config.seq_length)
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1e6]
    assert all(leaf.size >= 4 * np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in large)


MESHES = [dict(data=2, fsdp=2, tensor=2), dict(data=2, context=4)]


@pytest.mark.parametrize(
    "axes", [pytest.param(axes, marks=pytest.mark.thorough) for axes in (dict(fsdp=2, context=2, tensor=2), *MESHES)], ids=str
)
def test_every_mesh_computes_what_one_device_does(axes, one_device):
    """LENGTH is whole chunks for two devices; on more, attention is whole and the rest of the model is cut."""
    found = two_steps(jit_train_step(make_train_step(make_state()[1], OPTIMIZER), make_mesh(**axes), SHARDED_RULES))
    agrees(found, one_device)


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: make_mesh(tensor=3), "fsdp * context * tensor must divide the number of devices, 8, got 1 * 1 * 3"),
        (lambda: make_mesh(4, tensor=0), "fsdp * context * tensor must divide the number of devices, 4, got 1 * 1 * 0"),
        (lambda: make_mesh(data=2, fsdp=2), "must be the number of devices, 8, got 2 * 2 * 1 * 1"),
        (lambda: parse_mesh("data=2,pipe=2"), "tensor at most once, -1 for the remaining devices, got 'data=2,pipe=2' ('pipe=2')"),
        (lambda: make_mesh(fsdp=-1, tensor=-1), "at most one of data, fsdp, context, tensor may be -1, got"),
        (lambda: make_mesh(fsdp=-1, tensor=3), "data * context * tensor must divide the number of devices, 8, got 1 * 1 * 3"),
        (lambda: parse_mesh("data=2,data=2"), "got 'data=2,data=2' ('data=2')"),
        (lambda: parse_mesh("fsdp=0"), "got 'fsdp=0' ('fsdp=0')"),
        (lambda: Config(mesh="tensor"), "got 'tensor' ('tensor')"),
        (lambda: Config(mesh="tensor=2", parallel="pmap"), "mesh must be '' with parallel='pmap'"),
        (
            lambda: abstract_step(Config(batch_size=6, mesh="fsdp=4,tensor=2"), jax.devices()),
            "batch_size must be a multiple of 4 on 8 devices with mesh='fsdp=4,tensor=2' and accumulate_steps=1, got 6",
        ),
        (
            lambda: abstract_step(Config(mesh="data=2,fsdp=2"), jax.devices()),
            "mesh 'data=2,fsdp=2' does not fit: data * fsdp * context * tensor must be the number of devices, 8",
        ),
    ),
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
