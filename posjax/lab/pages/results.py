"""The stored results of runs, comparisons and ablations, as the data of a report page."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posjax.files import read_json
from posjax.lab.ablation.sweeps import Point
from posjax.lab.config import Config
from posjax.lab.evaluation import MEASURES, measure_in
from posjax.lab.pages.tables import series_of_seeds
from posjax.lab.report import by_label
from posjax.lab.trained import stored_rows, with_distinct_names
from posjax.lab.workdir import EVALUATION, READING, read_config, read_facts
from posjax.plots.explorer import curves_figure, dots_figure, loss_by_length_figure
from posjax.storage import run_path

RESULTS = "results.json"


def report_data(folders: Sequence[str], config: Config, flags: set[str]) -> dict[str, Any]:
    """Returns the data of a report page, from stored results only: neither data nor checkpoints are opened.

    Args:
      folders: workdirs of runs, of comparisons or of ablations.
      config: the configuration of the first.
      flags: names of the fields that the command line sets; encoding, encodings and seeds choose runs.

    Raises:
      ValueError: a workdir has no results, or the results are of different metrics or tasks.
    """
    rows, provenance, configs = [], [], []
    for folder in folders:
        stored = read_config(run_path(folder))
        chosen = {name: getattr(config, name) for name in flags & {*EVALUATION, *READING, "encoding", "seeds"} - {"workdir"}}
        own = dataclasses.replace(stored, **chosen)
        results = _results(folder)
        if _is_ablation(results):
            found = _ablation_rows(stored, results["rows"])
        else:
            found = [row | {"label": row["encoding"], "diverged": None} for row in stored_rows(own, flags)[0]]
        rows += [row | {"workdir": folder} for row in found]
        configs.append(stored)
        provenance.append({"caption": str(folder), "facts": _facts(folder, stored, results)})
    tasks = {one.task for one in configs}
    if len(tasks) > 1:
        raise ValueError(f"runs to report must have the same task, got {' and '.join(sorted(tasks))}")
    rows = with_distinct_names(rows, "label")
    measure = measure_in(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row["metrics"][measure]))
    series = series_of_seeds({name: _values(group, measure, columns) for name, group in by_label(rows).items()})
    return {
        "heading": _heading(configs, MEASURES[measure], rows),
        "tables": [_summary_table(series, columns, rows, measure), _seed_table(rows, measure, columns)],
        "figures": _figures(series, columns, rows, measure, configs),
        "provenance": provenance,
    }


def _results(folder: str) -> dict[str, Any]:
    try:
        return read_json(run_path(folder) / RESULTS, "rows")
    except FileNotFoundError:
        return {}


def _ablation_rows(config: Config, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def label(row: Mapping[str, Any]) -> str:
        return Point(dataclasses.replace(config, encoding=row["encoding"]), row["settings"]).label

    return [{**row, "label": label(row)} for row in rows]


def _values(rows: Sequence[Mapping[str, Any]], measure: str, columns: Sequence[str]) -> dict[str, list[float]]:
    """Returns {column: value of each seed}: NaN for a seed whose training diverged, nothing beyond the limit of an encoding."""
    values: dict[str, list[float]] = {}
    for column in columns:
        own = [row["metrics"][measure].get(column) if row["diverged"] is None else math.nan for row in rows]
        values[column] = [value for value in own if value is not None]
    return values


# Tables --------------------------------------------------------------------------------------------------------------------------


def _summary_table(
    series: Sequence[Mapping[str, Any]], columns: Sequence[str], rows: Sequence[Mapping[str, Any]], measure: str
) -> dict[str, Any]:
    first = {name: group[0] for name, group in by_label(rows).items()}

    def cell(one: Mapping[str, Any], place: int) -> Any:
        mean, low, high = one["mean"][place], one["low"][place], one["high"][place]
        if mean is None:
            limit = first[one["name"]]["metrics"]["limit"]
            return {"text": "diverged" if one["values"][place] else f"max {limit}" if limit else "no result", "value": None}
        text = f"{mean:.3f}" if low is None else f"{mean:.3f} [{max(low, 0.0) if mean >= 0 else low:.3f}, {high:.3f}]"
        return {"text": text, "value": mean}

    lines = []
    for one in series:
        seeds = max(map(len, one["values"]))
        parameters = first[one["name"]]["metrics"]["parameters"]
        cells = [cell(one, place) for place in range(len(columns))]
        lines.append([one["name"], *cells, {"text": str(seeds), "value": seeds}, {"text": f"{parameters:,}", "value": parameters}])
    caption = f"{MEASURES[measure]}: mean over seeds [95 % interval of the mean]"
    return {"caption": caption, "columns": ["setting", *columns, "seeds", "parameters"], "rows": lines}


def _seed_table(rows: Sequence[Mapping[str, Any]], measure: str, columns: Sequence[str]) -> dict[str, Any]:
    def cell(row: Mapping[str, Any], column: str) -> Any:
        value = row["metrics"][measure].get(column)
        if row["diverged"] is not None:
            return {"text": f"diverged at step {row['diverged']}", "value": None}
        return {"text": "no result" if value is None else f"{value:.4f}", "value": value}

    lines = [
        [row["label"], {"text": str(row["seed"]), "value": row["seed"]}, *(cell(row, column) for column in columns)] for row in rows
    ]
    return {"caption": f"{MEASURES[measure]}: every seed", "columns": ["setting", "seed", *columns], "rows": lines}


# Figures and facts ---------------------------------------------------------------------------------------------------------------


def _figures(
    series: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    measure: str,
    configs: Sequence[Config],
) -> list[dict[str, Any]]:
    label, lengths = MEASURES[measure], {one.seq_length for one in configs}
    train_length = lengths.pop() if len(lengths) == 1 else None
    if len(columns) > 1 and all(column.isdigit() for column in columns):
        figures = [loss_by_length_figure(series, train_length, label)]
    else:
        figures = [dots_figure(column, series, label) for column in columns]
    grouped = by_label(rows)
    by_index = {
        name: (group[0]["loss_by_index"]["index"], [row["loss_by_index"]["loss"] for row in group])
        for name, group in grouped.items()
        if all("loss_by_index" in row for row in group)
    }
    if by_index:
        words = "A line for every seed."
        figures.append(
            curves_figure("Loss by index of the token", words, by_index, "index of the token in its text (tokens)", label)
        )
    curves = {
        name: (group[0]["curve"]["step"], [row["curve"]["loss"] for row in group])
        for name, group in grouped.items()
        if all(row.get("curve", {}).get("step") for row in group)
    }
    if curves:
        figures.append(curves_figure("Training loss", "A line for every seed.", curves, "step", "training loss (nats)"))
    return figures


def _heading(configs: Sequence[Config], label: str, rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = len({row["seed"] for row in rows})
    first = configs[0]
    settings = len({row["label"] for row in rows})
    counts = f"{settings} setting{'s' if settings > 1 else ''} and {seeds} seed{'s' if seeds > 1 else ''}"
    trained = f"trained for {first.steps:,} steps of {first.batch_size} sequences"
    return f"{label[0].upper()}{label[1:]} of {counts}, {trained}. Lower is better. Click the head of a column to sort by it."


def _facts(folder: str, config: Config, results: Mapping[str, Any]) -> list[list[str]]:
    """Returns what a workdir says about where its results come from."""
    data = read_facts(run_path(folder)).get("data") or results.get("data") or {}
    facts = []
    if not _is_ablation(results):
        verb = "train" if (run_path(folder) / "checkpoints").is_dir() else "compare"
        facts.append(["to train again", f"posjax {verb} {folder}/config.json --workdir NEW"])
    facts += [[f"digest of the {name} data", digest] for name, digest in data.items()]
    if versions := results.get("versions"):
        facts.append(["versions", ", ".join(f"{name} {number}" for name, number in versions.items())])
    if hardware := results.get("hardware"):
        facts.append(["hardware", ", ".join(str(value) for value in hardware.values())])
    hidden = {"workdir", "data_dir"}
    settings = [(name, value) for name, value in dataclasses.asdict(config).items() if name not in hidden]
    return [*facts, ["configuration", ", ".join(f"{name}={json.dumps(value)}" for name, value in settings)]]


def _is_ablation(results: Mapping[str, Any]) -> bool:
    return any("settings" in row for row in results.get("rows", ()))
