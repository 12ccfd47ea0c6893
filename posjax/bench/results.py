"""What ``posjax bench attention`` measured, as tables and files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posjax import plots

Row = dict[str, Any]
FILES = ("attention.json", "attention.md", "attention.png")


def fill_ratios(rows: Sequence[Row]) -> None:
    """Time over that of identity in the same implementation, and over jax.nn.dot_product_attention without position."""
    times = {(row["kind"], row["implementation"], row["encoding"], row["length"], row["pass"]): row["ms_min"] for row in rows}
    for row in rows:
        where = row["length"], row["pass"]
        identity = times.get(("posjax", row["implementation"], "identity", *where)) if row["kind"] == "posjax" else None
        plain = times.get(("jax.nn", "xla", "identity", *where))
        for name, baseline in (("ratio_to_identity", identity), ("ratio_to_jax_nn", plain)):
            row[name] = row["ms_min"] / baseline if row["ms_min"] and baseline else None


def memory(row: Row) -> int | None:
    """Bytes: of the device's own memory where it has one, else by how much the process grew."""
    return row["device_peak_bytes"] or row["peak_bytes_growth"]


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column heads and cells of rows of one length and pass."""
    heads = ["contestant", "gates", "ms (min)", "median", "x identity", "x jax.nn", "MB", "temp MB", "error"]
    backward = any(row["error_grads"] is not None for row in rows)
    heads += ["error grads"] if backward else []
    lines = []
    for row in rows:
        if row["ms_min"] is None:
            lines.append([row["contestant"], row["gates"] or "", row["notes"] or "not measured", *[""] * (len(heads) - 3)])
            continue
        gates = f"{row['gates']} {_number(row['mean_gate'], '.2f')}".strip() if row["gates"] else ""
        line = [row["contestant"], gates]
        line += [_number(row[name], ",.1f" if row[name] >= 100 else ".2f") for name in ("ms_min", "ms_median")]
        line += [_number(row[name], ".2f") for name in ("ratio_to_identity", "ratio_to_jax_nn")]
        line += [_number(size and size / 1e6, ",.1f") for size in (memory(row), row["temp_bytes"])]
        line += [_number(row[name], ".1e") for name in ("error_out", *(("error_grads",) if backward else ()))]
        lines.append(line)
    return heads, lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """(heading, column heads, cells, notes) for each length and pass."""
    made = []
    for length, direction in dict.fromkeys((row["length"], row["pass"]) for row in rows):
        group = [row for row in rows if (row["length"], row["pass"]) == (length, direction)]
        heading = f"{length:,} tokens, " + ("forward" if direction == "forward" else "forward and backward")
        notes: dict[str, list[str]] = {}
        for row in group:
            if row["notes"] and row["ms_min"] is not None:
                notes.setdefault(row["notes"], []).append(row["contestant"])
        lines = [text if len(who) == len(group) else f"{', '.join(dict.fromkeys(who))}: {text}" for text, who in notes.items()]
        made.append((heading, *cells(group), lines))
    return made


LEGEND = (
    "Times are in milliseconds, the least and the median of interleaved rounds. 'x identity' is the least time over that of identity "
    "in the same implementation, 'x jax.nn' over jax.nn.dot_product_attention without position. MB is how much a process that makes "
    "one call grows at its peak (on an accelerator, the device's own peak); temp MB is the compiler's figure. Errors are norms of "
    "the difference to a float64 oracle over the oracle's norm; of gradients, the worst array's. The number beside gates is their mean."
)


def write(rows: Sequence[Row], config: Row, hardware: Row, versions: Row, out: Path) -> None:
    """Writes attention.json, attention.md and, once anything was measured, attention.png."""
    whole = {"hardware": hardware, "versions": versions, "config": config, "rows": list(rows)}
    part = out / "attention.json.part"
    part.write_text(json.dumps(whole, indent=1) + "\n")
    part.replace(out / "attention.json")
    machine = f"{hardware['cpu']}, {hardware['cores']} cores; {hardware['devices']} x {hardware['device_kind']}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    shape = f"batch {config['batch']}, {config['heads']} heads of {config['head_dim']} channels, {config['dtype']}, causal"
    lines = [f"{machine}. {packages}. {shape[0].upper()}{shape[1:]}.", "", LEGEND, ""]
    for heading, heads, body, notes in tables(rows):
        lines += [f"## {heading}", "", "| " + " | ".join(heads) + " |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
        lines += ["| " + " | ".join(line) + " |" for line in body]
        lines += ["", *notes, ""]
    (out / "attention.md").write_text("\n".join(lines).rstrip() + "\n")
    measured = [row for row in rows if row["ms_min"] is not None]
    if measured:
        plots.save(plots.cost_by_length(curves(measured)), out / "attention.png")


def curves(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, dict[int, float]]]]:
    """{pass: {"time (ms)" or "memory (MB)": {contestant: {length: value}}}}, for ``posjax.plots.cost_by_length``."""
    made: dict = {}
    for row in rows:
        name = row["contestant"] + (f", {row['gates']}" if row["gates"] else "")
        panels = made.setdefault("forward" if row["pass"] == "forward" else "forward and backward", {})
        for label, value in (("time (ms)", row["ms_min"]), ("memory (MB)", (memory(row) or 0) / 1e6)):
            if value > 0:  # the axes are logarithmic
                panels.setdefault(label, {}).setdefault(name, {})[row["length"]] = value
    return made
