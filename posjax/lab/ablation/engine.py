"""Compiles a training run as one program, and all runs of equal shapes as one batched program.

    run:    scan over steps of [ draw a batch on the device -> train step ]
    group:  the scan for all runs: batched with vmap, or sequential where that is as fast; sharded over all devices

The scan is split into pieces that share one program, so that metrics can be read and states saved between pieces.
``posjax.lab.ablation.grids`` builds the groups of a grid and runs them one after another.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.lab.ablation.sweeps import Group
from posjax.lab.evaluation import EvalSet, score
from posjax.lab.run import abstract_model, build_model, make_loss, optimizer_of
from posjax.lab.source import Source, batch_key, on_device
from posjax.training.state import TrainState, init_state
from posjax.training.step import make_train_step
from posjax.typing import Array, Params

_SHARE_OF_MEMORY = 0.9  # fraction of a device's memory that its concurrent runs may use


# The engine: pure functions, for any model -----------------------------------------------------------------------------


def scan_steps(
    step: Callable[[Any, Any], tuple[Any, Any]], draw: Callable[[Array], Any], state: Any, first: Array, count: int, last: Array
) -> tuple[Any, Any]:
    """Runs the steps ``first`` to ``first + count - 1`` of a training run as one scan.

    Steps from ``last`` on are skipped, so that a run of any length consists of pieces of one length.

    Args:
      step: (state, batch) -> (state, metrics), as ``make_train_step`` returns it.
      draw: step number -> batch, on the device.
      state: the state before step ``first``.
      first: int32 [], number of the first step.
      count: number of steps; static.
      last: int32 [], the run's number of steps.

    Returns:
      The state after these steps, and their metrics with a leading axis [count]; zeros for skipped steps.
    """

    def take(state: Any, number: Array) -> tuple[Any, Any]:
        return step(state, draw(number))

    zeros = jax.tree.map(lambda m: jnp.zeros(m.shape, m.dtype), jax.eval_shape(take, state, first)[1])

    def body(state: Any, number: Array) -> tuple[Any, Any]:
        return jax.lax.cond(number < last, take, lambda state, number: (state, zeros), state, number)

    return jax.lax.scan(body, state, first + jnp.arange(count, dtype=jnp.int32))


def over_runs(function: Callable[[Any, Any], Any], devices: Sequence[Any], at_once: int) -> Callable[[Any, Any], Any]:
    """Batches a function of one run over many runs: (run, shared) -> out becomes (runs, shared) -> outs.

    Every array of runs and outs has a leading axis [R].

    Args:
      function: a pure function.
      devices: devices that the runs are sharded over; R must be a multiple of their number.
      at_once: number of runs that a device executes concurrently (vmap); larger numbers run in sequence (map).
    """

    def local(runs: Any, shared: Any) -> Any:
        runs_per_device = jax.tree.leaves(runs)[0].shape[0]
        if at_once >= runs_per_device > 1:
            return jax.vmap(lambda run: function(run, shared))(runs)
        return jax.lax.map(lambda run: function(run, shared), runs, batch_size=at_once if at_once > 1 else None)

    if len(devices) == 1:
        return local
    mesh = jax.sharding.Mesh(np.asarray(devices), ("runs",))
    runs, everywhere = jax.sharding.PartitionSpec("runs"), jax.sharding.PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(runs, everywhere), out_specs=runs, check_vma=False)


def spread_over_cores(runs: int) -> None:
    """Makes JAX expose CPU cores as separate devices, at most one per run, so that ``over_runs`` can shard runs over them.

    Small models train far more efficiently with one core per run than with all cores on one run. It has no effect once
    JAX is initialized, or if XLA_FLAGS already sets the number of devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    try:
        jax.config.update("jax_num_cpu_devices", max(1, min(cores, runs)))
    except RuntimeError:  # JAX is already initialized
        return


# A group of a configuration's runs --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Programs:
    """Holds the computations of a group, each a pure function of one run; ``traced`` maps names to float32 scalars.

    Attributes:
      init: (seed, traced) -> state.
      step: (traced) -> the train step.
      draw: (data, seed, number) -> batch.
      data: the first argument of ``draw``, which is put on the device.
      score: (params, traced, batch, local_window_size) -> (numerator, denominator), [B] each, as ``evaluation.score`` returns
        them; a window of None means the configuration's.
    """

    init: Callable[[Array, Mapping[str, Array]], TrainState]
    step: Callable[[Mapping[str, Array]], Callable[[TrainState, Any], tuple[TrainState, Any]]]
    draw: Callable[[Any, Array, Array], Any]
    data: Any
    score: Callable[[Params, Mapping[str, Array], Any, int | None], tuple[Array, Array]]


def programs_of(group: Group, source: Source) -> Programs:
    """Returns the programs of a group: those of ``posjax train``, with the numbers in which its runs differ traced."""
    config = group.config

    def parts(traced: Mapping[str, Array]) -> tuple[list[Array], dict[str, Array]]:
        placeholders = sorted((name for name in traced if name.startswith("_")), key=lambda name: int(name[1:]))
        return [traced[name] for name in placeholders], {name: x for name, x in traced.items() if name not in placeholders}

    def init(seed: Array, traced: Mapping[str, Array]) -> TrainState:
        settings, fields = parts(traced)
        params = build_model(config, group.spec, source, seed, settings)[1]
        return init_state(params, optimizer_of(config, fields), seed, ema=config.ema_decay is not None)

    def step(traced: Mapping[str, Array]) -> Callable[[TrainState, Any], tuple[TrainState, Any]]:
        settings, fields = parts(traced)
        loss = make_loss(
            abstract_model(config, group.spec, source, settings)[0], config.dropout_rate > 0, config.z_loss, config.trainable
        )
        optimizer = optimizer_of(config, fields)
        return make_train_step(loss, optimizer, accumulate_steps=config.accumulate_steps, ema_decay=config.ema_decay)

    def scored(params: Params, traced: Mapping[str, Array], batch: Any, window: int | None) -> tuple[Array, Array]:
        scored_config = config if window is None else dataclasses.replace(config, local_window_size=window)
        return score(scored_config, abstract_model(scored_config, group.spec, source, parts(traced)[0])[0])(params, batch)

    data, draw = on_device(config, source)
    return Programs(init, step, lambda data, seed, number: draw(data, batch_key(seed, number)), data, scored)


class BatchedRuns:
    """Holds the runs of one group on the devices, and the compiled programs that advance and score them."""

    def __init__(self, group: Group, source: Source, devices: Sequence[Any], at_once: int | None):
        self.group, self.devices, self.size = group, devices, len(group.runs)
        self.programs = programs_of(group, source)
        self.mesh = jax.sharding.Mesh(np.asarray(devices), ("runs",))
        runs = [*group.runs, *[group.runs[0]] * (-self.size % len(devices))]  # padding, dropped by unpad
        seeds = jnp.asarray([run.seed for run in runs], jnp.int32)
        traced = {name: jnp.asarray([run.traced[name] for run in runs], jnp.float32) for name in runs[0].traced}
        self.fixed = self._place((seeds, traced), "runs")
        self.data = self._place(self.programs.data)
        # On a CPU, batched runs are no faster than sequential ones and use more memory.
        runs_per_device, is_cpu = len(runs) // len(devices), devices[0].platform == "cpu"
        self.at_once = min(runs_per_device, at_once or (1 if is_cpu else runs_per_device))
        self.may_shrink = at_once is None
        self.compilations = {"train": 0, "evaluate": 0}
        self.advance_program: Callable[..., Any] | None = None
        self.scorers: dict[int | None, Callable[..., Any]] = {}  # by local_window_size
        self.scored: set[Any] = set()

    def start(self) -> TrainState:
        """Initializes the state of all runs before the first step."""
        return jax.jit(over_runs(lambda run, _: self.programs.init(*run), self.devices, 1))(self.fixed, ())

    def unpad(self, state: TrainState) -> TrainState:
        """Drops the padding runs and moves the state to one device, so that saved states do not depend on the number of devices."""
        return jax.tree.map(lambda x: jax.device_put(x, self.devices[0])[: self.size], state)

    def restored(self, state: TrainState) -> TrainState:
        """Reverses ``unpad``: pads a saved state and shards it over the devices."""
        index = np.minimum(np.arange(len(self.fixed[0])), self.size - 1)
        return self._place(jax.tree.map(lambda x: x[index], state), "runs")

    def advance(self, state: TrainState, first: int) -> tuple[TrainState, dict[str, np.ndarray]]:
        """Trains all runs for up to ``log_every`` steps and returns the new state and the metrics, [R, steps]."""
        config = self.group.config
        count = min(config.log_every, config.steps)

        def run_piece(run: Any, shared: Any) -> Any:
            (state, (seed, traced)), (data, first, last) = run, shared
            step, draw = self.programs.step(traced), self.programs.draw
            return scan_steps(step, lambda number: draw(data, seed, number), state, first, count, last)

        shared = (self.data, *self._place((np.int32(first), np.int32(config.steps))))
        if self.advance_program is None:
            self.advance_program = self._compiled(run_piece, (state, self.fixed), shared)
        state, metrics = self.advance_program(state, self.fixed, shared)
        num_steps = min(count, config.steps - first)
        return state, {name: np.asarray(x)[: self.size, :num_steps] for name, x in metrics.items()}

    def scores(self, state: TrainState, tests: EvalSet) -> np.ndarray:
        """Scores all runs on a test set and returns the numerator and the denominator of every item, [2, R, I]."""
        window = tests.local_window_size

        def score_run(run: Any, batches: Any) -> tuple[Array, Array]:
            params, (_, traced) = run
            return jax.lax.map(lambda batch: self.programs.score(params, traced, batch, window), batches)

        if window not in self.scorers:
            self.scorers[window] = jax.jit(over_runs(score_run, self.devices, self.at_once))
        stacked = jax.tree.map(lambda *parts: np.stack(parts), *tests.batches)
        self.scored.add((window, stacked["tokens"].shape))
        self.compilations["evaluate"] = len(self.scored)
        row_scores = self.scorers[window]((state.eval_params, self.fixed), self._place(stacked))
        by_row = np.stack([np.asarray(x, np.float64)[: self.size].reshape(self.size, -1) for x in row_scores])
        if tests.by_row:
            by_row = np.stack([by_row[0] > 0, np.ones_like(by_row[1])]).astype(np.float64)
        if tests.items is None:
            return by_row
        sums = np.zeros((*by_row.shape[:2], int(tests.items.max()) + 1))
        np.add.at(sums, (slice(None), slice(None), tests.items), by_row)
        return sums

    def _place(self, tree: Any, *axes: str) -> Any:
        return jax.device_put(tree, jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*axes)))

    def _compiled(self, function: Callable[[Any, Any], Any], runs: tuple[Any, Any], shared: Any) -> Callable[..., Any]:
        """Compiles the program, halving the number of concurrent runs until it fits in the memory of a device."""
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
