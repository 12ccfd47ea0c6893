"""Trains the points of a grid, one group after another, each compiled once, and returns rows of results.

    points -> groups -> [ log_every steps -> metrics.jsonl, progress; every checkpoint_every steps: save ] -> scores -> rows

Rerunning a grid that was interrupted or killed resumes it from its last saved state.
"""

import hashlib
import io
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posjax.attention.backends.compile_errors import translate_compile_errors
from posjax.encodings.spec import parse_encoding, slug
from posjax.files import DamagedFile, read_json, set_aside, write_atomically, write_json
from posjax.lab.ablation.engine import BatchedRuns
from posjax.lab.ablation.sweeps import Group, Point, groups
from posjax.lab.config import Config
from posjax.lab.evaluation import EvalSet, max_eval_length, measure_of, metric_scale, test_sets
from posjax.lab.source import Source
from posjax.lab.workdir import run_fingerprint
from posjax.progress import INTERVAL
from posjax.training.checkpoints import Checkpoints, SaveError
from posjax.training.lock import locked
from posjax.training.loop import MAX_SKIPPED_IN_A_ROW
from posjax.training.signals import Interrupted, noted_signals
from posjax.training.writers import forget_after, json_number


def run_grid(
    points: Sequence[Point],
    seeds: Sequence[int],
    workdir: Path,
    source: Source,
    *,
    at_once: int | None = None,
    tests: Callable[[Config, int | None], Mapping[str, EvalSet | None]] | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains and evaluates every point with every seed; finished groups are read from disk.

    Args:
      points: settings, as ``posjax.lab.ablation.sweeps.grid`` returns them; all have the same task and data.
      seeds: seeds of parameters, data and dropout, as in ``posjax train``.
      workdir: gets one folder per group: ``checkpoints/``, ``metrics.jsonl`` and, once the group is finished, ``rows.json``.
      source: data of the points' configuration.
      at_once: number of runs that a device executes concurrently; None: all of a group if they fit in memory, one on a CPU.
      tests: (configuration, longest length that its encodings support, or None) -> test sets by column; None in place of a test
        set that is too long for the encodings. Defaults to the test sets of ``evaluate``.
      command: the command that resumes the grid, printed after an interruption.
      say: called with each line of progress.

    Returns:
      A row for every point and seed, in their order, with the entries encoding, seed, label, settings, metrics (as ``evaluate``
      returns them), diverged (the step at which the tenth consecutive update was not finite, or the last step if the final loss
      exceeds the initial loss; else None), curve ({"step", "loss"}: the mean training loss since the previous step of the curve,
      in nats), evaluations ({step: {column: value}}, including the last step) and items ({step: {column: [2, I]}}: numerator and
      denominator of every item).

    Raises:
      ValueError: there are several processes.
      WorkdirInUse: another process is writing to the workdir.
      Interrupted: SIGINT or SIGTERM arrived; the current piece was finished and saved.
      KernelCompileError: the attention kernel failed to compile on this device.
    """
    if jax.process_count() > 1:
        raise ValueError(f"an ablation must run in one process, on all of its devices, got {jax.process_count()} processes")
    all_groups = groups(points, seeds)
    total = sum(len(group.runs) * group.config.steps for group in all_groups)
    try:
        with locked(workdir), noted_signals() as caught, _Progress(total, say) as progress:
            rows = _rows(all_groups, points, workdir, source, at_once, tests or _usual_tests(source), caught, progress)
    except Interrupted as stopped:
        say(f"{stopped} To resume, run:\n  {command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}")
        raise
    return [rows[index, seed] for index in range(len(points)) for seed in seeds]


def _rows(
    all_groups: Sequence[Group],
    points: Sequence[Point],
    workdir: Path,
    source: Source,
    at_once: int | None,
    tests: Callable[[Config, int | None], Mapping[str, EvalSet | None]],
    caught: list[int],
    progress: "_Progress",
) -> dict[tuple[int, int], dict[str, Any]]:
    """Returns {(point, seed): row}, reading the files of finished groups and training the others."""
    rows = {}
    for number, group in enumerate(all_groups, 1):
        folder = workdir / _folder(group)
        progress.begin(f"{number} of {len(all_groups)}: {group.spec}, {len(group.runs)} runs")
        done = folder / "rows.json"
        content = _finished(done)
        if content is not None:
            progress.skipped(group.config.steps * len(group.runs))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with translate_compile_errors(group.config.implementation):
                content = _train_group(group, source, folder, at_once, tests, caught, progress)
            write_json(done, content)
        items = _read_items(folder)
        for index, (run, row) in enumerate(zip(group.runs, read_json(done, "rows")["rows"], strict=True)):
            point = points[run.point]
            header = {"encoding": point.config.encoding, "seed": run.seed, "label": point.label, "settings": point.settings}
            run_items = {step: {column: sums[:, index] for column, sums in scored.items()} for step, scored in items.items()}
            evaluations = {int(step): scores for step, scores in row["evaluations"].items()}
            rows[run.point, run.seed] = {**header, **row, "evaluations": evaluations, "items": run_items}
    return rows


def _finished(done: Path) -> dict[str, Any] | None:
    """Reads a ``rows.json``; a damaged one is set aside, and the group is evaluated again from its checkpoint."""
    try:
        return read_json(done, "rows")
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        set_aside(done, error)
        return None


def _folder(group: Group) -> str:
    """Returns a readable folder name that is unique to the group."""
    runs = [(run.seed, dict(run.traced)) for run in group.runs]
    digest = hashlib.sha256(json.dumps([run_fingerprint(group.config), group.spec, runs]).encode()).hexdigest()
    return f"{slug(group.spec)[:60]}-{digest[:8]}"


def _usual_tests(source: Source) -> Callable[[Config, int | None], Mapping[str, EvalSet | None]]:
    """Returns the default ``tests``: those of ``evaluate``, with every row as an item, scored every ``evaluate_every`` steps."""

    def tests(config: Config, limit: int | None) -> dict[str, EvalSet | None]:
        every = config.evaluate_every
        steps = frozenset(range(every, config.steps, every) if every else ())
        return {c: None if b is None else EvalSet(list(b), steps=steps) for c, b in test_sets(config, source, limit).items()}

    return tests


def _write_items(folder: Path, step: int, sums: Mapping[str, np.ndarray | None]) -> None:
    """Writes the [2, R, I] sums of every column, numerator and denominator, to items/STEP.npz atomically."""
    path, content = folder / "items" / f"{step}.npz", io.BytesIO()
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(content, **{column: x.astype(np.float32) for column, x in sums.items() if x is not None})
    write_atomically(path, content.getvalue())


def _read_items(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """Reads the files of ``_write_items`` as {step: {column: [2, R, I]}}."""
    steps = sorted(int(path.stem) for path in (folder / "items").glob("*.npz"))
    return {step: dict(np.load(folder / "items" / f"{step}.npz")) for step in steps}


def _train_group(
    group: Group,
    source: Source,
    folder: Path,
    at_once: int | None,
    tests: Callable[[Config, int | None], Mapping[str, EvalSet | None]],
    caught: list[int],
    progress: "_Progress",
) -> dict[str, Any]:
    """Trains a group and returns the content of its ``rows.json``: rows in the order of its runs, and training statistics."""
    config, log = group.config, folder / "metrics.jsonl"
    # Created before anything is compiled, because importing Orbax clears JAX's caches of compiled programs.
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
    began = time.perf_counter()
    batched_runs = BatchedRuns(group, source, jax.local_devices()[: len(group.runs)], at_once)
    state, step = batched_runs.start(), 0
    restored = checkpoints.restore_latest(batched_runs.unpad(state))
    if restored is not None:
        state, step = batched_runs.restored(restored.state), restored.step
        began -= restored.data_state["seconds"]
    saved = step
    forget_after(log, step)
    progress.skipped(step * len(group.runs))
    encodings = parse_encoding(group.spec, [1.0] * len(group.runs[0].traced))
    limit = max_eval_length(config, encodings if isinstance(encodings, tuple) else (encodings,), source)
    sets = tests(config, limit)

    def due(before: int) -> dict[str, EvalSet | None]:
        last = step == config.steps
        return {c: t for c, t in sets.items() if last or (t is not None and any(before < s <= step for s in t.steps))}

    def evaluate(selected: Mapping[str, EvalSet | None]) -> dict[str, list[float] | None]:
        scale = metric_scale(config, source)
        sums = {column: None if one is None else batched_runs.scores(state, one) for column, one in selected.items()}
        _write_items(folder, step, sums)
        return {c: None if s is None else (scale * s[0].sum(1) / s[1].sum(1)).tolist() for c, s in sums.items()}

    scores: dict[str, list[float] | None] = {}
    paces = []  # seconds per step, one entry per piece; the first includes compilation
    while step < config.steps:
        piece_began = time.perf_counter()
        state, metrics = batched_runs.advance(state, step)
        before, step = step, step + metrics["loss"].shape[1]
        paces.append((time.perf_counter() - piece_began) / (step - before))
        line = {"step": step} | _line(metrics)
        if selected := due(before):
            scores = evaluate(selected)
            line |= {f"evaluation/{column}": values for column, values in scores.items()}
        with log.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        progress.moved((step - before) * len(group.runs), f"loss {np.mean(metrics['loss'][:, -1]):.4f}")
        if caught or step == config.steps or step - saved >= config.checkpoint_every:
            try:
                checkpoints.save(step, batched_runs.unpad(state), {"seconds": time.perf_counter() - began})
            except SaveError as error:
                raise SaveError(f"{folder} could not be saved at step {step}: {error}. Rerun the command to resume.") from error
            saved = step
        if caught and step < config.steps:
            name = signal.Signals(caught[0]).name
            raise Interrupted(f"interrupted by {name} at step {step} of {config.steps}; the state is saved in {folder}.", caught[0])
    scores = scores or evaluate(sets)
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    parameters = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(state.params))
    sizes = {"limit": limit, "parameters": parameters}
    measure = measure_of(config, source)
    rows = []
    for index in range(len(group.runs)):
        final = {column: None if values is None else json_number(values[index]) for column, values in scores.items()}
        curve = {"step": [line["step"] for line in lines], "loss": [line["mean_loss"][index] for line in lines]}
        history = {line["step"]: _evaluated(line, index) for line in lines if _evaluated(line, index)}
        row = {"metrics": {measure: final} | sizes, "diverged": _diverged(lines, index), "curve": curve}
        rows.append(row | {"evaluations": history | {config.steps: final}})
    statistics = {"compilations": batched_runs.compilations, "at_once": batched_runs.at_once, "devices": len(batched_runs.devices)}
    pace = float(np.median(paces[1:])) * len(batched_runs.devices) / len(batched_runs.fixed[0]) if len(paces) > 1 else None
    statistics |= {"seconds_a_step": pace}  # for one run on one device
    return {"spec": group.spec, "rows": rows, "seconds": time.perf_counter() - began} | statistics


def _evaluated(line: Mapping[str, Any], run: int) -> dict[str, float | None]:
    """Returns the scores of one run in a line of metrics.jsonl, by column."""
    prefix = "evaluation/"
    return {name[len(prefix) :]: values and json_number(values[run]) for name, values in line.items() if name.startswith(prefix)}


def _line(metrics: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Builds a line of metrics.jsonl from the metrics of a piece: one number per run, None where it is not finite."""
    line = {name: metrics[name][:, -1] for name in ("loss", "learning_rate", "grad_norm", "skipped") if name in metrics}
    line |= {"first_loss": metrics["loss"][:, 0], "mean_loss": metrics["loss"].mean(1)}
    line |= {"streak": metrics["skipped_in_a_row"].max(1)}
    return {name: [json_number(x) for x in values.tolist()] for name, values in line.items()}


def _diverged(lines: Sequence[Mapping[str, Any]], run: int) -> int | None:
    """Returns the step at which a run diverged, or None.

    A run diverged if ten consecutive updates were not finite, or if its final loss exceeds its initial loss.
    """
    bad = (line["step"] for line in lines if line["streak"][run] >= MAX_SKIPPED_IN_A_ROW)
    first, end = lines[0]["first_loss"][run], lines[-1]["mean_loss"][run]
    lost = first is None or end is None or end > first
    return next(bad, lines[-1]["step"] if lost else None)


class _Progress:
    """Reports the progress of a grid in steps over all runs: as a bar on a terminal, else as a line at most every 15 seconds."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.say = total, say
        self.done = self.trained = 0  # trained: by this process; restored steps count as done, but not towards the speed
        self.started = self.shown = time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
            self.bar = Progress(*columns)
            self.task = self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, title: str) -> None:
        (self.bar.console.print if self.bar else self.say)(title)

    def skipped(self, steps: int) -> None:
        self.done += steps

    def moved(self, steps: int, text: str) -> None:
        self.done += steps
        self.trained += steps
        now = time.perf_counter()
        speed = self.trained / (now - self.started)
        text = f"{text}  {speed:,.0f} steps/s"
        if self.bar:
            self.bar.update(self.task, completed=self.done, description=text)
        elif now - self.shown > INTERVAL:
            self.shown = now
            minutes, seconds = divmod(round((self.total - self.done) / speed), 60)
            self.say(f"{100 * self.done / self.total:.0f} %  {text}  {minutes // 60}:{minutes % 60:02}:{seconds:02} left")


def read_rows(workdir: Path) -> Iterator[dict[str, Any]]:
    """Yields the ``rows.json`` of every finished group of a workdir.

    Each has "rows", "seconds" (including compilation, and earlier processes of a resumed run), "compilations", and more.
    """
    for path in sorted(workdir.glob("*/rows.json")):
        yield read_json(path, "rows")
