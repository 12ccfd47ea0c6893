"""Code that experiments with training share: scales, the grid, and its results as JSON and figures. Not a program.

    python experiments/NAME.py                    the small scale, on two CPU cores in under fifteen minutes
    python experiments/NAME.py --time             first, on a new machine: seconds per step, which define equal time
    python experiments/NAME.py --scale paper      the published scale, for a GPU

Runs are stored in runs/experiments/NAME_SCALE; rerun the command to resume. Results are results/NAME_SCALE.json and
NAME_SCALE_items.npz, which has the score of every seed on every item (excerpt of text, block of strings), the basis of intervals.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import RESULTS, markdown, write
from contrasts import Claim, Rows, adjusted, claims_table, measured_claims, steps_asked, values
from scoring import majority, text_digest

from posjax import plots
from posjax.attention.backends.compile_errors import KernelCompileError
from posjax.lab import run as runs
from posjax.lab.ablation.engine import BatchedRuns, spread_over_cores
from posjax.lab.ablation.grids import read_rows, run_grid
from posjax.lab.ablation.sweeps import Point, grid, groups
from posjax.lab.config import Config
from posjax.lab.evaluation import MEASURES, EvalSet, measure_of, metric_scale
from posjax.lab.source import Source, open_source
from posjax.training.checkpoints import CheckpointError
from posjax.training.loop import Interrupted

# The final seeds were not used for development or tuning.
FIRST_SEED, TUNING_SEEDS = 40, (100, 101, 102)
_QUANTUM = 1024  # losses of items are stored as multiples of 1 / _QUANTUM nats


@dataclasses.dataclass(frozen=True)
class Part:
    """Describes one grid of an experiment.

    Attributes:
      points: settings; all have the same task and text.
      tests: (configuration, source) -> test sets by column.
      seeds: number of seeds per point; an even number keeps two cores busy.
      claims: claimed contrasts between labels of points.
      first_seed: the first of the consecutive seeds.
    """

    points: Sequence[Point]
    tests: Callable[[Config, Source], Mapping[str, EvalSet]]
    seeds: int = 6
    claims: Sequence[Claim] = ()
    first_seed: int = FIRST_SEED

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


def lasting(config: Config, **fields: Any) -> Config:
    """Returns a configuration whose learning rate stays at its peak, for runs that are scored after several numbers of steps.

    A moving average of the parameters is scored, which has the effect of learning-rate decay at the end of a run; a run of 500
    steps is therefore the first part of a run of 2,000. Layers are compiled separately, which is faster for small ones.
    """
    return dataclasses.replace(config, decay="constant", ema_decay=0.99, scan_layers=False, **fields)


def tuned(
    config: Config, specs: Sequence[str], rates: Mapping[str, float] | None = None, steps: Mapping[str, int] | None = None
) -> list[Point]:
    """Returns a point per encoding, with the given learning rate and number of steps, or those of the configuration."""
    points = []
    for spec in specs:
        fields = {"learning_rate": (rates or {}).get(spec), "steps": (steps or {}).get(spec), "encodings": (spec,)}
        points += grid(dataclasses.replace(config, **{name: value for name, value in fields.items() if value}), [])
    return points


def main(
    name: str,
    description: str,
    parts: Callable[[argparse.Namespace], Mapping[str, Part]],
    table: Callable[[Mapping[str, "Found"]], str],
    arguments: Mapping[str, str] | None = None,
) -> None:
    """Runs an experiment from the command line: trains, writes results/NAME_SCALE.json and a figure per part, prints the tables.

    Args:
      name: name of the experiment's file.
      description: docstring of that file.
      parts: options -> {part: grid}.
      table: {part: result} -> Markdown table of our numbers next to the published ones.
      arguments: further options, {"--flag": help}.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=("cpu", "paper"), default="cpu")
    parser.add_argument("--seeds", type=int, help="number of seeds; default: the experiment's")
    parser.add_argument(
        "--time", action="store_true", help="measure the seconds per step of every program on this machine, without training"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to run; the others keep their results")
    for flag, text in (arguments or {}).items():
        parser.add_argument(flag, help=text)
    options = parser.parse_args()
    grids = dict(parts(options))
    if unknown := [part for part in options.only or () if part not in grids]:
        parser.error(f"--only must name {', '.join(grids)}, got {unknown[0]}")
    if options.only:
        grids = {part: one for part, one in grids.items() if part in options.only}
    if options.seeds:
        grids = {part: dataclasses.replace(one, seeds=options.seeds) for part, one in grids.items()}
    spread_over_cores(max(len(one.points) * one.seeds for one in grids.values()))
    result = f"{name}_{options.scale}"
    if options.time:
        return _time(f"{result}_steps", grids)
    try:
        found = stored(result) | {part: _run(result, part, one) for part, one in grids.items()}
    except Interrupted as stopped:  # run_grid has printed how to resume
        sys.exit(stopped.exit_code)
    except (ValueError, CheckpointError, KernelCompileError) as error:
        sys.exit(f"{name}: {error}")
    found = {part: found[part] for part in parts(options) if part in found}
    text = table(found)
    about = {part: one.about for part, one in found.items()}
    claims = [{"part": part} | claim for part, one in found.items() for claim in one.claims]
    rows = [{"part": part} | _slim(row) for part, one in found.items() for row in one.rows]
    _write_items(result, found)
    write(result, rows, scale=options.scale, parts=about, claims=claims, table=text)
    print(text, claims_table(adjusted({name: claims})[name], 3), sep="\n\n")


@dataclasses.dataclass(frozen=True)
class Found:
    """Holds the results of a part of an experiment.

    Attributes:
      rows: a row for every point and seed, with "items": {step: {column: [sums [I], counts [I]]}}.
      claims: the measured claims, from ``contrasts.measured_claims``.
      about: metadata: seeds, steps, seconds, costs, errors of baselines and others.
    """

    rows: Rows
    claims: list[dict[str, Any]]
    about: dict[str, Any]

    def of(self, **wanted: Any) -> Rows:
        """Returns the rows with the given encoding, label, seed or settings."""

        def fits(row: Mapping[str, Any]) -> bool:
            return all(row.get(name, row["settings"].get(name)) == value for name, value in wanted.items())

        return [row for row in self.rows if fits(row)]

    @property
    def scale(self) -> float:
        """Returns the factor from a mean score to the unit of the tables."""
        return self.about["scale"]

    def steps(self, rows: Rows) -> int:
        """Returns the number of steps that these rows were trained for."""
        return max(rows[0]["items"])


def costs_of(result: str, part: str, points: Sequence[Point]) -> dict[str, float]:
    """Returns the seconds per step of every point by label, as measured by ``--time``.

    Raises:
      ValueError: a point has not been measured.
    """
    path = RESULTS / f"{result}_steps.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    seconds = {row["label"]: row["seconds_a_step"] for row in rows if row["part"] == part}
    if missing := [point.label for point in points if point.label not in seconds]:
        raise ValueError(f"the seconds per step of {missing[0]!r} must be measured first; run the same command with --time")
    return {point.label: seconds[point.label] for point in points}


def _time(name: str, grids: Mapping[str, Part]) -> None:
    """Measures the seconds per step of every program on one core while the other cores run steps, too, in several rounds.

    The result is the minimum over rounds, because other load on the machine can only add to the time.
    """
    measured: list[tuple[str, Any, list[float]]] = []
    pieces, count = 10, 10
    for part, own in grids.items():
        source = open_source(own.points[0].config)
        for group in groups(own.points, [0]):
            devices = jax.local_devices()
            runs_ = (group.runs * len(devices))[: len(devices)]
            one = dataclasses.replace(group, config=dataclasses.replace(group.config, log_every=count), runs=runs_)
            batched_runs = BatchedRuns(one, source, devices, at_once=1)
            state, _ = batched_runs.advance(batched_runs.start(), 0)
            labels = [own.points[run.point].label for run in group.runs]
            measured.append((part, (labels, group, batched_runs, [state]), []))
    for piece in range(pieces):
        for _, (_, _, batched_runs, state), seconds in measured:
            began = time.perf_counter()
            state[0], _ = batched_runs.advance(state[0], count * (piece + 1))
            seconds.append((time.perf_counter() - began) / count)
    rows = [
        {"part": part, "label": label, "steps": group.config.steps, "seconds_a_step": round(min(seconds), 5)}
        for part, (labels, group, _, _), seconds in measured
        for label in labels
    ]
    heads = ["part", "setting", "milliseconds per step", "relative to the first"]
    first = {row["part"]: row["seconds_a_step"] for row in reversed(rows)}
    lines = [
        [row["part"], row["label"], f"{1000 * row['seconds_a_step']:.1f}", f"{row['seconds_a_step'] / first[row['part']]:.2f}"]
        for row in rows
    ]
    write(name, rows, table=markdown(heads, lines))
    print(markdown(heads, lines))


def _run(result: str, part: str, grid_part: Part) -> Found:
    folder = Path("runs/experiments") / result / part
    config = grid_part.points[0].config
    source = open_source(config)
    for point in grid_part.points:
        runs.check(point.config, (point.config.encoding,), source, devices=1)
    test_sets = dict(grid_part.tests(config, source))
    steps = {point.label: point.config.steps for point in grid_part.points}
    costs = costs_of(result, part, grid_part.points) if grid_part.claims else {}
    scored_steps = steps_asked(grid_part.claims, steps, costs, config.log_every)

    def tests(config: Config, limit: int | None) -> dict[str, EvalSet | None]:
        wanted = (config.encoding, config.steps)
        labels = [point.label for point in grid_part.points if (point.config.encoding, point.config.steps) == wanted]
        placed: dict[str, EvalSet | None] = {}
        for column, one in test_sets.items():
            steps = frozenset().union(*(scored_steps.get((label, column), ()) for label in labels))
            too_long = limit is not None and max(batch["positions"].max() for batch in one.batches) >= limit
            placed[column] = None if too_long else dataclasses.replace(one, steps=steps)
        return placed

    again = shlex.join(["python", *sys.argv])
    print(f"{part}: {len(grid_part.points)} settings, {grid_part.seeds} seeds", flush=True)
    rows = run_grid(
        grid_part.points, grid_part.all_seeds, folder, source, tests=tests, command=again, say=lambda t: print(t, flush=True)
    )
    is_text = source.task is None
    rows = [row | {"items": _rounded(row["items"]) if is_text else row["items"]} for row in rows]
    finished = list(read_rows(folder))
    seconds = sum(group["seconds"] for group in finished)
    total = sum(steps.values()) * grid_part.seeds
    measure = measure_of(config, source)
    label = MEASURES[measure]
    scale = metric_scale(config, source)
    dots = {
        column: {name: values([r for r in rows if r["label"] == name], most, column, scale) for name, most in steps.items()}
        for column in test_sets
    }
    figure = plots.dots(dots, label, {row["label"]: row["encoding"] for row in rows})
    plots.save(figure, RESULTS / f"{result}_{part.replace(' ', '_')}.png")
    about = {
        "seeds": list(grid_part.all_seeds),
        "runs": len(rows),
        "steps": config.steps,
        "seconds": round(seconds, 1),
        "runs_times_steps_a_second": round(total / seconds, 1),
        "programs": sum(group["compilations"]["train"] for group in finished),
        "measure": measure,
        "scale": scale,
        "costs": costs,
        "config": _described(config),
    }
    if is_text:
        digest = hashlib.sha256(b"".join(text_digest([source.train, source.validation]))).hexdigest()
        excerpts = source.validation.num_documents
        about["text"] = {"sha256": digest[:16], "train_tokens": len(source.train.tokens), "excerpts": excerpts}
    else:
        about["majority"] = majority(test_sets)
        about["answers"] = {column: int(sum(b["weights"].sum() for b in one.batches)) for column, one in test_sets.items()}
    claims = measured_claims(grid_part.claims, rows, costs, config.log_every, scale, exact=not is_text)
    return Found(rows, claims, about)


def _rounded(items: Mapping[int, Mapping[str, np.ndarray]]) -> dict[int, dict[str, np.ndarray]]:
    """Rounds sums of losses so that their means are multiples of the quantum, as in the file."""

    def one(found: np.ndarray) -> np.ndarray:
        sums, counts = np.asarray(found, float)
        return np.stack([np.round(_QUANTUM * sums / counts) / _QUANTUM * counts, counts])

    return {step: {column: one(found) for column, found in columns.items()} for step, columns in items.items()}


def _write_items(result: str, found: Mapping[str, Found]) -> None:
    """Writes results/RESULT_items.npz with scores "part|label|step|column" [S, I] and weights "part|column" [I] of the items.

    Scores are sums of wrong answers or, for text, the mean loss of an item in 1024ths of a nat.
    """
    arrays: dict[str, np.ndarray] = {}
    for part, one in found.items():
        for row in one.rows:
            for step, columns in row["items"].items():
                for column, (sums, counts) in columns.items():
                    stored = sums if "majority" in one.about else _QUANTUM * sums / counts
                    kind = np.uint16 if np.isfinite(stored).all() and stored.max() < 2**16 else np.float32
                    arrays.setdefault(f"{part}|{row['label']}|{step}|{column}", []).append(np.round(stored).astype(kind))
                    arrays[f"{part}|{column}"] = np.asarray(counts, np.uint16)
    path, unfinished = RESULTS / f"{result}_items.npz", RESULTS / f"{result}_items.part"
    with unfinished.open("wb") as file:
        np.savez_compressed(file, **{name: np.stack(x) if isinstance(x, list) else x for name, x in arrays.items()})
    unfinished.replace(path)


def stored(result: str) -> dict[str, Found]:
    """Loads the results in results/RESULT.json and its items, by part; returns {} if there are none."""
    path, items = RESULTS / f"{result}.json", RESULTS / f"{result}_items.npz"
    if not (path.exists() and items.exists()):
        return {}
    found, arrays = json.loads(path.read_text()), dict(np.load(items))
    made = {}
    for part, about in found["parts"].items():
        rows = [row for row in found["rows"] if row["part"] == part]
        for row in rows:
            row["items"] = {}
        for name, scores in arrays.items():
            if name.count("|") != 3 or not name.startswith(f"{part}|"):
                continue
            _, label, step, column = name.split("|")
            counts = arrays[f"{part}|{column}"].astype(float)
            unit = 1.0 if "majority" in about else counts / _QUANTUM
            own = sorted((row for row in rows if row["label"] == label), key=lambda row: row["seed"])
            for row, one in zip(own, scores.astype(float), strict=True):
                row["items"].setdefault(int(step), {})[column] = np.stack([one * unit, counts])
        claims = [claim for claim in found["claims"] if claim["part"] == part]
        made[part] = Found(rows, [{k: v for k, v in claim.items() if k != "part"} for claim in claims], about)
    return made


def _slim(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of results with a training curve of at most 25 points and four digits."""
    steps, losses = row["curve"]["step"], row["curve"]["loss"]
    kept = range(len(steps) - 1, -1, -max(1, math.ceil(len(steps) / 25)))[::-1]
    curve = {"step": [steps[i] for i in kept], "loss": [None if losses[i] is None else round(losses[i], 4) for i in kept]}
    return {name: row[name] for name in ("encoding", "seed", "settings", "label", "metrics", "diverged")} | {"curve": curve}


def _described(config: Config) -> dict[str, Any]:
    """Returns the fields that differ from the defaults, without paths, which are specific to the machine."""
    fields = [f for f in dataclasses.fields(config) if f.name not in ("workdir", "data_dir", "data", "encoding", "encodings")]
    return {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}
