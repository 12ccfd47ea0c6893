"""Cost of a training step on chips that are not attached: memory by kind, operations, communication between chips, and time.

    configuration, mesh, topology -> the full step, compiled by the chips' own compiler (``posjax.compile.aot``)
        -> memory of a chip, as the compiler allocates it
        -> work of a chip, read from the program with every iteration of its loops (``posjax.compile.hlo``)
        -> seconds, from data sheets (``posjax.compile.roofline``)

Times are lower bounds from data sheets, not measurements: they assume that matrix units and links run at their peaks and never
wait. Only the matrix products of attention kernels count; ``posjax bench schedule`` prints what CoPE's counting costs in addition.
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

from posjax.compile import aot
from posjax.compile.hlo import Collective
from posjax.compile.roofline import chip_of, seconds_of
from posjax.lab import named_configs
from posjax.lab.config import Config, load_config
from posjax.lab.flops import attention_flops, model_flops


def _kernel_flops(config: Config, mesh: Mapping[str, int], counts: bool) -> float:
    """Computes the operations of the attention kernels on a chip, which the text of the program does not state.

    The backward pass takes five matrix products, the forward pass two. On a ring of C chips, each waits for the one with the most
    work: if encodings count, the order of chunks is fixed, and a call takes the time of 3 C - 1 pairs of chunks instead of 2 C.
    """
    parts = mesh["context"]
    wait = (3 * parts - 1) / (2 * parts) if counts and parts > 1 else 1.0
    passes = 1.0 + 2.5 + (config.remat == "full")
    return passes * wait * attention_flops(config) / math.prod(mesh.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """Describes the cost of a training step on a topology. Bytes, operations and seconds are per chip and step.

    Attributes:
      config: path of the config file.
      topology, mesh, remat, accumulate_steps, batch_size, seq_length: the settings that were compiled.
      parameters: number of parameters of the model, over all chips.
      compile_seconds: seconds of compilation.
      memory: bytes by kind: parameters, optimizer, average, batch, activations (with gradients and all other temporary arrays).
      capacity: bytes of memory of a chip.
      largest: maximum bytes of weights, or of their gradients, that one collective gathers on a device.
      flops: operations: model (without recomputation), products (matrix products as compiled), attention (within kernels).
      peak_flops: peak bfloat16 operations per second of a chip.
      bytes_moved: bytes to and from memory, without loops whose trip count the program does not state.
      uncounted: the number of such loops, such as loops over tiles in plain XLA.
      collectives: communication by kind and axes.
      seconds: times by resource: compute, memory, and the axes of the mesh joined by "+".
      overlapped_s: seconds of communication that the compiler overlaps with computation.
      failed: why compilation failed; None if it succeeded. If it failed, fields that depend on the program are zero or empty.
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
    uncounted: int = 0
    collectives: tuple[Collective, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    overlapped_s: float = 0.0
    failed: str | None = None

    @property
    def used(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.failed is None and self.used <= self.capacity

    @property
    def compute_s(self) -> float:
        """Returns the seconds of computation or of memory access at peak rates, whichever takes longer."""
        return max(self.seconds["compute"], self.seconds["memory"])

    @property
    def comm_s(self) -> float:
        return sum(time for name, time in self.seconds.items() if name not in ("compute", "memory"))

    @property
    def step_s_lower(self) -> float:
        """Returns the seconds of a step in which computation, memory access and communication overlap fully."""
        return max(self.seconds.values())

    @property
    def step_s(self) -> float:
        """Returns the seconds of a step in which communication overlaps computation only where the compiler has arranged it."""
        overlap = min(self.overlapped_s, self.compute_s)
        return self.compute_s + self.comm_s - overlap

    def shares(self) -> dict[str, float]:
        """Returns each resource's share of a step in which communication overlaps nothing.

        Computation and memory access overlap each other; only the longer of the two counts.
        """
        longer = "compute" if self.seconds["compute"] >= self.seconds["memory"] else "memory"
        counted = {name: time for name, time in self.seconds.items() if name == longer or name not in ("compute", "memory")}
        return {name: time / sum(counted.values()) for name, time in counted.items()}

    def mfu(self, seconds: float) -> float:
        """Returns the model FLOPs utilization: a step's model operations over the chip's peak operations in that time."""
        return self.flops["model"] / (self.peak_flops * seconds)


def step_job(devices: Sequence[Any], config: str, folder: str, **fields: Any) -> Any:
    """Builds the training step for ``posjax.compile.aot``, in the process that compiles it.

    It also writes the sizes of the step's arguments to note.json in ``folder``.
    """
    import jax

    from posjax.lab.run import abstract_step

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
    """Compiles the training step of a configuration for a topology, once per variant, and returns the cost of each.

    Args:
      config: name or path of a config file.
      topology: such as "v5p:8x8x8", or "h200:1x1x8".
      variants: the fields of the configuration that each variant changes.
      done: called with each plan as soon as it is complete.

    Raises:
      ValueError: the topology or a field does not exist.
      ImportError: the compiler is not installed.
    """
    plans, base = [], load_config(config)
    path = os.path.abspath(named_configs().get(config, config))  # for another process
    for fields in variants:
        with tempfile.TemporaryDirectory() as folder:
            changed = dataclasses.replace(base, **fields)  # raises for an invalid field before a process starts
            job = "posjax.compile.plan:step_job", dict(config=path, folder=folder) | dict(fields)
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
        return Plan(**common, memory=note["memory"] | {"activations": rest}, failed="the compiler ran out of memory")
    peak = max(report.memory.get("peak", 0), report.memory["argument"] + report.memory["temp"])
    cost = report.cost
    counts = "cope" in config.encoding
    flops = dict(model=model_flops(config, note["parameters"]) / math.prod(mesh.values()), products=cost.flops)
    flops |= dict(attention=_kernel_flops(config, mesh, counts))
    seconds = {"compute": (flops["products"] + flops["attention"]) / chip.flops, "memory": cost.bytes / chip.bandwidth}
    overlapped_s = 0.0
    for collective in cost.collectives:
        if collective.axes:
            time = seconds_of(collective, mesh, note["places"], chip, topology)
            name = "+".join(collective.axes)
            seconds[name] = seconds.get(name, 0.0) + time
            overlapped_s += time * collective.overlapped_bytes / max(collective.bytes, 1)
    gathers = [c for c in cost.collectives if "fsdp" in c.axes or (c.kind != "collective-permute" and "context" in c.axes)]
    return Plan(
        **common,
        compile_seconds=report.seconds,
        memory=note["memory"] | {"activations": max(0, peak - sum(note["memory"].values()))},
        largest=max((c.largest for c in gathers), default=0),
        flops=flops,
        bytes_moved=cost.bytes,
        uncounted=cost.uncounted,
        collectives=cost.collectives,
        seconds=seconds,
        overlapped_s=overlapped_s,
    )


def _bytes_asked_for(failure: str, arguments: int) -> int | None:
    """Parses the bytes that a program would have needed besides its arguments from the compiler's out-of-memory message.

    Returns None if the message states no size.
    """
    temporaries = re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds", failure)
    total = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of ", failure)
    if (match := temporaries or total) is None:
        return None
    size = int(float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]])
    return size if temporaries else max(0, size - arguments)


# Advice and search -------------------------------------------------------------------------------------------------------


REMATS = ("none", "attention", "full")


def advice(plan: Plan, config: Config) -> list[str]:
    """Suggests changes that make a plan fit into memory, the most effective first, as flags of ``posjax``."""
    mesh, memory = plan.mesh, plan.memory
    gradients = min(memory.get("parameters", 0), memory.get("activations", 0))  # counted among the activations
    state = sum(memory.get(name, 0) for name in ("parameters", "optimizer", "average")) + gradients
    activations = memory.get("activations", 0) - gradients
    rows = config.batch_size // (mesh["data"] * mesh["fsdp"]) // config.accumulate_steps
    for_activations, for_state = [], []
    if plan.remat != "full":
        for_activations.append("--remat full stores only the input of each layer and recomputes the rest")
    if rows > 1:
        room = max(plan.capacity - state, 1)
        parts = next((n for n in range(2, rows + 1) if rows % n == 0 and activations / n <= room), rows)
        fewer = f"processes {rows // parts} of a device's {rows} sequences at a time"
        for_activations.append(f"--accumulate_steps {parts * config.accumulate_steps} {fewer}")
    elif config.seq_length % (4 * mesh["context"]) == 0:
        wider = mesh | {"context": 2 * mesh["context"]}
        narrower = next((axis for axis in ("data", "fsdp") if wider[axis] % 2 == 0), None)
        if narrower:
            wider[narrower] //= 2
            for_activations.append(f"--mesh {mesh_flag(wider)} shards each sequence over {wider['context']} devices")
    if mesh["data"] > 1:
        sharded = mesh | {"data": 1, "fsdp": mesh["fsdp"] * mesh["data"]}
        shards = mesh["fsdp"] * mesh["context"]
        for_state.append(f"--mesh {mesh_flag(sharded)} shards the state over all devices instead of {shards}")
    kv_heads = config.num_kv_heads or config.num_heads
    if mesh["tensor"] < 8 and kv_heads % (2 * mesh["tensor"]) == 0 and mesh["fsdp"] % 2 == 0:
        split = mesh | {"tensor": 2 * mesh["tensor"], "fsdp": mesh["fsdp"] // 2}
        for_activations.append(f"--mesh {mesh_flag(split)} shards heads, MLP and logits over {split['tensor']} devices")
    first, second = (for_state, for_activations) if state > 0.5 * plan.used else (for_activations, for_state)
    return [*first, *second, "a topology with more devices"]


def mesh_flag(mesh: Mapping[str, int]) -> str:
    """Formats a mesh as the value of --mesh."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"


def candidates(config: Config, devices: int, limit: int = 6) -> Iterator[dict[str, Any]]:
    """Yields meshes and remat policies worth compiling, the most promising first.

    Single rows and heads are never split, and a shard of a sequence has at least 256 tokens. If there are rows for all devices,
    meshes that shard neither sequences nor heads come first. Each mesh is tried with less recomputation before more.
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
    # First the fewest devices per sequence, then the most shards of the state that still have 16 rows each, a tile of bfloat16.
    narrow = config.embed_dim / 16
    found.sort(key=lambda m: (m["context"] * m["tensor"], m["context"], m["fsdp"] > narrow, -m["fsdp"]))
    for mesh in found[: math.ceil(limit / len(REMATS))]:
        for remat in REMATS:
            yield dict(mesh=mesh_flag(mesh), remat=remat)
