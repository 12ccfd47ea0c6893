"""Results as files: results.json, results.md and figures, from the rows that ``posjax.runs`` returns."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posjax import plots
from posjax.specs import slug

Row = Mapping[str, Any]


def write_results(rows: Sequence[Row], measure: str, workdir: Path, heading: str) -> str:
    """Writes results.json and results.md and returns the table of the latter."""
    slim = [{"encoding": row["encoding"], "seed": row["seed"], "metrics": row["metrics"]} for row in rows]
    (workdir / "results.json").write_text(json.dumps({"rows": slim}, indent=1) + "\n")
    table = markdown_table(rows, measure)
    (workdir / "results.md").write_text(f"{heading}\n\n{table}\n")
    return table


def by_encoding(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one encoding together, in their order."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["encoding"], []).append(row)
    return grouped


def table_cells(rows: Sequence[Row], measure: str) -> tuple[list[str], list[list[str]]]:
    """Column heads and cells: mean over seeds, with the standard deviation where there are several.

    A cell of a length that an encoding cannot take says how far it goes: "max 64".
    """
    columns = list(rows[0]["metrics"][measure])
    cells = []
    for encoding, group in by_encoding(rows).items():
        line = [encoding]
        for column in columns:
            values = [row["metrics"][measure][column] for row in group]
            if None in values:
                line.append(f"max {group[0]['metrics']['limit']}")
                continue
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.3f}{spread}")
        cells.append([*line, f"{group[0]['metrics']['parameters']:,}"])
    return ["encoding", *columns, "parameters"], cells


def markdown_table(rows: Sequence[Row], measure: str) -> str:
    """The table in Markdown."""
    heads, cells = table_cells(rows, measure)
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in cells])


def write_figures(rows: Sequence[Row], measure: str, label: str, train_length: int, workdir: Path) -> list[Path]:
    """Draws what the rows hold and returns the files. ``label`` is the measure in words, for axes."""
    grouped = by_encoding(rows)
    first = {encoding: group[0] for encoding, group in grouped.items()}
    written = []

    def keep(name: str, figure: Any) -> None:
        plots.save(figure, workdir / f"{name}.png")
        written.append(workdir / f"{name}.png")

    lengths = rows[0]["metrics"][measure]
    if all(column.isdigit() for column in lengths) and len(lengths) > 1:
        losses = {
            encoding: {
                int(n): [row["metrics"][measure][n] for row in group if row["metrics"][measure][n] is not None] for n in lengths
            }
            for encoding, group in grouped.items()
        }
        keep("loss_by_length", plots.loss_by_length(losses, train_length, label))
    curves = {
        encoding: (row["loss_by_index"]["index"], row["loss_by_index"]["loss"])
        for encoding, row in first.items()
        if "loss_by_index" in row
    }
    if curves:
        keep("loss_by_index", plots.loss_by_index(curves, train_length, label))
    distances = {encoding: row["attention_distance"] for encoding, row in first.items() if "attention_distance" in row}
    if distances:
        keep("attention_distance", plots.attention_distance(distances))
    decays = {encoding: (row["decay"]["distance"], row["decay"]["score"]) for encoding, row in first.items() if "decay" in row}
    if decays:
        keep("decay_curves", plots.decay_curves(decays))
    for encoding, row in first.items():
        if "line" in row:
            line = row["line"]
            titles = [f"layer {line['layer'] + 1}, head {head + 1}" for head in range(len(line["gates"]))]
            figure = plots.cope_over_line(line["text"], line["gates"], line["positions"], titles)
            keep(f"cope_{slug(encoding)}", figure)
    return written
