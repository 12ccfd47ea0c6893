"""Checkpoints that are restored intact or not at all: Orbax writes them, and a manifest of SHA-256 sums detects damage.

    <directory>/<step>/               one finished checkpoint, readable by Orbax alone
        state/ _CHECKPOINT_METADATA   Orbax's files; the latter holds the iterator's state and the config as `custom_metadata`
        evaluation.json               the evaluation at this step, if there was one
        manifest.json                 {file: {"bytes": size, "sha256": sum}} of every other file of the step
    <directory>/saving/               a save in progress; renamed to <step> atomically once its manifest is written

A folder named after a step is therefore always complete. A process that is killed at any moment leaves at most a `saving` folder
behind, which the next save removes. A bucket has no atomic rename: there, `saving` is a local temporary folder whose files are
uploaded, the manifest last, and a step without a manifest does not exist.

Saving is asynchronous: `save_async` returns once the state is copied to the host, and threads do the rest.
"""

import base64
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posjax.checks import checked, require
from posjax.parallel.distributed import barrier
from posjax.storage import download, files_in, is_bucket, remove, run_path, upload, with_retries

MANIFEST = "manifest.json"
EVALUATION = "evaluation.json"
SAVING = "saving"
METADATA = "_CHECKPOINT_METADATA"
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"


_numbers = itertools.count()  # barriers of different folders need different names; all processes create them in the same order


class CheckpointError(RuntimeError):
    """Raised when there are checkpoints but none can be used. The message gives the reasons."""


class SaveError(RuntimeError):
    """Raised when a checkpoint could not be written, for example to a full disk. Older checkpoints are untouched."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """Holds a checkpoint restored by `restore_latest`.

    Attributes:
      step: the step at which it was saved.
      state: a pytree with the shapes, dtypes and shardings of the abstract state.
      data_state: the data state passed to `save`: bytes, or a JSON value.
      config: the config passed to `save`, a JSON value.
    """

    step: int
    state: Any
    data_state: Any
    config: Any


class Checkpoints:
    """Saves and restores the checkpoints of one run.

    With several processes, all of them must make the same calls on the same shared directory.

    Args:
      directory: directory of the checkpoints, on a disk or in a bucket, created by the first save.
      keep_last: number of the newest intact checkpoints to keep. Others are removed once a newer one has been verified, unless one
        of the following keeps them.
      keep_every: keeps the checkpoints of all steps that this number divides. None keeps none for this reason.
      keep_best: number of checkpoints with the lowest evaluation loss to keep, among those saved with one.
      keep_steps: steps whose checkpoints are kept.

    Raises:
      ValueError: keep_last or keep_every is below 1, or keep_best is below 0; or the directory is in a bucket and there are several
        processes.
    """

    @checked(
        keep_last=dict(least=1, what="be at least 1"),
        keep_every=dict(least=1, what="be at least 1, or None"),
        keep_best=dict(least=0, what="be at least 0"),
    )
    def __init__(
        self,
        directory: str | os.PathLike,
        keep_last: int = 3,
        *,
        keep_every: int | None = None,
        keep_best: int = 0,
        keep_steps: Collection[int] = frozenset(),
    ):
        # Not imported in the first save, because importing Orbax clears JAX's compiled programs: the step would compile twice.
        require("a folder of checkpoints", "orbax")
        from orbax.checkpoint import v1  # noqa: F401

        self.directory = run_path(directory)
        if is_bucket(directory) and jax.process_count() > 1:
            raise ValueError(
                "workdir must be on a disk that all processes share (a bucket can be mounted as one), got "
                f"{os.fspath(directory)!r} and {jax.process_count()} processes"
            )
        if not is_bucket(directory):
            self.directory = self.directory.absolute()
        self.keep_last, self.keep_every, self.keep_best, self.keep_steps = keep_last, keep_every, keep_best, frozenset(keep_steps)
        self._barriers, self._saves = f"posjax/checkpoints/{next(_numbers)}", itertools.count()
        self._pending: concurrent.futures.Future[None] | None = None
        self._scratch: tempfile.TemporaryDirectory | None = None

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, intact or damaged, in ascending order."""
        if is_bucket(self.directory):
            return sorted(int(path.name) for path in _entries(self.directory) if with_retries((path / MANIFEST).exists))
        return sorted(int(path.name) for path in _entries(self.directory) if path.is_dir())

    def damage(self, step: int) -> str | None:
        """Describes the first damaged file of a checkpoint, or returns None if all files are intact."""
        return _damage(self._local(step))

    def newest_good(self) -> int | None:
        """Returns the newest step with an intact checkpoint, or None."""
        return next((step for step in reversed(self.steps()) if self.damage(step) is None), None)

    def config(self, step: int) -> Any:
        """Returns the config that was saved with a checkpoint."""
        from orbax.checkpoint import v1 as ocp

        return ocp.checkpointables_metadata(self._local(step)).custom_metadata["config"]

    def save(self, step: int, state: Any, data_state: Any = None, config: Any = None, **options: Any) -> None:
        """Saves a checkpoint and blocks until everything is on disk; see `save_async`.

        Raises:
          SaveError: it could not be written.
        """
        self.save_async(step, state, data_state, config, **options)
        self.wait()

    def save_async(
        self,
        step: int,
        state: Any,
        data_state: Any = None,
        config: Any = None,
        *,
        prune: bool = True,
        evaluation: Mapping[str, float | None] | None = None,
    ) -> None:
        """Begins to write a checkpoint, and returns once the state is copied: its buffers may then be donated.

        Threads write it, read it back to verify it, and then remove those that need not be kept. If verification fails, they warn
        and remove none. A checkpoint of the same step is replaced, but only after the new one has been written. Waits for the
        previous save to end.

        Args:
          step: the step, which names the checkpoint.
          state: a pytree of JAX arrays, which may include typed PRNG keys.
          data_state: position of the data iterator, bytes or a JSON value. Each process passes its own. If all pass the same value,
            any number of processes can resume from the checkpoint.
          config: a JSON value that is stored for readers of the checkpoint.
          prune: whether to verify the new checkpoint and remove older ones.
          evaluation: numbers of an evaluation of this state by name; `keep_best` compares the one named "loss".

        Raises:
          SaveError: it could not be written (or, if it is raised later by `wait`, could not be finished).
        """
        from orbax.checkpoint import v1 as ocp

        self.wait()
        metadata = {"data_states": _distinct(_gather(_encode(data_state))), "config": config, "leaves": _describe(state)}
        names = f"{self._barriers}/{next(self._saves)}"
        try:
            saving = self._begin()
            barrier(f"{names}/begin")
            response = ocp.save_checkpointables_async(
                saving / str(step), {"state": state}, overwrite=True, custom_metadata=metadata
            )
        except Exception as error:  # OSError, or that of TensorStore
            raise SaveError(_reason(error)) from error
        self._pending = concurrent.futures.Future()

        def finish(pending: concurrent.futures.Future[None]) -> None:
            try:
                response.result()
                barrier(f"{names}/written")
                if jax.process_index() == 0:
                    self._commit(saving / str(step), evaluation, prune)
                barrier(f"{names}/end")
                pending.set_result(None)
            except BaseException as error:
                if jax.process_index() == 0:
                    shutil.rmtree(saving, ignore_errors=True)  # a full disk needs the space
                pending.set_exception(error)

        # A daemon, unlike the threads of an executor: the process may end although a disk does not respond.
        threading.Thread(target=finish, args=(self._pending,), name="posjax_checkpoint", daemon=True).start()

    @property
    def is_saving(self) -> bool:
        """Whether a save is in progress. One that has ended must still be waited for to learn whether it succeeded."""
        return self._pending is not None and not self._pending.done()

    def wait(self, timeout: float | None = None) -> None:
        """Waits for the save in progress, if there is one.

        Args:
          timeout: seconds to wait at most; None waits as long as it takes.

        Raises:
          SaveError: the checkpoint could not be written.
          TimeoutError: it takes longer than the timeout.
        """
        if self._pending is None:
            return
        done, _ = concurrent.futures.wait([self._pending], timeout)
        if not done:
            raise TimeoutError(f"a checkpoint in {self.directory} is still being written")
        pending, self._pending = self._pending, None
        if (error := pending.exception()) is not None:
            raise SaveError(_reason(error)) from error

    def restore_latest(self, abstract_state: Any) -> Restored | None:
        """Restores the newest intact checkpoint.

        Damaged checkpoints are skipped with a warning that names the file and the damage, and are left in place.

        Args:
          abstract_state: a pytree of arrays or `jax.ShapeDtypeStruct`. Their shapes and dtypes must match the saved ones. Their
            shardings determine where the state is placed (any number of devices; without a sharding, the first local device).

        Returns:
          The checkpoint, or None if the directory has none.

        Raises:
          CheckpointError: there are checkpoints, but all are damaged; or the newest intact one holds a different state, in which
            case the message names the first leaf that differs, with both shapes and dtypes.
        """
        steps, reasons, good = self.steps(), [], -1
        if jax.process_index() == 0:
            for step in reversed(steps):
                if (reason := self.damage(step)) is None:
                    good = step
                    break
                reasons.append(f"checkpoint {step} in {self.directory} is damaged: {reason}")
                warnings.warn(f"{reasons[-1]}; trying an older one", stacklevel=2)
        good, count = (int(number) for number in from_first_process(np.array([good, len(steps)])))
        if not count:
            return None
        if good < 0:
            raise CheckpointError(
                "\n".join([f"none of the {count} checkpoints in {self.directory} can be used", *reasons])
                + "\nMove them away to start over."
            )
        return self._load(good, abstract_state)

    def _load(self, step: int, abstract_state: Any) -> Restored:
        from orbax.checkpoint import v1 as ocp

        path = self._local(step)
        metadata = ocp.checkpointables_metadata(path).custom_metadata
        _check_same(metadata["leaves"], _describe(abstract_state), path)
        data_state = _local_data_state(metadata["data_states"], path)
        abstract_state = jax.tree.map(_abstract, abstract_state)
        state = ocp.load_checkpointables(path, {"state": abstract_state})["state"]
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None
        return Restored(step, state, _decode(data_state), metadata["config"])

    def _local(self, step: int) -> Path:
        """Returns the folder of a checkpoint; that of a bucket is downloaded, unless this object has it already."""
        if not is_bucket(self.directory):
            return self.directory / str(step)
        self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="posjax-")
        folder = Path(self._scratch.name) / str(step)
        if not folder.exists():
            download(self.directory / str(step), folder)
        return folder

    def _begin(self) -> Path:
        """Removes the files that an interrupted save left behind, but never a folder named after a step; returns `saving`."""
        if is_bucket(self.directory):
            return Path(tempfile.mkdtemp(prefix="posjax-"))
        saving = self.directory / SAVING
        if jax.process_index() == 0:
            if self.directory.is_dir():
                for path in self.directory.iterdir():
                    if path.name == SAVING or ORBAX_TEMPORARY in path.name:
                        shutil.rmtree(path, ignore_errors=True)
            saving.mkdir(parents=True, exist_ok=True)
        return saving

    def _commit(self, written: Path, evaluation: Mapping[str, float | None] | None, prune: bool) -> None:
        """Turns the files that Orbax wrote into a checkpoint, verifies it, and removes older ones."""
        step = int(written.name)
        if evaluation is not None:
            (written / EVALUATION).write_text(json.dumps(dict(evaluation)))
        _write_manifest(written)
        if is_bucket(self.directory):
            reason = self._upload(written)
        else:
            self._move_in_place(written)
            reason = self.damage(step) if prune else None
        if reason is not None:
            text = f"checkpoint {step} in {self.directory} is damaged although it was just written: {reason}; older ones are kept"
            warnings.warn(text, stacklevel=2)
        elif prune:
            self._prune()

    def _move_in_place(self, written: Path) -> None:
        place = self.directory / written.name
        if place.exists():  # the old one is damaged, or the run was restarted from an earlier step
            os.replace(place, self.directory / SAVING / "replaced")
        os.replace(written, place)
        _sync(self.directory)
        shutil.rmtree(self.directory / SAVING)

    def _upload(self, written: Path) -> str | None:
        """Uploads a checkpoint, the manifest last, after the files of an older one of the same step are gone."""
        reason, place = _damage(written), self.directory / written.name
        if reason is None:
            if place.exists():
                with_retries((place / MANIFEST).unlink, missing_ok=True)
                remove(place)
            files = _files(written)
            for name, path in files.items():
                upload(path, place / name)
            upload(written / MANIFEST, place / MANIFEST)
        shutil.rmtree(written.parent, ignore_errors=True)
        return reason

    def _prune(self) -> None:
        # Checking names and sizes is enough here, because the newest checkpoint was just verified in full and is never removed.
        steps = self.steps()
        bucket = is_bucket(self.directory)
        good = steps if bucket else [step for step in steps if _damage(self.directory / str(step), read=False) is None]
        losses = {step: self._loss(step) for step in good} if self.keep_best else {}
        for step in set(steps) - self._kept(good, {step: loss for step, loss in losses.items() if loss is not None}):
            if bucket:  # first, so that a checkpoint that is half removed does not exist
                with_retries((self.directory / str(step) / MANIFEST).unlink, missing_ok=True)
            remove(self.directory / str(step))

    def _kept(self, good: list[int], losses: Mapping[int, float]) -> set[int]:
        """Returns the steps to keep: of the intact checkpoints `good`, and every damaged one newer than the oldest of the last."""
        last = good[-self.keep_last :]
        best = sorted(losses, key=lambda step: (losses[step], -step))[: self.keep_best]
        every = [step for step in good if self.keep_every and step % self.keep_every == 0]
        return {*last, *best, *every, *self.keep_steps, *(step for step in self.steps() if step > last[0])}

    def _loss(self, step: int) -> float | None:
        """Returns the evaluation loss that was saved with a checkpoint, or None."""
        path = self.directory / str(step) / EVALUATION
        try:
            loss = json.loads(with_retries(path.read_text))["loss"] if with_retries(path.exists) else None
        except (ValueError, KeyError, TypeError):
            return None
        return loss if loss is not None and math.isfinite(loss) else None


def _entries(directory: Any) -> list[Any]:
    """Returns the paths in a directory that are named after steps."""
    paths = with_retries(lambda: list(directory.iterdir()) if directory.is_dir() else [])
    return [path for path in paths if path.name.isdecimal()]


def _reason(error: BaseException) -> str:
    """Returns the part of an error in writing that a user needs."""
    text = f"{type(error).__name__}: {error}"
    known = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied", "Input/output error")
    return next((words for words in known if words in text), text.split("\n")[0][:300])


def _files(folder: Path) -> dict[str, Path]:
    return {name: path for name, path in files_in(folder).items() if name != MANIFEST}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    entries = {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(folder).items()}
    for path in _files(folder).values():
        _sync(path)
    with (folder / MANIFEST).open("w") as file:
        json.dump(entries, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(folder)


def _sync(path: Path) -> None:
    """Flushes a file or folder to disk, so that after a power cut no rename survives without the data that it refers to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damage(folder: Path, read: bool = True) -> str | None:
    """Describes the first damaged file in `folder`, or returns None. With read=False, checks only names and sizes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        entries = [(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    files, listed = _files(folder), {name for name, _, _ in entries}
    if unlisted := [name for name in files if name not in listed]:
        return f"{unlisted[0]} is not listed in {MANIFEST}"
    if METADATA not in listed or not any(name.startswith("state/") for name in listed):
        return f"{MANIFEST} lists no state"
    for name, size, digest in entries:
        if name not in files:
            return f"{name} is missing"
        if (actual := files[name].stat().st_size) != size:
            return f"{name} has {actual} bytes instead of {size}"
        if read and _sha256(files[name]) != digest:
            return f"{name} has changed since it was written (SHA-256 differs)"
    return None


def _describe(state: Any) -> dict[str, list]:
    """Returns {path of a leaf: [shape, dtype]} in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


def _check_same(saved: dict[str, list], expected: dict[str, list], path: Path) -> None:
    def describe(leaf):
        return "is absent" if leaf is None else f"has shape {tuple(leaf[0])} and dtype {leaf[1]}"

    for name in [*expected, *(name for name in saved if name not in expected)]:
        there, here = saved.get(name), expected.get(name)
        if there != here:
            raise CheckpointError(
                f"checkpoint {path} belongs to another model or optimizer: {name} {describe(there)} there, "
                f"but {describe(here)} in this run. Use another directory, or the config of that checkpoint."
            )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding, Orbax warns and uses the devices of the run that saved the checkpoint.
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _distinct(data_states: list[Any]) -> list[Any]:
    """Reduces equal data states to one. They are equal if the processes read different rows of the same batches."""
    return data_states[:1] if all(state == data_states[0] for state in data_states) else data_states


def _local_data_state(data_states: list[Any], path: Path) -> Any:
    """Returns this process's data state from those of the processes that saved the checkpoint."""
    data_states = _distinct(data_states)
    if len(data_states) == 1:
        return data_states[0]
    if len(data_states) != jax.process_count():
        raise CheckpointError(
            f"checkpoint {path} was saved by {len(data_states)} processes at different positions in their data, so that "
            f"{jax.process_count()} cannot resume from it; start {len(data_states)} processes"
        )
    return data_states[jax.process_index()]


def _encode(data_state: Any) -> Any:
    if isinstance(data_state, bytes):
        return {"base64": base64.b64encode(data_state).decode()}
    return {"json": data_state}


def _decode(entry: dict[str, Any]) -> Any:
    return base64.b64decode(entry["base64"]) if "base64" in entry else entry["json"]


def _gather(value: Any) -> list[Any]:
    """Gathers a JSON value from every process and returns the list, in the order of the processes, on all of them."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(np.max(multihost_utils.process_allgather(np.int32(text.size))))
    padded = np.pad(text, (0, size - text.size), constant_values=ord(" "))
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def from_first_process(array: np.ndarray) -> np.ndarray:
    """Returns the array of the first process in all of them."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(array)
