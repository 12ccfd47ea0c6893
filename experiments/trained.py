"""What the experiments that train share: scales, the grid, its results as JSON and figures. Not a program.

    python experiments/NAME.py                    the small scale, on two CPU cores in under ten minutes
    python experiments/NAME.py --scale paper      the published one, for a GPU; with --time, what a step of it takes

Both leave their runs in runs/experiments/NAME_SCALE, where the same command goes on, and write results/NAME_SCALE.json.
"""

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from common import RESULTS, markdown, write

from posjax import plots, report, runs
from posjax.ablation import Fleet, spread_over_cores
from posjax.checkpoints import CheckpointError
from posjax.config import Config
from posjax.evaluation import MEASURES, TASK_MEASURE
from posjax.grids import read_rows, run_grid
from posjax.kernels.refused import KernelRefused
from posjax.loop import Interrupted
from posjax.source import open_source
from posjax.statistics import difference, summary
from posjax.sweeps import Point, groups

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Part:
    """One grid of an experiment: its points, of one task and text, and how many seeds each gets."""

    points: Sequence[Point]
    seeds: int = 3


def main(
    name: str,
    description: str,
    parts: Callable[[argparse.Namespace], Mapping[str, Part]],
    table: Callable[[Mapping[str, Rows]], str],
    arguments: Mapping[str, str] | None = None,
) -> None:
    """Runs an experiment from the command line: trains, writes results/NAME_SCALE.json and a figure a part, prints the table.

    Args:
      name: of the file.
      description: its docstring.
      parts: options -> grids by name.
      table: {part: rows} -> Markdown, ours beside the published numbers.
      arguments: more options, {"--flag": help}.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("cpu", "paper"), default="cpu")
    parser.add_argument("--seeds", type=int, help="instead of the experiment's own number")
    parser.add_argument("--time", action="store_true", help="trains nothing: seconds of a step of every program, on this machine")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run; the others keep what results they have")
    for flag, text in (arguments or {}).items():
        parser.add_argument(flag, help=text)
    options = parser.parse_args()
    grids = dict(parts(options))
    if unknown := [part for part in options.only or () if part not in grids]:
        parser.error(f"--only must name {', '.join(grids)}, got {unknown[0]}")
    if options.only:
        grids = {part: grid for part, grid in grids.items() if part in options.only}
    if options.seeds:
        grids = {part: dataclasses.replace(grid, seeds=options.seeds) for part, grid in grids.items()}
    if options.time:
        return _time(f"{name}_{options.scale}_steps", grids)
    spread_over_cores(max(len(grid.points) * grid.seeds for grid in grids.values()))
    try:
        found, about = _run(name, options.scale, grids)
    except Interrupted as stopped:  # which has said how to go on
        sys.exit(stopped.exit_code)
    except (ValueError, CheckpointError, KernelRefused) as error:
        sys.exit(f"{name}: {error}")
    found, about = _kept(f"{name}_{options.scale}") | found, _kept(f"{name}_{options.scale}", "parts") | about
    found = {part: found[part] for part in parts(options) if part in found}
    stored = [{"part": part} | _slim(row) for part, rows in found.items() for row in rows]
    text = table(found)
    write(f"{name}_{options.scale}", stored, scale=options.scale, parts={part: about[part] for part in found}, table=text)
    print(text)


def _time(name: str, grids: Mapping[str, Part]) -> None:
    """Seconds of the second step of one run of each program, and what all steps of all runs would take one after the other."""
    rows = []
    for part, grid in grids.items():
        source = open_source(grid.points[0].config)
        for group in groups(grid.points, range(grid.seeds)):
            steps, runs_ = group.config.steps, len(group.runs)
            one = dataclasses.replace(group, config=dataclasses.replace(group.config, log_every=1), runs=group.runs[:1])
            fleet = Fleet(one, source, jax.local_devices()[:1], at_once=1)
            state, _ = fleet.move_on(fleet.start(), 0)
            began = time.perf_counter()
            fleet.move_on(state, 1)
            seconds = time.perf_counter() - began
            rows.append({"part": part, "encoding": group.spec, "runs": runs_, "steps": steps, "seconds_a_step": round(seconds, 2)})
            print(rows[-1], flush=True)
    heads = ["part", "encoding", "runs", "steps", "seconds a step", "hours in all"]
    hours = [row["runs"] * row["steps"] * row["seconds_a_step"] / 3600 for row in rows]
    table = markdown(heads, [[*row.values(), f"{own:,.0f}"] for row, own in zip(rows, hours, strict=True)])
    write(name, rows, table=table)
    print(table)


def _kept(name: str, what: str = "rows") -> dict[str, Any]:
    """What an earlier call left of its parts: rows, or what is said about them."""
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"parts": {}, "rows": []}
    if what == "parts":
        return stored["parts"]
    return {part: [row for row in stored["rows"] if row["part"] == part] for part in stored["parts"]}


def _run(name: str, scale: str, grids: Mapping[str, Part]) -> tuple[dict[str, Rows], dict[str, Any]]:
    found: dict[str, Rows] = {}
    about: dict[str, Any] = {}
    for part, grid in grids.items():
        folder = Path("runs/experiments") / f"{name}_{scale}" / part
        config = grid.points[0].config
        source = open_source(config)
        for point in grid.points:
            runs.check(point.config, (point.config.encoding,), source, devices=1)
        again = shlex.join(["python", *sys.argv])
        print(f"{part}: {len(grid.points)} settings, {grid.seeds} seeds", flush=True)
        rows = run_grid(grid.points, range(grid.seeds), folder, source, command=again, say=lambda text: print(text, flush=True))
        own = list(read_rows(folder))
        seconds = sum(group["seconds"] for group in own)
        steps = sum(point.config.steps for point in grid.points) * grid.seeds
        measure, label = MEASURES.get(config.task, TASK_MEASURE)
        dots = {column: report.seeds_of(rows, measure, column) for column in rows[0]["metrics"][measure]}
        figure = plots.dots(dots, label, {row["label"]: row["encoding"] for row in rows})
        plots.save(figure, RESULTS / f"{name}_{scale}_{part.replace(' ', '_')}.png")
        about[part] = {
            "seeds": grid.seeds,
            "runs": len(rows),
            "steps": config.steps,
            "seconds": round(seconds, 1),
            "runs_times_steps_a_second": round(steps / seconds, 1),
            "programs": sum(group["compilations"]["train"] for group in own),
            "config": _described(config),
        }
        found[part] = rows
    return found, about


def _slim(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of results, with its training curve at no more than 25 places and four digits."""
    steps, losses = row["curve"]["step"], row["curve"]["loss"]
    kept = range(len(steps) - 1, -1, -max(1, math.ceil(len(steps) / 25)))[::-1]
    curve = {"step": [steps[i] for i in kept], "loss": [None if losses[i] is None else round(losses[i], 4) for i in kept]}
    return {name: row[name] for name in ("encoding", "seed", "settings", "label", "metrics", "diverged")} | {"curve": curve}


def _described(config: Config) -> dict[str, Any]:
    """The fields that differ from the defaults, of which paths say nothing to anybody else."""
    fields = [f for f in dataclasses.fields(config) if f.name not in ("workdir", "data_dir", "data", "encoding", "encodings")]
    return {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}


def of(rows: Rows, **wanted: Any) -> Rows:
    """Rows whose encoding, seed or settings are those."""
    return [row for row in rows if all(row.get(name, row["settings"].get(name)) == value for name, value in wanted.items())]


def values(rows: Rows, column: str) -> list[float]:
    """What the seeds that did not diverge got, in one column."""
    kept = [row["metrics"] for row in rows if row["diverged"] is None]
    found = [scores[column] for metrics in kept for scores in metrics.values() if isinstance(scores, dict)]
    return [value for value in found if value is not None]


def cell(rows: Rows, column: str, digits: int = 1) -> str:
    """"mean (deviation)" as the papers write it, and how many diverged; empty where there is nothing."""
    found, lost = summary(values(rows, column)), sum(row["diverged"] is not None for row in rows)
    parts = [] if found.mean is None else [f"{found.mean:.{digits}f}"]
    parts += [] if found.deviation is None else [f"({found.deviation:.{digits}f})"]
    return " ".join([*parts, *([f"{lost} of {len(rows)} diverged"] if lost else [])])


def verdict(claim: str, lower: Sequence[float], higher: Sequence[float], unit: str = "", digits: int = 1) -> list[str]:
    """A line of the table of claims: what is claimed to be lower, by how much it is, and whether that was found.

    The interval is the paired one where there are as many values: seed i of both has the same data in the same order.
    """
    if not lower or not higher:
        return [claim, "no number", "not shown"]
    mean, interval = difference(lower, higher, paired=len(lower) == len(higher))
    if interval is None:
        return [claim, f"{mean:+.{digits}f}{unit}, one seed", "not shown"]
    low, high = interval
    word = "found" if high < 0 else "the opposite was found" if low > 0 else "not shown: the interval holds zero"
    return [claim, f"{mean:+.{digits}f}{unit} [{low:+.{digits}f}, {high:+.{digits}f}]", word]


def claims(lines: Sequence[Sequence[str]]) -> str:
    """The table of claims."""
    return markdown(["claim", "difference, 95 % interval", "here"], lines)
