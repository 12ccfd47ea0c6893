"""posjax plan: what a step takes on chips that are not attached. The compiler here is that of CPUs, on eight devices."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from posjax import cli
from posjax.cli import plan as planning
from posjax.cli.plan import Planning
from posjax.compile import aot, plan, roofline
from posjax.compile.hlo import Collective, read_cost
from posjax.compile.plan import Plan, advice, candidates, make_plans
from posjax.compile.roofline import Chip, seconds_of
from posjax.hardware import GPUS, gpu_by_kind, peak_flops
from posjax.lab.config import Config, load_config
from posjax.lab.flops import attention_flops, model_flops
from posjax.lab.run import abstract_step

OPTIMIZED = True  # see conftest.py

SMALL = """
from posjax.lab.config import Config
def get_config():
    return Config(tokenizer="bpe", vocab_size=512, seq_length=256, batch_size=16, encoding="rope + cope(8)", num_layers=2,
                  embed_dim=64, num_heads=4, num_kv_heads=2, mlp_dim=192, activation="swiglu", mesh="fsdp=-1", steps=10,
                  warmup_steps=1)
"""


COMPILED = {}  # what the fields of the configuration were compiled to: the same in several tests


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(SMALL)
    return str(path)


@pytest.fixture
def on_cpus(monkeypatch):
    """``aot.compile_all`` with the devices of this machine in place of a topology's, in this process."""

    def compile_all(jobs, topology, *, schedules):
        ((target, kwargs),) = jobs
        assert target == "posjax.compile.plan:step_job"
        try:
            jitted, args = plan.step_job(jax.devices(), **kwargs)
        except ValueError as error:
            return [aot.Report(target, topology, failed=f"ValueError: {error}")]
        key = json.dumps({name: x for name, x in kwargs.items() if name not in ("config", "folder")}, sort_keys=True)
        if key not in COMPILED:
            compiled, mesh = jitted.lower(*args).compile(), args[1]["tokens"].sharding.mesh
            stats = compiled.memory_analysis()
            memory = {name: getattr(stats, f"{name}_size_in_bytes") for name in ("argument", "temp")}
            COMPILED[key] = memory, read_cost(compiled.as_text(), mesh.shape)
        memory, cost = COMPILED[key]
        return [aot.Report(target, topology, memory=memory, cost=cost, seconds=1.0)]

    monkeypatch.setattr(plan.aot, "compile_all", compile_all)


# Operations --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "window"), [("lm", None), ("lm", 3), ("lm", 50), ("mlm", None)])
def test_pairs_that_may_meet(task, window):
    config = Config(task=task, seq_length=12, batch_size=3, num_layers=2, num_heads=2, embed_dim=8, local_window_size=window)
    far = 12 if window is None else window
    pairs = sum(task == "mlm" or 0 <= q - k <= far for q in range(12) for k in range(12))
    assert attention_flops(config) == 2 * 3 * 2 * pairs * (2 * 4 + 2 * 4)  # q.k and weights times v, 4 channels each


def test_model_operations_are_those_of_the_compiled_step():
    """With dense attention, all of whose pairs it works out; RoPE's products are none of matrices."""
    config = Config(
        tokenizer="bpe", vocab_size=512, seq_length=64, batch_size=8, encoding="rope", num_layers=2, embed_dim=64, num_heads=4,
        num_kv_heads=2, mlp_dim=192, activation="swiglu", implementation="xla", steps=10, warmup_steps=1,
    )  # fmt: skip
    jitted, (state, batch) = abstract_step(config, jax.devices()[:1])
    found = read_cost(jitted.lower(state, batch).compile().as_text(), None)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    matrices = sum(leaf.size for path, leaf in leaves if "scale" not in jax.tree_util.keystr(path))
    assert found.uncounted == 0
    dense = 3 * 4 * 2 * 8 * 4 * 16 * 64 * 64
    assert found.flops == 6 * matrices * 8 * 64 + dense
    assert model_flops(config, matrices) == 6 * matrices * 8 * 64 + dense * (65 / 128)


@pytest.mark.parametrize(
    ("kind", "cores", "teraflops"),
    [
        ("TPU v4", 1, 137.5),
        ("TPU v5", 2, 459),  # a chip that is one device of two cores
        ("TPU v5p", 2, 459),
        ("TPU v5 lite", 1, 197),
        ("TPU v5e", 1, 197),
        ("TPU v6 lite", 1, 918),
        ("TPU v6e", 1, 918),
        ("TPU7x", 1, 1153.5),
        ("TPU v7x", 1, 1153.5),
        ("NVIDIA A100-SXM4-80GB", 1, 312),
        ("NVIDIA A100 80GB PCIe", 1, 312),
        ("NVIDIA A100-SXM4-40GB", 1, 312),
        ("NVIDIA A100-PCIE-40GB", 1, 312),
        ("NVIDIA H100 80GB HBM3", 1, 989),
        ("NVIDIA H100 PCIe", 1, 756),
        ("NVIDIA GH200 480GB", 1, 989),
        ("NVIDIA H200", 1, 989),
        ("NVIDIA L4", 1, 121),
        ("NVIDIA L40", 1, 181),
        ("NVIDIA L40S", 1, 362),
        ("NVIDIA B200", 1, 2250),
        ("NVIDIA GB200", 1, 2250),
        ("cpu", 1, None),
        ("AMD Instinct MI300X", 1, None),
    ],
)
def test_peaks_of_devices(kind, cores, teraflops):
    """Peaks are dense bfloat16, from the data sheets, under every name that jax gives a device."""
    found = peak_flops(SimpleNamespace(device_kind=kind, num_cores=cores))
    assert found == (teraflops and pytest.approx(teraflops * 1e12))


def test_names_of_gpus_are_found_by_their_own_patterns():
    assert {name: gpu_by_kind(gpu.device_kind) for name, gpu in GPUS.items()} == GPUS


# Links -------------------------------------------------------------------------------------------------------------------

TORUS = list(itertools.product(range(4), range(4), range(8)))  # v5p:4x4x8, the devices of a mesh in this order
CHIP = Chip(memory=1.0, flops=1.0, bandwidth=1.0, torus=200e9)
MESH = {"data": 4, "fsdp": 4, "context": 4, "tensor": 2}

LINKS = [
    # all-gathers and reduce-scatters bring 3/4 of all to each of four; the ring along x closes
    ("all-gather", ("data",), 3 / 4 / 200e9),
    ("reduce-scatter", ("fsdp",), 3 / 4 / 200e9),
    ("all-reduce", ("fsdp",), 2 * 3 / 4 / 200e9),
    # every second of eight along z: not all of the ring
    ("all-gather", ("context",), 3 / 4 / 100e9),
    ("all-gather", ("tensor",), 1 / 2 / 100e9),
    ("collective-permute", ("context",), 1 / 100e9),
    # over x and y the links of both, over z the whole ring
    ("all-gather", ("data", "fsdp"), 15 / 16 / 400e9),
    ("all-gather", ("context", "tensor"), 7 / 8 / 200e9),
    ("all-reduce", ("data", "fsdp", "context", "tensor"), 2 * 127 / 128 / 600e9),
]


@pytest.mark.parametrize(("kind", "axes", "expected"), LINKS)
def test_seconds_on_a_torus(kind, axes, expected):
    one = Collective(kind, axes, 7, 10**9, 10**9)
    assert seconds_of(one, MESH, TORUS, CHIP, "v5p:4x4x8") == pytest.approx(1e9 * expected)


def test_a_small_slice_has_no_rings():
    places = [(x, y) for x in range(8) for y in range(8)]
    mesh = {"data": 8, "fsdp": 8, "context": 1, "tensor": 1}
    one = Collective("all-gather", ("fsdp",), 1, 10**9, 10**9)
    assert seconds_of(one, mesh, places, CHIP, "v5e:8x8") == pytest.approx(7 / 8 * 1e9 / 100e9)
    assert seconds_of(dataclasses.replace(one, axes=("tensor",)), mesh, places, CHIP, "v5e:8x8") == 0.0


def test_gpus_of_a_host_and_between_hosts():
    chip = roofline.chip_of("h200:1x2x8", 1)
    mesh = {"data": 2, "fsdp": 8, "context": 1, "tensor": 1}
    places = [(host,) for host in range(2) for _ in range(8)]
    within, between = (Collective("all-gather", (axis,), 1, 10**9, 10**9) for axis in ("fsdp", "data"))
    assert seconds_of(within, mesh, places, chip, "h200:1x2x8") == pytest.approx(7 / 8 * 1e9 / 450e9)
    assert seconds_of(between, mesh, places, chip, "h200:1x2x8") == pytest.approx(1 / 2 * 1e9 / 50e9)


def test_chips_of_one_and_of_two_cores():
    """The data sheets', per chip."""
    assert roofline.chip_of("v5p:8x8x8", 2) == Chip(95 * 2**30, 459e12, 2765e9, 200e9)
    assert roofline.chip_of("v5e:16x16", 1) == Chip(16 * 2**30, 197e12, 819e9, 100e9)


# Plans -------------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_the_compiler_says(config, on_cpus):
    (found,) = make_plans(config, "h200:1x1x8", [dict(mesh="data=2,fsdp=4")])
    jitted, (state, batch) = abstract_step(config, jax.devices(), mesh="data=2,fsdp=4")
    assert found.mesh == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))

    def part(tree):
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(tree))

    stats = jitted.lower(state, batch).compile().memory_analysis()
    assert found.memory["parameters"] == part(state.params) < 4 * found.parameters / 3
    assert found.memory["optimizer"] == part(state.opt_state)
    assert found.used == pytest.approx(stats.argument_size_in_bytes + stats.temp_size_in_bytes, rel=0.001)
    assert found.fits and found.capacity == 141 * 2**30
    assert set(found.seconds) >= {"compute", "memory", "fsdp", "data+fsdp"}
    gathered = max(one.largest for one in found.collectives if one.kind == "all-gather")
    assert gathered == 4 * 512 * 64  # the embedding, and twice its gradient, with that of the last norm and a few numbers
    assert 2 * gathered <= found.largest < 2.1 * gathered
    assert sum(found.shares().values()) == pytest.approx(1.0)
    assert found.step_s_lower <= found.step_s and found.mfu(found.step_s) == pytest.approx(
        found.flops["model"] / 989e12 / found.step_s
    )


def test_what_is_beside_computation_is_not_waited_for():
    some = dict(config="", topology="", mesh={}, remat="none", accumulate_steps=1, batch_size=1, seq_length=1)
    one = Plan(**some, seconds={"compute": 2.0, "memory": 3.0, "fsdp": 1.0, "tensor": 0.5}, overlapped_s=0.75)
    assert (one.compute_s, one.comm_s, one.step_s_lower, one.step_s) == (3.0, 1.5, 3.0, 3.0 + 1.5 - 0.75)
    assert one.shares() == {"memory": 3 / 4.5, "fsdp": 1 / 4.5, "tensor": 0.5 / 4.5}


def test_the_command(config, on_cpus, capsys, tmp_path):
    out = tmp_path / "plans" / "small.json"
    cli.main(["plan", config, "--topology", "h200:1x1x8", "--mesh", "data=2,fsdp=4", "--out", str(out)])
    said = capsys.readouterr().out
    assert "on h200:1x1x8, 8 devices: data 2, fsdp 4, context 1, tensor 1" in said
    assert "16 sequences of 256 tokens per step, 4,096 tokens in total" in said
    assert "Fits. Each device stores 1/4 of the large weights" in said and "processes 2 of 16 sequences" in said
    (stored,) = json.loads(out.read_text())
    assert stored["mesh"]["fsdp"] == 4 and stored["memory"]["parameters"] > 0


@pytest.mark.thorough
def test_a_search_ranks_those_that_fit_by_their_time(config, on_cpus, capsys):
    cli.main(["plan", config, "--topology", "h200:1x1x8", "--search", "--candidates", "3"])
    said = capsys.readouterr().out
    ranking = said[: said.index("Memory per device")]
    assert ranking.count(" yes ") == 3  # of one mesh, each policy
    times = [float(line.split()[-2]) for line in ranking.splitlines() if " yes " in line]
    assert times == sorted(times)


FAILURE = "XlaRuntimeError: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."


TEMPORARIES = "JaxRuntimeError: RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory \
required for HLO temporaries (212.10G) exceeds available HBM (15.75G). HLO module: jit_step."


def test_both_messages_of_the_compiler():
    """One has the whole program in it, the other what comes beside the arguments."""
    assert plan._bytes_asked_for(FAILURE, 2**30) == int(19.5 * 2**30)
    assert plan._bytes_asked_for(TEMPORARIES, 2**30) == int(212.1 * 2**30)
    assert plan._bytes_asked_for("ValueError: no", 2**30) is None


def test_what_does_not_fit_says_what_to_change(config, monkeypatch, capsys):
    def too_small(jobs, topology, *, schedules):
        ((target, kwargs),) = jobs
        plan.step_job(jax.devices(), **kwargs)
        return [aot.Report(target, topology, failed=FAILURE)]

    monkeypatch.setattr(plan.aot, "compile_all", too_small)
    cli.main(["plan", config, "--topology", "h200:1x1x8", "--mesh", "data=8"])
    said = capsys.readouterr().out
    assert "Does not fit: needs 20.50 of 141.0 GiB" in said
    advised = [line.strip() for line in said[said.index("To reduce memory, try:") :].splitlines()[1:] if line.strip()]
    assert advised[0].startswith("--remat full")
    assert advised[1].startswith("--accumulate_steps 2 processes 1 of a device's 2 sequences")
    assert any(line.startswith("--mesh fsdp=8 shards the state over all devices") for line in advised)
    assert advised[-1] == "a topology with more devices"


def test_advice_begins_with_what_is_largest():
    some = dict(config="", topology="h200:1x1x8", accumulate_steps=1, batch_size=8, seq_length=4096, capacity=1.0)
    mesh = {"data": 8, "fsdp": 1, "context": 1, "tensor": 1}
    config = Config(batch_size=8, seq_length=4096, remat="full", num_heads=8, embed_dim=64)
    of_state = Plan(**some, mesh=mesh, remat="full", memory={"parameters": 4, "optimizer": 8, "activations": 1})
    assert advice(of_state, config)[0].startswith("--mesh fsdp=8 ")
    of_activations = dataclasses.replace(of_state, memory={"parameters": 1, "activations": 9})
    assert advice(of_activations, config)[0] == "--mesh data=4,context=2 shards each sequence over 2 devices"


@pytest.mark.parametrize(("batch", "length"), [(16, 8192), (4, 131_072), (1024, 8192)])
def test_candidates_fit_the_batch(batch, length):
    config = Config(batch_size=batch, seq_length=length, num_heads=8, num_kv_heads=4, embed_dim=1024, tokenizer="bpe")
    found = list(candidates(config, 64, 12))
    assert len(found) == 12 and {one["remat"] for one in found} == {"none", "attention", "full"}
    for one in found:
        sizes = dict(data=1, fsdp=1, context=1, tensor=1) | {k: int(v) for k, v in (p.split("=") for p in one["mesh"].split(","))}
        assert math.prod(sizes.values()) == 64
        assert batch % (sizes["data"] * sizes["fsdp"]) == 0 and length % (2 * sizes["context"]) == 0 and 4 % sizes["tensor"] == 0


def test_a_config_may_be_given_by_name(monkeypatch):
    def compile_all(jobs, topology, *, schedules):
        ((_, kwargs),) = jobs
        assert load_config(kwargs["config"]) == load_config("pretrain_125m")
        raise NotImplementedError("compiled")

    monkeypatch.setattr(plan.aot, "compile_all", compile_all)
    with pytest.raises(NotImplementedError, match="compiled"):
        make_plans("pretrain_125m", "v5e:4x4", [{}])


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["--topology", "v9:2x2"], "topology must be a generation and a shape, such as"),
        (["--topology", "h200:1x1x8", "--mesh", "fsdp=3"], "mesh 'fsdp=3' does not fit: fsdp * context * tensor must divide"),
        (["--topology", "h200:1x1x8", "--batch_size", "12"], "batch_size must be a multiple of 8 on 8 devices"),
        (["--topology", "h200:1x1x8", "--candidates", "0"], "candidates must be at least 1, got 0"),
    ),
)
def test_errors(config, on_cpus, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", config, *arguments])
    assert caught.value.code in (1, 2)
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_config_must_be_named(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "--topology", "h200:1x1x8"])
    assert "a config must come first" in capsys.readouterr().err


def test_devices_of_a_topology():
    assert [planning._count(name) for name in ("v5e:16x16", "v5p:8x8x8", "tpu7x:2x2x1", "h200:1x2x8")] == [256, 512, 8, 16]
    assert Planning("h200:1x1x8").topology == "h200:1x1x8"


def test_neighbours_of_a_mesh_lie_where_its_devices_are():
    group = roofline._group(("context",), MESH, TORUS)
    assert group == [tuple(p) for p in np.array(TORUS).reshape(4, 4, 4, 2, 3)[0, 0, :, 0]]
    assert roofline._group(("data", "tensor"), MESH, TORUS)[:3] == [(0, 0, 0), (0, 0, 1), (1, 0, 0)]
