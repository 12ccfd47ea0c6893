"""Writes the rows that ``posjax.lab.run`` returns as files: results.json, results.md and figures."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from posjax import plots
from posjax.checks import printable
from posjax.encodings.spec import slug
from posjax.files import write_atomically, write_json
from posjax.lab.evaluation import not_finite
from posjax.lab.statistics import summary

Row = Mapping[str, Any]


def write_results(rows: Sequence[Row], measure: str, workdir: Path, heading: str) -> str:
    """Writes results.json and results.md, and returns the Markdown table in results.md."""
    slim = [{"encoding": row["encoding"], "seed": row["seed"], "metrics": row["metrics"]} for row in rows]
    write_json(workdir / "results.json", {"rows": slim}, indent=1)
    table = markdown_table(rows, measure)
    write_atomically(workdir / "results.md", f"{heading}\n\n{table}\n")
    return table


def by_encoding(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows by encoding, in order of first appearance."""
    return _grouped(rows, "encoding")


def _grouped(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row[key], []).append(row)
    return grouped


def table_cells(rows: Sequence[Row], measure: str) -> tuple[list[str], list[list[str]]]:
    """Returns column heads and cells: the mean over seeds, with the standard deviation if there are several.

    For a length that an encoding does not support, the cell gives the encoding's maximum: "max 64". A mean with a value that is not
    finite is "not finite".
    """
    columns = list(rows[0]["metrics"][measure])
    cells = []
    for encoding, group in by_encoding(rows).items():
        line = [encoding]
        for column in columns:
            values = [row["metrics"][measure][column] for row in group]
            if None in values:
                lost = any(column in not_finite(row["metrics"], measure) for row in group)
                line.append("not finite" if lost else f"max {group[0]['metrics']['limit']}")
                continue
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            line.append(f"{np.mean(values):.3f}{spread}")
        cells.append([*line, f"{group[0]['metrics']['parameters']:,}"])
    return ["encoding", *columns, "parameters"], cells


def markdown_table(rows: Sequence[Row], measure: str) -> str:
    """Formats ``table_cells`` as a Markdown table."""
    return _markdown(*table_cells(rows, measure))


def _markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_escaped, heads)) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(_escaped, line)) + " |" for line in cells])


def _escaped(cell: str) -> str:
    """Escapes what Markdown would read as the end of a cell, as HTML or as an entity, and control characters."""
    text = html.escape(" ".join(printable(cell).split()), quote=False)
    return text.replace("\\", "\\\\").replace("|", "\\|")


# Ablations -------------------------------------------------------------------------------------------------------------


def write_ablation(rows: Sequence[Row], measure: str, label: str, workdir: Path, heading: str) -> tuple[list[str], list[list[str]]]:
    """Writes results.json, results.md, dots.png and curves.png for the rows of ``run_grid``, and returns the table."""
    kept = ("encoding", "seed", "settings", "metrics", "diverged")
    slim = [{name: row[name] for name in kept} for row in rows]
    write_json(workdir / "results.json", {"rows": slim}, indent=1)
    heads, cells = ablation_cells(rows, measure)
    write_atomically(workdir / "results.md", f"{heading}\n\n{_markdown(heads, cells)}\n")
    encodings = {row["label"]: row["encoding"] for row in rows}
    columns = [column for column in rows[0]["metrics"][measure] if any(row["metrics"][measure][column] is not None for row in rows)]
    plots.save(plots.dots({c: seeds_of(rows, measure, c) for c in columns}, label, encodings), workdir / "dots.png")
    if trained := training_curves(rows):
        plots.save(plots.curves(trained, "step", "training loss (nats)", encodings), workdir / "curves.png")
    return heads, cells


def by_label(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows by setting, in order of first appearance."""
    return _grouped(rows, "label")


def seeds_of(rows: Sequence[Row], measure: str, column: str) -> dict[str, list[float]]:
    """Returns the values of one column as {setting: one value per seed}.

    The value of a seed whose training diverged is NaN; seeds whose encoding does not support the column's length are left out.
    """
    return {
        label: [
            math.nan if row["diverged"] is not None or row["metrics"][measure][column] is None else row["metrics"][measure][column]
            for row in group
            if row["diverged"] is not None or column not in _out_of_reach(row, measure)
        ]
        for label, group in by_label(rows).items()
    }


def _out_of_reach(row: Row, measure: str) -> list[str]:
    """Returns the columns whose lengths exceed the limit of the row's encoding."""
    limit = row["metrics"]["limit"]
    return [c for c in row["metrics"][measure] if limit is not None and c.isdigit() and int(c) > limit]


def training_curves(rows: Sequence[Row]) -> dict[str, tuple[list[int], list[list[float]]]]:
    """Returns {setting: (steps, losses of each seed)}, without diverged seeds, which would dominate the scale of the axis."""
    good = by_label([row for row in rows if row["diverged"] is None])
    return {
        label: (group[0]["curve"]["step"], [[math.nan if x is None else x for x in row["curve"]["loss"]] for row in group])
        for label, group in good.items()
    }


def ablation_cells(rows: Sequence[Row], measure: str) -> tuple[list[str], list[list[str]]]:
    """Returns column heads and cells: mean over seeds, standard deviation, and the 95 % interval of the mean in brackets.

    Seeds whose training diverged are excluded from the means and counted in a separate column.
    """
    columns = list(rows[0]["metrics"][measure])
    lost = {label: sum(row["diverged"] is not None for row in group) for label, group in by_label(rows).items()}
    values = {column: seeds_of(rows, measure, column) for column in columns}
    cells = []
    for label, group in by_label(rows).items():
        line = [label]
        for column in columns:
            if column in _out_of_reach(group[0], measure):
                line.append(f"max {group[0]['metrics']['limit']}")
            else:
                line.append(spread([value for value in values[column][label] if math.isfinite(value)]) or "diverged")
        line.append(f"{group[0]['metrics']['parameters']:,}")
        cells.append([*line, f"{lost[label]} of {len(group)}"] if any(lost.values()) else line)
    return ["setting", *columns, "parameters", *(["diverged"] if any(lost.values()) else [])], cells


def spread(values: Sequence[float]) -> str:
    """Formats the values of a setting's seeds as "mean ± deviation [low, high]"; one value has neither deviation nor interval.

    If all values are equal, for example because no seed makes errors, the interval is omitted: it would have width zero.
    """
    found = summary(values)
    if found.mean is None:
        return ""
    if found.interval is None:
        return f"{found.mean:.3g}"
    low, high = found.interval
    if min(values) >= 0:  # then the mean cannot be negative either
        low = max(low, 0.0)
    digits = 3 if found.mean < 10 else 2 if found.mean < 100 else 1
    if found.deviation == 0:
        return f"{found.mean:.{digits}f} ± {0:.{digits}f}"
    return f"{found.mean:.{digits}f} ± {found.deviation:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


# Comparisons -----------------------------------------------------------------------------------------------------------


def write_figures(
    rows: Sequence[Row], measure: str, label: str, train_length: int, workdir: Path, figure_format: str = "png"
) -> list[Path]:
    """Draws the figures for which the rows have data, and returns their files.

    The decay of scores and CoPE's counts are those of each encoding's first seed.

    Args:
      rows: the rows of results.
      measure, label: the metric, and its label on axes.
      train_length: training length in tokens.
      workdir: folder of the figures.
      figure_format: png, svg or pdf.
    """
    grouped = by_encoding(rows)
    first = {encoding: group[0] for encoding, group in grouped.items()}
    written = []

    def keep(name: str, figure: Any) -> None:
        plots.save(figure, workdir / f"{name}.{figure_format}")
        written.append(workdir / f"{name}.{figure_format}")

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
        encoding: (group[0]["loss_by_index"]["index"], [row["loss_by_index"]["loss"] for row in group])
        for encoding, group in grouped.items()
        if all("loss_by_index" in row for row in group)
    }
    if curves:
        keep("loss_by_index", plots.loss_by_index(curves, train_length, label))
    distances = {
        encoding: [row["attention_distance"] for row in group]
        for encoding, group in grouped.items()
        if all("attention_distance" in row for row in group)
    }
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
