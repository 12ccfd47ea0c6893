"""The training loop, which resumes from the workdir and tolerates kills, signals, full disks and bad batches.

    restore -> [ next batch -> step -> every log_every: fetch metrics, log -> every checkpoint_every: begin to save ] -> save

Between those points, the loop does not wait for the device: each step is dispatched while the previous one is still running. The
loss, and therefore a streak of non-finite steps, is checked only at the next of these points. Checkpoints are written while
training goes on; one that cannot be written costs a warning, and the next is due at its own step. Only the last must succeed.
"""

import contextlib
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posjax.checks import checked, short
from posjax.hardware import peak_flops
from posjax.parallel.distributed import PreemptionSync, on_peer_loss
from posjax.storage import run_path
from posjax.training.checkpoints import Checkpoints, SaveError, from_first_process
from posjax.training.lock import holds_lock
from posjax.training.signals import Interrupted, noted_signals
from posjax.training.writers import Writers, json_number, printed, read_metrics

MAX_SKIPPED_IN_A_ROW = 10
_GRACE_S = 3.0  # how long a process that ends at once waits for a checkpoint that is being written


class NonFiniteLoss(RuntimeError):
    """Raised after ten consecutive steps with a non-finite loss or gradient. The message names the newest intact checkpoint."""


@checked(
    steps=dict(least=1, what="be at least 1"),
    log_every=dict(least=1, what="be at least 1"),
    checkpoint_every=dict(least=1, what="be at least 1, or None to save by checkpoint_minutes alone"),
    checkpoint_minutes=dict(above=0, what="be positive, or None"),
    evaluate_every=dict(least=1, what="be at least 1, or None to evaluate only at the end"),
)
@holds_lock
def fit(
    step_fn: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]],
    state: Any,
    batches: Iterable[Any],
    *,
    steps: int,
    workdir: str | os.PathLike,
    config: Any = None,
    log_every: int = 50,
    checkpoint_every: int | None = 1000,
    checkpoint_minutes: float | None = None,
    keep_last: int = 3,
    keep_every: int | None = None,
    keep_best: int = 0,
    keep_steps: Collection[int] = frozenset(),
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    loggers: tuple[str, ...] = ("tensorboard",),
    resume_command: str | None = None,
    quiet: bool = False,
    shares: int | None = None,
    flops_per_token: float | None = None,
) -> Any:
    """Trains until `state.step == steps`, resuming from the newest intact checkpoint in the workdir, and returns the final state.

    Writes `metrics.jsonl`, the files of `loggers` and `checkpoints/` under `workdir`. Every line of `metrics.jsonl` has step, loss
    (of that step; null if not finite), learning_rate, grad_norm, tokens_per_second (since the previous line), skipped (in total),
    tokens (seen since step 0), epoch (if the batches have one), time (Unix time), elapsed (seconds of training), memory_bytes (peak
    of the first device, or of the process on a CPU) and, after an evaluation, its numbers as "evaluation/<name>". Each step has at
    most one line, even after a resume.

    Args:
      step_fn: (state, batch) -> (state, metrics), from `jit_train_step`, `pmap_train_step` or `jax.jit`. It may donate the state.
      state: the state at step 0. A restored state is placed on the same devices with the same shardings.
      batches: an iterable of batches. If its iterator has `get_state()` and `set_state()` (as Grain's has), its position is stored
        in the checkpoint. Otherwise it must yield the same batches each time: after a resume, the batches already used are drawn
        again and dropped. An attribute `epoch` of the iterator is logged.
      steps: the step to stop at, at least 1.
      workdir: directory of the run, created if it does not exist, or a path in a bucket, such as gs://bucket/run.
      config: a JSON value stored with each checkpoint.
      log_every, checkpoint_every: intervals in steps (None: by minutes alone). The last step is always logged and saved.
      checkpoint_minutes: saves, too, at the first log line after this many minutes without a save.
      keep_last, keep_every, keep_best, keep_steps: which checkpoints to keep, see `Checkpoints`. With keep_best, every evaluation
        is saved; with keep_steps, so are those steps.
      evaluate: state -> numbers by name, called every `evaluate_every` steps and after the last step. It must not donate the state.
      evaluate_every: interval in steps. None evaluates after the last step only.
      loggers: further writers of the metrics: "tensorboard", "csv", "wandb".
      resume_command: the command that resumes the run, printed after an interruption. None prints this program's command line.
      quiet: whether to print nothing except the resume command.
      flops_per_token: floating-point operations of the model per token of a step, forward and backward. If it is given and the
        devices' peak is known, every line also has mfu, the fraction of that peak.
      shares: number of batches of the size that `batches` yields in one global batch. None means the number of processes.

    Raises:
      Interrupted: SIGINT, SIGTERM, SIGHUP or SIGUSR1 was received. It is raised after the current step has finished and, unless
        steps are being skipped, the state has been saved. With several processes, all of them raise it after the same step, soon
        after one of them received the signal. (A second SIGINT raises KeyboardInterrupt at once.)
      ProcessLost: another process was lost. (If JAX itself aborts this process because of that, the same message is printed.)
      NonFiniteLoss: ten consecutive steps were not finite. While steps are skipped, nothing is saved but the last step.
      SaveError: the state after the last step, or after a signal, could not be saved. Older checkpoints are intact.
      CheckpointError: there are checkpoints, but none can be used.
      WorkdirInUse: another process is writing to the workdir.
      ValueError: an argument is out of range, or `batches` ended before `steps`.
    """
    workdir = run_path(workdir)
    say = printed if not quiet and jax.process_index() == 0 else lambda text: None
    folder = workdir / "checkpoints"
    checkpoints = Checkpoints(folder, keep_last, keep_every=keep_every, keep_best=keep_best, keep_steps=keep_steps)
    batches = _iterator(batches)
    restored = checkpoints.restore_latest(state)
    if restored is not None:
        state = restored.state
        if restored.step >= steps:
            say(f"{workdir} is already at step {restored.step} of {steps}; nothing to train")
            return state
        _restore_iterator(batches, restored)
        say(f"resuming {workdir} from step {restored.step} of {steps}")
    step = int(state.step)
    saves = _Saves(checkpoints, workdir, step, config, _command(resume_command))
    every = _Intervals(steps, checkpoint_every, checkpoint_minutes, evaluate_every if evaluate else None, keep_best, keep_steps)
    clock = _Clock(jax.process_count() if shares is None else shares)
    log = _Log(workdir, step, steps, quiet, flops_per_token, loggers, config)
    with noted_signals() as caught, log, PreemptionSync(step) as sync, on_peer_loss(saves.message), saves:
        streaks, save_due = [], False
        while step < steps:
            try:
                batch = next(batches)
            except StopIteration:
                raise ValueError(f"batches ended after step {step} of {steps}; repeat the data or reduce steps") from None
            with log.compiling(clock):
                state, metrics = step_fn(state, batch)
                step += 1
                clock.count(batch, metrics)
            streaks.append(metrics["skipped_in_a_row"])

            last = step == steps
            evaluating = evaluate is not None and every.evaluates(step)
            logging = step % log_every == 0 or evaluating or last
            save_due = save_due or every.saves(step, logging)
            stopping = None if last else sync.signal_after(step, caught)
            if not (logging or save_due or stopping):
                continue

            streak = _check_streaks(jax.device_get(streaks), step, saves)  # waits for the device
            streaks, evaluation = [], {}
            if logging:
                fetched, rate = jax.device_get(metrics), clock.lap()
                with clock.paused():
                    evaluation = evaluate(state) if evaluating else {}
                    log.write(step, fetched, rate, clock.tokens_per_step * step, getattr(batches, "epoch", None), evaluation)
            # Nothing is saved while steps are being skipped, so that the newest checkpoint predates any divergence. The state
            # after the last step is always saved, but then the checkpoints from before the skipped steps are kept.
            if last or (streak == 0 and (save_due or stopping)):
                with clock.paused():
                    saves.begin(step, state, batches, evaluation, prune=streak == 0, must_succeed=bool(last or stopping))
                save_due, every.saved_at = False, time.monotonic()
            if stopping:
                raise Interrupted(_interrupt_message(step, stopping, saves.message()), stopping)
    say(f"{workdir} has finished {steps} steps")
    return state


class _Intervals:
    """Decides which steps are evaluated and saved, equally in all processes."""

    def __init__(
        self,
        steps: int,
        checkpoint_every: int | None,
        checkpoint_minutes: float | None,
        evaluate_every: int | None,
        keep_best: int,
        keep_steps: Collection[int],
    ):
        self.steps, self.checkpoint_every, self.checkpoint_minutes = steps, checkpoint_every, checkpoint_minutes
        self.evaluate_every, self.keep_best, self.keep_steps = evaluate_every, keep_best, keep_steps
        self.saved_at = time.monotonic()

    def evaluates(self, step: int) -> bool:
        return step == self.steps or (self.evaluate_every is not None and step % self.evaluate_every == 0)

    def saves(self, step: int, logging: bool) -> bool:
        if (self.checkpoint_every is not None and step % self.checkpoint_every == 0) or step in self.keep_steps:
            return True
        if self.keep_best and self.evaluate_every is not None and self.evaluates(step):
            return True
        if self.checkpoint_minutes is None or not logging:
            return False
        due = time.monotonic() - self.saved_at >= 60 * self.checkpoint_minutes
        return bool(from_first_process(np.array(due)))  # the clocks of processes differ


class _Saves:
    """Saves in the background and keeps account of what was saved.

    Leaving the context waits for the save in progress, but only for seconds after an interrupt, or if another process may be lost.
    """

    def __init__(self, checkpoints: Checkpoints, workdir: Any, step: int, config: Any, command: str):
        self.checkpoints, self.workdir, self.config, self.command = checkpoints, workdir, config, command
        self.saved, self._writing = step, None

    def __enter__(self) -> "_Saves":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        brief = kind is KeyboardInterrupt or (kind is not None and jax.process_count() > 1)
        with contextlib.suppress(TimeoutError):
            self.collect(_GRACE_S if brief else None)

    def begin(
        self, step: int, state: Any, batches: Any, evaluation: Mapping[str, float], *, prune: bool, must_succeed: bool
    ) -> None:
        """Begins a save, after the previous one has ended; with `must_succeed`, waits, tries twice, and raises SaveError."""
        numbers = {name: json_number(value) for name, value in evaluation.items()} or None
        for attempts_left in (1, 0) if must_succeed else (0,):
            self.collect()
            data_state = batches.get_state() if hasattr(batches, "get_state") else None
            try:
                self.checkpoints.save_async(step, state, data_state, self.config, prune=prune, evaluation=numbers)
                self._writing = step
                if must_succeed:
                    self.checkpoints.wait()
                    self.saved, self._writing = step, None
                return
            except SaveError as error:
                self._writing = None
                if must_succeed and not attempts_left:
                    raise SaveError(f"{self.workdir} could not be saved at step {step}: {error}. {self.message()}") from error
                if not must_succeed:
                    self._warn(step, error)

    def collect(self, timeout: float | None = None) -> None:
        """Waits for the save in progress; a failure is a warning.

        Raises:
          TimeoutError: it takes longer than the timeout.
        """
        if self._writing is None:
            return
        try:
            self.checkpoints.wait(timeout)
            self.saved = self._writing
        except SaveError as error:
            self._warn(self._writing, error)
        self._writing = None

    def message(self) -> str:
        """Returns what is saved and how to resume."""
        if self._writing is not None and not self.checkpoints.is_saving:
            self.collect()
        is_saved = f"saved at step {self.saved}" if self.saved else "not saved yet"
        return f"{self.workdir} is {is_saved}. To resume, run:\n  {self.command}"

    def _warn(self, step: int, error: SaveError) -> None:
        text = f"{self.workdir} could not be saved at step {step}: {error}; training goes on, and the next save is a new attempt"
        warnings.warn(text, stacklevel=2)


def _iterator(batches: Iterable[Any]) -> Iterator[Any]:
    try:
        return iter(batches)
    except TypeError:  # an array without axes
        raise ValueError(f"batches must be an iterable of batches, got {short(batches)}") from None


def _restore_iterator(batches: Iterator[Any], restored: Any) -> None:
    if hasattr(batches, "set_state") and restored.data_state is not None:
        batches.set_state(restored.data_state)
        return
    for _ in range(restored.step):
        if next(batches, None) is None:
            raise ValueError(f"batches ended before step {restored.step}, at which the run resumes; repeat the data")


def _check_streaks(streaks: list[np.ndarray], step: int, saves: _Saves) -> int:
    """Returns the number of consecutive non-finite steps at `step`.

    Args:
      streaks: `skipped_in_a_row` of each step since the last check, ending at `step`.
      step: the current step.
      saves: the checkpoints of the run, for the error message.

    Raises:
      NonFiniteLoss: one of those steps was the tenth in a row, even if a finite step followed it.
    """
    tenths = [index for index, streak in enumerate(streaks) if streak >= MAX_SKIPPED_IN_A_ROW]
    if tenths:
        tenth = step - len(streaks) + 1 + tenths[0]
        saves.collect()
        checkpoints = saves.checkpoints
        good = checkpoints.newest_good()
        checkpoint = "there is no checkpoint yet"
        if good is not None:
            checkpoint = f"the newest intact checkpoint is {checkpoints.directory / str(good)}"
        raise NonFiniteLoss(
            f"the loss or its gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row, from step "
            f"{tenth - MAX_SKIPPED_IN_A_ROW + 1} to {tenth}; {checkpoint}. "
            "Try a lower learning rate, a smaller clip_norm or float32."
        )
    return int(streaks[-1])


def _interrupt_message(step: int, number: int, state: str) -> str:
    text = f"interrupted by {signal.Signals(number).name} at step {step}; {state}"
    if jax.process_index() == 0:
        printed(text)
    return text


def _command(resume_command: str | None) -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if resume_command is None else resume_command


class _Clock:
    """Measures tokens per second between log points, excluding evaluation, saving and the first step, which compiles."""

    def __init__(self, shares: int):
        self.shares, self.tokens_per_step = shares, 0
        self.tokens, self.start, self.first = 0, time.perf_counter(), None

    def count(self, batch: Any, metrics: dict[str, jax.Array]) -> None:
        leaf = batch["tokens"] if isinstance(batch, dict) and "tokens" in batch else None
        self.tokens_per_step = tokens = self.shares * (leaf.size if leaf is not None else jax.tree.leaves(batch)[0].shape[0])
        if self.first is None:
            jax.block_until_ready(metrics)  # once per run, so that later rates exclude compile time
            now = time.perf_counter()
            self.first, self.start = tokens / (now - self.start), now
        else:
            self.tokens += tokens

    def lap(self) -> float:
        now = time.perf_counter()
        rate = self.tokens / max(now - self.start, 1e-9) if self.tokens else self.first
        self.tokens, self.start = 0, now
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


class _Log:
    """Sends metrics to the writers, and prints a progress bar, or plain lines if stdout is not a terminal."""

    def __init__(
        self,
        workdir: Any,
        step: int,
        steps: int,
        quiet: bool,
        flops_per_token: float | None,
        loggers: tuple[str, ...],
        config: Any,
    ):
        peak = peak_flops(jax.devices()[0])
        self.flops_of_peak = None if None in (peak, flops_per_token) else flops_per_token / (peak * jax.device_count())
        self.workdir, self.first, self.steps = workdir, step, steps
        self.loggers, self.config = loggers, config
        self.active = jax.process_index() == 0
        self.show = not quiet and self.active
        self.progress = None

    def __enter__(self) -> "_Log":
        self.started = time.perf_counter()
        if not self.active:
            return self
        self.writers = Writers(self.workdir, self.first, self.loggers, self.config)
        earlier = read_metrics(self.workdir) if self.first else []
        self.elapsed_before = earlier[-1].get("elapsed") or 0.0 if earlier else 0.0
        if self.show and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.progress = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self.task = self.progress.add_task("compiling", total=self.steps, completed=self.first)
            self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self.active:
            if self.progress:
                self.progress.stop()
            self.writers.close()

    @contextlib.contextmanager
    def compiling(self, clock: _Clock) -> Iterator[None]:
        """Announces the compilation of the first step, and how long it took."""
        if clock.first is not None or not self.show:
            yield
            return
        began = time.perf_counter()
        if not self.progress:
            printed("compiling the training step")
        yield
        memory = f"; peak memory {peak_memory() / 2**30:.2f} GiB"
        text = f"compiled in {time.perf_counter() - began:.1f} s{memory}"
        if self.progress:
            self.progress.update(self.task, description=text)
        else:
            printed(text)

    def write(
        self,
        step: int,
        metrics: dict[str, Any],
        rate: float,
        tokens: int,
        epoch: float | None,
        evaluation: dict[str, float],
    ) -> None:
        if not self.active:
            return
        line = {name: json_number(metrics.get(name)) for name in ("loss", "learning_rate", "grad_norm")}
        line["tokens_per_second"] = json_number(rate)
        if self.flops_of_peak is not None:
            line["mfu"] = json_number(rate * self.flops_of_peak)
        line |= {"skipped": int(metrics["skipped"]), "tokens": tokens}
        if epoch is not None:
            line["epoch"] = json_number(epoch)
        elapsed = self.elapsed_before + time.perf_counter() - self.started
        line |= {"time": round(time.time(), 3), "elapsed": round(elapsed, 3), "memory_bytes": peak_memory()}
        line |= {f"evaluation/{name}": json_number(value) for name, value in evaluation.items()}
        self.writers.write(step, line)
        if self.show:
            self._print(step, line)

    def _print(self, step: int, line: dict[str, Any]) -> None:
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        text = f"loss {loss}  {line['tokens_per_second']:,.0f} tokens/s"
        text += f"  MFU {line['mfu']:.1%}" if line.get("mfu") is not None else ""
        scores = "".join(f"  {name} {value}" for name, value in line.items() if name.startswith("evaluation/"))
        if self.progress:
            self.progress.update(self.task, completed=step, description=text)
            if scores:
                self.progress.console.print(f"step {step}{scores}", highlight=False)
            return
        left = (time.perf_counter() - self.started) / (step - self.first) * (self.steps - step)
        minutes, seconds = divmod(round(left), 60)
        printed(f"step {step}/{self.steps}  {text}  {minutes // 60}:{minutes % 60:02}:{seconds:02} left{scores}")


def peak_memory() -> int:
    """Returns the peak memory in bytes of the first local device, or of this process where devices do not report theirs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
