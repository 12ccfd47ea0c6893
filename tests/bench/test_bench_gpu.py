"""posjax bench gpu: a run in miniature on the CPU, without packages that need not be there, and what follows from its rows."""

import dataclasses
import importlib.machinery
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import oracle
import pytest
from test_import import REFUSE, unneeded_by

from posjax.bench import command, contestants, gpu, gpu_machine, gpu_sections, inputs, tune
from posjax.bench.contestants import Prepared
from posjax.bench.gpu import GpuBench
from posjax.bench.gpu_machine import Clock

# Calls, vocabulary and encodings are cut short: every program is compiled.
PROGRAM = f"""{REFUSE}
import dataclasses
from posjax.bench import gpu, gpu_sections
from posjax.bench.contestants import Options

plain, every, sparse = gpu_sections.CALLS
options = Options(window=20, soft_cap=20.0, starts=(10, 33))
gpu_sections.CALLS = dataclasses.replace(every, length=50, options=options), dataclasses.replace(sparse, length=64)
gpu_sections.ENCODINGS, gpu_sections._VOCABULARY = ("identity", "cope(64)"), 100
config = gpu.GpuBench(
    length=64, heads=2, head_dim=16, encodings=("rope + cope(64)",), dtypes=("float32",), head_dims=(16,), contexts=(64,),
    layers=1, embed_dim=128, repeats=1, out=sys.argv[2],
)
gpu.show(gpu.run(config, implementation="xla_chunked"))
"""
TINY = GpuBench(length=64, heads=2, head_dim=16, encodings=("alibi",), dtypes=("bfloat16",), head_dims=(16,), repeats=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(gpu.json, its folder, what was printed)."""
    out = tmp_path_factory.mktemp("gpu")
    refused = unneeded_by("jax", "flax", "optax")
    assert {"matplotlib", "tyro", "pytest"} <= refused
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")  # which cost more than they save
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, " ".join(refused), str(out)],
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "gpu.json").read_text()), out, done.stdout


def of(rows, section, **fields):
    found = [row for row in rows if row["section"] == section]
    return [row for row in found if all(row[name] == value for name, value in fields.items())]


@pytest.mark.thorough
def test_a_run_has_rows_of_every_section(finished):
    written, _, _ = finished
    rows = written["rows"]
    assert not [row for row in rows if row["notes"]]
    speed = [(row["contestant"], row["gates"]) for row in of(rows, "speed", **{"pass": "both"})]
    ours = [("identity, xla_chunked", None), ("cope(64), xla_chunked", "half"), ("cope(64), xla_chunked", "sparse")]
    assert speed == [*ours, ("jax.nn, xla", None)]
    for row in of(rows, "speed"):
        assert 0 < row["ms_min"] <= row["ms_median"] and row["rounds"] == 1
        (identity,) = of(rows, "speed", encoding="identity", kind="posjax", **{"pass": row["pass"]})
        assert row["ratio_to_identity"] == row["ms_min"] / identity["ms_min"] and row["ratio_to_cudnn"] is None
        operations = 2 * 2 * 64 * 64 * 16 * (3.5 if row["pass"] == "both" else 1)
        assert row["tflops"] == pytest.approx(operations / row["ms_min"] / 1e9)
    assert {"platform", "device_kind", "cores"} <= set(written["hardware"]) and "jax" in written["versions"]


@pytest.mark.thorough
def test_errors_are_those_of_float32(finished):
    rows = of(finished[0]["rows"], "accuracy")
    assert [(row["call"], row["dtype"], row["head_dim"]) for row in rows] == [
        ("every option", "float32", 16),
        ("sparse gates", "float32", 16),
    ]
    for row in rows:
        assert 0 < row["error_out"] < 1e-5 and 0 < row["error_grads"] < 1e-3
        assert 0 <= row["xla_error_out"] < 1e-5 and 0 <= row["xla_error_grads"] < 1e-3  # the reference is this, in the same dtype
        assert row["same_bits"] is True


@pytest.mark.thorough
def test_the_decoder_has_the_parameters_that_it_should(finished):
    rows = of(finished[0]["rows"], "decoder")
    assert [(row["encoding"], row["context"]) for row in rows] == [("identity", 64), ("cope(64)", 64)]
    layer = 4 * 128 * 128 + 3 * 128 * 352 + 2 * 128
    assert [row["parameters"] for row in rows] == [100 * 128 + layer + 128, 100 * 128 + layer + 128 + 64 * 128]
    assert all(row["prefill_tokens_per_second"] > row["train_tokens_per_second"] > 0 for row in rows)


@pytest.mark.thorough
def test_without_matplotlib_there_is_no_figure_and_a_line_says_so(finished):
    _, out, printed = finished
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md"}
    assert "no gpu.png: matplotlib is not installed" in printed.splitlines()
    table = (out / "gpu.md").read_text()
    assert table.endswith("no gpu.png: matplotlib is not installed\n")
    assert "## speed, forward and backward" in table and "## accuracy, float32" in table and "## decoder" in table
    assert len([line for line in table.splitlines() if line.endswith("| not measured |  |")]) == 6


# From rows that are made up ----------------------------------------------------------------------------------------------


def timed(contestant, ms, direction="forward", gates=None, encoding="identity", kind="posjax", lowering=""):
    row = {"section": "speed", "contestant": contestant, "kind": kind, "encoding": encoding, "gates": gates, "pass": direction}
    row |= {"lowering": lowering}
    return row | {"ms_min": ms, "ms_median": ms, "tflops": None if ms is None else 1.0, "notes": [] if ms else ["no memory"]}


def decoded(encoding, prefill, train, context=4096):
    row = {"section": "decoder", "encoding": encoding, "context": context, "notes": []}
    return row | {"prefill_tokens_per_second": prefill, "train_tokens_per_second": train}


ROWS = [
    timed("identity, pallas", 2.0),
    timed("cope(64), pallas", 2.2, gates="sparse", encoding="cope(64)"),
    timed("cope(64), pallas", 2.1, gates="half", encoding="cope(64)"),
    timed("rope + cope(64), pallas", 2.5, gates="half", encoding="rope + cope(64)"),
    timed("jax.nn, cudnn", 1.0, kind="jax.nn"),
    timed("jax.nn, xla", None, kind="jax.nn"),
    timed("identity, pallas", 4.0, "both"),
    timed("cope(64), pallas", 5.0, "both", "half", "cope(64)"),
    decoded("rope", 1000.0, 100.0),
    decoded("cope(64)", 950.0, 80.0),
    decoded("cope(64)", 10.0, 8.0, context=16384),
]


def test_ratios():
    rows = [dict(row) for row in ROWS]
    gpu.fill_ratios(rows)
    assert [row["ratio_to_identity"] for row in of(rows, "speed")] == [1.0, 1.1, 1.05, 1.25, 0.5, None, 1.0, 1.25]
    assert [row["ratio_to_cudnn"] for row in of(rows, "speed")] == [2.0, 2.2, 2.1, 2.5, 1.0, None, None, None]
    ratios = [(row["prefill_ratio_to_rope"], row["train_ratio_to_rope"]) for row in of(rows, "decoder")]
    assert ratios == [(1.0, 1.0), (0.95, 0.8), (None, None)]


def test_targets_are_met_missed_or_not_measured():
    rows = [dict(row) for row in ROWS]
    gpu.fill_ratios(rows)
    found = {row["target"]: (row["limit"], row["found"], row["met"]) for row in gpu.targets(rows)}
    assert found == {
        "time of cope(64) over identity's, half gates, forward": (1.15, 1.05, True),
        "time of rope + cope(64) over identity's, half gates, forward": (1.15, 1.25, False),
        "time of cope(64) over identity's, half gates, forward and backward": (1.25, 1.25, True),
        "time of rope + cope(64) over identity's, half gates, forward and backward": (1.25, None, None),
        "speed of identity over cuDNN's, forward": (0.6, 0.5, False),
        "speed of identity over cuDNN's, forward and backward": (0.6, None, None),
        "tokens per second of the decoder's prefill, cope(64) over rope, 4,096 tokens": (0.9, 0.95, True),
        "tokens per second of the decoder's prefill, rope + cope(64) over rope, 4,096 tokens": (0.9, None, None),
    }
    heading, _, lines, _ = gpu.groups(rows)[-1]
    assert heading == "targets" and [line[1:] for line in lines[:2]] == [
        ["at most 1.15", "1.05", "met"],
        ["at most 1.15", "1.25", "missed"],
    ]


def test_each_lowering_has_ratios_and_targets_of_its_own():
    rows = [timed("jax.nn, cudnn", 1.0, kind="jax.nn")]
    for lowering, identity, cope in (("triton", 1.5, 1.8), ("mosaic", 1.25, 2.0)):
        rows.append(timed(f"identity, pallas, {lowering}", identity, lowering=lowering))
        rows.append(timed(f"cope(64), pallas, {lowering}", cope, gates="half", encoding="cope(64)", lowering=lowering))
    gpu.fill_ratios(rows)
    assert [row["ratio_to_identity"] for row in rows] == [1.0 / 1.5, 1.0, 1.8 / 1.5, 1.0, 1.6]
    found = {row["target"]: (row["limit"], row["met"]) for row in gpu.targets(rows) if row["found"] is not None}
    assert found == {
        "time of cope(64) over identity's, half gates, forward (triton)": (1.15, False),
        "time of cope(64) over identity's, half gates, forward (mosaic)": (1.15, False),
        "speed of identity over cuDNN's, forward (triton)": (0.6, True),
        "speed of identity over cuDNN's, forward (mosaic)": (0.8, True),
    }
    _, _, lines, _ = gpu.groups(rows)[0]
    assert [line[0] for line in lines][1:] == ["identity, triton", "cope(64), triton", "identity, mosaic", "cope(64), mosaic"]


@pytest.mark.parametrize(
    ("capability", "dtype", "lowerings"),
    [(90, "bfloat16", ("triton", "mosaic")), (90, "float32", ("triton",)), (80, "bfloat16", ("triton",))],
)
def test_lowerings_that_are_measured(capability, dtype, lowerings, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.setattr(gpu_sections, "capability", lambda: capability)
    assert gpu_sections.lowerings_of("pallas", dtype) == lowerings
    assert gpu_sections.lowerings_of("xla_chunked", dtype) == ("",)


def test_a_row_that_failed_is_in_the_table_with_its_reason():
    rows = [dict(row) for row in ROWS]
    gpu.fill_ratios(rows)
    heading, heads, lines, notes = gpu.groups(rows)[0]
    assert heading == "speed, forward" and len({len(heads), *map(len, lines)}) == 1
    assert notes == ["jax.nn, xla: no memory"]


def test_the_figure_has_a_bar_for_each_that_was_measured():
    figure = gpu.draw(ROWS)
    titles = ["speed, forward", "speed, forward and backward", "prefill, 4,096 tokens", "train, 4,096 tokens"]
    assert [axes.get_title() for axes in figure.axes[:4]] == titles
    first = figure.axes[0]
    assert [bar.get_width() for bar in first.patches] == [2.0, 2.2, 2.1, 2.5, 1.0]
    names = ["identity", "cope(64), sparse", "cope(64), half", "rope + cope(64), half", "jax.nn, cudnn"]
    assert [label.get_text() for label in first.get_yticklabels()] == names
    assert first.patches[1].get_facecolor() == first.patches[2].get_facecolor() != first.patches[0].get_facecolor()
    assert gpu.draw([timed("jax.nn, xla", None)]) is None


# What goes wrong ---------------------------------------------------------------------------------------------------------


def told(text):
    pass


def fake(answers):
    """A contestant that answers one after the other."""
    answers = iter(answers)
    return Prepared(call=lambda: next(answers), launch=lambda: 0, fetch=lambda x: x, temp_bytes=1)


def test_when_the_time_is_over_rows_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sections, "prepare", None)
    monkeypatch.setattr(gpu_sections.Jobs, "run", lambda self, job, **environment: {})
    monkeypatch.setattr(gpu_sections, "ENCODINGS", ("rope",))
    config = dataclasses.replace(TINY, seconds=1e-6, layers=1, embed_dim=128, contexts=(8, 16), out=str(tmp_path))
    rows = gpu.run(config, quiet=True, implementation="xla_chunked")
    assert [row["section"] for row in rows] == ["speed"] * 4 + ["accuracy"] * 2 + ["decoder"] * 2
    assert all(row["notes"] == ["not measured: the time limit was reached"] for row in rows)
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"] == rows
    assert not (tmp_path / "gpu.png").exists()
    gpu.show(rows)


def test_rounds_end_with_the_time_but_there_is_one():
    ready = [Prepared(call=lambda: 0, launch=lambda: 0, fetch=dict) for _ in range(2)]
    assert [len(times) for times in gpu_machine.milliseconds(ready, 3, Clock(60))] == [3, 3]
    assert [len(times) for times in gpu_machine.milliseconds(ready, 3, Clock(-1))] == [1, 1]


def test_a_burst_is_long_enough_for_the_clock_and_who_fails_is_left_out():
    """A call of 3 ms is called seven times in a row after one that is not counted, one of 50 ms once."""
    launched = {0.003: 0, 0.05: 0}

    def sleeper(seconds):
        def launch():
            launched[seconds] += 1
            time.sleep(seconds)

        return Prepared(call=lambda: 0, launch=launch, fetch=dict)

    def full():
        raise MemoryError("full")

    failing = Prepared(call=lambda: 0, launch=full, fetch=dict)
    short, failed, long = gpu_machine.milliseconds([sleeper(0.003), failing, sleeper(0.05)], 2, Clock(60))
    assert failed == "MemoryError: full" and min(short) >= 3 and min(long) >= 50
    assert len(short) == len(long) == 2 and launched[0.05] == 3
    assert (launched[0.003] - 1) % 2 == 0 and 3 <= launched[0.003] <= 15


def test_who_finds_no_memory_takes_nobody_along(monkeypatch):
    def prepare(who, with_gradients, *rest):
        if who.encoding == "rope" and with_gradients:
            raise NotImplementedError("not on Sundays\nnor Mondays")

        def call():
            if who.kind == "jax.nn":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return 0

        def launch():
            if who.encoding == "cope(64)" and with_gradients:
                raise MemoryError("full of others")
            return 0

        return Prepared(call=call, launch=launch, fetch=dict)

    monkeypatch.setattr(gpu_sections, "prepare", prepare)
    rows = list(gpu_sections.speed(TINY, "xla_chunked", Clock(60), told))
    failed = {(row["contestant"], row["pass"]): row["notes"] for row in rows if row["ms_min"] is None}  # one for all gates
    why = ["JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"]
    assert failed == {
        ("jax.nn, xla", "forward"): why,
        ("jax.nn, xla", "both"): why,
        ("rope, xla_chunked", "both"): ["NotImplementedError: not on Sundays"],
        ("cope(64), xla_chunked", "both"): ["MemoryError: full of others"],
    }
    assert len(rows) == 14 and all(row["rounds"] == 2 for row in rows if row["ms_min"] is not None)


def test_an_interruption_of_the_rounds_leaves_those_that_were_made(monkeypatch):
    launched = []

    def prepare(who, *rest):
        def launch():
            launched.append(who)
            if len(launched) > 20 and who.kind == "jax.nn":
                raise KeyboardInterrupt
            time.sleep(0.02)  # so that one call is a burst

        return Prepared(call=lambda: 0, launch=launch, fetch=dict)

    monkeypatch.setattr(gpu_sections, "prepare", prepare)
    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in gpu_sections.speed(TINY, "xla_chunked", Clock(60), told):
            rows.append(row)
    assert len(rows) == 14
    assert [(row["contestant"], row["pass"]) for row in rows if row["notes"]] == [("jax.nn, xla", "forward")] + [
        (row["contestant"], "both") for row in rows[7:]
    ]
    assert {note for row in rows for note in row["notes"]} == {"not measured: interrupted"}
    assert all(row["ms_min"] > 0 for row in rows if not row["notes"])


def test_gates_of_a_trained_model_are_timed_too(monkeypatch):
    given = {name: np.full((2, 32, 2, 16), 7.0, np.float32) for name in ("query", "key", "value")}
    seen = []

    def prepare(who, with_gradients, arrays, *rest):
        seen.append((who.encoding, float(arrays["value"].mean()) == 7.0))
        return Prepared(call=lambda: 0, launch=lambda: 0, fetch=dict)

    monkeypatch.setattr(inputs, "recorded_inputs", lambda workdir, layer, tokens: given | {"encoding": "alibi", "params": {}})
    monkeypatch.setattr(gpu_sections, "prepare", prepare)
    config = types.SimpleNamespace(**dataclasses.asdict(TINY) | {"workdir": "runs/mine"})
    rows = list(gpu_sections.speed(config, "xla_chunked", Clock(60), told))
    trained = [(row["encoding"], row["pass"]) for row in rows if row["gates"] == "trained"]
    assert trained == [(spec, way) for way in ("forward", "both") for spec in ("cope(64)", "rope + cope(64)")]
    assert sorted(spec for spec, is_recorded in seen if is_recorded) == sorted(spec for spec, _ in trained)


def test_tokamax_takes_part_where_it_is_installed(monkeypatch):
    calls = []

    def dot_product_attention(query, key, value, *, is_causal, implementation):
        calls.append((is_causal, implementation))
        return 2 * jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)

    module = types.ModuleType("tokamax")
    module.__spec__, module.dot_product_attention = importlib.machinery.ModuleSpec("tokamax", None), dot_product_attention
    assert [who.name for who in contestants.gpu_peers()] == ["jax.nn, cudnn"]
    monkeypatch.setitem(sys.modules, "tokamax", module)
    _, own_choice, triton = contestants.gpu_peers()
    assert [own_choice.name, triton.name] == ["tokamax", "tokamax, triton"] and own_choice.is_peer
    arrays = inputs.make_inputs("identity", "half", 8, types.SimpleNamespace(batch=1, heads=2, head_dim=4, dtype="float32"), None)
    for who in (own_choice, triton):
        ready = contestants.prepare(who, False, arrays, "float32", {})
        np.testing.assert_allclose(ready.fetch(ready.launch())["out"], 2 * oracle.attend("identity", arrays, 0)[0], atol=1e-5)
    assert calls == [(True, None), (True, "triton")]


def test_only_what_counts_is_called_with_other_gates():
    names = {spec: [call.name for call in gpu_sections.calls_of(spec)] for spec in ("rope", "rope + cope(8)")}
    assert names == {"rope": ["causal", "every option"], "rope + cope(8)": ["causal", "every option", "sparse gates"]}
    plain, _, sparse = gpu_sections.calls_of("cope(8)")
    shut, half = (call.arrays("cope(8)", 16)["query"][..., -1] > 0 for call in (sparse, plain))
    assert shut.all() and not half.all()


class Ones:
    """Oracles of a known answer."""

    def answer(self, spec, head_dim, call):
        return {"out": np.ones(4), "grads/query": np.ones(4)}


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([1.0, 1.0], {"error_out": 0.0, "error_grads": 0.0, "same_bits": True}),
        ([1.01, 1.01], {"error_out": pytest.approx(0.01), "error_grads": pytest.approx(0.01), "same_bits": True}),
        ([1.01, 1.02], {"error_out": pytest.approx(0.01), "error_grads": pytest.approx(0.01), "same_bits": False}),
        ([np.nan, 1.0], {"error_out": None, "error_grads": None, "same_bits": None, "notes": ["FloatingPointError: not finite"]}),
    ],
)
def test_errors_and_other_bits_are_seen(monkeypatch, answers, found):
    def prepare(who, *rest):
        numbers = answers if who.implementation == "pallas" else [1.5]
        return fake([{name: np.full(4, number) for name in ("out", "grads/query")} for number in numbers])

    monkeypatch.setattr(gpu_sections, "prepare", prepare)
    for row in gpu_sections.accuracy(TINY, "pallas", Clock(60), told, Ones()):
        assert {name: row[name] for name in found} == found
        assert row["xla_error_out"] == (None if row["notes"] else 0.5)


def test_an_interruption_leaves_what_was_measured(run, tmp_path, monkeypatch):
    def interrupted(*args, **more):
        yield decoded("rope", 5.0, 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "check_gpu", lambda *what: None)
    monkeypatch.setattr(gpu, "speed", lambda *args: iter([timed("identity, pallas", 2.0)]))
    monkeypatch.setattr(gpu, "decoder", interrupted)
    code, _, error = run("bench", "gpu", "--sections", "speed", "decoder", "--out", tmp_path)
    assert code == 130 and f"the results so far are in {tmp_path}" in error
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["section"] for row in written["rows"]] == ["speed", "decoder"]
    assert {path.name for path in tmp_path.iterdir()} == set(gpu.FILES)


# The command line --------------------------------------------------------------------------------------------------------

NEEDS = "posjax bench gpu needs an NVIDIA GPU, but jax's platform is cpu. posjax bench attention runs on any device"


def test_without_a_gpu_the_command_says_what_works(run, tmp_path):
    code, _, error = run("bench", "gpu", "--out", tmp_path / "made")
    assert (code, error) == (2, f"posjax: {NEEDS}\n")
    assert not (tmp_path / "made").exists()


def test_gpus_that_the_kernels_do_not_run_on(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(gpu_machine, "capability", lambda: 75)
    with pytest.raises(NotImplementedError, match=r"^This needs .* GPU of compute capability 8\.0 or later, got cpu\. Else\.$"):
        gpu_machine.check_gpu("This", "Else.")
    monkeypatch.setattr(gpu_machine, "capability", lambda: 80)
    gpu_machine.check_gpu("This", "Else.")

    def absent():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "default_backend", absent)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(NotImplementedError, match=r"^This needs .* GPU; jax finds no device with JAX_PLATFORMS='cuda'\. Else\.$"):
        gpu_machine.check_gpu("This", "Else.")


@pytest.mark.parametrize("what", ["gpu", "tune"])
def test_help_explains_every_field(run, what):
    code, out, _ = run("bench", what, "--help")
    options = {"gpu": GpuBench, "tune": tune.Tune}[what]
    assert code == 0 and all(f"--{field.name.replace('_', '-')} " in out for field in dataclasses.fields(options))
    assert f"  {what} " in run("bench")[1]


@pytest.mark.parametrize(("flags", "code"), [([], 1), (["--nonsense", "1"], 2), (["--length", "1"], 2), (["--help"], 0)])
def test_the_module_is_a_command_without_tyro(capsys, tmp_path, monkeypatch, flags, code):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        command.main(gpu, GpuBench, ["--out", str(tmp_path / "made"), *flags])
    assert end.value.code == code
    printed = capsys.readouterr()
    said = {1: NEEDS, 2: "usage: python -m posjax.bench.gpu"}
    assert said.get(code, "") in printed.err
    if flags[:1] == ["--length"]:
        assert "length must be an integer of at least 2, got 1" in printed.err
    if not code:
        assert all(f"--{field.name.replace('_', '-')} " in printed.out for field in dataclasses.fields(GpuBench))
        assert "time limit; the measurement in progress is completed. (default: 420.0)" in " ".join(printed.out.split())


def test_the_module_when_interrupted(capsys, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run", interrupted)
    with pytest.raises(SystemExit) as end:
        command.main(gpu, GpuBench, ["--out", "here"])
    assert end.value.code == 130 and "interrupted; the results so far are in here" in capsys.readouterr().err


def test_flags_are_read_like_the_fields():
    flags = ["--sections", "decoder", "--seconds", "60", "--contexts", "128", "256", "--encodings", "rope + cope(8)"]
    flags += ["--out", "a b"]
    want = GpuBench(sections=("decoder",), seconds=60.0, contexts=(128, 256), encodings=("rope + cope(8)",), out="a b")
    assert command.parse(GpuBench, "prog", flags) == want
    assert command.parse(GpuBench, "prog", []) == GpuBench()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sections": ()}, r"sections must not be empty, got \(\)"),
        ({"contexts": (8, 8)}, r"contexts must all differ, got \(8, 8\)"),
        ({"embed_dim": 200}, "embed_dim must be a multiple of 128, got 200"),
        ({"seconds": 0.0}, "seconds must be positive, got 0.0"),
        ({"encodings": ("rope / alibi",)}, "encodings must each be for one layer, got 'rope / alibi'"),
        ({"workdir": "nowhere"}, "workdir must hold checkpoints"),
    ],
)
def test_wrong_values_are_told_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        GpuBench(**fields)
