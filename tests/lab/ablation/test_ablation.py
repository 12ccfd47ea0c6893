"""A grid as one program does what its runs do alone: training, settings, resuming, evaluating; and a corpus on the device."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posjax.data.corpus import load_corpus
from posjax.data.on_device import language_rows, on_device
from posjax.data.pipeline import batches
from posjax.lab import report
from posjax.lab import run as runs
from posjax.lab.ablation.engine import BatchedRuns, over_runs, scan_steps
from posjax.lab.ablation.grids import run_grid
from posjax.lab.ablation.sweeps import grid, groups, parse_sweep
from posjax.lab.config import Config
from posjax.lab.source import open_source
from posjax.training.loop import Interrupted

CONFIG = Config(
    task="flip_flop",
    seq_length=16,
    batch_size=8,
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    steps=25,
    warmup_steps=4,
    learning_rate=1e-2,
    log_every=10,  # so that the last piece is shorter
    checkpoint_every=10,
    eval_tokens=1024,
    dropout_rate=0.1,
    encodings=("rope",),
)
QUIET = {"say": lambda text: None}


def made(config, *sweeps):
    return grid(config, [parse_sweep(text) for text in sweeps])


def same(first, second):
    """Whether two grids have the same rows: items are arrays."""
    assert [row.keys() for row in first] == [row.keys() for row in second]
    for a, b in zip(first, second, strict=True):
        assert {name: x for name, x in a.items() if name != "items"} == {name: x for name, x in b.items() if name != "items"}
        jax.tree.map(np.testing.assert_array_equal, a["items"], b["items"])
    return True


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# The engine -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_runs_are_mapped_over_devices_and_in_turns(devices, at_once):
    runs_, shared = {"x": jnp.arange(8.0), "y": jnp.arange(16).reshape(8, 2)}, jnp.float32(3)
    mapped = over_runs(lambda run, s: {"z": run["x"] * s + run["y"].sum()}, jax.local_devices()[:devices], at_once)
    found = jax.jit(mapped)(runs_, shared)
    np.testing.assert_array_equal(found["z"], 3.0 * np.arange(8) + np.arange(16).reshape(8, 2).sum(1))


def test_a_scan_takes_the_steps_before_the_last_alone():
    def step(state, batch):
        return state + batch, {"seen": batch}

    steps = jax.jit(lambda first: scan_steps(step, lambda number: 10.0 * number, jnp.float32(0), first, 4, jnp.int32(6)))
    state, metrics = steps(jnp.int32(3))
    assert state == 30 + 40 + 50
    np.testing.assert_array_equal(metrics["seen"], [30, 40, 50, 0])


# Grids ------------------------------------------------------------------------------------------------------------------


PRETRAINING = {"optimizer": "muon", "z_loss": 1e-2, "ema_decay": 0.8}


SLOWER = pytest.param("cope(8)", PRETRAINING, marks=pytest.mark.thorough)


@pytest.mark.parametrize(("spec", "fields"), [("rope", {}), SLOWER])
def test_a_grid_trains_and_evaluates_as_single_runs_do(spec, fields, tmp_path, caplog):
    config = dataclasses.replace(CONFIG, encodings=(spec,), **fields)
    source = open_source(config)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        rows = run_grid(made(config), (0, 3), tmp_path / "grid", source, **QUIET)
    finished = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Finished XLA compilation")]
    assert sum("train_piece" in message for message in finished) == 1  # for three pieces of two runs
    (folder,) = (tmp_path / "grid").iterdir()
    assert json.loads((folder / "rows.json").read_text())["compilations"] == {"train": 1, "evaluate": 1}

    assert [(row["encoding"], row["seed"]) for row in rows] == [(spec, 0), (spec, 3)]
    params = runs.train(config, spec, 3, tmp_path / "alone", source, quiet=True)
    for ours, theirs in zip(lines(folder / "metrics.jsonl"), lines(tmp_path / "alone" / "metrics.jsonl"), strict=True):
        assert ours["step"] == theirs["step"]
        for name in ("loss", "grad_norm", "learning_rate"):
            assert ours[name][1] == pytest.approx(theirs[name], rel=1e-5), (name, ours["step"])
    metrics = runs.evaluate_params(config, spec, params, source)["metrics"]
    assert rows[1]["metrics"] == metrics and rows[1]["evaluations"] == {25: metrics["error"]}
    for column, (wrong, answers) in rows[1]["items"][25].items():  # a string is an item
        assert wrong.shape == (64,) and answers.sum() >= 64
        assert 100 * wrong.sum() / answers.sum() == pytest.approx(metrics["error"][column])


@pytest.mark.thorough
def test_traced_settings_are_what_they_are_alone(tmp_path):
    config = dataclasses.replace(CONFIG, encodings=("rope + cope(8)",), warmup_steps=0)
    source = open_source(config)
    sweeps = ("learning_rate=1e-2,1e-3", "clip_norm=0.1,2.0", "weight_decay=0.0,1.0", "rope.theta=100,10000", "cope.gate_bias=-2,1")
    points = made(config, *sweeps)
    pair = [points[5], points[26]]
    rows = run_grid(pair, (0,), tmp_path / "traced", source, **QUIET)
    assert len(list((tmp_path / "traced").iterdir())) == 1  # one group
    (alone,) = run_grid(pair[:1], (0,), tmp_path / "alone", source, **QUIET)
    np.testing.assert_allclose(rows[0]["curve"]["loss"], alone["curve"]["loss"], rtol=1e-4)
    assert rows[0]["settings"] == alone["settings"] and rows[0]["metrics"]["parameters"] == alone["metrics"]["parameters"]
    assert all(abs(a - b) > 1e-3 for a, b in zip(*(row["curve"]["loss"] for row in rows), strict=True))  # they matter


def test_an_interrupted_grid_goes_on_where_it_stopped_and_is_done_once(tmp_path):
    points, source = made(CONFIG), open_source(CONFIG)
    whole = run_grid(points, (0, 1), tmp_path / "whole", source, **QUIET)

    stops = iter([True, False])

    said = []

    def say(text):  # the first line comes before the first piece
        said.append(text)
        if next(stops, False):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="interrupted by SIGINT at step 10 of 25"):
        run_grid(points, (0, 1), tmp_path / "cut", source, command="posjax ablate", say=say)
    assert said[-1].endswith("To resume, run:\n  posjax ablate")
    (log,) = (tmp_path / "cut").glob("*/metrics.jsonl")
    assert [line["step"] for line in lines(log)] == [10]
    with log.open("a") as file:  # as a kill in the next piece may leave it
        file.write('{"step": 20, "loss": [1')
    assert same(run_grid(points, (0, 1), tmp_path / "cut", source, **QUIET), whole)
    assert [line["step"] for line in lines(log)] == [10, 20, 25]

    log.unlink()
    assert same(run_grid(points, (0, 1), tmp_path / "cut", source, **QUIET), whole)
    assert not log.exists()  # nothing was trained


@pytest.mark.thorough
def test_runs_that_do_not_fit_the_memory_wait(monkeypatch):
    (group,) = groups(made(CONFIG), range(4))
    source, metrics = open_source(CONFIG), []
    for fits, at_once in ((True, 4), (False, 1)):
        monkeypatch.setattr("posjax.lab.ablation.engine._fits", lambda compiled, device, fits=fits: fits)
        batched_runs = BatchedRuns(group, source, jax.local_devices()[:1], None)
        batched_runs.at_once = 4  # as it begins on an accelerator
        metrics.append(batched_runs.advance(batched_runs.start(), 0)[1]["loss"])
        assert batched_runs.at_once == at_once and batched_runs.compilations["train"] == (1 if fits else 3)
    np.testing.assert_allclose(metrics[0], metrics[1], rtol=1e-4)


def test_a_training_that_diverged_says_so(tmp_path):
    rows = run_grid(made(CONFIG, "learning_rate=1e-2,1e4"), (0, 1), tmp_path, open_source(CONFIG), **QUIET)
    assert [row["diverged"] is None for row in rows] == [True, True, False, False]
    heads, cells = report.write_ablation(rows, "error", "error (%)", tmp_path, "heading")
    assert heads[-1] == "diverged" and [line[-1] for line in cells] == ["0 of 2", "2 of 2"]
    assert cells[1][1:4] == ["diverged"] * 3
    assert "| rope, learning_rate=10000.0 | diverged |" in (tmp_path / "results.md").read_text()
    stored = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["settings"] for row in stored] == [{"learning_rate": 1e-2}] * 2 + [{"learning_rate": 1e4}] * 2
    assert (tmp_path / "dots.png").read_bytes()[:4] == b"\x89PNG" == (tmp_path / "curves.png").read_bytes()[:4]


def test_cells_hold_mean_deviation_and_interval():
    def row(seed, error):
        metrics = {"error": {"x": error}, "limit": None, "parameters": 1000}
        return {"label": "rope", "seed": seed, "diverged": None, "metrics": metrics}

    heads, cells = report.ablation_cells([row(0, 10.0), row(1, 12.0), row(2, 14.0)], "error")
    # t_{0.975, 2} = 4.3027; 2 / sqrt(3) * 4.3027 = 4.968
    assert heads == ["setting", "x", "parameters"] and cells == [["rope", "12.00 ± 2.00 [7.03, 16.97]", "1,000"]]
    cells = report.ablation_cells([row(seed, 0.0) for seed in range(3)], "error")[1]
    assert cells == [["rope", "0.000 ± 0.000", "1,000"]]  # [0, 0] would say that there can be no error


def test_lengths_that_an_encoding_cannot_place_have_no_number():
    def row(label, limit, value):
        metrics = {"bits": {"16": 2.0, "32": value}, "limit": limit, "parameters": 5}
        return {"label": label, "seed": 0, "diverged": None, "metrics": metrics}

    rows = [row("learned", 16, None), row("rope", None, 3.0)]
    assert report.ablation_cells(rows, "bits")[1] == [["learned", "2", "max 16", "5"], ["rope", "2", "3", "5"]]
    assert report.seeds_of(rows, "bits", "32") == {"learned": [], "rope": [3.0]}


# The command line ---------------------------------------------------------------------------------------------------------

SIZES = {"seq_length": 16, "embed_dim": 16, "num_layers": 1, "batch_size": 8, "steps": 25, "log_every": 10, "eval_tokens": 1024}
FLAGS = [part for name, value in SIZES.items() for part in (f"--{name}", value)]


def test_a_grid_from_the_command_line(run, tmp_path):
    command = ("ablate", "flip_flop", "--encodings", "rope", "--sweep", "learning_rate=1e-3,1e-2", *FLAGS)
    command += ("--seeds", 2, "--workdir", tmp_path)
    code, out, _err = run(*command)
    assert code == 0 and "1 of 1: rope, 4 runs" in out and "Mean of 2 seeds" in out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    expected = [({"learning_rate": rate}, seed) for rate in (1e-3, 1e-2) for seed in (0, 1)]
    assert [(row["settings"], row["seed"]) for row in rows] == expected
    written = {"config.json", "run.json", "results.json", "results.md", "dots.png", "curves.png"}
    assert {path.name for path in tmp_path.glob("*.*")} == written
    assert run(*command)[0] == 0
    code, _, err = run(*command, "--embed_dim", 32)
    assert code == 2 and "belongs to a run with another configuration: embed_dim is 16 there and 32 here" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sweep", "learning_rat=1,2"), "did you mean learning_rate?"),
        (("--sweep", "learning_rate=-1"), "learning_rate must be positive, got -1"),
        (("--sweep", "cope.gates='keys',nothing"), "gates must be 'logits', 'content', 'keys' or 'values', got 'nothing'"),
        (("--sweep", "num_heads=3"), "num_heads must divide embed_dim=64"),
        (("--encodings", "rop"), "did you mean 'rope'?"),
        (("--runs_at_once", "0"), "runs_at_once must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_told_before_anything_is_made(run, tmp_path, flags, message):
    code, _, err = run("ablate", "flip_flop", "--workdir", tmp_path / "new", *flags)
    assert code in (1, 2) and message in err
    assert not (tmp_path / "new").exists()


# A corpus on the device ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(6):
        (folder / f"{number}.txt").write_text("".join(rng.choice([*"abcdefgh=(): \n"], size=300 + 137 * number)))
    return folder


@pytest.fixture(scope="module")
def corpus(text, tmp_path_factory):
    return load_corpus(str(text), "train", data_dir=tmp_path_factory.mktemp("data"))


def test_rows_on_the_device_are_those_of_the_pipeline(corpus):
    data, _ = on_device(corpus, length=24, batch_size=4)
    theirs = list(batches(corpus, length=24, batch_size=1, seed=0, shuffle=False, repeat=False))
    full = (len(corpus.tokens) + corpus.num_documents - 1) // 24
    ours = jax.device_get(jax.jit(lambda d: language_rows(d, 24 * jnp.arange(full), 24, corpus.bos))(data))
    for name in ours:
        np.testing.assert_array_equal(ours[name], np.concatenate([batch[name] for batch in theirs[:full]]), err_msg=name)


def test_rows_are_drawn_uniformly_and_follow_from_the_key(corpus):
    data, draw = on_device(corpus, length=24, batch_size=500)
    draw = jax.jit(draw)
    first, again, other = (draw(data, jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first["tokens"] == again["tokens"]).all() and not (first["tokens"] == other["tokens"]).all()
    rows = len({row.tobytes() for row in np.asarray(first["tokens"])})
    total = (len(corpus.tokens) + corpus.num_documents - 1) // 24
    assert rows == pytest.approx(total * (1 - (1 - 1 / total) ** 500), rel=0.05)  # of draws with replacement


def test_masked_rows_on_the_device_have_the_shares_of_the_pipeline(corpus):
    data, draw = on_device(corpus, length=33, batch_size=400, masked=True)
    batch = jax.device_get(jax.jit(draw)(data, jax.random.key(0)))
    assert (batch["tokens"][:, 0] == corpus.cls).all() and not batch["weights"][:, 0].any()
    text = {corpus.tokens[i * 32 : i * 32 + 32].astype(np.int32).tobytes() for i in range(len(corpus.tokens) // 32)}
    assert {row[1:].tobytes() for row in batch["targets"]} <= text
    asked = batch["weights"] > 0
    n = asked.sum()
    error = 3 / np.sqrt(n)
    assert asked[:, 1:].mean() == pytest.approx(0.15, abs=3 * np.sqrt(0.15 * 0.85 / asked[:, 1:].size))
    assert (batch["tokens"][asked] == corpus.mask).mean() == pytest.approx(0.8, abs=error)
    assert (batch["tokens"][asked] == batch["targets"][asked]).mean() == pytest.approx(0.1 + 0.1 / 256, abs=error)
    np.testing.assert_array_equal(batch["tokens"][~asked], batch["targets"][~asked])


@pytest.mark.parametrize("task", ["lm", pytest.param("mlm", marks=pytest.mark.thorough)])
def test_a_text_is_learned_from_the_device(task, text, tmp_path):
    config = dataclasses.replace(
        CONFIG, task=task, data=str(text), data_dir=str(tmp_path / "data"), eval_lengths=(1, 2), encodings=("learned",)
    )
    (row,) = run_grid(made(config), (0,), tmp_path / "run", open_source(config), **QUIET)
    measure = "bits_per_byte" if task == "lm" else "masked_loss"
    assert row["curve"]["loss"][-1] < row["curve"]["loss"][0] - 0.3
    assert row["metrics"][measure]["32"] is None and row["metrics"]["limit"] == 16
    assert 1.0 < row["metrics"][measure]["16"] < 8.0
    assert row["diverged"] is None
