"""The training loop, which resumes from the workdir and tolerates kills, signals and bad batches.

    restore -> [ next batch -> step -> every log_every: fetch metrics, log -> every checkpoint_every: save ] -> save

Between those points, the loop does not wait for the device: each step is dispatched while the previous one is still running. The
loss, and therefore a streak of non-finite steps, is checked only at the next of these points.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posjax.checks import check, require
from posjax.hardware import peak_flops
from posjax.parallel.distributed import RESTART, PreemptionSync, on_peer_loss
from posjax.training.checkpoints import Checkpoints
from posjax.training.lock import holds_lock

MAX_SKIPPED_IN_A_ROW = 10


class Interrupted(Exception):
    """Raised when SIGINT or SIGTERM stops the run. The message names the step of the newest checkpoint.

    Attributes:
      exit_code: exit code of the command line: 130 after SIGINT, posjax.parallel.distributed.RESTART after SIGTERM, which
        schedulers send.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = RESTART if number == signal.SIGTERM else 130


class NonFiniteLoss(RuntimeError):
    """Raised after ten consecutive steps with a non-finite loss or gradient. The message names the newest intact checkpoint."""


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
    checkpoint_every: int = 1000,
    keep: int = 3,
    keep_steps: Sequence[int] = (),
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    resume_command: str | None = None,
    quiet: bool = False,
    shares: int | None = None,
    flops_per_token: float | None = None,
) -> Any:
    """Trains until `state.step == steps`, resuming from the newest intact checkpoint in the workdir, and returns the final state.

    Writes `metrics.jsonl`, TensorBoard events and `checkpoints/` under `workdir`. Every line of `metrics.jsonl` has step, loss
    (of that step; null if not finite), learning_rate, grad_norm, tokens_per_second (since the previous line), skipped (in total),
    and, after an evaluation, its numbers as "evaluation/<name>". Each step has at most one line, even after a resume.

    Args:
      step_fn: (state, batch) -> (state, metrics), from `jit_train_step`, `pmap_train_step` or `jax.jit`. It may donate the state.
      state: the state at step 0. A restored state is placed on the same devices with the same shardings.
      batches: an iterable of batches. If its iterator has `get_state()` and `set_state()` (as Grain's has), its position is stored
        in the checkpoint. Otherwise it must yield the same batches each time: after a resume, the batches already used are drawn
        again and dropped.
      steps: the step to stop at, at least 1.
      workdir: directory of the run, created if it does not exist.
      config: a JSON value stored with each checkpoint.
      log_every, checkpoint_every: intervals in steps. The last step is always logged and saved.
      keep: number of intact checkpoints to keep.
      keep_steps: further steps to save at, whose checkpoints are kept.
      evaluate: state -> numbers by name, called every `evaluate_every` steps and after the last step. It must not donate the state.
      evaluate_every: interval in steps. None evaluates after the last step only.
      resume_command: the command that resumes the run, printed after an interruption. None prints this program's command line.
      quiet: whether to print nothing except the resume command.
      flops_per_token: floating-point operations of the model per token of a step, forward and backward. If it is given and the
        devices' peak is known, every line also has mfu, the fraction of that peak.
      shares: number of batches of the size that `batches` yields in one global batch. None means the number of processes.

    Raises:
      Interrupted: SIGINT or SIGTERM was received. It is raised after the current step has finished and, unless steps are being
        skipped, the state has been saved. With several processes, all of them raise it after the same step, soon after one of them
        received the signal. (A second SIGINT raises KeyboardInterrupt at once.)
      ProcessLost: another process was lost. (If JAX itself aborts this process because of that, the same message is printed.)
      NonFiniteLoss: ten consecutive steps were not finite. No checkpoint is written while steps are being skipped, except after
        the last step.
      CheckpointError: there are checkpoints, but none can be used.
      WorkdirInUse: another process is writing to the workdir.
      ValueError: an argument is out of range, or `batches` ended before `steps`.
    """
    for name, value in {"steps": steps, "log_every": log_every, "checkpoint_every": checkpoint_every}.items():
        check(name, value, int, least=1, what="be at least 1")
    check("evaluate_every", evaluate_every, int | None, least=1, what="be at least 1, or None to evaluate only at the end")
    workdir = Path(workdir)
    say = _say if not quiet and jax.process_index() == 0 else lambda text: None
    checkpoints = Checkpoints(workdir / "checkpoints", keep, keep_steps)

    batches = iter(batches)
    restored = checkpoints.restore_latest(state)
    if restored is not None:
        state = restored.state
        if restored.step >= steps:
            say(f"{workdir} is already at step {restored.step} of {steps}; nothing to train")
            return state
        _restore_iterator(batches, restored)
        say(f"resuming {workdir} from step {restored.step} of {steps}")
    step = saved = int(state.step)

    def save(prune: bool = True) -> None:
        nonlocal saved
        data_state = batches.get_state() if hasattr(batches, "get_state") else None
        checkpoints.save(step, state, data_state, config, prune=prune)
        saved = step

    def state_message() -> str:
        done = checkpoints.steps()
        return f"{workdir} is {_saved_at(done[-1] if done else 0)}. To resume, run:\n  {_command(resume_command)}"

    log = _Log(workdir, step, steps, quiet, flops_per_token)
    with noted_signals() as caught, log, PreemptionSync(step) as sync, on_peer_loss(state_message):
        clock, streaks, save_due = _Clock(jax.process_count() if shares is None else shares), [], False
        while step < steps:
            try:
                batch = next(batches)
            except StopIteration:
                raise ValueError(f"batches ended after step {step} of {steps}; repeat the data or reduce steps") from None
            state, metrics = step_fn(state, batch)
            step += 1
            streaks.append(metrics["skipped_in_a_row"])
            clock.count(batch, metrics)

            last = step == steps
            save_due = save_due or step % checkpoint_every == 0 or step in keep_steps
            evaluating = evaluate is not None and (last or (evaluate_every and step % evaluate_every == 0))
            logging = step % log_every == 0 or evaluating or last
            stopping = None if last else sync.signal_after(step, caught)
            if not (logging or save_due or stopping):
                continue

            streak = _check_streaks(jax.device_get(streaks), step, checkpoints)  # waits for the device
            streaks = []
            if logging:
                fetched, rate = jax.device_get(metrics), clock.lap()
                with clock.paused():
                    log.write(step, fetched, rate, evaluate(state) if evaluating else {})
            # Nothing is saved while steps are being skipped, so that the newest checkpoint predates any divergence. The state
            # after the last step is always saved, but then the checkpoints from before the skipped steps are kept.
            if last or (streak == 0 and (save_due or stopping)):
                with clock.paused():
                    save(prune=streak == 0)
                save_due = False
            if stopping:
                raise Interrupted(_interrupt_message(workdir, step, saved, stopping, resume_command), stopping)
    say(f"{workdir} has finished {steps} steps")
    return state


def _restore_iterator(batches: Iterator[Any], restored: Any) -> None:
    if hasattr(batches, "set_state") and restored.data_state is not None:
        batches.set_state(restored.data_state)
        return
    for _ in range(restored.step):
        if next(batches, None) is None:
            raise ValueError(f"batches ended before step {restored.step}, at which the run resumes; repeat the data")


def _check_streaks(streaks: list[np.ndarray], step: int, checkpoints: Checkpoints) -> int:
    """Returns the number of consecutive non-finite steps at `step`.

    Args:
      streaks: `skipped_in_a_row` of each step since the last check, ending at `step`.
      step: the current step.
      checkpoints: the checkpoints of the run, for the error message.

    Raises:
      NonFiniteLoss: one of those steps was the tenth in a row, even if a finite step followed it.
    """
    tenths = [index for index, streak in enumerate(streaks) if streak >= MAX_SKIPPED_IN_A_ROW]
    if tenths:
        tenth = step - len(streaks) + 1 + tenths[0]
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


def _interrupt_message(workdir: Path, step: int, saved: int, number: int, resume_command: str | None) -> str:
    name, command = signal.Signals(number).name, _command(resume_command)
    text = f"interrupted by {name} at step {step}; {workdir} is {_saved_at(saved)}. To resume, run:\n  {command}"
    if jax.process_index() == 0:
        _say(text)
    return text


def _command(resume_command: str | None) -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if resume_command is None else resume_command


def _saved_at(step: int) -> str:
    return f"saved at step {step}" if step else "not saved yet"


def _say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Defers SIGINT and SIGTERM, so that they do not end the program in the middle of a step; yields a list of received signals."""
    caught: list[int] = []

    def note(number, frame):
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second SIGINT interrupts at once

    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python handles signals in the main thread only
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Clock:
    """Measures tokens per second between log points, excluding evaluation, saving and the first step, which compiles."""

    def __init__(self, shares: int):
        self.shares = shares
        self.tokens, self.start, self.first = 0, time.perf_counter(), None

    def count(self, batch: Any, metrics: dict[str, jax.Array]) -> None:
        leaf = batch["tokens"] if isinstance(batch, dict) and "tokens" in batch else None
        tokens = self.shares * (leaf.size if leaf is not None else jax.tree.leaves(batch)[0].shape[0])
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
    """Writes `metrics.jsonl` and TensorBoard events, and prints a progress bar, or plain lines if stdout is not a terminal."""

    def __init__(self, workdir: Path, step: int, steps: int, quiet: bool, flops_per_token: float | None):
        peak = peak_flops(jax.devices()[0])
        self.flops_of_peak = None if None in (peak, flops_per_token) else flops_per_token / (peak * jax.device_count())
        self.workdir, self.first, self.steps = workdir, step, steps
        self.show = not quiet
        self.started = time.perf_counter()
        self.active = jax.process_index() == 0
        self.progress = None

    def __enter__(self) -> "_Log":
        if not self.active:
            return self
        require("training", "tensorboardX", "rich")
        from tensorboardX import SummaryWriter

        self.workdir.mkdir(parents=True, exist_ok=True)
        forget_after(self.workdir / "metrics.jsonl", self.first)
        self.file = (self.workdir / "metrics.jsonl").open("a")
        self.events = SummaryWriter(str(self.workdir), purge_step=self.first + 1 if self.first else None)
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
            self.file.close()
            self.events.close()

    def write(self, step: int, metrics: dict[str, Any], rate: float, evaluation: dict[str, float]) -> None:
        if not self.active:
            return
        line = {"step": step}
        for name in ("loss", "learning_rate", "grad_norm"):
            line[name] = json_number(metrics.get(name))
        line["tokens_per_second"] = json_number(rate)
        if self.flops_of_peak is not None:
            line["mfu"] = json_number(rate * self.flops_of_peak)
        line["skipped"] = int(metrics["skipped"])
        line |= {f"evaluation/{name}": json_number(value) for name, value in evaluation.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in line.items():
            if name != "step" and value is not None:
                self.events.add_scalar(name, value, step)
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
        _say(f"step {step}/{self.steps}  {text}  {minutes // 60}:{minutes % 60:02}:{seconds:02} left{scores}")


def forget_after(path: Path, step: int) -> None:
    """Truncates a `metrics.jsonl` to the lines up to `step`, and drops malformed lines, such as one cut short by a kill."""
    if not path.exists():
        return
    contents = path.read_bytes()
    kept = b"".join(line for line in contents.splitlines(keepends=True) if _line_step(line) <= step)
    if kept != contents:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(kept)
        os.replace(temporary, path)


def _line_step(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def json_number(value: Any) -> float | None:
    """Returns the value as a float, or None if it is NaN or infinite, which JSON cannot represent."""
    return None if value is None or not math.isfinite(value) else float(value)
