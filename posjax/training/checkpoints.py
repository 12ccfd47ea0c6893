"""Checkpoints that are restored intact or not at all: Orbax writes them, and a manifest of SHA-256 sums detects damage.

    <directory>/<step>/               one finished checkpoint, readable by Orbax alone
        state/ _CHECKPOINT_METADATA   Orbax's files; the latter holds the iterator's state and the config as `custom_metadata`
        manifest.json                 {file: {"bytes": size, "sha256": sum}} of every other file of the step
    <directory>/saving/               a save in progress; renamed to <step> atomically once its manifest is written

A folder named after a step is therefore always complete. A process that is killed at any moment leaves at most a `saving` folder
behind, which the next save removes.
"""

import base64
import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posjax.checks import check, require

MANIFEST = "manifest.json"
SAVING = "saving"
ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"


class CheckpointError(RuntimeError):
    """Raised when there are checkpoints but none can be used. The message gives the reasons."""


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
      directory: directory of the checkpoints, created by the first save.
      keep: number of the newest intact checkpoints to keep. Older ones are removed once a newer one has been verified.
      keep_steps: steps whose checkpoints are never removed.

    Raises:
      ValueError: keep is below 1.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3, keep_steps: Sequence[int] = ()):
        check("keep", keep, int, least=1, what="be at least 1")
        # Not imported in the first save, because importing Orbax clears JAX's compiled programs: the step would compile twice.
        require("a folder of checkpoints", "orbax")
        from orbax.checkpoint import v1  # noqa: F401

        self.directory = Path(directory).absolute()
        self.keep, self.keep_steps = keep, keep_steps

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, intact or damaged, in ascending order."""
        if not self.directory.is_dir():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal() and path.is_dir())

    def damage(self, step: int) -> str | None:
        """Describes the first damaged file of a checkpoint, or returns None if all files are intact."""
        return _damage(self.directory / str(step))

    def newest_good(self) -> int | None:
        """Returns the newest step with an intact checkpoint, or None."""
        return next((step for step in reversed(self.steps()) if self.damage(step) is None), None)

    def save(self, step: int, state: Any, data_state: Any = None, config: Any = None, *, prune: bool = True) -> None:
        """Writes a checkpoint, reads it back to verify it, and then removes those older than the `keep` newest intact ones.

        If verification fails, warns and removes none. Blocks until everything is on disk. A checkpoint of the same step is
        replaced, but only after the new one has been written.

        Args:
          step: the step, which names the checkpoint.
          state: a pytree of JAX arrays, which may include typed PRNG keys.
          data_state: position of the data iterator, bytes or a JSON value. Each process passes its own. If all pass the same value,
            any number of processes can resume from the checkpoint.
          config: a JSON value that is stored for readers of the checkpoint.
          prune: whether to verify the new checkpoint and remove older ones.
        """
        from orbax.checkpoint import v1 as ocp

        saving = self.directory / SAVING
        metadata = {"data_states": _distinct(_gather(_encode(data_state))), "config": config, "leaves": _describe(state)}
        if jax.process_index() == 0:
            self._clear_leftovers()
            saving.mkdir(parents=True)
        _barrier("posjax_save_begin")
        with ocp.training.Checkpointer(saving) as checkpointer:
            checkpointer.save_checkpointables(step, {"state": state}, force=True, custom_metadata=metadata)
        _barrier("posjax_save_written")
        if jax.process_index() == 0:
            _write_manifest(saving / str(step))
            self._move_in_place(saving / str(step))
            if prune and (reason := self.damage(step)) is None:
                self._prune()
            elif prune:
                text = (
                    f"checkpoint {step} in {self.directory} is damaged although it was just written: {reason}; older ones are kept"
                )
                warnings.warn(text, stacklevel=2)
        _barrier("posjax_save_end")

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
                reason = self.damage(step)
                if reason is None:
                    good = step
                    break
                reasons.append(f"checkpoint {step} in {self.directory} is damaged: {reason}")
                warnings.warn(f"{reasons[-1]}; trying an older one", stacklevel=2)
        good, count = (int(number) for number in _from_first_process(np.array([good, len(steps)])))
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

        path = self.directory / str(step)
        metadata = ocp.checkpointables_metadata(path).custom_metadata
        _check_same(metadata["leaves"], _describe(abstract_state), path)
        data_state = _local_data_state(metadata["data_states"], path)
        abstract_state = jax.tree.map(_abstract, abstract_state)
        state = ocp.load_checkpointables(path, {"state": abstract_state})["state"]
        return Restored(step, state, _decode(data_state), metadata["config"])

    def _clear_leftovers(self) -> None:
        """Removes the files that an interrupted save left behind. Never removes a folder named after a step."""
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                if path.name == SAVING or ORBAX_TEMPORARY in path.name:
                    shutil.rmtree(path, ignore_errors=True)

    def _move_in_place(self, written: Path) -> None:
        place = self.directory / written.name
        if place.exists():  # the old one is damaged, or the run was restarted from an earlier step
            os.replace(place, self.directory / SAVING / "replaced")
        os.replace(written, place)
        _sync(self.directory)
        shutil.rmtree(self.directory / SAVING)

    def _prune(self) -> None:
        # Checking names and sizes is enough here, because the newest checkpoint was just verified in full and is never removed.
        steps = self.steps()
        good = [step for step in steps if _damage(self.directory / str(step), read=False) is None]
        for step in steps:
            if step < good[-self.keep :][0] and step not in self.keep_steps:
                shutil.rmtree(self.directory / str(step))


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): path for path in paths}


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
    files = _files(folder)
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


def _from_first_process(array: np.ndarray) -> np.ndarray:
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(array)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
