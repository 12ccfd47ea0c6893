"""Whole runs in this process: what is shared between encodings, the encoder's four, and one device against eight."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest

import posjax as pj
from posjax.encodings.spec import parse_encoding, slug
from posjax.lab import run as runs
from posjax.lab.config import Config
from posjax.lab.evaluation import mean_loss, take_tokens, token_losses
from posjax.lab.source import eval_batches, open_source, train_batches
from posjax.parallel.mesh import make_mesh
from posjax.parallel.steps import jit_train_step, pmap_train_step
from posjax.training.checkpoints import Checkpoints
from posjax.training.optimizer import make_optimizer
from posjax.training.state import init_state
from posjax.training.step import make_train_step

WORDS = [*"abcdefgh=():", "return", "range", "print", "None", "True", "while"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(6):
        words = rng.choice(WORDS, size=(150, 6))
        (folder / f"{number}.txt").write_text("\n".join(" ".join(line) for line in words))
    return folder


@pytest.fixture(scope="module")
def tiny(text, tmp_path_factory):
    return Config(
        data=str(text),
        data_dir=str(tmp_path_factory.mktemp("data")),
        seq_length=16,
        batch_size=8,
        num_layers=2,
        embed_dim=16,
        num_heads=2,
        steps=60,
        warmup_steps=6,
        learning_rate=1e-2,
        log_every=5,
        checkpoint_every=1000,
    )


def leaves(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_encodings_start_from_the_same_weights(tiny):
    """Seeds move every drawn matrix; an encoding moves none but its own."""
    source = open_source(tiny)
    models = {
        spec: leaves(runs.build_model(tiny, spec, source, seed=3)[1]) for spec in ("rope", "cope(8)", "learned", "tupe / rope")
    }
    common = [name for name in models["rope"] if not name.startswith("encoding")]
    assert len(common) == 10
    for spec, model in models.items():
        for name in common:
            np.testing.assert_array_equal(model[name], models["rope"][name], err_msg=f"{spec} {name}")
    assert any(name.startswith("encoding") for name in models["learned"])
    other = leaves(runs.build_model(tiny, "rope", source, seed=4)[1])
    assert all(name.endswith("scale") != bool(np.any(other[name] != models["rope"][name])) for name in common)


def test_every_encoding_reads_the_same_data(tiny, tmp_path, monkeypatch):
    """What ``fit`` is handed, encoding by encoding, in ``compare`` itself."""
    seen = {}

    def fit(step, state, batches, *, workdir, **options):
        workdir.mkdir(parents=True, exist_ok=True)
        seen[workdir.parent.name, workdir.name] = [batch["tokens"] for batch in itertools.islice(batches, 5)]
        return state

    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(runs, "evaluate", lambda *args: {"metrics": {}})
    config = dataclasses.replace(tiny, encodings=("identity", "rope"), seeds=(0, 1))
    rows = runs.compare(config, tmp_path, open_source(tiny), command=None, say=lambda text: None)
    assert [(row["encoding"], row["seed"]) for row in rows] == [("identity", 0), ("identity", 1), ("rope", 0), ("rope", 1)]
    np.testing.assert_array_equal(seen["identity", "seed-0"], seen["rope", "seed-0"])
    np.testing.assert_array_equal(seen["identity", "seed-1"], seen["rope", "seed-1"])
    assert np.any(np.stack(seen["rope", "seed-0"]) != np.stack(seen["rope", "seed-1"]))


SLOWER = ("tupe(relative=True)", "learned", "t5(bidirectional=True)")


@pytest.mark.thorough
@pytest.mark.parametrize("spec", ["tupe", *SLOWER])
def test_encoder_learns(tiny, tmp_path, spec):
    """The four of encoder_mlm learn the frequencies of characters, and hardly more in 60 steps: no answer leaks."""
    config = dataclasses.replace(
        tiny, task="mlm", encoding=spec, norm="layernorm", norm_position="post", eval_lengths=(1,), eval_tokens=1024
    )
    source = open_source(config)
    params = runs.train(config, spec, 0, tmp_path, source, quiet=True)
    seen = losses(tmp_path)
    assert seen[0] > 4.5  # ln 258 is 5.55, and five steps lower it
    assert np.mean(seen[-3:]) < 3.6
    assert sum(np.any(leaf) for name, leaf in leaves(params).items() if name.startswith("encoding")) > 0
    tokens = source.train.tokens
    entropy = -sum(p * np.log(p) for p in np.bincount(tokens)[np.unique(tokens)] / len(tokens))
    assert entropy < np.mean(seen[-3:]) + 0.5  # else the loss is below what can be known: the answer leaks


def test_z_loss_is_in_the_gradient_and_not_in_the_loss():
    logits = np.random.default_rng(0).normal(scale=2, size=(2, 4, 6)).astype(np.float32)
    batch = {name: np.zeros((2, 4), np.int32) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["weights"] = np.array([[1, 1, 0.5, 0], [1, 0, 0, 2]], np.float32)

    def with_params(params):
        return lambda *_, **__: params  # a model whose parameters are its logits

    def value_and_gradient(*z_weight):
        loss = runs.make_loss(with_params, False, *z_weight)
        return jax.value_and_grad(loss, has_aux=True)(logits, batch, jax.random.key(0))

    (plain, weight), without = value_and_gradient()
    (same, same_weight), with_z = value_and_gradient(0.25)
    assert (float(same), float(same_weight)) == (float(plain), float(weight)) and float(weight) == 5.5
    exact = logits.astype(np.float64)
    z = np.log(np.exp(exact).sum(-1, keepdims=True))
    added = 0.25 * 2 * z * np.exp(exact - z) * batch["weights"][..., None]
    np.testing.assert_allclose(with_z - without, added, rtol=0, atol=1e-6 * np.abs(added).max())


@pytest.mark.thorough
def test_muon_learns_and_the_average_is_what_is_evaluated_and_restored(tiny, tmp_path):
    config = dataclasses.replace(tiny, optimizer="muon", z_loss=1e-3, ema_decay=0.9, steps=40, evaluate_every=40)
    source = open_source(config)
    params = runs.train(config, "rope", 0, tmp_path, source, quiet=True)
    seen = losses(tmp_path)
    assert seen[0] > 5.0 and seen[-1] < 3.6  # ln 258 is 5.55
    with_params, state, _ = runs._start(config, "rope", 0, source)
    state = Checkpoints(tmp_path / "checkpoints").restore_latest(state).state
    restored = runs.restore_params(config, "rope", 0, tmp_path, source)
    for average, last, *evaluated in zip(*map(jax.tree.leaves, (state.ema, state.params, params, restored)), strict=True):
        assert np.abs(average - last).max() > 1e-4
        for leaf in evaluated:
            np.testing.assert_array_equal(leaf, average)
    score = jax.jit(token_losses(with_params))
    expected, other = (
        mean_loss(score, p, take_tokens(eval_batches(config, source, 16), config.eval_tokens))[0] for p in (state.ema, state.params)
    )
    (line,) = [x for x in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()) if x["step"] == 40]
    assert line["evaluation/loss"] == pytest.approx(expected, rel=1e-6) and abs(other - expected) > 1e-4


@pytest.mark.thorough
def test_one_device_eight_devices_and_pmap_agree(tiny):
    """Twenty steps of the real Transformer on packed text: how a batch lies on devices changes rounding and nothing else."""
    config = dataclasses.replace(tiny, batch_size=16)
    source = open_source(config)
    with_params, params = runs.build_model(config, "rope + cope(8)", source, 0)
    loss, optimizer = runs.make_loss(with_params, dropout=False), make_optimizer(3e-3, weight_decay=0.1)
    batches = list(itertools.islice(train_batches(config, source, 0), 20))
    assert max(batch["segment_ids"].max() for batch in batches) > 1  # documents share rows
    plain, mapped = (make_train_step(loss, optimizer, axis_name=axis) for axis in (None, "data"))
    forms = [jit_train_step(plain, make_mesh(1)), jit_train_step(plain, make_mesh(8)), pmap_train_step(mapped)]
    curves = []
    for step in forms:
        state, curve = init_state(params, optimizer, 0), []
        for batch in batches:
            state, metrics = step(state, batch)
            curve.append(float(metrics["loss"]))
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.3
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=0, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("meshes", "fields"),
    [
        (("fsdp=2,context=2,tensor=2",), {}),  # others in test_distributed.py, by two processes
        (("fsdp=2,context=2,tensor=2",), {"optimizer": "muon", "z_loss": 1e-3, "ema_decay": 0.9}),
    ],
)
def test_a_run_on_any_mesh_is_the_run_on_one_axis(tiny, tmp_path, meshes, fields):
    own = {"seq_length": 32, "steps": 20, "log_every": 1, "evaluate_every": 10, "implementation": "xla_chunked"}
    config = dataclasses.replace(tiny, **own, **fields)
    source = open_source(config)
    curves, params = {}, {}
    for mesh in ("", *meshes):
        there = dataclasses.replace(config, mesh=mesh)
        runs.check(there, ("rope + cope(8)",), source)
        folder = tmp_path / (mesh or "data=8")
        params[mesh] = runs.train(there, "rope + cope(8)", 0, folder, source, quiet=True)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves[mesh] = [line["loss"] for line in lines] + [lines[-1]["evaluation/loss"]]
    assert len(curves[""]) == 21
    for mesh in meshes:
        np.testing.assert_allclose(curves[mesh], curves[""], rtol=0, atol=1e-5)
        kernel = params[mesh]["layers"]["up"]["kernel"]
        assert math.prod(kernel.sharding.shard_shape(kernel.shape)) == kernel.size // (8 // (2 if "data" in mesh else 1))
        # on another mesh than it was saved on
        restored = runs.restore_params(config, "rope + cope(8)", 0, tmp_path / mesh, source)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((jax.device_get(a) == jax.device_get(b)).all()), restored, params[mesh]))


@pytest.mark.thorough
def test_an_encoding_is_trained_alone(tiny, tmp_path):
    """Only CoPE's table moves, resuming included; an encoding without parameters is refused."""
    config = dataclasses.replace(tiny, trainable="encoding", steps=4, warmup_steps=0, checkpoint_every=2)
    source = open_source(config)
    runs.check(config, ["rope + cope(4)"], source, devices=1)
    first = leaves(runs.build_model(config, "rope + cope(4)", source, 0)[1])
    half = dataclasses.replace(config, steps=2, decay="constant")
    runs.train(half, "rope + cope(4)", 0, tmp_path, source, quiet=True)
    last = leaves(runs.train(dataclasses.replace(half, steps=4), "rope + cope(4)", 0, tmp_path, source, quiet=True))
    moved = [name for name in first if np.any(np.asarray(first[name]) != np.asarray(last[name]))]
    assert moved and all(name.startswith("encoding/") for name in moved)
    with pytest.raises(ValueError, match="learned parameters with trainable='encoding', got 'rope', which has none"):
        runs.check(config, ["rope"], source, devices=1)


def test_check_compiles_nothing(tiny, monkeypatch):
    """All that a wrong command says, it says before the first compilation."""
    source = open_source(tiny)
    monkeypatch.setattr(jax._src.compiler, "compile_or_get_cached", None)
    runs.check(tiny, ("rope + cope(8)", "tupe / alibi"), source)
    with pytest.raises(ValueError, match=r"encoding 'rope / alibi / rope' does not fit .* num_layers=2, got 3"):
        runs.check(tiny, ("rope", "rope / alibi / rope"), source)
    short = dataclasses.replace(tiny, seq_length=12, mesh="context=4")
    with pytest.raises(ValueError, match=r"seq_length must be a multiple of 8, two chunks for each of the 4 devices .* got 12"):
        runs.check(short, ("rope",), open_source(short))
    with pytest.raises(ValueError, match=r"mesh 'data=3,fsdp=2' does not fit: .* must be the number of devices, 8, got 3 \* 2"):
        runs.check(dataclasses.replace(tiny, mesh="data=3,fsdp=2"), ("rope",), source)
    with pytest.raises(ValueError, match="encodings must all differ, got 'rope', 'rope'"):
        runs.check(tiny, ("rope", "alibi", "rope"), source)


def test_alternating_and_chained_encodings_have_folders_of_their_own():
    specs = ("rope + cope(64)", "rope / cope(64)", "cope(64)", "cope_mlp", "t5(bidirectional=True)")
    assert len({slug(spec) for spec in specs}) == len(specs)
    assert all("/" not in slug(spec) for spec in specs)
    assert isinstance(parse_encoding("rope / cope(64)"), tuple) and not isinstance(parse_encoding("rope + cope(64)"), tuple)


@pj.register("test_stick")
class Stick(pj.PositionalEncoding):
    """Breaks a stick of weight along the keys, from the nearest on."""

    needs_causal = True

    def attend(self, params, inputs):
        return pj.ScoreModifications(weights=pj.StickBreaking())


def test_encodings_that_do_not_count_by_gates_once_are_evaluated(tiny):
    """A layer without a gated bias, and one with two: neither has one count to draw along a line."""
    config = dataclasses.replace(tiny, seq_length=32, eval_lengths=(1,), eval_tokens=1024)
    source = open_source(config)
    for encoding, drawn in (("test_stick / cope(4) + cope(8)", False), ("cope(4) + cope(8) / cope(4)", True)):
        _, params = runs.build_model(config, encoding, source, 0)
        assert ("line" in runs.evaluate_params(config, encoding, params, source)) == drawn
