"""The folder of a run: its stored configuration, and which fields of it may change."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from posjax.lab.config import Config

# Fields that may change when a run is resumed; a change of any other field makes it a different run.
_SAVING = {"workdir", "data_dir", "log_every", "checkpoint_every", "keep_checkpoints"}
RUN_ONLY = _SAVING | {"parallel", "mesh", "implementation", "remat", "scan_layers", "encodings"}
_LATER = ("optimizer", "z_loss", "ema_decay")  # newer fields: runs that started without them resume with their defaults


def run_fingerprint(config: Config) -> dict[str, Any]:
    """Returns the fields that identify a run; fields in ``_LATER`` are included only if they differ from the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config) if field.name in _LATER}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in RUN_ONLY}
    return {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}


def init_or_check_workdir(config: Config) -> Path:
    """Creates the workdir and stores the config in it, or checks an existing workdir against the config stored there.

    With several processes, only the first one creates the workdir.

    Raises:
      ValueError: the workdir belongs to another configuration (the message names the fields that differ), or cannot be created.
    """
    workdir = Path(config.workdir)
    stored = workdir / "config.json"
    now, defaults = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (config, Config()))
    if stored.exists():
        try:
            before = defaults | dict(json.loads(stored.read_text()))  # a stored config may lack newer fields
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"workdir {workdir} has an unreadable config.json ({error}); remove that file or use another --workdir"
            ) from None
        differ = [name for name in now if name not in RUN_ONLY and before.get(name) != now[name]]
        if differ:
            changes = ", ".join(f"{name} is {before.get(name)!r} there and {now[name]!r} here" for name in differ)
            raise ValueError(
                f"workdir {workdir} belongs to a run with another configuration: {changes}; use another --workdir, or remove it to "
                "start over"
            )
        return workdir
    if jax.process_index() > 0:
        return workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        part = stored.with_suffix(".part")
        part.write_text(json.dumps(now, indent=1) + "\n")
        part.replace(stored)
    except OSError as error:
        raise ValueError(f"workdir must be a writable folder, got {config.workdir!r}: {error}") from None
    return workdir
