"""posjax plan: prints the cost of a training step as tables, and suggests changes if it does not fit in memory."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from posjax.bench.results import print_table
from posjax.checks import check, short
from posjax.cli.common import parse
from posjax.compile import aot, aot_gpu
from posjax.compile.plan import Plan, advice, candidates, make_plans, mesh_flag
from posjax.files import write_json
from posjax.lab.config import Config, load_config

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Planning:
    """Configures posjax plan, in addition to the fields of a configuration.

    Attributes:
      topology: a TPU generation and a shape, e.g. v5p:8x8x8 (v4, v5e, v5p, v6e, tpu7x), or a GPU and the numbers of slices, hosts
        and GPUs per host, e.g. h200:1x1x8.
      search: compiles several meshes and remat policies and ranks them.
      candidates: number of plans that a search compiles, one to two minutes each.
      out: JSON file to write the plans to. Empty: none is written.
    """

    topology: str = "v5e:16x16"
    search: tyro.conf.UseCounterAction[int] = 0
    candidates: int = 6
    out: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*){1,2}", self.topology):
            raise ValueError(
                f"topology must be a generation and a shape, such as v5p:8x8x8 or h200:1x1x8, got {short(self.topology)}"
            )
        if aot_gpu.gpu_of(self.topology) is None:
            aot.generation_of(self.topology)
        check("candidates", self.candidates, int, least=1, what="be at least 1")


def plan(args: Sequence[str]) -> None:
    """Runs posjax plan: predicts memory, collectives and time of a step by compiling it for chips that are not attached."""
    planning, config = parse(args, "plan", Planning)
    if planning.out:
        try:  # before minutes of compilation
            Path(planning.out).parent.mkdir(parents=True, exist_ok=True)
            Path(planning.out).open("a").close()
        except OSError as error:
            raise ValueError(f"out must be a file that can be written, got {short(planning.out)}: {error.strerror}") from None
    base = load_config(args[0])
    changed = {f.name: v for f in dataclasses.fields(base) if (v := getattr(config, f.name)) != getattr(base, f.name)}
    run(args[0], config, changed, planning)


def run(path: str, config: Config, fields: Mapping[str, Any], planning: Planning) -> list[Plan]:
    """Compiles the plans of a command, prints them and returns them; a search puts the best plan first.

    Args:
      path: the config file.
      config: the configuration in that file, with ``fields`` replaced.
      fields: the fields whose values differ from the file's.
      planning: the flags of posjax plan.

    Raises:
      ValueError: no mesh of the topology divides batch_size and seq_length.
    """
    from posjax.bench.attention import show_progress

    variants = [dict(fields)]
    if planning.search:
        variants = [dict(fields) | candidate for candidate in candidates(config, _count(planning.topology), planning.candidates)]
        if not variants:
            got = f"batch_size={config.batch_size} and seq_length={config.seq_length}"
            raise ValueError(f"batch_size and seq_length must be divisible over some mesh of {planning.topology}, got {got}")
    with show_progress(quiet=False) as progress:
        progress("compiling", 0, len(variants))
        compiled: list[Plan] = []

        def done(plan: Plan) -> None:
            compiled.append(plan)
            progress("compiling", len(compiled), len(variants))

        plans = make_plans(path, planning.topology, variants, done=done)
    if planning.search:
        plans.sort(key=lambda plan: (not plan.fits, plan.step_s if plan.fits else plan.used))
        _print_ranking(plans)
    _print_plan(plans[0], config)
    if planning.out:
        Path(planning.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(planning.out), [dataclasses.asdict(plan) for plan in plans], indent=1)
    return plans


_TWO_DEVICES = ("v4", "tpu7x")  # generations whose chips are two JAX devices each, one per core


def _count(topology: str) -> int:
    """Returns the number of JAX devices in a topology."""
    name, _, shape = topology.partition(":")
    return math.prod(int(n) for n in shape.split("x")) * (2 if name in _TWO_DEVICES else 1)


def _print_ranking(plans: Sequence[Plan]) -> None:
    lines = []
    for plan in plans:
        used = f"{plan.used / _GIB:.2f}"
        if plan.failed is not None:
            lines.append([mesh_flag(plan.mesh), plan.remat, used, "no", "", ""])
        else:
            verdict = "yes" if plan.fits else "no"
            lines.append([mesh_flag(plan.mesh), plan.remat, used, verdict, f"{plan.step_s:.3f}", f"{plan.mfu(plan.step_s):.0%}"])
    heads = ["mesh", "remat", "GiB per device", "fits", "s per step", "MFU"]
    print_table(
        f"{plans[0].topology}, {plans[0].capacity / _GIB:.0f} GiB per device: plans that fit, fastest first, then the others",
        heads,
        lines,
        [],
    )


def _print_plan(plan: Plan, config: Config) -> None:
    devices = math.prod(plan.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    tokens = plan.batch_size * plan.seq_length
    print(
        f"\n{plan.config} on {plan.topology}, {devices} devices: {mesh}; remat {plan.remat}, accumulate_steps "
        f"{plan.accumulate_steps}\n{plan.parameters / 1e9:.3f} billion parameters; {plan.batch_size} sequences of "
        f"{plan.seq_length:,} tokens per step, {tokens:,} tokens in total"
    )
    lines = [[name, f"{size / _GIB:.3f}"] for name, size in plan.memory.items()]
    lines += [["total", f"{plan.used / _GIB:.3f}"], ["capacity", f"{plan.capacity / _GIB:.1f}"]]
    print_table("Memory per device", ["kind", "GiB"], lines, [])
    if not plan.fits:
        why = plan.failed or "as compiled"
        hints = "".join(f"\n  {hint}" for hint in advice(plan, dataclasses.replace(config, remat=plan.remat)))
        print(
            f"Does not fit: needs {plan.used / _GIB:.2f} of {plan.capacity / _GIB:.1f} GiB ({why}). To reduce memory, try:{hints}"
        )
        return
    shards = plan.mesh["fsdp"] * plan.mesh["context"] * plan.mesh["tensor"]
    rows = plan.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    weight_bytes = 2 * plan.parameters if config.compute_dtype == "bfloat16" else 4 * plan.parameters
    length = plan.seq_length // plan.mesh["context"]
    print(
        f"Fits. Each device stores 1/{shards} of the large weights and of their optimizer moments. The largest collective\n"
        f"gathers {plan.largest / 2**20:.0f} MiB of weights or gradients at once, {plan.largest / weight_bytes:.1%} of the "
        f"{weight_bytes / 2**20:,.0f} MiB of all weights.\n"
        f"Each device processes {rows} of {plan.batch_size} sequences, and {length:,} tokens of each "
        f"(1/{plan.mesh['context']} of a sequence)."
    )
    lines = []
    for one in plan.collectives:
        share = f"{one.overlapped_bytes / max(one.bytes, 1):.0%}"
        lines.append([one.kind, "+".join(one.axes) or "?", str(one.count), f"{one.bytes / 2**20:,.1f}", share])
    heads = ["collective", "axes", "count", "MiB", "overlapped with computation"]
    print_table("Communication per device and step", heads, lines, [])
    shares = plan.shares()
    lines = [[name, f"{1e3 * time:,.1f}", f"{shares[name]:.1%}" if name in shares else ""] for name, time in plan.seconds.items()]
    notes = []
    if plan.uncounted:
        notes = [f"memory excludes {plan.uncounted} loop(s) whose trip count the program does not state, such as loops over tiles"]
    print_table("Roofline", ["resource", "ms", "share"], lines, notes)
    flops = ", ".join(f"{name} {value / 1e12:,.1f}" for name, value in plan.flops.items())
    print(
        f"Tera-operations per device and step: {flops}.\n"
        f"A step takes {plan.step_s_lower:.3f} s if communication overlaps fully (MFU {plan.mfu(plan.step_s_lower):.0%}), and "
        f"{plan.step_s:.3f} s with the overlap as compiled\n"
        f"(MFU {plan.mfu(plan.step_s):.0%}, {tokens / plan.step_s:,.0f} tokens/s). Times are lower bounds from data sheets. "
        f"Compiled in {plan.compile_seconds:.0f} s."
    )
