"""What a training step takes on chips that are not attached: memory by kind, operations, what moves between chips, and how long.

    configuration, mesh, topology -> the whole step, compiled by the chips' own compiler (``posjax.aot``)
        -> memory of a chip as the compiler has laid it out
        -> what a chip does, read from the program with its loops turned (``posjax.hlo``)
        -> roofline: operations / peak, bytes / bandwidth, collectives / links of the torus

Times are bounds from data sheets, not measurements: matrix units at their peak, links at theirs, no waiting. What a kernel of
attention does is counted by its products of matrices alone; what CoPE's counting costs on top, ``posjax bench schedule`` tells.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from posjax import aot, aot_gpu
from posjax.bench.results import print_table
from posjax.config import Config, load_config
from posjax.flops import attention_flops, model_flops
from posjax.hlo import Collective

REMATS = ("none", "attention", "full")
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device of jax as the roofline sees it.

    Attributes:
      memory: bytes.
      flops: peak bfloat16 operations a second.
      bandwidth: bytes a second to and from memory.
      torus: bytes a second that leave it along one dimension of the torus, both ways together; of a GPU, to those of its host.
      network: bytes a second to other hosts, of a GPU; None: the torus is all there is.
    """

    memory: float
    flops: float
    bandwidth: float
    torus: float
    network: float | None = None


def chip_of(topology: str, cores: int) -> Chip:
    """The chip of a topology, of which a device of jax has that many TensorCores."""
    if (gpu := aot_gpu.gpu_of(topology)) is not None:
        return Chip(gpu.memory, gpu.flops, gpu.bandwidth, gpu.link, aot_gpu.NETWORK)
    g = aot.generation_of(topology)
    return Chip(g.memory * cores, g.flops * cores, g.bandwidth * cores, g.torus * cores / g.cores)


def _kernel_flops(config: Config, mesh: Mapping[str, int], counts: bool) -> float:
    """What attention does of it that the text of the program does not show, on a chip: five products back for two forward.

    On a ring a chip waits for the one with most to do: where chunks have an order, 3 C - 1 pairs of them in the time of 2 C.
    """
    parts = mesh["context"]
    wait = (3 * parts - 1) / (2 * parts) if counts and parts > 1 else 1.0
    passes = 1.0 + 2.5 + (config.remat == "full")
    return passes * wait * attention_flops(config) / math.prod(mesh.values())


# Links -------------------------------------------------------------------------------------------------------------------


def seconds_of(one: Collective, mesh: Mapping[str, int], places: Sequence[Sequence[int]], chip: Chip, topology: str) -> float:
    """How long the collectives of a kind take with nothing else on their links.

    Of V bytes on n chips an all-gather and a reduce-scatter bring (n - 1) / n V to every chip, an all-reduce is both. A group that
    lies along d dimensions of the torus has 2 d links of a chip, of which a line that does not close uses half.
    """
    parts = math.prod(mesh[axis] for axis in one.axes)
    if parts < 2:
        return 0.0
    if chip.network is not None:
        hosts = len({place[0] for place in _group(one.axes, mesh, places)})
        speed = chip.torus if hosts == 1 else chip.network
    else:
        speed = chip.torus * sum(_dimensions(_group(one.axes, mesh, places), topology))
    share = {"all-reduce": 2 * (parts - 1) / parts, "collective-permute": 1.0, "all-to-all": 0.25 * parts / max(parts - 1, 1)}
    return one.bytes * share.get(one.kind, (parts - 1) / parts) / speed


def _group(axes: Sequence[str], mesh: Mapping[str, int], places: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Where the chips of the first group along those axes are."""
    ranges = [range(mesh[axis]) if axis in axes else range(1) for axis in mesh]
    strides = [math.prod(list(mesh.values())[n + 1 :]) for n in range(len(mesh))]
    return [tuple(places[sum(i * s for i, s in zip(at, strides, strict=True))]) for at in itertools.product(*ranges)]


def _dimensions(group: Sequence[tuple[int, ...]], topology: str) -> list[float]:
    """For each dimension that a group lies along 1, or 1/2 where it is a line and no ring."""
    size = [int(n) for n in topology.partition(":")[2].split("x")]
    found = []
    for n, length in enumerate(size):
        along = {place[n] for place in group}
        if len(along) > 1:
            closed = length % 4 == 0 and min(size) >= 4 if len(size) == 3 else length == 16
            found.append(1.0 if closed and len(along) == length else 0.5)
    return found or [0.5]


# A plan ------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step on a topology. Bytes, operations and seconds are of one chip and one step.

    Attributes:
      config: file of the configuration.
      topology, mesh, remat, accumulate_steps, batch_size, seq_length: what was compiled.
      parameters: of the model, all chips together.
      compile_seconds: that the compiler took.
      memory: bytes by kind: parameters, optimizer, average, batch, activations (with gradients and all else that comes and goes).
      capacity: bytes of a chip.
      largest: the most bytes of weights, or of their gradients, that one collective has whole on a device.
      flops: operations: model (without recomputation), products (of matrices, as compiled), attention (within kernels).
      bytes_moved: to and from memory.
      collectives: by kind and axes.
      seconds: by what is waited for: compute, memory, and the axes of the mesh joined by "+".
      beside: of the axes' seconds those that the compiler has put beside computation.
      failed: why there is no program; None where there is one. What needs one is then zero or empty.
    """

    config: str
    topology: str
    mesh: dict[str, int]
    remat: str
    accumulate_steps: int
    batch_size: int
    seq_length: int
    parameters: int = 0
    compile_seconds: float = 0.0
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    capacity: float = 0.0
    largest: int = 0
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_flops: float = 0.0
    bytes_moved: float = 0.0
    collectives: tuple[Collective, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    beside: float = 0.0
    failed: str | None = None

    @property
    def used(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.failed is None and self.used <= self.capacity

    @property
    def computing(self) -> float:
        """Seconds with computation and memory at their peaks, whichever takes longer."""
        return max(self.seconds["compute"], self.seconds["memory"])

    @property
    def moving(self) -> float:
        return sum(time for name, time in self.seconds.items() if name not in ("compute", "memory"))

    @property
    def best(self) -> float:
        """Seconds of a step where all that can go on at once does."""
        return max(self.seconds.values())

    @property
    def step(self) -> float:
        """Seconds of a step where what moves is waited for, but for what the compiler has put beside computation."""
        hidden = min(self.beside, self.computing)
        return self.computing + self.moving - hidden

    def shares(self) -> dict[str, float]:
        """Of the seconds of a step in which nothing overlaps but computation and memory, of which the longer one counts."""
        longer = "compute" if self.seconds["compute"] >= self.seconds["memory"] else "memory"
        counted = {name: time for name, time in self.seconds.items() if name == longer or name not in ("compute", "memory")}
        return {name: time / sum(counted.values()) for name, time in counted.items()}

    def mfu(self, seconds: float) -> float:
        """Model operations of a step over what the chip could have done in that time."""
        return self.flops["model"] / (self.peak_flops * seconds)


def step_job(devices: Sequence[Any], config: str, folder: str, **fields: Any) -> Any:
    """What ``posjax.aot`` compiles, in its own process: the step, after a note of what its arguments take."""
    import jax

    from posjax.runs import abstract_step

    jitted, (state, batch) = abstract_step(config, devices, **fields)

    def bytes_of(tree: Any) -> int:
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    kinds = dict(parameters=state.params, optimizer=state.opt_state, average=getattr(state, "ema", None), batch=batch)
    note = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}
    mesh = batch["tokens"].sharding.mesh
    note |= {"memory": {name: bytes_of(tree) for name, tree in kinds.items() if tree is not None}, "mesh": dict(mesh.shape)}
    first = mesh.devices.flat[0]
    on_torus = hasattr(first, "coords")
    note["places"] = [list(d.coords) if on_torus else [d.process_index] for d in mesh.devices.flat]
    note["cores"] = getattr(first, "num_cores", 1) if on_torus else 1
    Path(folder, "note.json").write_text(json.dumps(note))
    return jitted, (state, batch)


def make_plans(
    config: str, topology: str, variants: Sequence[Mapping[str, Any]], *, done: Callable[[Plan], None] = lambda plan: None
) -> list[Plan]:
    """Compiles a configuration's step for a topology, with other fields of the configuration in each variant.

    Args:
      config: file of a configuration.
      topology: such as "v5p:8x8x8", or "h200:1x1x8".
      variants: fields of the configuration, each.
      done: called with each plan when it is made.

    Raises:
      ValueError: a topology or a field that there is not.
      ImportError: the compiler is not installed.
    """
    plans = []
    for fields in variants:
        with tempfile.TemporaryDirectory() as folder:
            changed = dataclasses.replace(load_config(config), **fields)  # tells what is wrong before a process starts
            job = "posjax.plan:step_job", dict(config=os.path.abspath(config), folder=folder) | dict(fields)
            (report,) = aot.compile_all([job], topology, schedules=False)
            note_file = Path(folder, "note.json")
            if not note_file.exists():
                raise ValueError(re.sub(r"^\w+Error: ", "", report.failed or "nothing was compiled"))
            plans.append(_plan(config, changed, topology, report, json.loads(note_file.read_text())))
        done(plans[-1])
    return plans


def _plan(path: str, config: Config, topology: str, report: aot.Report, note: dict[str, Any]) -> Plan:
    chip, mesh = chip_of(topology, note["cores"]), note["mesh"]
    common = dict(config=path, topology=topology, mesh=mesh, remat=config.remat, accumulate_steps=config.accumulate_steps)
    common |= dict(batch_size=config.batch_size, seq_length=config.seq_length, parameters=note["parameters"], capacity=chip.memory)
    common |= dict(peak_flops=chip.flops)
    if report.failed is not None:
        if (rest := _bytes_asked_for(report.failed, sum(note["memory"].values()))) is None:
            return Plan(**common, memory=note["memory"], failed=report.failed)
        return Plan(**common, memory=note["memory"] | {"activations": rest}, failed="the compiler gave up")
    peak = max(report.memory.get("peak", 0), report.memory["argument"] + report.memory["temp"])
    cost = report.cost
    counts = "cope" in config.encoding
    flops = dict(model=model_flops(config, note["parameters"]) / math.prod(mesh.values()), products=cost.flops)
    flops |= dict(attention=_kernel_flops(config, mesh, counts))
    seconds = {"compute": (flops["products"] + flops["attention"]) / chip.flops, "memory": cost.bytes / chip.bandwidth}
    beside = 0.0
    for one in cost.collectives:
        if one.axes:
            time = seconds_of(one, mesh, note["places"], chip, topology)
            name = "+".join(one.axes)
            seconds[name] = seconds.get(name, 0.0) + time
            beside += time * one.beside / max(one.bytes, 1)
    of_weights = [c for c in cost.collectives if "fsdp" in c.axes or (c.kind != "collective-permute" and "context" in c.axes)]
    return Plan(
        **common,
        compile_seconds=report.seconds,
        memory=note["memory"] | {"activations": max(0, peak - sum(note["memory"].values()))},
        largest=max((c.largest for c in of_weights), default=0),
        flops=flops,
        bytes_moved=cost.bytes,
        collectives=cost.collectives,
        seconds=seconds,
        beside=beside,
    )


def _bytes_asked_for(failure: str, arguments: int) -> int | None:
    """What a program that did not fit would have taken beside its arguments, as the compiler's message has it."""
    alone = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds", failure)
    whole = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of ", failure)
    if (match := alone or whole) is None:
        return None
    size = int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]])
    return size if alone else max(0, size - arguments)


# What to change ----------------------------------------------------------------------------------------------------------


def advice(plan: Plan, config: Config) -> list[str]:
    """What makes a plan smaller that does not fit, what helps most first; flags as ``posjax`` takes them."""
    mesh, memory = plan.mesh, plan.memory
    state = sum(memory.get(name, 0) for name in ("parameters", "optimizer", "average"))
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"]) // config.accumulate_steps
    of_activations, of_state = [], []
    if plan.remat != "full":
        of_activations.append("--remat full keeps the input of each layer alone and computes the rest again")
    if rows > 1:
        room = max(plan.capacity - state, 1)
        parts = next((n for n in range(2, rows + 1) if rows % n == 0 and memory.get("activations", 0) / n <= room), rows)
        fewer = f"has {rows // parts} of a device's {rows} sequences in memory at a time"
        of_activations.append(f"--accumulate_steps {parts * config.accumulate_steps} {fewer}")
    elif config.seq_length % (4 * mesh["context"]) == 0:
        wider = mesh | {"context": 2 * mesh["context"]}
        narrower = next((axis for axis in ("data", "fsdp") if wider[axis] % 2 == 0), None)
        if narrower:
            wider[narrower] //= 2
            of_activations.append(f"--mesh {_flag(wider)} cuts each sequence over {wider['context']} devices")
    if mesh["data"] > 1:
        whole = mesh | {"data": 1, "fsdp": mesh["fsdp"] * mesh["data"]}
        of_state.append(f"--mesh {_flag(whole)} cuts the state over all chips, not over {mesh['fsdp'] * mesh['context']}")
    kv_heads = config.num_kv_heads or config.num_heads
    if mesh["tensor"] < 8 and kv_heads % (2 * mesh["tensor"]) == 0 and mesh["fsdp"] % 2 == 0:
        cut = mesh | {"tensor": 2 * mesh["tensor"], "fsdp": mesh["fsdp"] // 2}
        of_activations.append(f"--mesh {_flag(cut)} cuts heads, MLP and logits over {cut['tensor']} chips")
    first, second = (of_state, of_activations) if state > 0.5 * plan.used else (of_activations, of_state)
    return [*first, *second, "a topology with more chips"]


def _flag(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def candidates(config: Config, devices: int, limit: int = 6) -> Iterator[dict[str, Any]]:
    """Meshes and remat policies worth compiling, the likeliest first.

    Rows are whole, heads are whole, a sequence is cut no finer than 256 tokens. Where there are rows for all devices neither
    sequences nor heads are cut at first; each mesh comes with less recomputation before more.
    """
    kv_heads = config.num_kv_heads or config.num_heads
    found = []
    powers = [2**n for n in range(devices.bit_length()) if devices % 2**n == 0]
    for tensor, context, data in itertools.product(powers, powers, powers):
        if devices % (tensor * context * data):
            continue
        fsdp = devices // (tensor * context * data)
        if kv_heads % tensor or tensor > 8 or config.batch_size % (data * fsdp * config.accumulate_steps):
            continue
        if context > 1 and (config.seq_length % (2 * context) or config.seq_length // context < 256):
            continue
        found.append(dict(data=data, fsdp=fsdp, context=context, tensor=tensor))
    # Fewest chips to a sequence first, and then the widest cut of the state that still has parts of 16 rows, a tile of bfloat16.
    narrow = config.embed_dim / 16
    found.sort(key=lambda m: (m["context"] * m["tensor"], m["context"], m["fsdp"] > narrow, -m["fsdp"]))
    for mesh in found[: math.ceil(limit / len(REMATS))]:
        for remat in REMATS:
            yield dict(mesh=_flag(mesh), remat=remat)


# The command -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Planning:
    """What posjax plan takes beyond a configuration.

    Attributes:
      topology: a TPU and its shape, such as v5p:8x8x8 (v4, v5e, v5p, v6e, tpu7x), or a GPU and slices x hosts x GPUs, h200:1x1x8.
      search: try meshes and remat policies, and rank those that fit.
      candidates: how many a search compiles, one to two minutes each.
      out: a file for the plans, as JSON. Empty: none.
    """

    topology: str = "v5e:16x16"
    search: tyro.conf.UseCounterAction[int] = 0
    candidates: int = 6
    out: str = ""

    def __post_init__(self) -> None:
        if aot_gpu.gpu_of(self.topology) is None:
            aot.generation_of(self.topology)
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")


def run(path: str, fields: Mapping[str, Any], planning: Planning) -> list[Plan]:
    """Makes the plans of a command and prints them as they come.

    Args:
      path: of the configuration.
      fields: of the configuration that differ from its file's.
    """
    from posjax.bench.attention import show_progress

    config = dataclasses.replace(load_config(path), **fields)
    variants = [dict(fields)]
    if planning.search:
        variants = [dict(fields) | found for found in candidates(config, _count(planning.topology), planning.candidates)]
        if not variants:
            found = f"{config.batch_size} sequences of {config.seq_length}"
            raise ValueError(f"batch_size and seq_length must divide over some mesh of {planning.topology}, got {found}")
    with show_progress(quiet=False) as progress:
        progress("compiling", 0, len(variants))
        made: list[Plan] = []

        def done(plan: Plan) -> None:
            made.append(plan)
            progress("compiling", len(made), len(variants))

        plans = make_plans(path, planning.topology, variants, done=done)
    if planning.search:
        plans.sort(key=lambda plan: (not plan.fits, plan.step if plan.fits else plan.used))
        _print_ranking(plans)
    _print_plan(plans[0], config)
    if planning.out:
        Path(planning.out).parent.mkdir(parents=True, exist_ok=True)
        Path(planning.out).write_text(json.dumps([dataclasses.asdict(plan) for plan in plans], indent=1) + "\n")
    return plans


_TWO_DEVICES = ("v4", "tpu7x")  # whose chips jax takes for two devices, one for each core


def _count(topology: str) -> int:
    """Devices of a topology."""
    name, _, shape = topology.partition(":")
    return math.prod(int(n) for n in shape.split("x")) * (2 if name in _TWO_DEVICES else 1)


def _print_ranking(plans: Sequence[Plan]) -> None:
    lines = []
    for plan in plans:
        used = f"{plan.used / _GIB:.2f}"
        if plan.failed is not None:
            lines.append([_flag(plan.mesh), plan.remat, used, "no", "", ""])
        else:
            verdict = "yes" if plan.fits else "no"
            lines.append([_flag(plan.mesh), plan.remat, used, verdict, f"{plan.step:.3f}", f"{plan.mfu(plan.step):.0%}"])
    heads = ["mesh", "remat", "GiB of a chip", "fits", "s a step", "MFU"]
    print_table(f"{plans[0].topology}: of {plans[0].capacity / _GIB:.0f} GiB, those that fit by their time", heads, lines, [])


def _print_plan(plan: Plan, config: Config) -> None:
    chips = math.prod(plan.mesh.values())
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    tokens = plan.batch_size * plan.seq_length
    print(
        f"\n{plan.config} on {plan.topology}, {chips} devices: {mesh}; remat {plan.remat}, accumulate_steps "
        f"{plan.accumulate_steps}\n{plan.parameters / 1e9:.3f} billion parameters, {plan.batch_size} sequences of "
        f"{plan.seq_length:,} tokens a step, {tokens:,} in all"
    )
    lines = [[name, f"{size / _GIB:.3f}"] for name, size in plan.memory.items()]
    lines += [["in all", f"{plan.used / _GIB:.3f}"], ["of", f"{plan.capacity / _GIB:.1f}"]]
    print_table("Memory of a device", ["what", "GiB"], lines, [])
    if not plan.fits:
        why = plan.failed or "it does not fit"
        hints = "".join(f"\n  {hint}" for hint in advice(plan, dataclasses.replace(config, remat=plan.remat)))
        print(f"Does not fit: {plan.used / _GIB:.2f} GiB of {plan.capacity / _GIB:.1f} ({why}). What would make it smaller:{hints}")
        return
    cut = plan.mesh["fsdp"] * plan.mesh["context"] * plan.mesh["tensor"]
    rows = plan.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    whole = 2 * plan.parameters if config.compute_dtype == "bfloat16" else 4 * plan.parameters
    length = plan.seq_length // plan.mesh["context"]
    print(
        f"Fits. A device keeps 1/{cut} of the large weights and of their moments. Whole it has what one collective\n"
        f"moves, {plan.largest / 2**20:.0f} MiB at most of weights or gradients, {plan.largest / whole:.1%} of the "
        f"{whole / 2**20:,.0f} of all weights.\n"
        f"Of {plan.batch_size} sequences it has {rows}, {length:,} tokens of each, 1/{plan.mesh['context']}."
    )
    lines = []
    for one in plan.collectives:
        share = f"{one.beside / max(one.bytes, 1):.0%}"
        lines.append([one.kind, "+".join(one.axes) or "?", str(one.count), f"{one.bytes / 2**20:,.1f}", share])
    heads = ["collective", "axes", "count", "MiB", "beside computation"]
    print_table("Between devices, in a step of one device", heads, lines, [])
    shares = plan.shares()
    lines = [[name, f"{1e3 * time:,.1f}", f"{shares[name]:.1%}" if name in shares else ""] for name, time in plan.seconds.items()]
    print_table("Roofline", ["what", "ms", "share"], lines, [])
    flops = ", ".join(f"{name} {value / 1e12:,.1f}" for name, value in plan.flops.items())
    print(
        f"Tera-operations of a device: {flops}.\n"
        f"A step takes {plan.best:.3f} s where all overlaps (MFU {plan.mfu(plan.best):.0%}), {plan.step:.3f} s as compiled "
        f"(MFU {plan.mfu(plan.step):.0%}, {tokens / plan.step:,.0f} tokens/s): bounds from data sheets. "
        f"Compiled in {plan.compile_seconds:.0f} s."
    )
