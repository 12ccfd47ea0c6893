"""``posjax bench attention``: compares contestants in time, memory and error of causal attention, in one run.

    inputs -> reference -> each contestant once, in a separate process: memory, error -> all in turn, in this process: time

The separate processes run before this one uses a device: an accelerator may admit only one process at a time, and a contestant
that runs out of memory does not affect the others.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import posjax
from posjax.bench.contestants import Contestant, Prepared, counts, list_contestants, members, prepare
from posjax.checks import check_at_least
from posjax.encodings.spec import parse_encoding

Row = dict[str, Any]
# Beyond this length, only the last queries are checked, because the reference's time grows with the square of the length.
_REFERENCE_LENGTH, _REFERENCE_ROWS = 2048, 256
REFERENCE_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0"}


@dataclasses.dataclass(frozen=True)
class AttentionBench:
    """Measures time, memory and error of causal attention, for encodings and other packages.

    Errors are relative to dense attention in float32 on the CPU.

    Attributes:
      lengths: sequence lengths in tokens.
      encodings: encodings such as rope, "cope(64)" or "rope + cope(64)"; identity is always included as the baseline.
      implementations: implementations of posjax.attention: xla (dense), xla_chunked (tiled), pallas.
      passes: forward, or both: forward and backward with gradients of query, key, value and all parameters.
      gates: gates of contextual encodings: half (random input), sparse (mean gate 0.02), saturating (0.98).
      workdir: folder with checkpoints; adds the gates of a trained model, from query, key and value on its validation text.
      layer: index of that model's layer, from 0.
      heads: N, number of heads; with a workdir, it must equal the model's.
      head_dim: H, channels per head; with a workdir, it must equal the model's.
      batch: B, batch size.
      dtype: dtype of query, key and value; parameters are float32.
      peers: includes other installed packages: jax.nn on cuDNN, tokamax on a GPU, torch, x-transformers.
      peer_limit_seconds: time limit for all rounds of a peer; a peer whose single call takes longer is called only once.
      repeats: number of rounds; each calls every contestant once.
      out: folder for attention.json, attention.md and attention.png.
    """

    lengths: tuple[int, ...] = (512, 2048)
    encodings: tuple[str, ...] = ("identity", "cope(64)", "rope + cope(64)")
    implementations: tuple[Literal["xla", "xla_chunked", "pallas"], ...] = ("xla", "xla_chunked")
    passes: tuple[Literal["forward", "both"], ...] = ("forward", "both")
    gates: tuple[Literal["half", "sparse", "saturating"], ...] = ("half", "sparse")
    workdir: str = ""
    layer: int = 0
    heads: int = 4
    head_dim: int = 64
    batch: int = 1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    peers: bool = True
    peer_limit_seconds: float = 30.0
    repeats: int = 5
    out: str = "runs/bench"

    def __post_init__(self) -> None:
        for name in ("lengths", "encodings", "implementations", "passes", "gates"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty, got ()")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must all differ, got {getattr(self, name)}")
        for length in self.lengths:
            check_at_least("lengths", length, 2)
        for name in ("heads", "head_dim", "batch", "repeats"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("layer", self.layer, 0)
        if not self.peer_limit_seconds > 0:
            raise ValueError(f"peer_limit_seconds must be positive, got {self.peer_limit_seconds}")
        for spec in self.encodings:
            if isinstance(parse_encoding(spec), tuple):
                raise ValueError(f"encodings must each be for one layer, got {spec!r}; list the encodings of its layers separately")
        if self.workdir:
            check_workdir(self.workdir, self.layer, self.heads, self.head_dim)


@dataclasses.dataclass(frozen=True)
class Case:
    """Identifies one row of the benchmark: a contestant, a length, a pass, and the gates (None if the encoding has none)."""

    contestant: Contestant
    length: int
    direction: str
    gates: str | None

    @property
    def inputs(self) -> tuple[str, str | None, int]:
        return self.contestant.encoding, self.gates, self.length


def run(config: AttentionBench, contestants: Sequence[Contestant] | None = None, quiet: bool = False) -> list[Row]:
    """Runs the benchmark and writes attention.json, attention.md and attention.png, even if interrupted.

    Args:
      config: the settings of the benchmark.
      contestants: contestants to measure; None: the encodings, implementations and peers of the config.
      quiet: hides the progress on the terminal.

    Returns:
      Rows in the order of lengths, passes and contestants, as in attention.json. The notes of a failed row give the reason.

    Raises:
      ValueError: the inputs cannot be created, or the folder is not writable.
      RuntimeError: jax has no device.
    """
    out = make_folder(config.out)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share the device's memory
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="posjax-bench-") as folder, show_progress(quiet) as progress:
        jobs = Jobs(Path(folder))
        device = jobs.run({"task": "device"})
        if "failed" in device:
            raise RuntimeError(f"jax has no device: {device['failed']}")
        if contestants is None:
            contestants = list_contestants(config.encodings, config.implementations, config.peers, device["platform"] == "gpu")
        cases = list_cases(config, contestants)
        rows += [_empty_row(case) for case in cases]
        try:
            _measure(config, cases, rows, jobs, progress)
            _time(config, cases, rows, jobs, progress)
        finally:
            from posjax.bench import results

            results.fill_ratios(rows)
            results.write(rows, dataclasses.asdict(config), _hardware(device), versions(), out)
    return rows


def check_workdir(workdir: str, layer: int, heads: int, head_dim: int) -> None:
    """Checks that a trained model has the layer, the heads and the channels of a benchmark.

    Raises:
      ValueError: the workdir has no checkpoints, or its model does not have this layer, or has other heads or channels.
    """
    from posjax.bench.inputs import workdir_config

    trained = workdir_config(workdir)[0]
    if layer >= trained.num_layers:
        raise ValueError(f"layer must be below {trained.num_layers}, the number of layers of workdir {workdir!r}, got {layer}")
    dims = trained.transformer(vocab_size=2).dims
    if (dims.num_heads, dims.head_dim) != (heads, head_dim):
        raise ValueError(
            f"heads and head_dim must be those of workdir {workdir!r}, got {heads} and {head_dim}; "
            f"add --heads {dims.num_heads} --head-dim {dims.head_dim}"
        )


def make_folder(out: str) -> Path:
    """Creates the folder ``out`` if it does not exist, and returns its path.

    Raises:
      ValueError: the folder cannot be created.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a writable folder, got {out!r}: {error}") from None
    return Path(out)


def list_cases(config: AttentionBench, contestants: Sequence[Contestant]) -> list[Case]:
    """Lists the cases to measure: contextual encodings with every kind of gates, other encodings once."""
    gates = (*config.gates, *(("trained",) if config.workdir else ()))
    return [
        Case(contestant, length, direction, kind)
        for length in config.lengths
        for direction in config.passes
        for contestant in contestants
        for kind in (gates if counts(contestant.encoding) else (None,))
    ]


def _empty_row(case: Case) -> Row:
    measured = (
        *("ms_min", "ms_median", "rounds", "ratio_to_identity", "ratio_to_jax_nn"),
        *("peak_bytes_process", "peak_bytes_growth", "temp_bytes", "device_peak_bytes"),
        *("error_out", "error_grads", "worst_gradient", "mean_gate"),
    )
    return {
        "contestant": case.contestant.name,
        "kind": case.contestant.kind,
        "encoding": case.contestant.encoding,
        "implementation": case.contestant.implementation,
        "length": case.length,
        "pass": case.direction,
        "gates": case.gates,
        **dict.fromkeys(measured),
        "notes": [],
    }


# Memory and error: a process for each contestant ------------------------------------------------------------------------


class Jobs:
    """Runs jobs of ``python -m posjax.bench`` in separate processes, with all files in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[Any, Path] = {}

    def file(self, *key: Any) -> Path:
        """Returns the path of a file, the same for each call with equal arguments."""
        return self.files.setdefault(key, self.folder / f"{len(self.files)}.npz")

    def run(self, job: dict[str, Any], timeout: float | None = None, **environment: str) -> dict[str, Any]:
        """Runs a job and returns its answer, or {"failed": reason} if the process died or exceeded ``timeout`` seconds."""
        path, result = self.folder / "job.json", self.folder / "result.json"
        result.unlink(missing_ok=True)
        path.write_text(json.dumps(job | {"result": str(result)}))
        search = os.pathsep.join(dict.fromkeys([str(Path(__file__).parents[2]), *filter(None, sys.path)]))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "posjax.bench", str(path)],
                env=os.environ | {"PYTHONPATH": search} | environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {timeout:.0f} s"}
        if result.exists():
            return json.loads(result.read_text())
        if done.returncode in (-9, 137):
            return {"failed": "killed, most likely because it ran out of memory"}
        last = [line for line in done.stderr.strip().split("\n") if line.strip()][-1:]
        return {"failed": f"exit code {done.returncode}: {''.join(last)}"[:300]}


def _measure(config: AttentionBench, cases: list[Case], rows: list[Row], jobs: Jobs, progress: Callable) -> None:
    wanted = list(dict.fromkeys(case.inputs for case in cases))
    total = len(wanted) + len(cases)
    progress("inputs", 0, total)
    files = [(spec, gates or "half", length, str(jobs.file("inputs", spec, gates, length))) for spec, gates, length in wanted]
    made = jobs.run({"task": "inputs", "config": dataclasses.asdict(config), "files": files}, JAX_PLATFORMS="cpu")
    if "failed" in made:
        raise ValueError(made["failed"])
    references: dict[Any, dict[str, Any]] = {}
    for number, (case, row) in enumerate(zip(cases, rows, strict=True)):
        first = _first_row(case.length)
        if case.inputs not in references:
            progress(f"reference of {case.contestant.encoding}, {case.length:,} tokens", number + len(references), total)
            job = {"task": "reference", "encoding": case.contestant.encoding, "first": first, "gradients": "both" in config.passes}
            job |= {"inputs": str(jobs.file("inputs", *case.inputs)), "arrays": str(jobs.file("reference", *case.inputs))}
            references[case.inputs] = jobs.run(job, **REFERENCE_ENVIRONMENT)
        progress(f"{case.contestant.name}, {case.length:,} tokens: memory, error", number + len(references), total)
        job = {"task": "measure", "contestant": dataclasses.asdict(case.contestant), "gradients": case.direction == "both"}
        job |= {"first": first, "dtype": config.dtype, "inputs": str(jobs.file("inputs", *case.inputs))}
        job |= {"arrays": str(jobs.file("results"))}
        limit = 60 + 4 * config.peer_limit_seconds if case.contestant.is_peer else None
        answer, reference = jobs.run(job, limit), references[case.inputs]
        if "failed" in answer:
            row["notes"].append(answer["failed"])
            continue
        row["ms_min"] = row["ms_median"] = 1000 * answer.pop("seconds")  # replaced by the times of the rounds
        row["rounds"] = 0
        row |= answer
        if "failed" in reference:
            row["notes"].append(f"no reference: {reference['failed']}")
            continue
        row["mean_gate"] = reference["mean_gate"]
        try:
            row |= errors(dict(np.load(jobs.file("results"))), dict(np.load(jobs.file("reference", *case.inputs))))
        except FloatingPointError as error:
            row["notes"].append(str(error))
        if {member.registered_name for member in members(case.contestant.encoding)} <= {"sinusoidal", "learned"}:
            row["notes"].append("adds to the embeddings; its attention is the same as identity's")
        if first:
            row["notes"].append(f"error of the last {case.length - first} queries")


def _first_row(length: int) -> int:
    return 0 if length <= _REFERENCE_LENGTH else length - _REFERENCE_ROWS


def errors(results: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> Row:
    """Computes the relative errors of a result: the norm of the difference over the norm of the reference's array.

    Args:
      results: "out", and gradients as "grads/...", as ``Prepared.fetch`` returns them.
      reference: the same arrays, of dense attention.

    Returns:
      A dict with error_out and, with gradients, error_grads, the largest error of a gradient, and worst_gradient, its name.

    Raises:
      FloatingPointError: a number in ``results`` is not finite.
    """
    if not all(np.isfinite(x).all() for x in results.values()):
        raise FloatingPointError("not finite")
    gradients = [name for name in results if name.startswith("grads/")]
    whole = float(np.sqrt(sum(np.sum(reference[name] ** 2) for name in gradients)))

    def error(name: str) -> float:
        size = float(np.linalg.norm(reference[name]))
        if size <= 1e-6 * whole:
            size = whole  # the gradient is zero up to rounding, because softmax cancels the parameter
        return float(np.linalg.norm(results[name] - reference[name])) / size

    row: Row = {"error_out": error("out")}
    if gradients:
        by_name = {name.removeprefix("grads/"): error(name) for name in gradients}
        row |= {"error_grads": max(by_name.values()), "worst_gradient": max(by_name, key=by_name.get)}
    return row


# Time: all contestants of a length in turn ------------------------------------------------------------------------------


def _time(config: AttentionBench, cases: list[Case], rows: list[Row], jobs: Jobs, progress: Callable) -> None:
    for length in config.lengths:
        compiled: dict = {}
        ready: list[tuple[Row, int, Prepared, list[float]]] = []
        for case, row in zip(cases, rows, strict=True):
            if case.length != length or row["ms_min"] is None:
                continue
            rounds, seconds = config.repeats, row["ms_min"] / 1000
            if case.contestant.is_peer:
                if seconds > config.peer_limit_seconds:
                    continue
                rounds = max(1, min(rounds, int(config.peer_limit_seconds / seconds)))
            progress(f"{case.contestant.name}, {length:,} tokens: compiling", len(ready), len(cases))
            arrays = dict(np.load(jobs.file("inputs", *case.inputs)))
            try:
                prepared = prepare(case.contestant, case.direction == "both", arrays, config.dtype, compiled)
                prepared.call()
            except Exception as error:  # it succeeded alone, but other contestants use memory here
                row["notes"].append(f"not timed in rounds: {type(error).__name__}")
                continue
            ready.append((row, rounds, prepared, []))
        for turn in range(config.repeats):
            for number, (row, rounds, prepared, times) in enumerate(ready):
                if turn >= rounds:
                    continue
                done, total = turn * len(ready) + number, config.repeats * len(ready)
                progress(f"{length:,} tokens: round {turn + 1} of {config.repeats}", done, total)
                time.sleep(0.005)  # threads of the previous contestant may still spin
                start = time.perf_counter()
                prepared.call()
                times.append(1000 * (time.perf_counter() - start))
                row["ms_min"], row["ms_median"], row["rounds"] = min(times), float(np.median(times)), len(times)


# The machine ------------------------------------------------------------------------------------------------------------


def _hardware(device: dict[str, Any]) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": names[0] if names else platform.processor() or platform.machine(), "cores": cores} | device


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages in the benchmark."""
    packages = {"python": platform.python_version(), "posjax": posjax.__version__}
    for package in ("jax", "jaxlib", "libtpu", "numpy", "tokamax", "torch", "x-transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[package] = importlib.metadata.version(package)
    return packages


def _lines(seconds: float = 15.0) -> Callable[[str, int, int], None]:
    """Returns a function that prints progress as lines: the first, the last, and one every 15 seconds."""
    printed = [-math.inf]

    def show(text: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - printed[0] >= seconds:
            print(f"{text}: {done} of {total}", flush=True)
            printed[0] = time.monotonic()

    return show


@contextlib.contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress on one line of the terminal, else as lines; yields a function of (description, done, total)."""
    if not quiet and not sys.stdout.isatty():
        yield _lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
