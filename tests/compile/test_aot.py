"""posjax.compile.aot and posjax bench schedule: what is read from the compiler's texts, and what becomes of jobs that fail."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from posjax.bench import schedule
from posjax.bench.schedule import ScheduleBench
from posjax.compile import aot, aot_gpu
from posjax.compile.aot import Kernel, Report, Section
from posjax.hardware import GENERATIONS, GPUS

OPTIMIZED = True  # see conftest.py

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
HERE = Path(__file__).stem


# Jobs, found by name in the compiler's process


def raising(why):
    raise ValueError(why)


def aborting():
    os.abort()


def leaving(text, code):
    os.write(2, text.encode())
    os._exit(code)


def doubling(size):
    return lambda x: x + x, (jax.ShapeDtypeStruct((size, size), jnp.float32),)


def walking(devices, length):
    """A Pallas kernel with a loop in its grid's loop, between products of sharded matrices."""
    import numpy as np
    from jax.experimental import pallas as pl

    def body(x_ref, o_ref):
        def add(n, total):
            return total + jnp.dot(x_ref[...], x_ref[...] * n, preferred_element_type=jnp.float32)

        o_ref[...] = jax.lax.fori_loop(0, x_ref[0, 0].astype(jnp.int32), add, jnp.zeros((128, 128), jnp.float32))

    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("data",))
    spec = jax.sharding.PartitionSpec("data")
    block = pl.BlockSpec((128, 128), lambda i: (i, 0))
    call = pl.pallas_call(
        body, grid=(length // 2 // 128,), in_specs=[block], out_specs=block, name="walk",
        out_shape=jax.ShapeDtypeStruct((length // 2, 128), jnp.float32),
    )  # fmt: skip

    def function(x, w):
        return (jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x) @ w).sum(0)

    x = jax.ShapeDtypeStruct((length, 128), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
    return function, (x, jax.ShapeDtypeStruct((128, 256), jnp.float32))


# The compiler's texts ----------------------------------------------------------------------------------------------------

# Two delay slots. The grid's loop is bundles 1 to 15; a branch over the start of a row, 4 and 5; over the walk, 8 to 12, which is a
# loop of 9 to 12 but for one bundle; in it a branch that multiplies no matrices, 12 alone.
SCHEDULE = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov.u32 0 }
   0x1 LB: > { %s2 = sphi 0  ;;  %v9 = vmatmul.bf16.gmra.mxu0 %v1 } /* Start region 10 :: Start region 2 */
   0x2   : > { %5 = sbr.rel (%p1) target = $region4  ;;  %s3 = sadd.s32 1, %s2 }
   0x3   : > {} /* layout:
second_minor_factor: 1 */
   0x4   :  {} /* End region 2 */
   0x5   : > { %6 = vst [vmem:[#allocation3] sm:$0xff] %v0 }
   0x6 PF: > { %7 = sbr.rel (%p2) target = $region6 } /* Start/End empty region 4 :: Start region 14 */
   0x7   : > {}
   0x8   :  {}
   0x9   : > { %s4 = smov.u32 0 } /* Start region 5 */
   0xa LB: >> { %v2 = vmatmul.mubr.bf16.gmra.mxu0 %v1  ;;  %v3 = vmatmul.mubr.bf16.gmra.mxu1 %v1 } /* Start region 12 */
   0xb   : >> { %8 = sbr.rel (!%p3) target = $region12  ;;  %v4 = vmatprep.mubr.bf16.mxu0 %v1 }
   0xc   : >> {}
   0xd   : >> { %v5 = vpop.f32.mrf.mxu0 }
   0xe PF: > { %9 = sbr.rel (!%p4) target = $region10 } /* Start/End empty region 6 */
   0xf   :  {}
  0x10   : > {}
  0x11   :  { %10 = vsyncpa [#allocation9], 1 }
"""


def test_loops_and_branches_of_a_schedule():
    bundles, sections = aot.read_schedule(SCHEDULE, delay_slots=2)
    assert bundles == 18
    assert sections == (
        Section("loop", first=1, bundles=16, depth=1, products=3),
        Section("branch", first=5, bundles=1, depth=1, products=0),
        Section("branch", first=9, bundles=5, depth=1, products=2),
        Section("loop", first=10, bundles=4, depth=2, products=2),
    )


def test_the_work_on_a_tile_is_in_the_inner_loop():
    """And without that loop in the grid's, less what else a turn may do."""
    bundles, sections = aot.read_schedule(SCHEDULE, delay_slots=2)
    grid, start, walk, inner = sections
    assert Kernel("k", "", bundles, sections, None).tiles == ((inner, 4),)
    only = dataclasses.replace(grid, products=2)
    assert Kernel("k", "", bundles, (only, start, walk), None).tiles == ((walk, 15),)
    # Two forms of the work; a turn has one of them.
    other = Section("branch", first=6, bundles=2, depth=1, products=4)
    only = dataclasses.replace(grid, products=6)
    assert Kernel("k", "", bundles, (only, start, other, walk), None).tiles == ((other, 10), (walk, 13))
    assert Kernel("k", "", bundles, (dataclasses.replace(grid, products=0),), None).tiles == ()


PROGRAM = """\
HloModule jit_f

ENTRY %main (x: bf16[8,4]) -> bf16[4,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  %topk = f32[8]{0} custom-call(%x), custom_call_target="TopK"
  ROOT %my_kernel.3 = bf16[4,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", attributes={kernel_metadata={
"a":"b"
}}, metadata={op_name="jit(f)/pallas_call" stack_frame_id=7}, \
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"1024","size":"4096"}]}
}
"""


def test_kernels_of_a_program():
    kernels, others = aot.read_program(PROGRAM)
    assert kernels == [Kernel("my_kernel.3", "jit(f)/pallas_call", None, (), 1024 + 4096)]
    assert others == {"TopK": 1}


def test_a_kernel_finds_its_schedule(tmp_path):
    """Under its name, or under that of its equal."""
    (tmp_path / "17-my_kernel.3-01-final_bundles.txt").write_text(SCHEDULE)
    (tmp_path / "17-my_kernel.3-00-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    (tmp_path / "18-other-01-final_bundles.txt").write_text("")
    for name, bundles in (("my_kernel.3", 18), ("my_kernel.7", 18), ("another", None)):
        assert aot._with_schedule(Kernel(name, "", None, (), None), tmp_path, 2).bundles == bundles


# Chips and topologies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("topology", ["v6", "v6e", "v6e:", "v6e:2x", "v6e:2x2x", "v3:2x2", ""])
def test_topologies_are_checked(topology):
    with pytest.raises(ValueError, match=f"topology must be a generation and a shape, such as v4:2x2x1, .*, got '{topology}'"):
        aot.compile_all([], topology)


@pytest.mark.parametrize("topology", ["h200", "h200:", "h200:1x8", "a100:1x1x"])
def test_topologies_of_gpus_are_checked(topology):
    with pytest.raises(ValueError, match="topology must be a GPU and the numbers of slices, hosts and GPUs per host"):
        aot.compile_all([], topology)


PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'posjax_attention_forward' for 'sm_90a'
ptxas info    : Function properties for posjax_attention_forward
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 170 registers, used 1 barriers
ptxas info    : Compile time = 293.335 ms
ptxas info    : Compiling entry function 'loop_fusion' for 'sm_90a'
ptxas info    : Function properties for loop_fusion
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_registers_of_kernels(tmp_path, monkeypatch):
    wanted = {"posjax_attention_forward": {"registers": 170, "spilled": 0}, "loop_fusion": {"registers": 255, "spilled": 20}}
    assert aot_gpu.read_ptxas(PTXAS) == wanted
    ptxas = tmp_path / "bin" / "ptxas"
    ptxas.parent.mkdir()
    ptxas.write_text(f"#!/bin/sh\n[ $2 = -arch=sm_90a ] && cat >&2 <<END\n{PTXAS}END\n")
    ptxas.chmod(0o755)
    (tmp_path / "module.ptx").touch()
    monkeypatch.setattr(aot_gpu, "_toolkit", lambda: tmp_path)
    assert aot_gpu.resources(tmp_path, GPUS["h200"]) == wanted


def test_resources_of_mosaic_kernels_are_what_their_compiler_wrote_down(tmp_path, monkeypatch):
    """It is not asked again of their PTX."""
    monkeypatch.setattr(aot_gpu, "_toolkit", lambda: tmp_path)
    (tmp_path / "posjax_attention_mosaic_forward_0.ptx").touch()
    said = PTXAS.replace("posjax_attention_forward", "f_mosaic_gpu_kernel")
    (tmp_path / "posjax_attention_mosaic_forward_0.ptxas").write_text(said)
    assert aot_gpu.resources(tmp_path, GPUS["h200"])["f"] == aot_gpu.read_ptxas(PTXAS)["posjax_attention_forward"]


def test_triton_kernels_of_a_program():
    line = """
  %call.1 = bf16[8,128]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/pallas_call"}, \
backend_config={debug = false, grid_x = 64 : i32, ir = "ML", name = "posjax_attention_forward", num_stages = 2 : i32}
"""
    kernels, others = aot.read_program(f"ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {{{line}}}\n")
    assert [(kernel.name, kernel.op_name) for kernel in kernels] == [("posjax_attention_forward", "jit(f)/pallas_call")]
    assert not others


def test_mosaic_kernels_of_a_program_have_their_names_from_what_called_them():
    line = """
  %mpmd_map.0 = bf16[8,128]{1,0} custom-call(%x), custom_call_target="mosaic_gpu_v2", \
metadata={op_name="jit(f)/posjax_attention_mosaic_forward/mpmd_map"}, backend_config={module = "ML"}
"""
    kernels, others = aot.read_program(f"ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {{{line}}}\n")
    assert [kernel.name for kernel in kernels] == ["posjax_attention_mosaic_forward"]
    assert not others


def test_without_the_plugin_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs jax's CUDA plugin; add it with: pip install 'posjax\[gpu-aot\]'"):
        aot.compile_all([], "h200:1x1x1")


def test_chips_are_those_of_jax():
    """Per core, as in jax's own table; bandwidths there are rounded."""
    from jax.experimental.pallas import tpu as pltpu

    for name, chip in GENERATIONS.items():
        version = getattr(pltpu.ChipVersion, f"TPU_{name.removeprefix('tpu').upper()}")
        info = pltpu.get_tpu_info_for_chip(version, 1)
        assert chip.cores == version.num_physical_tensor_cores_per_chip
        assert chip.vmem == info.vmem_capacity_bytes
        assert chip.flops == pytest.approx(info.bf16_ops_per_second, rel=0.005)
        assert chip.bandwidth == pytest.approx(info.mem_bw_bytes_per_second, rel=0.15)
        per_bundle = info.num_mxus * info.mxu_column_size**2 * 2 * (2 if info.mxu_column_size == 256 else 1)
        assert chip.clock == pytest.approx(info.bf16_ops_per_second / per_bundle, rel=0.005)


# Jobs that fail ----------------------------------------------------------------------------------------------------------


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'posjax\[tpu-aot\]'"):
        aot.compile_ahead(f"{HERE}:doubling", {"size": 8}, "v6e:2x2")


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """Processes of the compiler that compile for the CPU: what is tested is what becomes of their ends."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if sys.argv[0] == '-m':\n"
        "    import jax\n"
        "    from jax.experimental import topologies\n"
        "    topologies.get_topology_desc = lambda **_: type('Topology', (), {'devices': jax.devices()})\n"
    )
    monkeypatch.setenv("TPU_LIBRARY_PATH", "none")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_job_that_fails_takes_no_other_along(on_cpu):
    jobs = [("raising", {"why": "no good"}), ("doubling", {"size": 8}), ("aborting", {}), ("doubling", {"size": 16})]
    jobs.append(("leaving", {"text": "W1122 a warning\nF1122 x.cc:3] Check failed: a == b\n@ 0x5581 main\n", "code": 3}))
    jobs.append(("doubling", {"size": 32}))
    reports = aot.compile_all([(f"{HERE}:{name}", kwargs) for name, kwargs in jobs], "v6e:2x2")
    assert [report.failed is None for report in reports] == [False, True, False, True, False, True]
    assert [report.memory["output"] for report in reports[1::2]] == [4 * 8**2, 4 * 16**2, 4 * 32**2]
    assert reports[0].failed == "ValueError: no good"
    assert reports[2].failed.startswith("the compiler's process ended (killed by signal 6)")
    assert reports[4].failed == "the compiler's process ended (exit status 3); F1122 x.cc:3] Check failed: a == b"


def test_what_fails_alone_is_an_error_with_the_topology(monkeypatch):
    def failed(jobs, topology, flags, schedules):
        return [Report(target, topology, failed="ValueError: no good") for target, _ in jobs]

    monkeypatch.setattr(aot, "compile_all", failed)
    with pytest.raises(RuntimeError, match=r"test_aot:raising did not compile for v5p:8x8x8: ValueError: no good"):
        aot.compile_ahead(f"{HERE}:raising", {"why": "no good"}, "v5p:8x8x8")


def test_a_compiler_that_does_not_start_is_an_error(on_cpu, monkeypatch):
    def run(*args, stderr, **kwargs):
        stderr.write(b"ERROR: Unknown command line flag 'xla_nonsense'\n")
        return subprocess.CompletedProcess(args, 1)

    monkeypatch.setattr(aot.subprocess, "run", run)
    with pytest.raises(
        RuntimeError, match=r"compiling for v4:2x2x1 failed: .*exit status 1.*Unknown command line flag 'xla_nonsense'"
    ):
        aot.compile_all([(f"{HERE}:doubling", {"size": 8})], "v4:2x2x1", flags=("--xla_nonsense=1",))


# A real compiler ---------------------------------------------------------------------------------------------------------


@needs_libtpu
def test_a_kernel_on_two_chips(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    report = aot.compile_ahead(f"{HERE}:walking", {"length": 1024}, "v6e:2x2")
    assert Report.from_json(json.loads(json.dumps(dataclasses.asdict(report)))) == report
    assert report.device_kind == "TPU v6 lite"
    assert report.memory["argument"] == 4 * (512 * 128 + 128 * 256)
    assert report.memory["output"] >= 4 * 256
    (one,) = report.collectives
    assert (one.kind, one.axes, one.count, one.bytes) == ("all-reduce", ("data",), 1, 4 * 256)
    (kernel,) = report.kernels
    assert kernel.name.startswith("walk") and "pallas_call" in kernel.op_name
    assert kernel.vmem >= 4 * 2 * 128 * 128
    grid, inner = kernel.loops
    assert (grid.depth, inner.depth) == (1, 2) and grid.contains(inner)
    assert kernel.bundles > grid.bundles > inner.bundles > 128 * 128 // (8 * 256)
    assert kernel.tiles == ((inner, inner.bundles),)
    (quick,) = aot.compile_ahead(f"{HERE}:walking", {"length": 1024}, "v6e:2x2", schedules=False).kernels
    assert quick == dataclasses.replace(kernel, bundles=None, sections=())


# posjax bench schedule ---------------------------------------------------------------------------------------------------


def splash_kernel(name="splash_mha_fwd_no_residuals.1"):
    loop, work = Section("loop", 10, 1200, 1, 192), Section("branch", 200, 900, 1, 192)
    end = Section("branch", 1120, 50, 1, 0)
    return Kernel(name, "", 1300, (loop, work, end), 2_500_000)


def compiled(jobs, topology):
    """Splash attention alone compiles."""
    reports = []
    for target, kwargs in jobs:
        failed = None if "splash" in target else "NotImplementedError: not yet\nmore of it"
        names = ["fwd_no_residuals"] if not kwargs["with_gradients"] else ["fwd_residuals", "dkv_no_residuals"]
        kernels = tuple(splash_kernel(f"splash_mha_{name}.1") for name in names) if failed is None else ()
        memory = {"argument": 3 * 8 * 1024 * 128 * 2, "output": 8 * 1024 * 128 * 2, "peak": 9_000_000} if failed is None else {}
        reports.append(Report(target, topology, failed=failed, memory=memory, kernels=kernels))
    return reports


def test_a_run_has_a_row_for_each_contestant_and_says_what_failed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(aot, "compile_all", compiled)
    flags = ["--generations", "v6e", "v4", "--encodings", "rope", "cope(64)", "--seq-len", 1024, "--out", tmp_path / "made"]
    code, shown, _ = run("bench", "schedule", *flags)
    assert code == 0
    whole = json.loads((tmp_path / "made" / "schedule.json").read_text())
    assert whole["config"]["seq_len"] == 1024 and set(whole["hardware"]["generations"]) == {"v6e", "v4"}
    rows = [row for row in whole["rows"] if row["generation"] == "v6e"]
    assert [row["contestant"] for row in rows] == [
        *("rope, pallas", "cope(64), pallas", "splash 128 x 128", "splash 512 x 512"),
        *("rope, pallas", "cope(64), pallas", "splash 128 x 128", "splash 128 x 128, fused backward"),
        *("splash 512 x 512", "splash 512 x 512, fused backward"),
    ]
    assert rows[0]["kernels"] == [] and rows[0]["notes"] == ["NotImplementedError: not yet"]
    (kernel,) = rows[3]["kernels"]
    (tile,) = kernel["tiles"]
    assert (tile["bundles"], tile["turn"], kernel["bundles"], kernel["vmem_bytes"]) == (900, 1150, 1300, 2_500_000)
    # Two products of 512 x 512 x 128 at 524,288 operations a cycle take 256; 8 heads have 3 tiles each, and 8 MB take longer.
    assert kernel["roofline_bundles"] == pytest.approx(1.7508e9 * 8 * 2**20 / 24 / 1640e9, rel=1e-3)
    assert tile["distance"] == pytest.approx(1150 / kernel["roofline_bundles"])
    split, fused = (row["kernels"][1]["roofline_bundles"] for row in rows[8:])
    assert fused / split == pytest.approx(5 / 4)
    assert "splash 512 x 512" in shown and "NotImplementedError: not yet" in shown and "more of it" not in shown
    text = (tmp_path / "made" / "schedule.md").read_text()
    assert "## v4, forward and backward" in text and "| splash 512 x 512 | fwd_no_residuals | 900 | 1150 | " in text


def test_jobs_are_those_of_posjax_and_splash():
    """Traced, with as many arguments as the functions take."""
    sizes = {"seq_len": 256, "heads": 4, "kv_heads": 2, "head_dim": 128, "batch": 2, "dtype": "bfloat16"}
    function, args = schedule.splash_job(tile=128, with_gradients=True, fused=False, **sizes)
    out, gradients = jax.eval_shape(function, *args)
    assert out.shape == gradients[0].shape == (2, 4, 256, 128) and gradients[2].shape == (2, 2, 256, 128)
    function, args = schedule.posjax_job(spec="rope + cope(8)", with_gradients=True, **sizes)
    assert args[1].shape == (2, 256, 4, 128) and args[2].shape == args[3].shape == (2, 256, 2, 128)
    assert jax.tree.leaves(args[4])[0].shape[-2:] == (8, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generations": ()}, r"generations must not be empty, got \(\)"),
        ({"generations": ("v4", "v4")}, "generations must all differ"),
        ({"encodings": (), "peers": False}, "encodings must not be empty without peers"),
        ({"encodings": ("cope(64) / identity",)}, "encodings must each be for one layer"),
        ({"seq_len": 1}, "seq_len must be an integer of at least 2, got 1"),
        ({"kv_heads": 3}, "kv_heads must divide heads=8, got 3"),
        ({"tile": 192}, "tile must be a multiple of 128, got 192"),
    ],
)
def test_wrong_settings_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        ScheduleBench(**fields)


def test_the_command_line_knows_schedule(run):
    code, _, error = run("bench", "schedul")
    assert code == 2 and "did you mean schedule?" in error
    code, out, _ = run("bench", "schedule", "--help")
    assert code == 0
    for field in dataclasses.fields(ScheduleBench):
        assert f"--{field.name.replace('_', '-')}" in out
    assert sys.modules["posjax.bench.schedule"] is schedule
