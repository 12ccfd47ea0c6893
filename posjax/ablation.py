"""Ablations: a whole run as one program, and a grid of runs as one more.

    run:    scan over steps of [ draw a batch on the device -> train step ]
    group:  that for every run of the same shapes at once: vmap, or one after the other where that is as fast; over all devices
    grid:   groups in turn, each compiled once

A scan is cut into pieces of ``log_every`` steps, all of them one program. Between two pieces metrics come out, progress is
shown, and every ``checkpoint_every`` steps the state of all runs is saved: a grid that was killed goes on from there.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checkpoints import Checkpoints
from posjax.config import RUN_ONLY
from posjax.evaluation import MEASURES, TASK_MEASURE, longest, percent_or_unit, score, test_sets
from posjax.kernels.refused import naming_refusals
from posjax.loop import MAX_SKIPPED_IN_A_ROW, Interrupted, forget_after, json_number, noted_signals
from posjax.runs import abstract_model, build_model, make_loss, optimizer_of
from posjax.source import Source, batch_key, on_device
from posjax.specs import parse_encoding, slug
from posjax.sweeps import Group, Point, groups
from posjax.training import TrainState, init_state, make_train_step
from posjax.typing import Array, Params

_SHARE_OF_MEMORY = 0.9  # of a device, that the runs which it makes at once may take


# The engine: pure functions, of any model ------------------------------------------------------------------------------


def scan_steps(
    step: Callable[[Any, Any], tuple[Any, Any]], draw: Callable[[Array], Any], state: Any, first: Array, count: int, last: Array
) -> tuple[Any, Any]:
    """The steps ``first`` to ``first + count - 1`` of a run, as one scan.

    Steps from ``last`` on are not taken, so that a run of any length is made of pieces of one length.

    Args:
      step: (state, batch) -> (state, metrics), as ``make_train_step`` makes it.
      draw: number of a step -> batch, on the device.
      state: before step ``first``.
      first: int32 [].
      count: how many; static.
      last: int32 []: the run's number of steps.

    Returns:
      The state after these steps, and their metrics with a leading axis [count]; zeros for steps that were not taken.
    """

    def take(state: Any, number: Array) -> tuple[Any, Any]:
        return step(state, draw(number))

    zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(take, state, first)[1])

    def body(state: Any, number: Array) -> tuple[Any, Any]:
        return jax.lax.cond(number < last, take, lambda state, number: (state, zeros), state, number)

    return jax.lax.scan(body, state, first + jnp.arange(count, dtype=jnp.int32))


def over_runs(function: Callable[[Any, Any], Any], devices: Sequence[Any], at_once: int) -> Callable[[Any, Any], Any]:
    """(run, shared) -> out becomes (runs, shared) -> outs, with a leading axis [R] on every array of runs and outs.

    Args:
      function: pure.
      devices: the runs are cut over them; R must be a multiple of their number.
      at_once: runs that a device makes at once (vmap); the others wait (map).
    """

    def local(runs: Any, shared: Any) -> Any:
        own = jax.tree.leaves(runs)[0].shape[0]
        if at_once >= own > 1:
            return jax.vmap(lambda run: function(run, shared))(runs)
        return jax.lax.map(lambda run: function(run, shared), runs, batch_size=at_once if at_once > 1 else None)

    if len(devices) == 1:
        return local
    mesh = jax.sharding.Mesh(np.asarray(devices), ("runs",))
    runs, everywhere = jax.sharding.PartitionSpec("runs"), jax.sharding.PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(runs, everywhere), out_specs=runs, check_vma=False)


def spread_over_cores(runs: int) -> None:
    """Makes a device of every CPU core, as many as there are runs, for ``over_runs`` to cut the runs over.

    Small trainings use one core each far better than all cores use one. It must be called before JAX is used; later, or where
    the flags of XLA say how many devices there shall be, it changes nothing.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", max(1, min(cores, runs)))
    except RuntimeError:  # JAX is in use already
        return


# A group of a configuration's runs --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Programs:
    """What the runs of a group do, each a pure function of one run; traced numbers are float32 scalars by name.

    Attributes:
      init: (seed, traced) -> state.
      step: (traced) -> the train step.
      draw: (data, seed, number) -> batch.
      data: what ``draw`` reads, for the device.
      score: (params, traced, batch) -> (what is wrong, how much counts).
    """

    init: Callable[[Array, Mapping[str, Array]], TrainState]
    step: Callable[[Mapping[str, Array]], Callable[[TrainState, Any], tuple[TrainState, Any]]]
    draw: Callable[[Any, Array, Array], Any]
    data: Any
    score: Callable[[Params, Mapping[str, Array], Any], tuple[Array, Array]]


def programs_of(group: Group, source: Source) -> Programs:
    """The programs of a group: those of ``posjax train`` with the numbers that differ between runs traced."""
    config = group.config

    def parts(traced: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        blanks = sorted((name for name in traced if name.startswith("_")), key=lambda name: int(name[1:]))
        return [traced[name] for name in blanks], {name: x for name, x in traced.items() if name not in blanks}

    def init(seed: Array, traced: Mapping[str, Array]) -> TrainState:
        settings, fields = parts(traced)
        params = build_model(config, group.spec, source, seed, settings)[1]
        return init_state(params, optimizer_of(config, fields), seed)

    def step(traced: Mapping[str, Array]) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
        settings, fields = parts(traced)
        loss = make_loss(abstract_model(config, group.spec, source, settings)[0], config.dropout_rate > 0)
        return make_train_step(loss, optimizer_of(config, fields), accumulate_steps=config.accumulate_steps)

    def scored(params: Params, traced: Mapping[str, Array], batch: Any) -> tuple[Array, Array]:
        return score(config, abstract_model(config, group.spec, source, parts(traced)[0])[0])(params, batch)

    data, draw = on_device(config, source)
    return Programs(init, step, lambda data, seed, number: draw(data, batch_key(seed, number)), data, scored)


class _Fleet:
    """The runs of one group on the devices, and the compiled programs that move them on and score them."""

    def __init__(self, group: Group, source: Source, devices: Sequence[Any], at_once: int | None):
        self.group, self.devices, self.size = group, devices, len(group.runs)
        self.programs = programs_of(group, source)
        self.mesh = jax.sharding.Mesh(np.asarray(devices), ("runs",))
        runs = [*group.runs, *[group.runs[0]] * (-self.size % len(devices))]  # the last ones fill up; nobody looks at them
        seeds = jnp.asarray([run.seed for run in runs], jnp.int32)
        traced = {name: jnp.asarray([run.traced[name] for run in runs], jnp.float32) for name in runs[0].traced}
        self.fixed = self._place((seeds, traced), "runs")
        self.data = self._place(self.programs.data)
        # On a CPU, runs side by side in one loop are no faster than one after the other, and take more memory.
        own, is_cpu = len(runs) // len(devices), devices[0].platform == "cpu"
        self.at_once = min(own, at_once or (1 if is_cpu else own))
        self.may_shrink = at_once is None
        self.compilations = {"train": 0, "evaluate": 0}
        self.advance: Callable[..., Any] | None = None
        self.score_all: Callable[..., Any] | None = None
        self.scored_shapes: set[tuple[int, ...]] = set()

    def start(self) -> TrainState:
        """The state of all runs before the first step."""
        return jax.jit(over_runs(lambda run, _: self.programs.init(*run), self.devices, 1))(self.fixed, ())

    def trimmed(self, state: TrainState) -> TrainState:
        """Without the runs that fill up, on one device: what is saved does not depend on the number of devices."""
        return jax.tree.map(lambda x: jax.device_put(x, self.devices[0])[: self.size], state)

    def restored(self, state: TrainState) -> TrainState:
        """The opposite of ``trimmed``."""
        places = np.minimum(np.arange(len(self.fixed[0])), self.size - 1)
        return self._place(jax.tree.map(lambda x: x[places], state), "runs")

    def move_on(self, state: TrainState, first: int) -> tuple[TrainState, dict[str, np.ndarray]]:
        """The next ``log_every`` steps of all runs, and their metrics, [R, log_every]."""
        config = self.group.config
        count = min(config.log_every, config.steps)

        def run_piece(run: Any, shared: Any) -> Any:
            (state, (seed, traced)), (data, first, last) = run, shared
            step, draw = self.programs.step(traced), self.programs.draw
            return scan_steps(step, lambda number: draw(data, seed, number), state, first, count, last)

        shared = (self.data, *self._place((np.int32(first), np.int32(config.steps))))
        if self.advance is None:
            self.advance = self._compiled(run_piece, (state, self.fixed), shared)
        state, metrics = self.advance(state, self.fixed, shared)
        taken = min(count, config.steps - first)
        return state, {name: np.asarray(x)[: self.size, :taken] for name, x in metrics.items()}

    def scores(self, state: TrainState, batches: Sequence[Any]) -> np.ndarray:
        """What is wrong and how much counts, [2, R], over batches of one shape."""

        def score_run(run: Any, batches: Any) -> tuple[Array, Array]:
            params, (_, traced) = run

            def add(sums: tuple[Array, Array], batch: Any) -> tuple[tuple[Array, Array], None]:
                return jax.tree.map(jnp.add, sums, self.programs.score(params, traced, batch)), None

            return jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), batches)[0]

        if self.score_all is None:
            self.score_all = jax.jit(over_runs(score_run, self.devices, self.at_once))
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *batches)
        self.scored_shapes.add(stacked["tokens"].shape)
        self.compilations["evaluate"] = len(self.scored_shapes)
        found = self.score_all((state.params, self.fixed), self._place(stacked))
        return np.stack([np.asarray(x, np.float64)[: self.size] for x in found])

    def _place(self, tree: Any, *axes: str) -> Any:
        return jax.device_put(tree, jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*axes)))

    def _compiled(self, function: Callable[[Any, Any], Any], runs: tuple[Any, Any], shared: Any) -> Callable[..., Any]:
        """Compiled for as many runs at once as the device has memory for."""
        while True:
            mapped = over_runs(function, self.devices, self.at_once)

            def train_piece(state: Any, fixed: Any, shared: Any, mapped: Callable[[Any, Any], Any] = mapped) -> Any:
                return mapped((state, fixed), shared)

            program = jax.jit(train_piece, donate_argnums=0)
            self.compilations["train"] += 1
            last_try = self.at_once == 1 or not self.may_shrink
            try:
                compiled = program.lower(*runs, shared).compile()
                if last_try or _fits(compiled, self.devices[0]):
                    return compiled
            except jax.errors.JaxRuntimeError as error:
                if last_try or "RESOURCE_EXHAUSTED" not in str(error):
                    raise
            self.at_once = -(-self.at_once // 2)


def _fits(compiled: Any, device: Any) -> bool:
    limit, analysis = (device.memory_stats() or {}).get("bytes_limit"), compiled.memory_analysis()
    if limit is None or analysis is None:
        return True
    need = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return need - analysis.alias_size_in_bytes <= _SHARE_OF_MEMORY * limit


# A grid, from its points to rows of results ------------------------------------------------------------------------------


def ablate(
    points: Sequence[Point],
    seeds: Sequence[int],
    workdir: Path,
    source: Source,
    *,
    at_once: int | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains and evaluates every point with every seed; what is finished is kept and not done again.

    Args:
      points: from ``posjax.sweeps.grid``; all of one task and text.
      seeds: of parameters, data and dropout, as in ``posjax train``.
      workdir: gets a folder a group: ``checkpoints/``, ``metrics.jsonl`` and, when it is done, ``rows.json``.
      source: of the points' configuration.
      at_once: runs that a device makes at once; None: all of a group where its memory allows, one on a CPU.
      command: what to print after an interruption.
      say: where lines for the reader go.

    Returns:
      A row for every point and seed, in their order: encoding, seed, label, settings, metrics as ``evaluate`` gives them,
      diverged (the step of the tenth update in a row that was not finite, or the last where the loss ended above its start; else
      None), curve ({"step", "loss"}: the mean training loss since the step before, in nats).

    Raises:
      Interrupted: SIGINT or SIGTERM, after the piece was finished and saved.
      KernelRefused: the compiler of the chip does not take the attention kernel.
    """
    made = groups(points, seeds)
    total = sum(len(group.runs) * group.config.steps for group in made)
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    with noted_signals() as caught, _Progress(total, say) as progress:
        for number, group in enumerate(made, 1):
            folder = workdir / _folder(group)
            progress.begin(f"{number} of {len(made)}: {group.spec}, {len(group.runs)} runs", group.config.steps * len(group.runs))
            done = folder / "rows.json"
            if not done.exists():
                with naming_refusals(group.config.implementation):
                    found = _train_group(group, source, folder, at_once, caught, progress, command)
                folder.mkdir(parents=True, exist_ok=True)
                part = done.with_suffix(".part")
                part.write_text(json.dumps(found))
                part.replace(done)
            progress.end()
            for run, row in zip(group.runs, json.loads(done.read_text())["rows"], strict=True):
                point = points[run.point]
                about = {"encoding": point.config.encoding, "seed": run.seed, "label": point.label, "settings": point.settings}
                rows[run.point, run.seed] = {**about, **row}
    return [rows[index, seed] for index in range(len(points)) for seed in seeds]


def _folder(group: Group) -> str:
    """A name that says what is in it, and that another group does not have."""
    config = {name: value for name, value in dataclasses.asdict(group.config).items() if name not in RUN_ONLY}
    runs = [(run.seed, dict(run.traced)) for run in group.runs]
    digest = hashlib.sha256(json.dumps([config, group.spec, runs]).encode()).hexdigest()
    return f"{slug(group.spec)[:60]}-{digest[:8]}"


def _train_group(
    group: Group,
    source: Source,
    folder: Path,
    at_once: int | None,
    caught: list[int],
    progress: "_Progress",
    command: str | None,
) -> dict[str, Any]:
    config, log = group.config, folder / "metrics.jsonl"
    # Before anything is compiled: importing Orbax makes JAX forget its programs.
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    began = time.perf_counter()
    fleet = _Fleet(group, source, jax.local_devices()[: len(group.runs)], at_once)
    state, step = fleet.start(), 0
    found = checkpoints.restore_latest(fleet.trimmed(state))
    if found is not None:
        state, step = fleet.restored(found.state), found.step
        began -= found.data_state["seconds"]
    saved = step
    forget_after(log, step)
    progress.moved(step * len(group.runs), counted=False)
    encodings = parse_encoding(group.spec, [1.0] * len(group.runs[0].traced))
    limit = longest(config, encodings if isinstance(encodings, tuple) else (encodings,), source)
    sets = {column: None if b is None else list(b) for column, b in test_sets(config, source, limit).items()}

    def evaluate() -> dict[str, list[float] | None]:
        scale = percent_or_unit(config, source)
        sums = {column: None if batches is None else fleet.scores(state, batches) for column, batches in sets.items()}
        return {c: None if s is None else (scale * s[0] / s[1]).tolist() for c, s in sums.items()}

    folder.mkdir(parents=True, exist_ok=True)
    scores: dict[str, list[float] | None] = {}
    while step < config.steps:
        state, metrics = fleet.move_on(state, step)
        before, step = step, step + metrics["loss"].shape[1]
        line = {"step": step} | _line(metrics)
        if step == config.steps or (config.evaluate_every and step // config.evaluate_every > before // config.evaluate_every):
            scores = evaluate()
            line |= {f"evaluation/{column}": values for column, values in scores.items()}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        progress.moved((step - before) * len(group.runs), f"loss {np.mean(metrics['loss'][:, -1]):.4f}")
        if caught or step == config.steps or step - saved >= config.checkpoint_every:
            checkpoints.save(step, fleet.trimmed(state), {"seconds": time.perf_counter() - began})
            saved = step
        if caught and step < config.steps:
            progress.stop()
            again = command or " ".join(sys.argv)
            raise Interrupted(f"interrupted at step {step} of {config.steps}; saved in {folder}. To go on, run:\n  {again}")
    scores = scores or evaluate()
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    parameters = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(state.params))
    about = {"limit": limit, "parameters": parameters}
    measure = MEASURES.get(config.task, TASK_MEASURE)[0]
    rows = []
    for index in range(len(group.runs)):
        own = {column: None if values is None else json_number(values[index]) for column, values in scores.items()}
        curve = {"step": [line["step"] for line in lines], "loss": [line["mean_loss"][index] for line in lines]}
        rows.append({"metrics": {measure: own} | about, "diverged": _diverged(lines, index), "curve": curve})
    how = {"compilations": fleet.compilations, "at_once": fleet.at_once, "devices": len(fleet.devices)}
    return {"spec": group.spec, "rows": rows, "seconds": time.perf_counter() - began} | how


def _line(metrics: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    """A line of metrics.jsonl from those of a piece, a number for every run; null for what is not finite."""
    line = {name: metrics[name][:, -1] for name in ("loss", "learning_rate", "grad_norm", "skipped") if name in metrics}
    line |= {"first_loss": metrics["loss"][:, 0], "mean_loss": metrics["loss"].mean(1)}
    line |= {"streak": metrics["skipped_in_a_row"].max(1)}
    return {name: [json_number(x) for x in values.tolist()] for name, values in line.items()}


def _diverged(lines: Sequence[Mapping[str, Any]], run: int) -> int | None:
    """The step at which a training was lost, or None: ten updates in a row not finite, or a loss that ends above its start."""
    bad = (line["step"] for line in lines if line["streak"][run] >= MAX_SKIPPED_IN_A_ROW)
    first, end = lines[0]["first_loss"][run], lines[-1]["mean_loss"][run]
    lost = first is None or end is None or end > first
    return next(bad, lines[-1]["step"] if lost else None)


class _Progress:
    """Steps of all runs of a grid: a bar on a terminal, else a line now and then. Finished groups count as done, not as fast."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.say, self.done, self.bar = total, say, 0, None
        self.counted, self.started, self.last = 0, time.perf_counter(), 0.0
        self.group_end = 0

    def __enter__(self) -> "_Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeRemainingColumn())
            self.bar = Progress(*columns)
            self.task = self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, title: str, steps: int) -> None:
        self.title, self.group_end = title, self.done + steps
        (self.bar.console.print if self.bar else self.say)(title)

    def end(self) -> None:
        self.moved(self.group_end - self.done, counted=False)

    def moved(self, steps: int, text: str = "", counted: bool = True) -> None:
        self.done += steps
        if counted:
            self.counted += steps
        if not counted or not steps:
            self.started = time.perf_counter() if not self.counted else self.started
        elapsed = time.perf_counter() - self.started
        speed = self.counted / elapsed if self.counted else 0.0
        if self.bar:
            self.bar.update(self.task, completed=self.done, description=f"{text}  {speed:,.0f} steps/s")
        elif counted and time.perf_counter() - self.last > 15:
            self.last = time.perf_counter()
            minutes, seconds = divmod(round((self.total - self.done) / max(speed, 1e-9)), 60)
            share = 100 * self.done / self.total
            self.say(f"{share:.0f} %  {text}  {speed:,.0f} steps/s  {minutes // 60}:{minutes % 60:02}:{seconds:02} left")


def read_rows(workdir: Path) -> Iterator[dict[str, Any]]:
    """What every finished group of a workdir says of itself: rows, seconds (compiling and resuming included), compilations ..."""
    for path in sorted(workdir.glob("*/rows.json")):
        yield json.loads(path.read_text())
