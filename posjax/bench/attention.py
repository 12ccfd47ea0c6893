"""``posjax bench attention``: time, memory and error of causal attention, side by side in one run.

    inputs -> float64 oracle -> each contestant once, alone in a process: memory, error -> all of them in turn, here: time

Processes come before anything here touches a device: an accelerator may let in one process at a time, and a contestant that
does not fit in memory takes nobody along.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
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
from posjax.bench.contestants import Contestant, Prepared, counts, list_contestants, prepare
from posjax.bench.oracle import members
from posjax.checks import check_at_least
from posjax.encodings.spec import parse_encoding

Row = dict[str, Any]
# Past this length the error is that of the last queries alone: the oracle's time grows with the square of the length.
_ORACLE_LENGTH, _ORACLE_ROWS = 2048, 256
# XLA without its optimisations makes NaN of an oracle's gradients, as of jaxlib 0.12.0.1.
ORACLE_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}


@dataclasses.dataclass(frozen=True)
class AttentionBench:
    """Times causal attention, and measures its memory and its error against a float64 oracle, for encodings and other packages.

    Attributes:
      lengths: tokens.
      encodings: such as rope, "cope(64)" or "rope + cope(64)"; identity is always there as the baseline.
      implementations: of posjax.attention: xla (dense), xla_chunked (tiles), pallas.
      passes: forward, or both: forward and backward with gradients of query, key, value and all parameters.
      gates: of encodings that count by content: half (random input), sparse (mean gate 0.02), saturating (0.98).
      workdir: also takes the gates of a trained model: query, key and value of its validation text. A folder with checkpoints.
      layer: of that model, from 0.
      heads: N; with a workdir, those of its model.
      head_dim: H, channels of a head; likewise.
      batch: B.
      dtype: of query, key and value; parameters are float32.
      peers: other packages that are installed: jax.nn on cuDNN, tokamax on a GPU, torch, x-transformers.
      peer_limit_seconds: a peer whose call takes longer is called once. Rounds of a peer stop at this time too.
      repeats: rounds in which every contestant is called once.
      out: a folder for attention.json, attention.md and attention.png.
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
                raise ValueError(f"encodings must each be of one layer, got {spec!r}; name its parts one by one")
        if self.workdir:
            check_workdir(self.workdir, self.layer, self.heads, self.head_dim)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a contestant at a length, in a pass, with gates (None where they do not matter)."""

    contestant: Contestant
    length: int
    direction: str
    gates: str | None

    @property
    def inputs(self) -> tuple[str, str | None, int]:
        return self.contestant.encoding, self.gates, self.length


def run(config: AttentionBench, contestants: Sequence[Contestant] | None = None, quiet: bool = False) -> list[Row]:
    """Measures everything and writes attention.json, attention.md and attention.png, also when it is interrupted.

    Args:
      config: what to measure.
      contestants: who; None: the encodings, implementations and peers of the config.
      quiet: no progress on the terminal.

    Returns:
      Rows in the order of lengths, passes and contestants, as they stand in attention.json. What failed has its reason in notes.

    Raises:
      ValueError: a workdir whose model has other heads than the config, or a folder that cannot be written.
      RuntimeError: no device.
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
    """Raises ValueError where a trained model has other heads than a benchmark, or no such layer."""
    from posjax.bench.inputs import workdir_config

    trained = workdir_config(workdir)[0]
    if layer >= trained.num_layers:
        raise ValueError(f"layer must be below the {trained.num_layers} layers of {workdir!r}, got {layer}")
    dims = trained.transformer(vocab_size=2).dims
    if (dims.num_heads, dims.head_dim) != (heads, head_dim):
        raise ValueError(
            f"heads and head_dim must be those of workdir {workdir!r}, got {heads} and {head_dim}; "
            f"add --heads {dims.num_heads} --head-dim {dims.head_dim}"
        )


def make_folder(out: str) -> Path:
    """The folder ``out``, which may be there.

    Raises:
      ValueError: it cannot be made.
    """
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got {out!r}: {error}") from None
    return Path(out)


def list_cases(config: AttentionBench, contestants: Sequence[Contestant]) -> list[Case]:
    """Encodings that do not count are measured once, those that do with every kind of gates."""
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
    """Runs ``python -m posjax.bench`` with a job and returns its answer; files live in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[Any, Path] = {}

    def file(self, *what: Any) -> Path:
        """A path for something, the same each time."""
        return self.files.setdefault(what, self.folder / f"{len(self.files)}.npz")

    def run(self, job: dict[str, Any], timeout: float | None = None, **environment: str) -> dict[str, Any]:
        """The answer, or {"failed": why} where the process died or took longer than ``timeout`` seconds."""
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
            return {"failed": "killed, most likely for want of memory"}
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
    oracles: dict[Any, dict[str, Any]] = {}
    for number, (case, row) in enumerate(zip(cases, rows, strict=True)):
        first = _first_row(case.length)
        if case.inputs not in oracles:
            progress(f"oracle of {case.contestant.encoding}, {case.length:,} tokens", number + len(oracles), total)
            job = {"task": "oracle", "encoding": case.contestant.encoding, "first": first, "gradients": "both" in config.passes}
            job |= {"inputs": str(jobs.file("inputs", *case.inputs)), "arrays": str(jobs.file("oracle", *case.inputs))}
            oracles[case.inputs] = jobs.run(job, **ORACLE_ENVIRONMENT)
        progress(f"{case.contestant.name}, {case.length:,} tokens: memory, error", number + len(oracles), total)
        job = {"task": "measure", "contestant": dataclasses.asdict(case.contestant), "gradients": case.direction == "both"}
        job |= {"first": first, "dtype": config.dtype, "inputs": str(jobs.file("inputs", *case.inputs))}
        job |= {"arrays": str(jobs.file("results"))}
        limit = 60 + 4 * config.peer_limit_seconds if case.contestant.is_peer else None
        answer, oracle = jobs.run(job, limit), oracles[case.inputs]
        if "failed" in answer:
            row["notes"].append(answer["failed"])
            continue
        row["ms_min"] = row["ms_median"] = 1000 * answer.pop("seconds")  # until rounds give better
        row["rounds"] = 0
        row |= answer
        if "failed" in oracle:
            row["notes"].append(f"no oracle: {oracle['failed']}")
            continue
        row["mean_gate"] = oracle["mean_gate"]
        try:
            row |= errors(dict(np.load(jobs.file("results"))), dict(np.load(jobs.file("oracle", *case.inputs))))
        except FloatingPointError as error:
            row["notes"].append(str(error))
        if {name for name, _ in members(case.contestant.encoding)} <= {"sinusoidal", "learned"}:
            row["notes"].append("adds to the embeddings; attention is identity's")
        if first:
            row["notes"].append(f"error of the last {case.length - first} queries")


def _first_row(length: int) -> int:
    return 0 if length <= _ORACLE_LENGTH else length - _ORACLE_ROWS


def errors(found: Mapping[str, np.ndarray], oracle: Mapping[str, np.ndarray]) -> Row:
    """Norm of the difference over norm: error_out, and of gradients, where there are, the worst array's, error_grads.

    Args:
      found: "out", and gradients as "grads/..."; ``Prepared.fetch`` gives it.
      oracle: the same in float64.

    Returns:
      error_out, and with gradients error_grads and worst_gradient, the name of that array.

    Raises:
      FloatingPointError: something found is not finite.
    """
    if not all(np.isfinite(x).all() for x in found.values()):
        raise FloatingPointError("not finite")
    gradients = [name for name in found if name.startswith("grads/")]
    whole = float(np.sqrt(sum(np.sum(oracle[name] ** 2) for name in gradients)))

    def error(name: str) -> float:
        size = float(np.linalg.norm(oracle[name]))
        if size <= 1e-9 * whole:
            size = whole  # zero but for rounding, where softmax does not see a parameter: a part of all gradients
        return float(np.linalg.norm(found[name] - oracle[name])) / size

    row: Row = {"error_out": error("out")}
    if gradients:
        of = {name.removeprefix("grads/"): error(name) for name in gradients}
        row |= {"error_grads": max(of.values()), "worst_gradient": max(of, key=of.get)}
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
            except Exception as error:  # alone it was well; here others hold memory too
                row["notes"].append(f"not timed in rounds: {type(error).__name__}")
                continue
            ready.append((row, rounds, prepared, []))
        for turn in range(config.repeats):
            for number, (row, rounds, prepared, times) in enumerate(ready):
                if turn >= rounds:
                    continue
                done, total = turn * len(ready) + number, config.repeats * len(ready)
                progress(f"{length:,} tokens: round {turn + 1} of {config.repeats}", done, total)
                time.sleep(0.005)  # threads of the contestant before may still spin
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
    """Of Python and of what takes part."""
    found = {"python": platform.python_version(), "posjax": posjax.__version__}
    for package in ("jax", "jaxlib", "libtpu", "numpy", "tokamax", "torch", "x-transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@contextlib.contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """(what, done, of how many) on one line of the terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
