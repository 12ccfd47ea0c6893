"""posjax bench attention: posjax against an oracle, the rows of a whole run, and what its measures make of known culprits."""

import dataclasses
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from posjax import plots
from posjax.bench import __main__ as child
from posjax.bench import attention, inputs, reference, results
from posjax.bench.attention import AttentionBench
from posjax.bench.contestants import Contestant, Options, list_contestants, prepare

OPTIMIZED = True  # see conftest.py

SMALL = SimpleNamespace(batch=2, heads=3, head_dim=8, dtype="float32")
MEGABYTES = 200


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """Here and in processes of our own: optimisations cost more than they save."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")
        before = jax.config.values["jax_disable_most_optimizations"]
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


# Contestants of one's own, found by name in processes of their own


def greedy(query, key, value):
    """One percent too large, and it holds 200 MB for a moment."""

    def hold():
        return np.float32(np.ones(MEGABYTES * 125_000).sum() * 0.0)

    held = jax.pure_callback(hold, jax.ShapeDtypeStruct((), jnp.float32))
    return 1.01 * jax.nn.dot_product_attention(query, key, value, is_causal=True) + held


def dying(query, key, value):
    os.kill(os.getpid(), signal.SIGKILL)


def refusing(query, key, value):
    raise NotImplementedError("not on Sundays\nnor Mondays")


def own(name):
    return Contestant("function", implementation=f"{Path(__file__).stem}:{name}")


# The oracle --------------------------------------------------------------------------------------------------------------

SPECS = [
    "learned",
    "rope(theta=500.0, fraction=0.5, pairing='interleaved')",
    "alibi",
    "t5(num_buckets=8, max_distance=20)",
    "tupe(relative=True)",
    "tupe(relative=True, released=True)",
    "tupe(relative=True, untie_cls=False)",
    "rope + cope(8, scaled=True)",
    "cope(8, gates='keys') + cope(4, gates='content')",
    "cope(8, gates='values', per_head=True)",
    "cope_alibi(learned=True)",
    "cope_mlp(4)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_the_oracle_and_posjax_agree(spec):
    """Two ways of writing the same papers down; 3 heads, so that ALiBi's slopes are not a power of two's."""
    arrays = inputs.make_inputs(spec, "half", 23, SMALL, None)
    ready = prepare(Contestant("posjax", spec, "xla"), False, arrays, "float32", {})
    want, _ = oracle.attend(spec, arrays, 0)
    np.testing.assert_allclose(ready.fetch(ready.call())["out"], want, atol=3e-6)
    tail, _ = oracle.attend(spec, arrays, 17)
    np.testing.assert_allclose(tail, want[:, 17:], atol=1e-13)


@pytest.mark.parametrize("spec", ["alibi", "tupe(relative=True)", "rope + cope(8)"])
@pytest.mark.parametrize("options", [Options(window=5), Options(soft_cap=0.5), Options(starts=(4, 15)), Options(5, 0.5, (7,))])
def test_the_oracle_and_posjax_agree_on_options_and_shared_heads(spec, options):
    arrays = inputs.make_inputs(spec, "half", 23, SMALL, None, kv_heads=1)
    ready = prepare(Contestant("posjax", spec, "xla"), False, arrays, "float32", {}, options)
    want, _ = oracle.attend(spec, arrays, 0, options)
    np.testing.assert_allclose(ready.fetch(ready.call())["out"], want, atol=3e-6)
    assert np.abs(want - oracle.attend(spec, arrays, 0)[0]).max() > 1e-2


@pytest.mark.parametrize("options", [Options(), Options(5, 0.5, (7,))])
@pytest.mark.parametrize("spec", ["identity", "rope + cope(8, gates='keys')"])
def test_the_reference_of_a_run_agrees_with_the_oracle(spec, options, monkeypatch):
    """In blocks of 5 rows, from row 9 on; the gradient along a random direction is a difference of the oracle's outputs."""
    monkeypatch.setattr(reference, "_CELLS", 2 * 3 * 23 * 5)
    arrays = inputs.make_inputs(spec, "half", 23, SMALL, None)
    out, mean = reference.attend(spec, arrays, 9, options)
    want, want_mean = oracle.attend(spec, arrays, 9, options)
    np.testing.assert_allclose(out, want, atol=3e-6)
    assert mean == (want_mean if want_mean is None else pytest.approx(want_mean, abs=1e-5))

    rng, step = np.random.default_rng(0), 1e-6
    ways = {name: rng.standard_normal(x.shape) for name, x in arrays.items() if name != "cotangent"}
    ends = [oracle.attend(spec, arrays | {n: arrays[n] + s * step * w for n, w in ways.items()}, 9, options)[0] for s in (1, -1)]
    slope = ((ends[0] - ends[1]) * arrays["cotangent"][:, 9:]).sum() / (2 * step)
    found = reference.gradients(spec, arrays, 9, options)
    assert sum((found[f"grads/{name}"] * way).sum() for name, way in ways.items()) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(("gates", "low", "high"), [("half", 0.45, 0.55), ("sparse", 0.015, 0.025), ("saturating", 0.97, 0.99)])
@pytest.mark.parametrize("spec", ["cope(8)", "rope + cope(8)"])
def test_gates_are_as_open_as_they_are_called(spec, gates, low, high):
    config = SimpleNamespace(batch=1, heads=2, head_dim=64, dtype="float32")
    assert low < oracle.attend(spec, inputs.make_inputs(spec, gates, 512, config, None), 256)[1] < high


# A whole run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(rows, folder, what a run said) of 16 tokens, forward and backward."""
    out = tmp_path_factory.mktemp("bench")
    config = AttentionBench(
        lengths=(16,), passes=("both",), gates=("half",), heads=2, head_dim=8, repeats=2, peers=False, out=str(out / "made")
    )
    contestants = [Contestant("posjax", "identity", "xla"), Contestant("posjax", "cope(4)", "xla"), own("greedy"), own("dying")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_REFERENCE_LENGTH", 8)
        patch.setattr(attention, "_REFERENCE_ROWS", 5)
        patch.syspath_prepend(Path(__file__).parent)
        rows = attention.run(config, contestants, quiet=True)
    return rows, out / "made"


def test_a_run_gives_a_row_of_everything_for_each_contestant(finished):
    rows, out = finished
    written = json.loads((out / "attention.json").read_text())
    assert written["rows"] == rows
    assert written["config"]["lengths"] == [16]
    assert {"python", "jax", "jaxlib", "numpy"} <= set(written["versions"])
    assert written["hardware"]["platform"] == "cpu" and written["hardware"]["cores"] >= 1
    assert [row["contestant"] for row in rows[:2]] == ["identity, xla", "cope(4), xla"]
    identity, cope = rows[:2]
    assert (identity["gates"], cope["gates"]) == (None, "half")
    for row in rows[:2]:
        assert 0 < row["ms_min"] <= row["ms_median"] and row["rounds"] == 2
        assert row["peak_bytes_process"] > row["peak_bytes_growth"] >= 0
        assert row["temp_bytes"] > 0
        assert row["ratio_to_identity"] == row["ms_min"] / identity["ms_min"]
        assert row["ratio_to_jax_nn"] is None  # it was not there
        assert 0 <= row["error_out"] < 1e-5
        assert 0 <= row["error_grads"] < 1e-3
        assert row["notes"] == ["error of the last 5 queries"]
    assert identity["worst_gradient"] in ("query", "key", "value")
    assert 0.3 < cope["mean_gate"] < 0.7 and identity["mean_gate"] is None


def test_an_error_of_a_percent_and_200_megabytes_are_seen(finished):
    rows, _ = finished
    row = rows[2]
    assert row["error_out"] == pytest.approx(0.01, rel=1e-3)
    assert row["error_grads"] == pytest.approx(0.01, rel=1e-2)
    assert 0.98 * MEGABYTES * 1e6 < row["peak_bytes_growth"] < 1.5 * MEGABYTES * 1e6
    assert row["temp_bytes"] < 1e6  # the compiler knows nothing of it
    assert rows[0]["peak_bytes_growth"] < 50e6


def test_who_dies_is_a_row_with_the_reason(finished):
    rows, out = finished
    assert rows[3]["notes"] == ["killed, most likely because it ran out of memory"]
    assert rows[3]["ms_min"] is None and rows[3]["error_out"] is None
    assert "function, test_bench:dying: killed, most likely" in (out / "attention.md").read_text()


def test_the_tables_and_the_figure(finished, capsys):
    rows, out = finished
    assert (out / "attention.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = (out / "attention.md").read_text()
    assert "## 16 tokens, forward and backward" in table
    (line,) = [line for line in table.split("\n") if line.startswith("| cope(4), xla | half 0.")]
    assert len(line.split("|")) == 12
    results.show(rows)
    shown = capsys.readouterr().out
    assert "cope(4), xla" in shown and f"{rows[1]['ratio_to_identity']:.2f}" in shown


def test_what_a_contestant_raises_is_its_answer(tmp_path, monkeypatch):
    np.savez(tmp_path / "in.npz", **inputs.make_inputs("identity", "half", 8, SMALL, None))
    job = {"task": "measure", "contestant": dataclasses.asdict(own("refusing")), "gradients": False, "first": 0}
    job |= {"dtype": "float32", "inputs": str(tmp_path / "in.npz"), "result": str(tmp_path / "out.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "job.json")])
    child.main()
    assert json.loads((tmp_path / "out.json").read_text()) == {"failed": "NotImplementedError: not on Sundays"}


def test_a_kernel_that_the_compiler_refuses_is_an_answer_that_says_what_to_do(tmp_path, monkeypatch):
    def refuse(job):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile posjax_attention_forward\nsecond line")

    monkeypatch.setattr(child, "measure", refuse)
    job = {"task": "measure", "contestant": {"implementation": "pallas"}, "result": str(tmp_path / "out.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "job.json")])
    child.main()
    answer = json.loads((tmp_path / "out.json").read_text())["failed"]
    what = "the attention kernel failed to compile on this device with implementation='pallas'"
    assert answer.startswith(f"KernelCompileError: {what}")
    assert answer.endswith("INTERNAL: Mosaic failed to compile posjax_attention_forward")


def test_what_needs_more_memory_than_there_is_is_refused():
    if not Path("/proc/meminfo").exists():
        pytest.skip("the limit is Linux's")
    with pytest.raises(MemoryError, match=r"needs 1048576\.0 GiB besides inputs and outputs, but only [\d.]+ GiB are free"):
        child._limit_memory(2**50)


# Rows from other rows ----------------------------------------------------------------------------------------------------


def row(name, length, ms, kind="posjax", encoding="identity", implementation="xla", direction="forward", gates=None, **more):
    made = attention._empty_row(attention.Case(Contestant(kind, encoding, implementation), length, direction, gates))
    return made | {"contestant": name, "ms_min": ms, "ms_median": ms} | more


def test_ratios_are_to_identity_of_the_same_implementation_and_to_jax_nn():
    rows = [
        row("jax.nn, xla", 64, 4.0, kind="jax.nn"),
        row("identity, xla", 64, 2.0),
        row("cope, xla", 64, 6.0, encoding="cope(4)", gates="half"),
        row("identity, xla_chunked", 64, 1.0, implementation="xla_chunked"),
        row("cope, xla_chunked", 64, 5.0, encoding="cope(4)", implementation="xla_chunked", gates="half"),
        row("torch", 64, 1.0, kind="torch", implementation=""),
        row("identity, xla", 128, 10.0),
        row("cope, xla", 128, None, encoding="cope(4)"),
    ]
    results.fill_ratios(rows)
    assert [r["ratio_to_identity"] for r in rows] == [None, 1.0, 3.0, 1.0, 5.0, None, 1.0, None]
    assert [r["ratio_to_jax_nn"] for r in rows] == [1.0, 0.5, 1.5, 0.25, 1.25, 0.25, None, None]


def test_the_figure_has_a_line_for_each_contestant_and_none_for_who_failed():
    rows = [
        row("identity, xla", n, float(n), peak_bytes_growth=10**6 * n, direction=direction)
        for n in (64, 128)
        for direction in ("forward", "both")
    ]
    rows += [row("cope, xla", 64, 100.0, encoding="cope(4)", gates=gates, peak_bytes_growth=0) for gates in ("half", "sparse")]
    rows += [row("t5, xla", 64, None, encoding="t5")]
    figure = results.draw(rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["identity, xla", "cope, xla, half", "cope, xla, sparse"]
    time, memory, time_both, _ = figure.axes
    assert [len(axes.lines) for axes in figure.axes] == [3, 1, 1, 1]  # what grew by nothing has no place on a logarithmic axis
    np.testing.assert_allclose(time.lines[0].get_xydata(), [[64, 64], [128, 128]])
    np.testing.assert_allclose(memory.lines[0].get_xydata(), [[64, 64], [128, 128]])
    assert (time.get_ylabel(), memory.get_ylabel(), time_both.get_xlabel()) == ("time (ms)", "memory (MB)", "length (tokens)")
    assert time.get_xscale() == time.get_yscale() == "log"
    assert time.lines[1].get_color() == time.lines[2].get_color() != time.lines[0].get_color()
    assert time.lines[1].get_marker() != time.lines[2].get_marker()
    assert plots.styles(["cope(4)"])["cope(4)"].color == time.lines[1].get_color()


def test_a_gradient_that_is_zero_but_for_rounding_counts_as_a_part_of_all():
    want = {"out": np.ones(4), "grads/query": np.ones(4), "grads/unseen": np.full(4, 1e-17)}
    measured = attention.errors(want | {"grads/unseen": np.full(4, 1e-6)}, want)
    assert measured == {"error_out": 0.0, "error_grads": pytest.approx(1e-6), "worst_gradient": "unseen"}


def test_what_is_not_finite_has_no_error_but_a_reason():
    with pytest.raises(FloatingPointError, match=r"^not finite$"):
        attention.errors({"out": np.array([1.0, np.nan])}, {"out": np.ones(2)})


def test_slow_peers_run_fewer_rounds_and_failures_in_company_keep_their_first_time(tmp_path, monkeypatch):
    seconds = {"identity": 50.0, "cope(4)": 0.1, "cope(5)": 3.0, "cope(6)": 20.0}
    contestants = [Contestant("posjax", "identity", "xla"), Contestant("posjax", "cope(4)", "xla")]
    contestants += [Contestant("x-transformers", "cope(5)"), Contestant("x-transformers", "cope(6)")]
    config = AttentionBench(lengths=(8,), passes=("forward",), gates=("half",), peer_limit_seconds=10.0, repeats=4)
    cases, jobs = attention.list_cases(config, contestants), attention.Jobs(tmp_path)
    rows = [attention._empty_row(case) | {"ms_min": 1000 * seconds[case.contestant.encoding], "rounds": 0} for case in cases]
    for case in cases:
        np.savez(jobs.file("inputs", *case.inputs))
    called = []

    def prepared(contestant, *rest):
        if contestant.encoding == "cope(4)":
            raise MemoryError
        return attention.Prepared(call=lambda: called.append(contestant.encoding), launch=dict, fetch=dict)

    monkeypatch.setattr(attention, "prepare", prepared)
    attention._time(config, cases, rows, jobs, lambda *progress: None)
    assert [measured["rounds"] for measured in rows] == [4, 0, 3, 0]
    assert called == ["identity", "cope(5)"] * 4 + ["identity"]  # once to warm up, then in turn
    assert rows[0]["ms_min"] < 50_000 and rows[1]["ms_min"] == 100.0 and rows[3]["ms_min"] == 20_000.0
    assert rows[1]["notes"] == ["not timed in rounds: MemoryError"]
    (group,) = results.groups(rows)
    assert "x-transformers cope(6), half: time of a single call, the first in its process" in group[2][0]


# Who takes part ----------------------------------------------------------------------------------------------------------


def test_encodings_without_gates_are_measured_once():
    config = AttentionBench(lengths=(8,), passes=("forward",), gates=("half", "sparse"))
    contestants = list_contestants(("rope", "rope + cope(4)"), ("xla", "xla_chunked"), peers=False, on_gpu=False)
    cases = attention.list_cases(config, contestants)
    assert [(case.contestant.name, case.gates) for case in cases[:5]] == [
        ("jax.nn, xla", None),
        ("identity, xla", None),
        ("rope, xla", None),
        ("rope + cope(4), xla", "half"),
        ("rope + cope(4), xla", "sparse"),
    ]
    assert len(cases) == 9


@pytest.mark.parametrize("encoding", ["identity", "cope(8)"])
def test_torch_and_x_transformers_compute_the_same(encoding):
    pytest.importorskip("torch")
    pytest.importorskip("x_transformers")
    arrays = inputs.make_inputs(encoding, "half", 24, SMALL, None)
    peers = list_contestants(("cope(8)", "cope(8, scaled=True)", "rope + cope(8)"), (), peers=True, on_gpu=False)
    assert [peer.name for peer in peers] == ["jax.nn, xla", "torch", "x-transformers cope(8)"]
    (peer,) = [peer for peer in peers if peer.encoding == encoding and peer.is_peer]
    theirs, ours = (prepare(who, True, arrays, "float32", {}) for who in (peer, Contestant("posjax", encoding, "xla")))
    theirs.call()
    found, want = theirs.fetch(theirs.call()), ours.fetch(ours.call())  # a second call has gradients of its own
    np.testing.assert_allclose(found["out"], oracle.attend(encoding, arrays, 0)[0], atol=3e-6)
    assert set(found) == set(want)
    for name, array in found.items():
        np.testing.assert_allclose(array, want[name], atol=1e-4 * np.abs(want[name]).max(), err_msg=name)


# Inputs of a trained model -----------------------------------------------------------------------------------------------


def test_gates_of_a_trained_model(tmp_path, monkeypatch):
    from posjax.lab import run as runs
    from posjax.lab.config import Config
    from posjax.lab.source import eval_batches, open_source
    from posjax.lab.workdir import init_or_check_workdir

    config = Config(
        workdir=str(tmp_path / "run"), task="flip_flop", encoding="cope(4)", encodings=("cope(4)",), seq_length=8, batch_size=8,
        num_layers=1, embed_dim=8, num_heads=2, num_kv_heads=1, steps=1, warmup_steps=0, evaluate_every=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="workdir must hold checkpoints"):
        AttentionBench(workdir=config.workdir)
    source = open_source(config)
    with_params, params = runs.build_model(config, config.encoding, source, 0)
    (init_or_check_workdir(config) / "checkpoints").mkdir()
    monkeypatch.setattr(runs, "restore_params", lambda *args: params)
    recorded = inputs.recorded_inputs(config.workdir, 0, 100)
    assert recorded["query"].shape == recorded["key"].shape == (16, 8, 2, 4)
    np.testing.assert_array_equal(recorded["key"][:, :, 0], recorded["key"][:, :, 1])  # shared heads, repeated
    batch = next(eval_batches(config, source, 8))
    (record,) = with_params(params).records(batch["tokens"])
    np.testing.assert_allclose(recorded["query"][:8], record.query, atol=1e-5)

    bench = SimpleNamespace(batch=1, heads=2, head_dim=4, dtype="float32")
    arrays = inputs.make_inputs("cope(4)", "trained", 20, bench, recorded)
    np.testing.assert_array_equal(arrays["query"][0], recorded["query"].reshape(-1, 2, 4)[:20])
    np.testing.assert_array_equal(arrays["params/embedding"], recorded["params"]["embedding"])
    other = inputs.make_inputs("cope(6)", "trained", 200, bench, recorded)  # longer than what there is, and other parameters
    np.testing.assert_array_equal(other["value"][0, 128:], recorded["value"].reshape(-1, 2, 4)[:72])
    assert other["params/embedding"].shape == (6, 4)
    with pytest.raises(ValueError, match=r"layer must be below 1, the number of layers of workdir .*, got 1"):
        AttentionBench(workdir=config.workdir, layer=1, heads=2, head_dim=4)
    with pytest.raises(ValueError, match=r"got 4 and 64; add --heads 2 --head-dim 4$"):
        AttentionBench(workdir=config.workdir)
    bench = AttentionBench(workdir=config.workdir, heads=2, head_dim=4)
    cases = attention.list_cases(bench, [Contestant("posjax", "cope(4)", "xla")])
    assert [case.gates for case in cases[:3]] == ["half", "sparse", "trained"]


# The command line --------------------------------------------------------------------------------------------------------


def test_the_command_says_what_can_be_benched(run):
    code, out, _ = run("bench")
    assert code == 2 and "  attention " in out
    code, _, error = run("bench", "atention")
    assert code == 2 and "did you mean attention?" in error


def test_help_explains_every_field_and_near_flags_are_named(run):
    code, out, _ = run("bench", "attention", "--help")
    assert code == 0
    for field in dataclasses.fields(AttentionBench):
        assert f"--{field.name.replace('_', '-')}" in out
    assert "--no-peers" in out
    code, _, error = run("bench", "attention", "--lenghts", "64")
    assert code == 2 and "--lengths" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "1"], "lengths must be an integer of at least 2, got 1"),
        (["--lengths", "64", "64"], "lengths must all differ, got (64, 64)"),
        (["--lengths"], "lengths must not be empty"),
        (["--encodings", "roap"], "did you mean 'rope'?"),
        (["--encodings", "cope(64) / identity"], "encodings must each be for one layer, got 'cope(64) / identity'"),
        (["--repeats", "0"], "repeats must be an integer of at least 1, got 0"),
        (["--peer-limit-seconds", "0"], "peer_limit_seconds must be positive, got 0.0"),
        (["--workdir", "nowhere"], "workdir must hold checkpoints"),
        (["--out", "/dev/null/x"], "out must be a writable folder, got '/dev/null/x'"),
    ],
)
def test_wrong_input_is_told_at_once(run, flags, message):
    code, _, error = run("bench", "attention", *flags)
    assert code in (1, 2) and message in re.sub(r"[\s│]+", " ", error)


def test_an_interruption_leaves_what_was_measured(run, tmp_path, monkeypatch):
    def interrupted(config, cases, rows, jobs, progress):
        rows[0] |= {"ms_min": 1.0, "ms_median": 2.0, "peak_bytes_growth": 10**6}
        raise KeyboardInterrupt

    device = {"platform": "cpu", "device_kind": "cpu", "devices": 1}
    monkeypatch.setattr(attention.Jobs, "run", lambda self, job: device)
    monkeypatch.setattr(attention, "_measure", interrupted)
    code, _, error = run("bench", "attention", "--out", tmp_path, "--lengths", 8)
    assert code == 130 and f"the results so far are in {tmp_path}" in error
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert rows[0]["ms_min"] == 1.0 and rows[0]["ratio_to_jax_nn"] == 1.0
    assert rows[1]["ms_min"] is None
    assert {path.name for path in tmp_path.iterdir()} == set(results.FILES)
