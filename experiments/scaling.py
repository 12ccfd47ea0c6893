"""Predicts how a training step divides between computation and each mesh axis on 64, 256 and 512 chips; needs no TPU.

    python experiments/scaling.py                          # pretrain_7b on v5p, an hour on two CPU cores
    python experiments/scaling.py --only "fsdp" --chips 64 256

Compiles the full step of a decoder with 7 billion parameters, RoPE and CoPE for each number of chips; shares are those of
``posjax plan``: computation and communication at the peaks of the data sheets, without overlap. Strong scaling keeps the batch of
the configuration on more and more chips; weak scaling keeps the number of sequences per chip. Three meshes:

    fsdp                 rows and state over all chips
    data, fsdp, tensor   the state over 16, heads and MLP over 4, replicas over the remaining chips
    context              sequences of 32,768 tokens, a quarter as many, each over 4 chips

experiments/results/scaling.json stores each plan; stored plans are reused as long as the versions of jax and libtpu are the same.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from posjax.bench.attention import versions
from posjax.bench.results import print_table
from posjax.compile.plan import make_plans
from posjax.plots.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, new_figure, save

CONFIG = "pretrain_7b"
RESULTS = Path(__file__).parent / "results" / "scaling.json"
TOPOLOGIES = {64: "v5p:4x4x4", 256: "v5p:4x8x8", 512: "v5p:8x8x8"}
SEQUENCES = 512  # of 8,192 tokens, strong scaling


def meshes(chips: int) -> dict[str, dict[str, Any]]:
    """Returns {name of the mesh: fields of the configuration}."""
    long = dict(seq_length=32_768)
    return {
        "fsdp": dict(mesh=f"fsdp={chips}"),
        "data, fsdp, tensor": dict(mesh=f"data={chips // 64},fsdp=16,tensor=4"),
        "context": dict(mesh=f"data={chips // 64},fsdp=16,context=4") | long,
    }


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Configures which plans to compile.

    Attributes:
      only: names of meshes; all if empty.
      chips: numbers of chips.
    """

    only: tuple[str, ...] = ()
    chips: tuple[int, ...] = tuple(TOPOLOGIES)


def sequences(kind: str, chips: int, fields: Mapping[str, Any]) -> int:
    """Returns the number of sequences in a batch, given the sequence length of the mesh."""
    return (SEQUENCES if kind == "strong" else chips) * 8192 // fields.get("seq_length", 8192)


def main(config: Scaling) -> None:
    current = {name: n for name, n in versions().items() if name in ("python", "jax", "jaxlib", "libtpu")}
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = {(r["mesh"], r["kind"], r["chips"]): r for r in stored.get("rows", ()) if stored.get("versions") == current}
    for name in meshes(64):
        for kind in ("strong", "weak"):
            for chips in TOPOLOGIES:
                is_selected = (not config.only or name in config.only) and chips in config.chips
                if is_selected and (name, kind, chips) not in rows:
                    fields = meshes(chips)[name]
                    fields |= dict(batch_size=sequences(kind, chips, fields))
                    alike = [r for r in rows.values() if r["fields"] == fields and r["chips"] == chips]
                    plan = alike[0]["plan"] if alike else measured(chips, fields)
                    rows[name, kind, chips] = dict(mesh=name, kind=kind, chips=chips, fields=fields, plan=plan)
                    RESULTS.write_text(json.dumps({"versions": current, "rows": list(rows.values())}, indent=1) + "\n")
    show(list(rows.values()))
    draw(list(rows.values()))


def measured(chips: int, fields: dict[str, Any]) -> dict[str, Any]:
    (plan,) = make_plans(CONFIG, TOPOLOGIES[chips], [fields])
    print(f"{TOPOLOGIES[chips]} {fields}: {plan.compile_seconds:.0f} s", flush=True)
    numbers = dataclasses.asdict(plan)
    numbers["collectives"] = [{k: v for k, v in one.items() if k != "op_names"} for one in numbers["collectives"]]
    if plan.failed is None:
        numbers |= dict(shares=plan.shares(), step=plan.step_s, best=plan.step_s_lower, mfu=plan.mfu(plan.step_s))
    return numbers


def show(rows: list[dict[str, Any]]) -> None:
    heads = ["mesh", "scaling", "chips", "GiB", "s per step", "MFU", *_GROUPS]
    lines = []
    for row in rows:
        plan, first = row["plan"], [row["mesh"], row["kind"], str(row["chips"])]
        if plan["failed"] is not None:
            lines.append([*first, "does not fit", *[""] * (len(heads) - 4)])
            continue
        used = sum(plan["memory"].values())
        verdict = "" if used <= plan["capacity"] else " (does not fit)"
        grouped = dict.fromkeys(_GROUPS, 0.0)
        for name, share in plan["shares"].items():
            grouped[name if name in grouped else "weights"] += share
        numbers = [f"{used / 2**30:.1f}{verdict}", f"{plan['step']:.2f}", f"{plan['mfu']:.0%}"]
        lines.append([*first, *numbers, *(f"{share:.1%}" for share in grouped.values())])
    print_table(
        f"{CONFIG} on v5p: shares of a step",
        heads,
        lines,
        ["weights: communication of weights and gradients, over data, fsdp and other axes"],
    )


_GROUPS = ("compute", "weights", "tensor", "context")
_COLORS = {"compute": GREY, "memory": SKY, "fsdp": BLUE, "data+fsdp": GREEN, "tensor": ORANGE, "context": RED}


def draw(rows: list[dict[str, Any]]) -> None:
    """Plots the stacked shares of a step, with a panel for each mesh and kind of scaling."""
    names = list(meshes(64))
    figure, grid = new_figure(10.0, 5.0, 2, len(names), squeeze=False, sharey=True, sharex=True)
    seen: dict[str, Any] = {}
    for panels, kind in zip(grid, ("strong", "weak"), strict=True):
        for axes, name in zip(panels, names, strict=True):
            found = [r for r in rows if (r["mesh"], r["kind"]) == (name, kind) and r["plan"]["failed"] is None]
            for at, row in enumerate(sorted(found, key=lambda r: r["chips"])):
                low = 0.0
                for what, share in row["plan"]["shares"].items():
                    color = _COLORS.get(what, PURPLE)
                    label = what if what in _COLORS else "other axes"
                    seen[label] = axes.bar(at, share, 0.7, low, color=color)
                    low += share
                axes.text(at, 1.01, f"{row['plan']['step']:.2f} s", ha="center", fontsize=8)
            axes.set_xticks(range(len(found)), [str(r["chips"]) for r in sorted(found, key=lambda r: r["chips"])])
            axes.set_ylim(0, 1.1)
            axes.set_title(f"{name}: {kind}", fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("chips (v5p)")
    for axes in grid[:, 0]:
        axes.set_ylabel("share of a step")
    figure.legend(list(seen.values()), list(seen), loc="outside right upper", frameon=False, fontsize=9)
    save(figure, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Scaling, description=__doc__))
