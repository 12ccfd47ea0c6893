"""What a pod does in a step of configs/decoder_1b.py: memory and collectives of the compiled train step; no TPU is needed.

    python experiments/tpu_train_step.py                                          # v5e:16x16 and v5p:8x8x8, several minutes each
    python experiments/tpu_train_step.py --topologies v6e:16x16 --tensor 8

Heads and MLP of a sequence are cut over ``tensor`` devices, the batch over the others, and the state over all. Shapes are those on
a device; what stands in a loop, such as the one over layers, is counted once. A collective is marked as moving

    q, k, v       over sequence or heads: its op_name lies within the attention call (in its shard_map) and it is not a sum, as that
                  of a learned table's gradient is; or an operand or result has the axes of q, k or v, which are the sequence, the
                  channels of a head, and heads, all of them or one device's
    activations   over the sequence or another axis: it is not a sum nor of the state, and an operand or result has the sequence

Sums are all-reduce and reduce-scatter. An axis is known by its size, and the sequence as a whole.

experiments/results/tpu_train_step.json has a row for each topology. One that stands in it already is not compiled again, as long as
versions and sources in posjax/kernels are those that it names; else the file begins anew.
"""

import collections
import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from tpu_compiles import basis  # beside this one

from posjax import aot
from posjax.bench import results
from posjax.bench.attention import show_progress
from posjax.config import Config, load_config
from posjax.runs import abstract_step

CONFIG = Path(__file__).parents[1] / "configs" / "decoder_1b.py"
RESULTS = Path(__file__).parent / "results" / "tpu_train_step.json"
_SUMS = ("all-reduce", "reduce-scatter")
_KINDS = (*_SUMS, "all-gather", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
_SCATTER = "all-reduce-scatter"  # computations that TPUs have for a reduce-scatter; within is an all-reduce
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([\w.-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Pods:
    """Compiles the train step for topologies and writes down memory and collectives.

    Attributes:
      topologies: such as v5e:16x16.
      tensor: devices that share the heads and the MLP of a sequence.
    """

    topologies: tuple[str, ...] = ("v5e:16x16", "v5p:8x8x8")
    tensor: int = 4


@dataclasses.dataclass
class Kept:
    """A jitted function, on its way through lower and compile, that leaves the text of its program in a file."""

    stage: Any
    path: str

    def lower(self, *args: Any) -> "Kept":
        return Kept(self.stage.lower(*args), self.path)

    def compile(self) -> Any:
        compiled = self.stage.compile()
        Path(self.path).write_text(compiled.as_text())
        return compiled


def step_job(config: str, tensor: int, folder: str, devices: Sequence[Any]) -> tuple[Kept, tuple]:
    """What posjax.aot compiles, in its own process."""
    step, (state, batch) = abstract_step(config, devices, mesh=f"fsdp={len(devices) // tensor},tensor={tensor}")
    about = {"devices": len(devices), "mesh": dict(batch["tokens"].sharding.mesh.shape)}
    about |= {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}
    Path(folder, "about.json").write_text(json.dumps(about | {"batch": list(batch["tokens"].shape)}))
    return Kept(step, f"{folder}/program.txt"), (state, batch)


def measure(topology: str, tensor: int) -> dict[str, Any]:
    """The row of a topology."""
    with tempfile.TemporaryDirectory() as folder:
        job = dict(config=str(CONFIG), tensor=tensor, folder=folder)
        report = aot.compile_ahead("tpu_train_step:step_job", job, topology)
        about = json.loads(Path(folder, "about.json").read_text())
        found = list(collectives(Path(folder, "program.txt").read_text(), load_config(str(CONFIG)), tensor))
    counts = collections.Counter(json.dumps(one) for one in found)
    grouped = [json.loads(one) | {"count": count} for one, count in counts.items()]
    grouped.sort(key=lambda one: (not one["moves"], one["kind"], not one["loops"]))
    kernels = [{"name": k.name, "op_name": k.op_name, "bundles": k.bundles, "vmem_bytes": k.vmem} for k in report.kernels]
    row = {"topology": topology, "tensor": tensor, "device_kind": report.device_kind, **about, "seconds": round(report.seconds, 1)}
    row |= {"memory_bytes": report.memory, "kernels": kernels, "custom_calls": report.custom_calls}
    return row | {"collectives": grouped}


def collectives(text: str, config: Config, tensor: int) -> Iterator[dict[str, Any]]:
    """Collectives of a compiled program. One whose channel was seen before is the same, in a fusion that was made twice."""
    bodies = set(re.findall(r" while\(.*? body=%([\w.-]+)", text))
    callers: dict[str, str] = {}
    for part in re.split(r"\n(?=%|ENTRY )", text):
        callers |= dict.fromkeys(re.findall(r"(?:body|calls|to_apply)=%([\w.-]+)", part), part.split(" (")[0].split("%")[-1])
    computation, shapes, seen = "", {}, set()
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation, shapes = match[1], {}
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, shape, opcode, operands, rest = match.groups()
        shapes[name] = shape
        kind = "reduce-scatter" if f"calls=%{_SCATTER}" in rest else opcode.removesuffix("-start")
        channel = re.search(r"channel_id=(\d+)", rest)
        if kind not in _KINDS or computation.startswith(_SCATTER) or (channel and channel[1] in seen):
            continue
        seen |= {channel[1]} if channel else set()
        op_name = match[1] if (match := re.search(r'op_name="(.*?)"', rest)) else ""
        arrays = " ".join([shape, *(shapes.get(operand, "") for operand in re.findall(r"%([\w.-]+)", operands))])
        axes = [[int(size) for size in dims.split(",") if size] for dims in re.findall(r"\w\[([\d,]*)\]", arrays)]
        loops, at = 0, computation
        while at:
            loops, at = loops + (at in bodies), callers.get(at, "")
        bare = re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)
        yield {"kind": kind, "shape": bare, "op_name": op_name, "loops": loops, "moves": moved(kind, op_name, axes, config, tensor)}


def moved(kind: str, op_name: str, arrays: Sequence[Sequence[int]], config: Config, tensor: int) -> str:
    """What a collective moves, as said above."""
    heads = {n // cut for n in (config.num_heads, config.num_kv_heads or config.num_heads) for cut in (1, tensor)}
    head_dim = config.embed_dim // config.num_heads
    of_attention = any(config.seq_length in a and head_dim in a and heads & set(a) for a in arrays)
    if of_attention or (kind not in _SUMS and "shard_map" in op_name.split("/")):
        return "q, k, v"
    others = kind not in _SUMS and not op_name.startswith("state.")
    return "activations" if others and any(config.seq_length in a for a in arrays) else ""


def show(row: dict[str, Any]) -> None:
    """Prints a topology's table."""
    lines = []
    for one in row["collectives"]:
        where = re.sub(r"jit\(step\)/|closed_call/|eval_jaxpr/|\\", "", one["op_name"])
        count = f"{one['count']}{' in a loop' if one['loops'] else ''}"
        lines.append([f"{one['kind']} {one['shape']}\n  {where}", count, one["moves"] or "-"])
    memory = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in row["memory_bytes"].items())
    mesh = " x ".join(f"{name} {size}" for name, size in row["mesh"].items())
    batch = f"batch of {row['batch'][0]} x {row['batch'][1]:,} tokens on {row['devices']} devices ({mesh})"
    heading = f"{row['topology']}: {row['parameters'] / 1e9:.3f} billion parameters, {batch}; compiled in {row['seconds']:.0f} s"
    names = ", ".join(kernel["name"] for kernel in row["kernels"]) or "none"
    notes = [f"GiB of a device: {memory}.", f"Attention kernels in the program: {names}."]
    results.print_table(heading, ["collective and its origin", "count", "moves"], lines, notes)


def main(config: Pods) -> None:
    started = basis()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = {(row["topology"], row["tensor"]): row for row in found.pop("rows", ()) if found == started}
    for number, topology in enumerate(config.topologies):
        if (topology, config.tensor) not in rows:
            with show_progress(quiet=False) as progress:
                progress(topology, number, len(config.topologies))
                row = measure(topology, config.tensor)
            if basis() != started:
                raise RuntimeError("posjax/kernels changed meanwhile; start again, from a copy if it goes on changing")
            rows[topology, config.tensor] = row
            RESULTS.write_text(json.dumps(started | {"rows": list(rows.values())}, indent=1) + "\n")
        show(rows[topology, config.tensor])


if __name__ == "__main__":
    main(tyro.cli(Pods, description=__doc__))
