"""posjax bench tune: the search, with times that are planted; the kernels interpreted with two blocks; the table that it writes."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import pytest

from posjax.attention.backends import reference
from posjax.attention.backends.gpu import blocks as gpu_blocks
from posjax.attention.backends.gpu.blocks import GpuBlocks, blocks_for, check_gpu_blocks
from posjax.bench import command, tune
from posjax.bench.tune import CHANNELS, SHIPPED, Tune, neighbours, table, text_of, walk

SMALL, IMPOSSIBLE = GpuBlocks(16, 16, 16, 16, 4, 1), GpuBlocks(16, 16, 32, 16, 4, 1)
TINY = Tune(dtypes=("float32",), channels=(64,), encodings=("cope(4)",), length=32, heads=1, repeats=1)
KINDS = list(itertools.product(("bfloat16", "float32"), CHANNELS, (False, True)))


def run_tiny(config=TINY):
    return tune.run(config, quiet=True, anywhere=True, near=lambda blocks, counting: [SMALL, IMPOSSIBLE])


# The kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_search_among_two_and_one_that_is_impossible(tmp_path):
    rows = run_tiny(dataclasses.replace(TINY, out=str(tmp_path)))
    present, small, impossible = rows
    assert [GpuBlocks(**row["blocks"]) for row in rows] == [blocks_for(80, "float32", 64, True), SMALL, IMPOSSIBLE]
    assert [row["present"] for row in rows] == [True, False, False]
    assert present["ms"] > 0 and small["ms"] > 0 and not present["notes"] + small["notes"]
    (why,) = impossible["notes"]
    assert why.startswith("ValueError: block_kv_count of block_sizes must be at most block_kv") and impossible["ms"] is None
    (best,) = [row for row in rows if row["best"]]
    assert best["ms"] <= present["ms"] and best["forward_ms"] > 0
    assert json.loads((tmp_path / "tune.json").read_text())["rows"] == rows
    lines = json.loads((tmp_path / "gpu_blocks.json").read_text())
    (line,) = [x for x in lines if (x["capability"], x["bytes"], x["channels"], x["counts"]) == (80, 4, 64, True)]
    assert {name: line[name] for name in GpuBlocks._fields} == best["blocks"]


@pytest.fixture
def planted(monkeypatch):
    """Sets the factor by which blocks are wrong, of a kernel that is dense attention otherwise."""
    factors = {}

    def attention(call, block_sizes):
        if math.isinf(factors.get(block_sizes, 1.0)):
            raise RuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded\nmore")
        return factors.get(block_sizes, 1.0) * reference.attention(call)

    monkeypatch.setattr(tune.gpu, "attention", attention)
    return factors


@pytest.mark.parametrize(
    ("factor", "note"),
    [
        (math.inf, "RuntimeError: RESOURCE_EXHAUSTED: Shared memory size limit exceeded"),
        (1.5, "wrong: relative error 5.0e-01 of the output, 5.0e-01 of gradients"),
        (math.nan, "wrong: relative error nan of the output, nan of gradients"),
        (1.01, None),
    ],
)
def test_what_is_refused_or_wrong_is_left_out(tmp_path, planted, factor, note):
    planted[SMALL] = factor
    rows = run_tiny(dataclasses.replace(TINY, encodings=("identity",), out=str(tmp_path)))
    assert rows[1]["notes"] == ([note] if note else []) and (rows[1]["ms"] is None) == (note is not None)
    assert rows[0]["ms"] > 0 and (rows[0]["best"] or note is None)


def test_the_best_is_timed_beside_the_present_once_more_and_stays_or_goes(tmp_path, planted, monkeypatch):
    """The walk finds the small blocks twice as fast; side by side they are faster, or not."""
    first = blocks_for(80, "float32", 64, False)
    for again in (1.5, 2.5):
        rounds = iter([[[2.0], [1.0]], [[1.0]], [[2.0], [again]], [[0.5], [0.25]]])
        monkeypatch.setattr(tune, "milliseconds", lambda ready, *rest, rounds=rounds: next(rounds)[: len(ready)])
        rows = run_tiny(dataclasses.replace(TINY, encodings=("identity",), out=str(tmp_path)))
        (best,) = [row for row in rows if row["best"]]
        assert GpuBlocks(**best["blocks"]) == (SMALL if again == 1.5 else first)
        assert [row["ms"] for row in rows] == [2.0, again, None]
        assert best["forward_ms"] == (0.25 if again == 1.5 else 0.5)


def test_where_nothing_runs_the_package_s_blocks_stay(tmp_path, planted):
    planted |= dict.fromkeys((SMALL, blocks_for(80, "float32", 64, False)), math.inf)
    rows = run_tiny(dataclasses.replace(TINY, encodings=("identity",), out=str(tmp_path)))
    assert len(rows) == 3 and all(row["notes"] and not row["best"] for row in rows)
    assert json.loads((tmp_path / "gpu_blocks.json").read_text()) == table(json.loads(SHIPPED.read_text()), 80, [])
    tune.show(rows)


# The search --------------------------------------------------------------------------------------------------------------


def cost(blocks):
    """Least for 128 queries, 32 keys, 4 warps and 3 stages."""
    off = [math.log2(blocks.block_q / 128), math.log2(blocks.block_kv / 32), math.log2(blocks.num_warps / 4), blocks.num_stages - 3]
    return 1.0 + sum(x * x for x in off)


def near(blocks):
    return neighbours(blocks, False)


FIRST = GpuBlocks(32, 128, 16, 32, 8, 1)


def test_the_walk_ends_where_no_neighbour_is_faster():
    measured = []

    def measure(several):
        measured.append(several)
        return [cost(blocks) for blocks in several]

    best = walk(FIRST, measure, near)
    assert (best.block_q, best.block_kv, best.num_warps, best.num_stages) == (128, 32, 4, 3)
    later = [blocks for several in measured for blocks in several[1:]]
    assert len(set(later)) == len(later) and FIRST not in later  # nothing is tried twice
    centers = [several[0] for several in measured]
    assert [cost(b) for b in centers] == sorted((cost(b) for b in centers), reverse=True) and centers[-1] == best


def test_the_walk_goes_around_what_is_refused_and_does_not_follow_noise():
    def refusing(several):
        return ["no room" if blocks.block_kv == 64 or blocks == FIRST else cost(blocks) for blocks in several]

    best = walk(FIRST, refusing, near)
    assert best.block_kv == 128 and (best.block_q, best.num_warps, best.num_stages) == (128, 4, 3)
    assert walk(FIRST, lambda several: ["no room"] * len(several), near) is None
    noisy = {FIRST: 1.0}
    assert walk(FIRST, lambda several: [noisy.get(blocks, 0.995) for blocks in several], near) == FIRST


@pytest.mark.parametrize("counting", [False, True])
def test_neighbours_are_blocks_that_a_kernel_may_have(counting):
    for capability, (dtype, channels, counts) in itertools.product((80, 86, 90), KINDS):
        blocks = blocks_for(capability, dtype, channels, counts)
        found = neighbours(blocks, counting)
        for other in found:
            check_gpu_blocks(other)
        assert len(set(found)) == len(found) >= 5 and blocks not in found
    blocks = GpuBlocks(64, 32, 32, 64, 8, 2)
    found = neighbours(blocks, counting)
    assert blocks._replace(block_q=32, block_q_rows=32) in found and blocks._replace(block_kv=16, block_kv_count=16) in found
    assert (blocks._replace(block_kv_count=16) in found) == counting


# The table ---------------------------------------------------------------------------------------------------------------


def of_table(monkeypatch, lines, capability):
    monkeypatch.setattr(gpu_blocks, "_TABLE", lines)
    return [blocks_for(capability, *kind) for kind in KINDS]


def test_a_table_is_written_as_the_package_s_is():
    assert text_of(json.loads(SHIPPED.read_text())) == SHIPPED.read_text()


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100])
def test_only_the_calls_that_were_searched_change_and_only_on_that_gpu(monkeypatch, capability):
    shipped = json.loads(SHIPPED.read_text())
    row = {"dtype": "bfloat16", "channels": 128, "counts": True, "blocks": SMALL._asdict(), "best": True, "ms": 1.0}
    lines = table(shipped, capability, [row, row | {"blocks": IMPOSSIBLE._asdict(), "best": False}])
    want = of_table(monkeypatch, shipped, capability)
    want[KINDS.index(("bfloat16", 128, True))] = SMALL
    assert of_table(monkeypatch, lines, capability) == want
    assert [x for x in lines if x["capability"] != capability] == [x for x in shipped if x["capability"] != capability]
    assert {jnp.dtype(dtype).itemsize for dtype, _, _ in KINDS} == {x["bytes"] for x in lines}


def test_the_faster_lowering_comes_first(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    shipped, kind = json.loads(SHIPPED.read_text()), ("bfloat16", 128, False)
    both = [blocks_for(90, *kind, lowerings=(lowering,)) for lowering in ("triton", "mosaic")]
    about = dict(zip(("dtype", "channels", "counts"), kind, strict=True)) | {"best": True}
    for times in ((1.0, 2.0), (2.0, 1.0)):
        monkeypatch.setattr(gpu_blocks, "_TABLE", shipped)
        rows = [about | {"blocks": blocks._asdict(), "ms": ms} for blocks, ms in zip(both, times, strict=True)]
        monkeypatch.setattr(gpu_blocks, "_TABLE", table(shipped, 90, rows))
        assert blocks_for(90, *kind) == both[times.index(1.0)]
        assert {blocks_for(100, *kind).lowering, blocks_for(90, "float32", 128, False).lowering} == {"triton"}


# What goes wrong, and the command line -----------------------------------------------------------------------------------

NEEDS = "posjax bench tune needs an NVIDIA GPU, but jax's platform is cpu. Without one, the kernels use the blocks in "


def test_when_the_time_is_over_rows_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "_Bench", None)
    rows = tune.run(Tune(seconds=1e-9, out=str(tmp_path)), quiet=True, anywhere=True)
    assert [row["notes"] for row in rows] == [["not measured: the time limit was reached"]] * 12
    assert not any(row["best"] for row in rows)
    assert json.loads((tmp_path / "gpu_blocks.json").read_text()) == table(json.loads(SHIPPED.read_text()), 80, [])


def test_an_interruption_leaves_the_kinds_that_are_done(run, tmp_path, monkeypatch):
    row = {"dtype": "bfloat16", "channels": 128, "counts": False, "encoding": "identity", "blocks": SMALL._asdict(), "best": True}

    def search(config, kind, *rest):
        if kind[2] != "identity":
            raise KeyboardInterrupt
        return [row | {"ms": 1.0, "forward_ms": 0.5, "present": True, "notes": []}]

    monkeypatch.setattr(tune, "check_gpu", lambda *what: None)
    monkeypatch.setattr(tune, "_search", search)
    code, _, error = run("bench", "tune", "--out", tmp_path)
    assert code == 130 and f"the results so far are in {tmp_path}" in error
    assert len(json.loads((tmp_path / "tune.json").read_text())["rows"]) == 1
    lines = json.loads((tmp_path / "gpu_blocks.json").read_text())
    assert next(x["block_q"] for x in lines if (x["bytes"], x["channels"], x["counts"]) == (2, 128, False)) == 16


def test_the_table_says_by_how_much(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    about = {"dtype": "float32", "channels": 64, "counts": False, "encoding": "identity"}
    times = [(FIRST, 3.0, 1.5, []), (SMALL, 2.0, 1.25, []), (IMPOSSIBLE, None, None, ["no room"])]
    rows = [
        about | {"blocks": b._asdict(), "ms": both, "forward_ms": one, "present": b == FIRST, "best": b == SMALL, "notes": notes}
        for b, both, one, notes in times
    ]
    tune.show(rows)
    printed = capsys.readouterr().out
    assert "float32, 64, identity 16/16/16/16/4/1/triton 32/128/16/32/8/1/triton 2.00 1.50 1.20 3" in " ".join(printed.split())
    assert "float32, 64, identity, 16/16/32/16/4/1/triton: no room" in printed


def test_without_a_gpu_the_command_says_so(run, tmp_path):
    code, _, error = run("bench", "tune", "--out", tmp_path / "made")
    assert (code, error) == (2, f"posjax: {NEEDS}{SHIPPED}\n")
    assert not (tmp_path / "made").exists()


def test_the_module_is_a_command_without_tyro(capsys):
    for flags, code, words in ([], 1, NEEDS), (["--channels", "65"], 2, "invalid choice: 65"), (["--repeats", "0"], 2, "got 0"):
        with pytest.raises(SystemExit) as end:
            command.main(tune, Tune, flags)
        assert end.value.code == code and words in capsys.readouterr().err
    assert command.parse(Tune, "prog", ["--channels", "64", "128"]) == Tune(channels=(64, 128))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": (65,)}, "channels must be among 64, 128, 288, got 65"),
        ({"dtypes": ()}, r"dtypes must not be empty, got \(\)"),
        ({"encodings": ("identity", "rope")}, "encodings must have at most one that is contextual and one that is not, got"),
        ({"seconds": -1.0}, "seconds must be positive, got -1.0"),
        ({"length": 1}, "length must be an integer of at least 2, got 1"),
    ],
)
def test_wrong_values_are_told_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Tune(**fields)
