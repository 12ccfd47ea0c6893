"""Where the metrics of a run go: metrics.jsonl always, and TensorBoard, a CSV file or Weights & Biases as chosen.

A writer is an object with `write(step, metrics)` and `close()`. Those of files write to a local folder. For a run in a bucket, this
is a temporary folder whose files are uploaded every half minute and at the end, because a bucket has no append.
"""

import contextlib
import csv
import json
import math
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from posjax.checks import check_one_of, printable, require
from posjax.storage import files_in, is_bucket, upload, with_retries

METRICS = "metrics.jsonl"
LOGGERS = ("tensorboard", "csv", "wandb")
UPLOAD_EVERY_S = 30.0


class Writer(Protocol):
    """Receives the metrics of a run."""

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Writes the numbers of one step; None stands for a number that is not finite."""

    def close(self) -> None:
        """Writes what is buffered and releases the files."""


class JsonLines:
    """Appends a JSON object per step to `metrics.jsonl`. Lines after `step`, of a run that is resumed there, are removed first."""

    def __init__(self, folder: Path, step: int):
        forget_after(folder / METRICS, step)
        self._path, self._waiting = folder / METRICS, b""
        self._file = self._path.open("ab", buffering=0)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._waiting += json.dumps({"step": step, **metrics}, allow_nan=False).encode() + b"\n"
        while self._waiting:  # a full disk may take a part of the bytes, and the rest later
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self) -> None:
        self._file.close()


class Csv:
    """Writes `metrics.csv`, a table with a row per step; a new column rewrites the file."""

    def __init__(self, folder: Path, step: int):
        self._path, self._columns, self._rows = folder / "metrics.csv", ["step"], []
        if self._path.exists():
            with self._path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]
            self._rows = [row for row in rows if int(row["step"]) <= step]
            self._columns = list(dict.fromkeys(["step", *(name for row in self._rows for name in row)]))
        self._rewrite()

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        row = {"step": step, **{name: "" if value is None else value for name, value in metrics.items()}}
        self._rows.append(row)
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite()
            return
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _rewrite(self) -> None:
        part = self._path.with_suffix(".part")
        with part.open("w", newline="") as file:
            table = csv.DictWriter(file, self._columns, restval="")
            table.writeheader()
            table.writerows(self._rows)
        os.replace(part, self._path)

    def close(self) -> None: ...


class TensorBoard:
    """Writes TensorBoard events; those after `step` of an interrupted run are hidden."""

    def __init__(self, folder: Path, step: int):
        require("training", "tensorboardX")
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class WandB:
    """Sends metrics to Weights & Biases, one run per workdir, which a resumed run continues."""

    def __init__(self, folder: Path, workdir: str, config: Any):
        require("loggers=('wandb',)", "wandb")
        import wandb

        identity = folder / "wandb-run.txt"
        known = identity.read_text().strip() if identity.exists() else None
        self._run = wandb.init(dir=str(folder), name=workdir, config=config, id=known, resume="allow")
        identity.write_text(self._run.id)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()


class Writers:
    """Writes metrics to `metrics.jsonl` and to all chosen loggers.

    An error of one of them while training, such as a full disk, costs lines and a warning, not the run. `metrics.jsonl` gets the
    lines later if it can.

    Args:
      workdir: folder of the run, created if it does not exist, or a path in a bucket.
      step: the step at which the run resumes; metrics of later steps are removed.
      loggers: a choice of LOGGERS.
      config: a JSON value that Weights & Biases stores.

    Raises:
      OSError: the files cannot be opened.
      ModuleNotFoundError: a logger needs a package that is not installed.
    """

    def __init__(self, workdir: Any, step: int, loggers: tuple[str, ...] = ("tensorboard",), config: Any = None):
        for name in loggers:
            check_one_of("loggers", name, LOGGERS)
        self._bucket, self._uploaded, self._due = None, {}, time.monotonic() + UPLOAD_EVERY_S
        folder = workdir
        if is_bucket(workdir):
            self._bucket, folder = workdir, Path(tempfile.mkdtemp(prefix="posjax-"))
            for name in (METRICS, "metrics.csv", "wandb-run.txt"):
                if with_retries((workdir / name).exists):
                    (folder / name).write_bytes(with_retries((workdir / name).read_bytes))
        else:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        makers: dict[str, Callable[[], Writer]] = {
            "tensorboard": lambda: TensorBoard(folder, step),
            "csv": lambda: Csv(folder, step),
            "wandb": lambda: WandB(folder, str(workdir), config),
        }
        self._writers: dict[str, Writer] = {METRICS: JsonLines(folder, step)}
        self._writers |= {name: makers[name]() for name in dict.fromkeys(loggers)}
        self._failed: set[str] = set()

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name in self._writers:
            self._attempt(name, self._writers[name].write, step, metrics)
        if self._bucket is not None and time.monotonic() >= self._due:
            self._attempt("the upload of metrics", self._upload)
            self._due = time.monotonic() + UPLOAD_EVERY_S

    def close(self) -> None:
        for name, writer in self._writers.items():
            self._attempt(name, writer.close)
        if self._bucket is not None:
            self._attempt("the upload of metrics", self._upload)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _attempt(self, name: str, function: Callable[..., None], *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:  # each logger raises its own
            if name not in self._failed:
                warnings.warn(f"{name} has failed ({error}); training goes on", stacklevel=3)
            self._failed.add(name)

    def _upload(self) -> None:
        for name, path in files_in(self._folder).items():
            size = path.stat().st_size
            if self._uploaded.get(name) != size:
                upload(path, self._bucket / name)
                self._uploaded[name] = size


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


def read_metrics(workdir: Any) -> list[dict[str, Any]]:
    """Returns the lines of a run's `metrics.jsonl`, without malformed ones; [] if there is no such file."""
    path = workdir / METRICS
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if _line_step(line) < math.inf]


def json_number(value: Any) -> float | None:
    """Returns the value as a float, or None if it is NaN or infinite, which JSON cannot represent."""
    return None if value is None or not math.isfinite(value) else float(value)


def printed(text: str) -> None:
    """Prints a line; a terminal or reader that is gone is no error."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text), flush=True)
