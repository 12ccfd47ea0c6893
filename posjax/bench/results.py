"""Writes the results of ``posjax bench`` as tables and files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posjax import files, plots

Row = dict[str, Any]
FILES = ("attention.json", "attention.md", "attention.png")


def fill_ratios(rows: Sequence[Row]) -> None:
    """Sets each row's ratios to identity in the same implementation and to jax.nn.dot_product_attention, which has no positions."""
    times = {(row["kind"], row["implementation"], row["encoding"], row["length"], row["pass"]): row["ms_min"] for row in rows}
    for row in rows:
        case = row["length"], row["pass"]
        identity = times.get(("posjax", row["implementation"], "identity", *case)) if row["kind"] == "posjax" else None
        plain = times.get(("jax.nn", "xla", "identity", *case))
        for name, baseline in (("ratio_to_identity", identity), ("ratio_to_jax_nn", plain)):
            row[name] = row["ms_min"] / baseline if row["ms_min"] and baseline else None


def memory(row: Row) -> int | None:
    """Returns the peak memory in bytes: of the device if it has separate memory, else the growth of the process."""
    return row["peak_bytes_growth"] if row["device_peak_bytes"] is None else row["device_peak_bytes"]


# Column heads, fields of a row, and formats. The last two columns appear only in the file.
_COLUMNS = (
    ("ms", "ms_min", ".2f"),
    ("x id", "ratio_to_identity", ".2f"),
    ("x nn", "ratio_to_jax_nn", ".2f"),
    ("MB", "megabytes", ".1f"),
    ("error", "error_out", ".0e"),
    ("grads", "error_grads", ".0e"),
    ("median", "ms_median", ".2f"),
    ("temp MB", "temp_megabytes", ".1f"),
)
_ON_TERMINAL = 6


def cells(rows: Sequence[Row], wide: bool) -> tuple[list[str], list[list[str]]]:
    """Returns column heads and cells for rows of one length and pass; ``wide`` includes the columns omitted on a terminal."""
    columns = _COLUMNS if wide else _COLUMNS[:_ON_TERMINAL]
    if all(row["error_grads"] is None for row in rows):
        columns = tuple(column for column in columns if column[0] != "grads")
    lines = []
    for row in rows:
        temp = row["temp_bytes"]
        row = row | {"megabytes": memory(row) / 1e6 if memory(row) is not None else None}
        row |= {"temp_megabytes": temp / 1e6 if temp is not None else None}
        gates = f"{row['gates']} {_number(row['mean_gate'], '.2f')}".strip() if row["gates"] else ""
        numbers = [_number(row[name], form) for _, name, form in columns]
        lines.append([row["contestant"], gates, *(numbers if row["ms_min"] is not None else ["-"] * len(columns))])
    return ["contestant", "gates", *(head for head, _, _ in columns)], lines


def _number(value: float | None, form: str) -> str:
    """Formats a number in at most about seven characters; large numbers have no decimals."""
    if value is None:
        return ""
    return f"{value:,.0f}" if form.endswith("f") and abs(value) >= 1000 else format(value, form)


def groups(rows: Sequence[Row]) -> list[tuple[str, list[Row], list[str]]]:
    """Returns (heading, rows, notes) for each length and pass; a note names its contestants, or "all"."""
    tables = []
    for length, direction in dict.fromkeys((row["length"], row["pass"]) for row in rows):
        group = [row for row in rows if (row["length"], row["pass"]) == (length, direction)]
        notes: dict[str, list[str]] = {}
        for row in group:
            first_only = ["time of a single call, the first in its process"] if row["rounds"] == 0 else []
            for note in first_only + row["notes"]:
                notes.setdefault(note, []).append(_label(row))
        num_measured = sum(row["ms_min"] is not None for row in group)
        lines = [f"{'all' if len(who) >= num_measured > 1 else '; '.join(who)}: {note}" for note, who in notes.items()]
        heading = f"{length:,} tokens, {'forward' if direction == 'forward' else 'forward and backward'}"
        tables.append((heading, group, lines))
    return tables


def show(rows: Sequence[Row]) -> None:
    """Prints the tables."""
    for heading, group, notes in groups(rows):
        print_table(heading, *cells(group, wide=False), notes)
    print_text(LEGEND)


def print_table(heading: str, heads: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> None:
    """Prints a table with two columns of text, then columns of numbers, and notes below it."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title=heading, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number > 1 else "left", no_wrap=number > 0, overflow="fold")
    for line in lines:
        table.add_row(*line)
    print_text(table, *notes, "")


def print_text(*parts: Any) -> None:
    """Prints texts and tables below one another, in the width of the terminal."""
    from rich.console import Console

    Console(markup=False, highlight=False).print(*parts, sep="\n")


LEGEND = (
    "ms: minimum over interleaved rounds (attention.md also has the median). x id: ratio to the time of identity in the same "
    "implementation; x nn: ratio to the time of jax.nn.dot_product_attention, which has no positions. MB: peak growth of a process "
    "that makes only this call (on an accelerator: peak memory of the device). error: norm of the difference from dense attention "
    "in float32 on the CPU over its norm; grads: the same for the gradient with the largest error. The number after gates is their "
    "mean."
)
_LEGEND_OF_FILE = (
    "temp MB is the compiler's figure. CoPE's gradient is discontinuous where a count crosses an integer, and rounding to float32 "
    "moves some counts across: this alone can cause errors of 1e-4 in its gradients, and larger ones in long sequences."
)


def write(rows: Sequence[Row], config: Row, hardware: Row, versions: Row, out: Path) -> None:
    """Writes attention.json, attention.md and, if anything was measured, attention.png."""
    write_json(rows, config, hardware, versions, out / "attention.json")
    machine = f"{hardware['cpu']}, {hardware['cores']} cores; {hardware['devices']} x {hardware['device_kind']}"
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    shape = f"batch {config['batch']}, {config['heads']} heads of {config['head_dim']} channels, {config['dtype']}, causal"
    lines = [f"{machine}. {packages}. {shape[0].upper()}{shape[1:]}.", "", f"{LEGEND} {_LEGEND_OF_FILE}", ""]
    for heading, group, notes in groups(rows):
        lines += markdown(heading, *cells(group, wide=True), notes)
    (out / "attention.md").write_text("\n".join(lines).rstrip() + "\n")
    if any(row["ms_min"] is not None for row in rows):
        plots.save(draw(rows), out / "attention.png")


def write_json(rows: Sequence[Row], config: Row, hardware: Row, versions: Row, path: Path, **more: Any) -> None:
    """Writes rows with their hardware, versions and config, and ``more`` derived values, to a JSON file atomically."""
    settings = {name: value for name, value in config.items() if name != "out"}
    content = {"hardware": hardware, "versions": versions, "config": settings, **more, "rows": list(rows)}
    files.write_json(path, content, indent=1)


def markdown(heading: str, heads: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> list[str]:
    """Returns the lines of a Markdown section with the content of ``print_table``."""
    table = ["| " + " | ".join(heads) + " |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
    table += ["| " + " | ".join(line) + " |" for line in lines]
    return [f"## {heading}", "", *table, "", *(f"- {note}" for note in notes), ""]


def draw(rows: Sequence[Row]) -> Any:
    """Plots time and memory against length."""
    panels: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    looks = {}
    for row in rows:
        looks[_label(row)] = (row["encoding"], f"{row['kind']} {row['implementation']}", row["gates"] or "half")
        labels = panels.setdefault("forward" if row["pass"] == "forward" else "forward and backward", {})
        for label, value in (("time (ms)", row["ms_min"]), ("memory (MB)", (memory(row) or 0) / 1e6)):
            curves = labels.setdefault(label, {})
            if value:  # the axes are logarithmic
                curves.setdefault(_label(row), {})[row["length"]] = value
    return plots.cost_by_length(panels, looks)


def _label(row: Row) -> str:
    return row["contestant"] + (f", {row['gates']}" if row["gates"] else "")
