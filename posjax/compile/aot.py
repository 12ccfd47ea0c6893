"""Ahead-of-time compilation for TPUs and GPUs that are not attached, with reports on the compiled programs.

    compile_all([("package.module:function", {...}), ...], "v6e:2x2")
        -> a child process with libtpu: function(**kwargs) -> jit -> lower -> compile, one job after another
        -> a Report for each job: memory, operations, collectives, and the bundles in the loops of every Pallas kernel

For a topology of GPUs, such as "h200:1x1x8", reports list the registers of kernels instead (``aot_gpu.py``).

The compiler for TPUs is part of libtpu, which needs no TPU (``pip install 'posjax[tpu-aot]'``). It reads its settings from the
environment before jax starts, and may abort its process if it rejects a program; it therefore runs in a child process.

A TPU core issues one bundle (one very long instruction word) per cycle, in order. The number of bundles in a loop is therefore the
number of cycles of one iteration, unless it waits for memory or for a matrix unit. It is the same in every run.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posjax.compile import aot_gpu
from posjax.compile.hlo import Collective, Cost, computations, read_cost
from posjax.hardware import GENERATIONS, Generation

Job = tuple[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Section:
    """Describes a section of consecutive bundles: the body of a loop, or the code that a branch may skip.

    Attributes:
      kind: "loop" or "branch".
      first: index of its first bundle in the kernel.
      bundles: number of bundles, with all nested sections.
      depth: number of loops around its first bundle; a loop counts itself.
      products: number of its instructions that feed a matrix unit.
    """

    kind: str
    first: int
    bundles: int
    depth: int
    products: int

    def contains(self, other: "Section") -> bool:
        """Returns whether this section contains the other; a branch that skips exactly one loop contains that loop."""
        if (self.first, self.bundles) == (other.first, other.bundles):
            return self.kind == "branch" and other.kind == "loop"
        return self.first <= other.first and other.first + other.bundles <= self.first + self.bundles


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Describes a Pallas kernel in a program.

    Attributes:
      name: name of its instruction.
      op_name: HLO metadata: the operation in the JAX program that it comes from.
      bundles: number of bundles of the kernel; None if the compiler wrote no schedule for it.
      sections: loops and branches in the order of their first bundles; the outermost loop is that of the grid.
      vmem: bytes of VMEM that it occupies: scratch, and the blocks in flight.
      registers: registers per thread, on a GPU; None if unknown.
      spilled: bytes per thread that are spilled from registers.
    """

    name: str
    op_name: str
    bundles: int | None
    sections: tuple[Section, ...]
    vmem: int | None
    registers: int | None = None
    spilled: int | None = None

    @property
    def loops(self) -> tuple[Section, ...]:
        return tuple(section for section in self.sections if section.kind == "loop")

    @property
    def tiles(self) -> tuple[tuple[Section, int], ...]:
        """Returns the variants of the work on a tile, each with the bundles of one iteration of the loop around it.

        The work is the outermost section that multiplies matrices itself, inside the loops within the grid's loop if there are any.
        It may have several variants, for example with and without a mask. An iteration excludes the other branches and loops in the
        innermost loop around the work, such as the start and the end of a row of tiles. Loops within the work count for one
        iteration.
        """
        return tuple((work, self._bundles_per_iteration(around, work)) for work, around in self._forms(None, None) if around)

    def _forms(self, at: Section | None, around: Section | None) -> list[tuple[Section, Section | None]]:
        inside = [s for s in self.sections if s.products and (at is None or at.contains(s))]
        found = [s for s in inside if not any(other.contains(s) for other in inside)]
        inner = [s for s in found if any(s == loop or s.contains(loop) for loop in inside if loop.kind == "loop")]
        if around is not None and around.depth == 1 and inner:
            found = inner
        elif at is not None and (not found or at.products > sum(s.products for s in found)):
            return [(at, around)]
        return [form for s in found for form in self._forms(s, s if s.kind == "loop" else around)]

    def _bundles_per_iteration(self, loop: Section, work: Section) -> int:
        beside = [s for s in self.sections if loop.contains(s) and not (s == work or s.contains(work) or work.contains(s))]
        outermost = [s for s in beside if not any(other.contains(s) for other in beside)]
        return loop.bundles - sum(s.bundles for s in outermost)


@dataclasses.dataclass(frozen=True)
class Report:
    """Describes the result of a compilation job. If it failed, only target, topology and failed are set.

    Attributes:
      target: "package.module:function".
      topology: such as "v6e:2x2".
      failed: why compilation failed; None if the program compiled.
      device_kind: jax's name of the device.
      seconds: time to trace, lower and compile.
      memory: bytes of HBM on each device: argument, output, temp, alias, peak.
      flops: operations of the program on a device, as XLA counts them; Pallas kernels count only if they declare their cost.
      bytes_accessed: bytes that the program accesses, as XLA counts them, including accesses to VMEM.
      cost: work of a device in one run, read from the program's text with every iteration of its loops, without Pallas kernels.
      kernels: Pallas kernels of the program.
      custom_calls: number of calls of each other custom-call target.
    """

    target: str
    topology: str
    failed: str | None = None
    device_kind: str = ""
    seconds: float = 0.0
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: float | None = None
    bytes_accessed: float | None = None
    cost: Cost | None = None
    kernels: tuple[Kernel, ...] = ()
    custom_calls: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Report":
        """Creates a report from the result of ``dataclasses.asdict``, after a round trip through JSON."""
        kernels = tuple(Kernel(**k | {"sections": tuple(Section(**s) for s in k["sections"])}) for k in fields.get("kernels", ()))
        cost = fields.get("cost") and Cost.from_json(fields["cost"])
        return cls(**{**fields, "kernels": kernels, "cost": cost})

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Returns the collectives by kind and mesh axes."""
        return self.cost.collectives if self.cost else ()


def generation_of(topology: str) -> Generation:
    """Returns the TPU generation of a topology such as "v5p:8x8x8"."""
    name = topology.partition(":")[0]
    if name not in GENERATIONS or not re.fullmatch(r"[^:]+:\d+(x\d+)+", topology):
        examples = ", ".join(generation.topology for generation in GENERATIONS.values())
        raise ValueError(f"topology must be a generation and a shape, such as {examples}, got {topology!r}")
    return GENERATIONS[name]


def compile_ahead(
    target: str, kwargs: Mapping[str, Any], topology: str, *, flags: Sequence[str] = (), schedules: bool = True
) -> Report:
    """Compiles one function for a device that is not attached; see ``compile_all``.

    Raises:
      RuntimeError: the function did not compile; the message gives the topology and the reason.
    """
    (report,) = compile_all([(target, kwargs)], topology, flags=flags, schedules=schedules)
    if report.failed is not None:
        raise RuntimeError(f"{target} did not compile for {topology}: {report.failed}")
    return report


def compile_all(jobs: Sequence[Job], topology: str, *, flags: Sequence[str] = (), schedules: bool = True) -> list[Report]:
    """Compiles functions for a TPU or a GPU that is not attached, one after another in a separate process.

    Args:
      jobs: pairs (target, kwargs). The target is "package.module:function". The function is called with kwargs, which must be
        JSON-serializable, and with the devices of the topology if it has an argument ``devices``. It returns a pair: a function or
        a jax.jit object to compile, and its arguments as a tuple of trees of jax.ShapeDtypeStruct. An argument without a sharding
        is placed on the first device or, if another argument is on a mesh, on every device of that mesh.
      topology: such as "v6e:2x2" or "v5p:8x8x8" (GENERATIONS has the smallest ones), or "h200:1x1x8" for slices, hosts and GPUs per
        host.
      flags: flags of libtpu, such as "--xla_tpu_scoped_vmem_limit_kib=65536", or of XLA for GPUs.
      schedules: whether reports include the bundles and sections of kernels, or their registers. Compilation is faster without
        them, several times so on TPUs.

    Returns:
      A report for each job. If a job raises an exception or ends its process, its report has ``failed`` set; the others still run.

    Raises:
      ImportError: libtpu, or the CUDA plugin, is not installed.
      RuntimeError: no job could start, for example because the compiler does not support the topology or a flag.
      ValueError: the topology is not a generation or a GPU and a shape.
    """
    if aot_gpu.gpu_of(topology) is not None:
        aot_gpu.check_installed()
    elif generation_of(topology) and importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise ImportError("compiling for a TPU that is not attached needs libtpu; add it with: pip install 'posjax[tpu-aot]'")
    reports: dict[int, Report] = {}
    while len(reports) < len(jobs):
        left = [n for n in range(len(jobs)) if n not in reports]
        with tempfile.TemporaryDirectory() as folder:
            finished, begun, message = _run_child([jobs[n] for n in left], topology, flags, schedules, Path(folder))
        reports |= {left[n]: report for n, report in finished.items()}
        if len(finished) == len(left):
            break
        if begun is None:
            raise RuntimeError(f"compiling for {topology} failed: {message}")
        if begun not in finished:
            reports[left[begun]] = Report(jobs[left[begun]][0], topology, failed=message)
    return [reports[n] for n in range(len(jobs))]


def _run_child(
    jobs: Sequence[Job], topology: str, flags: Sequence[str], schedules: bool, folder: Path
) -> tuple[dict[int, Report], int | None, str]:
    """Runs jobs in a child process; returns the reports of finished jobs, the last job that started, and why the process ended."""
    answers, dump, errors = folder / "answers", folder / "dump", folder / "errors"
    dump.mkdir()
    answers.touch()
    request = {"jobs": [[target, dict(kwargs)] for target, kwargs in jobs], "topology": topology}
    request |= {"answers": str(answers), "dump": str(dump)}
    with errors.open("wb") as file:
        child = subprocess.run(
            [sys.executable, "-m", "posjax.compile.aot"],
            input=json.dumps(request).encode(),
            env=_environment(topology, dump if schedules else None, flags),
            stdout=file,
            stderr=file,
        )
    lines = [json.loads(line) for line in answers.read_text().splitlines() if line.endswith("}")]
    begun, start = max(((line["begin"], line["output_bytes"]) for line in lines if "begin" in line), default=(None, 0))
    finished = {line["end"]: Report.from_json(line["report"]) for line in lines if "end" in line}
    return finished, begun, _exit_reason(errors.read_bytes()[start:].decode(errors="replace"), child.returncode)


def _dumping(dump: Path) -> list[str]:
    """Returns the flags that make libtpu write schedules to ``dump``."""
    return [f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"]


def _environment(topology: str, dump: Path | None, flags: Sequence[str]) -> dict[str, str]:
    """Returns the environment variables for the compiler and jax; schedules are written to ``dump`` unless it is None."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TPU_") or name == "TPU_LIBRARY_PATH"}
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):  # libtpu aborts on flags of another XLA
        environment.pop(name, None)
    path = [entry or os.getcwd() for entry in sys.path]  # so that the child imports targets from the same places
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program from the cache has no schedule
    if aot_gpu.gpu_of(topology) is not None:
        return environment | aot_gpu.environment(dump, flags)
    flags = [*(_dumping(dump) if dump else ()), *flags]
    return environment | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": generation_of(topology).accelerator_type,
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs on a TPU, so several processes can compile at once
        "LIBTPU_INIT_ARGS": " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags]).strip(),
    }


def _exit_reason(text: str, code: int) -> str:
    """Describes why a process ended, from the last informative lines of its output; failed checks and errors take precedence."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = re.compile(r"@|\*\*\*|PC:|=+$|[IW]\d{4} |E\d{4} .*RAW:|https://symbolize|File \"")
    informative = [line for line in lines if not noise.match(line)]
    marked = [line for line in informative if re.match(r"F\d{4} ", line) or re.search("check fail|error|fatal", line, re.I)]
    ended = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
    return "; ".join([f"the compiler's process ended ({ended})", *(line[:400] for line in (marked or informative)[-3:])])


# Output of the compiler --------------------------------------------------------------------------------------------------

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)*:\s*(>*)\s*\{")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"= sbr\.\w+ .*?target = \$region(\d+)")


def read_schedule(text: str, delay_slots: int) -> tuple[int, tuple[Section, ...]]:
    """Parses the number of bundles and the sections from a ``*final_bundles.txt``.

    Each line is a bundle, with one ">" for each loop around it:

        0x18 LB: > { %s1 = ... }                                 /* Start region 9 */
        0x19   : > { %5 = sbr.rel (%p1) target = $region4 }                               from here, past the delay slots,
        0x1a   : > { ... }
        0x1b PF: > { ... }                                       /* Start/End empty region 4 */     to here: a branch
        0x1c   : > { %9 = sbr.rel (!%p2) target = $region9 }                              a jump back: a loop
    """
    bundles, depths = [], []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            bundles.append(line)
            depths.append(len(match[1]))
        elif bundles:  # a comment continues
            bundles[-1] += line
    starts = {region: n for n, line in enumerate(bundles) for region in _REGION.findall(line)}
    products = [0, *itertools.accumulate(line.count("= vmatmul") for line in bundles)]
    spans = set()  # kind, first, one past the last
    loops: dict[int, int] = {}
    for n, line in enumerate(bundles):
        for region in _BRANCH.findall(line):
            to, after = starts.get(region), n + 1 + delay_slots
            if to is not None and to <= n:
                loops[to] = max(loops.get(to, 0), min(after, len(bundles)))
            elif to is not None and to > after:
                spans.add(("branch", after, to))
    spans |= {("loop", first, stop) for first, stop in loops.items()}
    return len(bundles), tuple(
        Section(kind, first, stop - first, depths[first], products[stop] - products[first])
        for kind, first, stop in sorted(spans, key=lambda span: (span[1], -span[2], span[0] == "branch"))
    )


_CALL_TARGET = re.compile(r'custom_call_target="([^"]+)"')


def read_program(text: str) -> tuple[list[Kernel], dict[str, int]]:
    """Parses optimised HLO into its kernels, without schedules, and the number of calls of each other custom-call target."""
    kernels, others = [], {}
    for i in itertools.chain.from_iterable(computations(text)[0].values()):
        if i.opcode != "custom-call" or not (match := _CALL_TARGET.search(i.attributes)):
            continue
        op_name = found[1] if (found := re.search(r'op_name="([^"]*)"', i.attributes)) else ""
        if match[1] == aot_gpu.TRITON:
            called = re.search(r'\bname = "([^"]+)"', i.attributes)
            kernels.append(Kernel(called[1] if called else i.name, op_name, None, (), None))
        elif match[1].startswith(aot_gpu.MOSAIC):
            kernels.append(Kernel(op_name.rpartition("/")[0].rpartition("/")[2] or i.name, op_name, None, (), None))
        elif match[1] != "tpu_custom_call":
            others[match[1]] = others.get(match[1], 0) + 1
        else:
            used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', i.attributes)
            sizes = re.findall(r'"memory_space":"1","offset":"(\d+)","size":"(\d+)"', used[1] if used else "")
            kernels.append(Kernel(i.name, op_name, None, (), max((int(at) + int(size) for at, size in sizes), default=None)))
    return kernels, others


def _with_schedule(kernel: Kernel, dump: Path, delay_slots: int) -> Kernel:
    """Adds its schedule to a kernel. Identical kernels are compiled only once, under the name of one of them."""
    files = {re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name): path for path in sorted(dump.glob("*-final_bundles.txt"))}
    stem = re.sub(r"\.\d+$", "", kernel.name)
    near = [path for name, path in files.items() if re.sub(r"\.\d+$", "", name) == stem]
    path = files.get(kernel.name) or (near[0] if len(near) == 1 else None)
    if path is None:
        return kernel
    bundles, sections = read_schedule(path.read_text(errors="replace"), delay_slots)
    return dataclasses.replace(kernel, bundles=bundles, sections=sections)


# Child process -----------------------------------------------------------------------------------------------------------


def main() -> None:
    request = json.loads(sys.stdin.read())
    from jax.experimental import topologies

    if aot_gpu.gpu_of(request["topology"]) is not None:
        devices = aot_gpu.devices(request["topology"])
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"]).devices
    with open(request["answers"], "a") as answers:
        for n, (target, kwargs) in enumerate(request["jobs"]):
            print(json.dumps({"begin": n, "output_bytes": os.fstat(2).st_size}), file=answers, flush=True)
            for path in Path(request["dump"]).iterdir():
                path.unlink()
            try:
                report = _compile(target, kwargs, request["topology"], devices, Path(request["dump"]))
            except Exception as error:  # a job may raise anything; the parent process reports it
                report = Report(target, request["topology"], failed=f"{type(error).__name__}: {error}".strip()[:2000])
            print(json.dumps({"end": n, "report": dataclasses.asdict(report)}), file=answers, flush=True)


def _compile(target: str, kwargs: dict[str, Any], topology: str, devices: Sequence[Any], dump: Path) -> Report:
    import jax

    module, _, name = target.partition(":")
    make = getattr(importlib.import_module(module), name)
    if "devices" in inspect.signature(make).parameters:
        kwargs = kwargs | {"devices": devices}
    first = devices[0]
    gpu = aot_gpu.gpu_of(topology)
    cores = getattr(first, "num_cores", 1) if gpu is None else gpu.processors
    kind = jax.sharding.AbstractDevice(first.device_kind, cores, first.platform)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=kind)  # for code that queries the device that it will run on
    with jax.sharding.use_abstract_mesh(mesh):
        function, args = make(**kwargs)
        jitted = function if hasattr(function, "lower") else jax.jit(function)
        start = time.perf_counter()
        compiled = jitted.lower(*_placed(args, first)).compile()
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    kernels, others = read_program(text)
    if gpu is None:
        delay_slots = generation_of(topology).delay_slots
        kernels = [_with_schedule(kernel, dump, delay_slots) for kernel in kernels]
    else:
        resources = aot_gpu.resources(dump, gpu)
        kernels = [dataclasses.replace(kernel, **resources.get(kernel.name, {})) for kernel in kernels]
    cost = compiled.cost_analysis() or {}
    stats = compiled.memory_analysis()
    sizes = {name: getattr(stats, f"{name}_size_in_bytes", None) for name in ("argument", "output", "temp", "alias")}
    sizes["peak"] = getattr(stats, "peak_memory_in_bytes", None)
    return Report(
        target=target,
        topology=topology,
        device_kind=first.device_kind,
        seconds=seconds,
        memory={name: size for name, size in sizes.items() if size is not None},
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        cost=read_cost(text, meshes[0].shape if (meshes := _meshes(args)) else None),
        kernels=tuple(kernels),
        custom_calls=others,
    )


def _meshes(args: Any) -> list[Any]:
    """Returns the meshes that the arguments are sharded over."""
    import jax

    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args)]
    return [sharding.mesh for sharding in shardings if isinstance(sharding, jax.sharding.NamedSharding)]


def _placed(args: Any, device: Any) -> Any:
    """Gives every array among the arguments a sharding."""
    import jax

    leaves = [leaf for leaf in jax.tree.leaves(args) if hasattr(leaf, "shape")]
    if not leaves:
        raise ValueError(f"a target must return (function, arguments) with an array among the arguments, got arguments {args!r}")
    meshes = _meshes(args)
    default = jax.sharding.SingleDeviceSharding(device)
    if meshes:
        default = jax.sharding.NamedSharding(meshes[0], jax.sharding.PartitionSpec())

    def place(leaf: Any) -> Any:
        if not hasattr(leaf, "shape"):  # a static argument
            return leaf
        given = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None else default
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=given)

    return jax.tree.map(place, args)


if __name__ == "__main__":
    main()
