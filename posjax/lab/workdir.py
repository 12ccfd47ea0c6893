"""The folder of a run: the configuration and the facts stored in it, and which fields of the configuration may change.

<workdir>/config.json       the configuration, with which ``posjax train`` can start the same run elsewhere
<workdir>/run.json          digests of the data, the vocabulary, where user-defined encodings came from, and init_from's digest
<workdir>/tokenizer.json    the tokenizer, unless tokens are bytes
<workdir>/pretrained.json   of a run that starts from another library's checkpoint, its config.json
<workdir>/checkpoints/      absent in the workdir of a comparison, which has a workdir ENCODING/seed-N for every run
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posjax.data.tokenizers import KINDS
from posjax.encodings.spec import modules_of, slug
from posjax.files import DamagedFile, read_json, set_aside, write_atomically, write_json
from posjax.lab.config import PRETRAINED, Config
from posjax.lab.source import Source
from posjax.parallel.distributed import on_first_process
from posjax.storage import move, run_path
from posjax.training.checkpoints import Checkpoints
from posjax.training.schedule import num_decay_steps

CONFIG, FACTS, TOKENIZER = "config.json", "run.json", "tokenizer.json"

# Fields that do not change what a run computes.
_SAVING = {"workdir", "data_dir", "log_every", "checkpoint_every", "keep_checkpoints", "keep_last", "keep_every", "keep_best"}
_SAVING |= {"checkpoint_minutes", "loggers", "figure_format"}
RUN_ONLY = _SAVING | {"parallel", "mesh", "implementation", "remat", "scan_layers", "encodings"}
EVALUATION = {"eval_lengths", "eval_tokens", "evaluate_every"}  # what is measured, but not what is trained
_DATA = {"data", "validation_data", "include", "exclude", "text_key"}  # where the data come from; their digests say what they are
READING = RUN_ONLY | EVALUATION | _DATA  # what may differ when a run is read
_END = {"steps", "decay", "decay_steps", "end_fraction"}  # when the learning rate decays
# Newer fields: runs that started without them resume with their defaults.
_LATER = {"optimizer", "trainable", "z_loss", "ema_decay", "init_from", "from_pretrained", "decay_steps", *_DATA - {"data"}}
_RENAMED = {"keep_checkpoints": "keep_last"}


def run_fingerprint(config: Config) -> dict[str, Any]:
    """Returns the fields that identify the results of a run; newer fields are included only if they differ from the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config) if field.name in _LATER}
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in RUN_ONLY}
    return {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}


# Reading -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """Represents a run on disk.

    Attributes:
      path: the folder that holds its checkpoints.
      config: its configuration, with the run's encoding and seed, and ``path`` as workdir.
      facts: the content of run.json; empty if there is none.
    """

    path: Path
    config: Config
    facts: Mapping[str, Any]


def is_workdir(path: str) -> bool:
    """Returns whether a path is a folder with a stored configuration."""
    return bool(path) and (run_path(path) / CONFIG).is_file()


def read_config(path: Path) -> Config:
    """Reads a configuration from a workdir, or from a config.json, whose folder becomes its workdir.

    Raises:
      DamagedFile: the file does not hold the fields of a configuration.
      ValueError: a field has a value that this version of posjax does not accept.
    """
    file = path / CONFIG if path.is_dir() else path
    stored = read_json(file, "task", "encoding", "steps")
    known = {field.name for field in dataclasses.fields(Config)}
    fields = {name if name in known else _RENAMED.get(name, name): value for name, value in stored.items()}
    if unknown := [name for name in fields if name not in known | RUN_ONLY]:
        raise ValueError(f"{file} must hold fields of a configuration, got {', '.join(map(repr, unknown))}")
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if name in known}
    try:
        return Config(**plain | {"workdir": str(file.parent)})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_facts(workdir: Path) -> dict[str, Any]:
    """Returns the content of a workdir's run.json; empty if there is none, as in workdirs of posjax 0.2 and before."""
    try:
        return read_json(workdir / FACTS)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def stored_runs(workdir: str | Path, default: Config | None = None) -> list[StoredRun]:
    """Returns the runs in a workdir: one, or those of a comparison in its order.

    Args:
      workdir: a workdir of posjax train or posjax compare.
      default: the configuration of a run without a config.json; None: such a run is an error.

    Raises:
      ValueError: there are no checkpoints, or no configuration.
      DamagedFile: a stored file is damaged.
    """
    workdir = run_path(workdir)
    if (workdir / "checkpoints").is_dir():
        return [_stored_run(workdir, default)]
    found = [_stored_run(path, default) for path in _folders(workdir, 2) if (path / "checkpoints").is_dir()]
    if not found:
        hint = f"neither {workdir / 'checkpoints'} nor {workdir / 'ENCODING' / 'seed-N' / 'checkpoints'} exists"
        if any((path / "rows.json").exists() for path in _folders(workdir, 1)):
            hint = "the runs of an ablation are not stored one by one; posjax plot shows their results"
        raise ValueError(
            f"workdir must hold checkpoints, which posjax train and posjax compare write, got {str(workdir)!r}: {hint}"
        )
    above = read_config(workdir) if is_workdir(str(workdir)) else default
    order = list(above.encodings) if above else []

    def place(run: StoredRun) -> tuple[Any, ...]:
        spec = run.config.encoding
        return (order.index(spec) if spec in order else len(order), spec, run.config.seed)

    return sorted(found, key=place)


def _folders(path: Any, depth: int) -> list[Any]:
    """Returns the folders at a depth below a folder."""
    if not path.is_dir():
        return []
    inner = [entry for entry in path.iterdir() if entry.is_dir()]
    return inner if depth == 1 else [folder for entry in inner for folder in _folders(entry, depth - 1)]


def _stored_run(folder: Path, default: Config | None) -> StoredRun:
    above = folder.parent.parent
    if is_workdir(str(folder)):
        config = read_config(folder)
        return StoredRun(folder, config, read_facts(folder))
    # A comparison of posjax 0.2 stored one configuration for all of its runs.
    is_compared = folder.name.startswith("seed-") and folder.name[5:].isdecimal()
    if is_compared and is_workdir(str(above)):
        default = read_config(above)
    if default is None:
        raise ValueError(f"workdir must hold a {CONFIG}, which posjax train and posjax compare write, got {str(folder)!r}")
    if is_compared:
        specs = [spec for spec in (*default.encodings, default.encoding) if slug(spec) == folder.parent.name]
        if not specs:
            raise ValueError(f"workdir must be named after one of {default.encodings}, got {str(folder)!r}")
        default = dataclasses.replace(default, encoding=specs[0], seeds=(int(folder.name[5:]),))
    return StoredRun(folder, dataclasses.replace(default, workdir=str(folder)), read_facts(folder))


def choose_runs(
    config: Config, encodings: Iterable[str] | None = None, seeds: Iterable[int] | None = None
) -> list[tuple[StoredRun, Config]]:
    """Returns the runs in a configuration's workdir, each with the configuration to read it with.

    Args:
      config: the stored configuration, or another one of the same run, with any changes of fields that do not change the training.
      encodings, seeds: which runs of a comparison; None: all.

    Raises:
      ValueError: there is no such run, or a run was trained with another configuration (the message names the fields that differ).
    """
    runs = stored_runs(config.workdir, config)
    is_comparison = runs[0].path != run_path(config.workdir)
    wanted = None if encodings is None else {slug(spec) for spec in encodings}
    chosen = [
        run
        for run in runs
        if not is_comparison
        or ((wanted is None or slug(run.config.encoding) in wanted) and (seeds is None or run.config.seed in seeds))
    ]
    if not chosen:
        known = ", ".join(f"{run.config.encoding} with seed {run.config.seed}" for run in runs)
        raise ValueError(f"encoding and seeds must be those of a run in workdir {config.workdir}, which holds {known}")
    pairs = []
    for run in chosen:
        same = dict(encoding=run.config.encoding, seeds=run.config.seeds) if is_comparison else {}
        reading = dataclasses.replace(config, workdir=str(run.path), **same)
        _check_fields(run.config, reading, run_path(config.workdir), may_differ=_DATA)
        pairs.append((run, reading))
    return pairs


# Starting and resuming ---------------------------------------------------------------------------------------------------


def facts_of(config: Config, source: Source) -> dict[str, Any]:
    """Returns what run.json records about a run before it starts."""
    facts: dict[str, Any] = {"data": dict(source.digests), "vocab_size": source.vocab_size}
    folders = {}
    for name in sorted({name for spec in (config.encoding, *config.encodings) for name in modules_of(spec)}):
        module = sys.modules.get(name)
        if file := getattr(module, "__file__", None):
            is_package = Path(file).name == "__init__.py"
            folders[name] = str(Path(file).resolve().parents[name.count(".") + is_package])
    return facts | ({"imported_from": folders} if folders else {})


def check_workdir(config: Config, fixed: Iterable[str] = ()) -> None:
    """Checks a configuration against the one stored in its workdir, if there is one, before anything is opened or compiled.

    Args:
      config: the configuration.
      fixed: fields that must not change either, although they do not change the training.

    Raises:
      ValueError: the workdir belongs to a run with another configuration; the message names the fields that differ.
    """
    workdir = run_path(config.workdir)
    try:
        stored = read_config(workdir) if is_workdir(config.workdir) else None
    except DamagedFile:
        return  # init_or_check_workdir replaces it
    if stored is not None:
        may_differ = _DATA if read_facts_or_none(workdir) else set()
        _check_fields(stored, config, workdir, may_differ=may_differ | _END, fixed=fixed)
        _first_step_that_differs(stored, config, workdir)


def read_facts_or_none(workdir: Path) -> dict[str, Any] | None:
    try:
        return read_facts(workdir)
    except DamagedFile:
        return None


def init_or_check_workdir(config: Config, facts: Mapping[str, Any] | None = None, tokenizer: Path | None = None) -> Path:
    """Creates the workdir and stores the configuration in it, or checks an existing workdir against what is stored there.

    Fields that do not change the training may change, and are then stored anew. If the steps of a run with the schedule wsd
    change after its learning rate began to decay, its checkpoints from then on are moved to the workdir ``steps-N`` within
    this one. With several processes, only the first one does all this.

    Args:
      config: the configuration of the run.
      facts: ``facts_of`` the run; None: the data are not checked.
      tokenizer: file of the tokenizer, of which the workdir gets a copy.

    Raises:
      ValueError: the workdir belongs to a run with another configuration or other data (the message names the fields that differ),
        or cannot be created.
    """
    workdir = run_path(config.workdir)

    def init_or_check() -> None:
        stored = _read_or_set_aside(workdir)
        before = _facts_or_set_aside(workdir)
        if stored is not None:
            may_differ = _DATA if before.get("data") and facts else set()
            _check_fields(stored, config, workdir, may_differ=may_differ | _END)
            _check_data(before, facts or {}, workdir)
            _keep_aside(stored, config, workdir)
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if stored is None or dataclasses.asdict(stored) != dataclasses.asdict(config):
                write_json(workdir / CONFIG, dataclasses.asdict(config), indent=1)
            if config.from_pretrained and not (workdir / PRETRAINED).exists():
                write_json(workdir / PRETRAINED, dataclasses.asdict(config.pretrained), indent=1)
            if facts and {**before, **facts} != before:
                write_json(workdir / FACTS, {**before, **facts}, indent=1)
            if tokenizer is not None and not (workdir / TOKENIZER).exists():
                write_atomically(workdir / TOKENIZER, tokenizer.read_bytes())
        except OSError as error:
            raise ValueError(f"workdir must be a writable folder, got {config.workdir!r}: {error}") from None

    on_first_process(init_or_check)
    return workdir


def add_fact(workdir: Path, name: str, value: Any) -> None:
    """Adds an entry to a workdir's run.json."""
    on_first_process(lambda: write_json(workdir / FACTS, {**read_facts(workdir), name: value}, indent=1))


def _read_or_set_aside(workdir: Path) -> Config | None:
    """Returns the stored configuration; a damaged one is set aside and read from the newest intact checkpoint, if there is one."""
    if not (workdir / CONFIG).exists():
        return None
    try:
        return read_config(workdir)
    except DamagedFile as error:
        checkpoints = Checkpoints(workdir / "checkpoints")
        step = checkpoints.newest_good()
        set_aside(workdir / CONFIG, error)
        if step is None:
            return None
        write_json(workdir / CONFIG, checkpoints.config(step), indent=1)
        return read_config(workdir)


def _facts_or_set_aside(workdir: Path) -> dict[str, Any]:
    try:
        return read_facts(workdir)
    except DamagedFile as error:
        set_aside(workdir / FACTS, error)
        return {}


def _check_fields(stored: Config, config: Config, workdir: Path, may_differ: Iterable[str], fixed: Iterable[str] = ()) -> None:
    then, now = dataclasses.asdict(stored), dataclasses.asdict(config)
    free = {*RUN_ONLY, *EVALUATION, *may_differ} - {*fixed}
    if "data" in free and then["tokenizer"] not in KINDS and now["tokenizer"] not in KINDS:
        free.add("tokenizer")  # paths: the digests of the tokens say whether the files are the same
    if any(name not in free and then[name] != now[name] for name in now):
        differ = [name for name in now if name not in free - _END and then[name] != now[name]]
        changes = ", ".join(f"{name} is {then[name]!r} there and {now[name]!r} here" for name in differ)
        raise ValueError(
            f"workdir {workdir} belongs to a run with another configuration: {changes}; use another --workdir, or remove it to "
            "start over"
        )


def _check_data(before: Mapping[str, Any], facts: Mapping[str, Any], workdir: Path) -> None:
    then, now = before.get("data") or {}, facts.get("data") or {}
    for split, name in (("train", "training"), ("validation", "validation")):
        if split in then and split in now and then[split] != now[split]:
            raise ValueError(
                f"data: the {name} text differs from the one that the run in workdir {workdir} started with (its digest is "
                f"{now[split][:12]}, not {then[split][:12]}); restore that text, or use another --workdir"
            )


# The end of a run --------------------------------------------------------------------------------------------------------


def _stable_steps(config: Config) -> float | None:
    """Returns the number of steps that do not depend on the length of the run; None if all depend on it."""
    if config.decay == "constant":
        return math.inf
    return config.steps - num_decay_steps(config.steps, config.decay_steps) if config.decay == "wsd" else None


def milestones(config: Config) -> tuple[int, ...]:
    """Returns the steps whose checkpoints a run keeps, so that it can be extended."""
    steps = _stable_steps(config)
    return (int(steps),) if steps is not None and 0 < steps < config.steps else ()


def _first_step_that_differs(stored: Config, config: Config, workdir: Path) -> int | None:
    """Returns the step of the newest checkpoint that a run with other ``steps`` can resume from; None if any will do.

    Raises:
      ValueError: the run cannot be changed like this; the message says what would work.
    """
    then, now = ({name: getattr(one, name) for name in _END} for one in (stored, config))
    if then == now:
        return None
    differ = [name for name in ("steps", "decay", "decay_steps", "end_fraction") if then[name] != now[name]]
    changes = ", ".join(f"{name} is {then[name]!r} there and {now[name]!r} here" for name in differ)
    other = f"or start another run from this one with --init_from {workdir} and another --workdir"
    prefix = f"workdir {workdir} belongs to a run with another configuration: {changes}; "
    stable = [_stable_steps(one) for one in (stored, config)]
    if None in stable:
        decay = next(one.decay for one, steps in zip((stored, config), stable, strict=True) if steps is None)
        raise ValueError(
            f"{prefix}with decay={decay!r} every step depends on the number of steps; use another --workdir with "
            f"decay='constant' or 'wsd', which can be extended, {other}"
        )
    steps = Checkpoints(workdir / "checkpoints").steps()
    shared = min(stable)
    if not steps or steps[-1] <= min(shared, config.steps):
        return None
    good = [step for step in steps if step <= min(shared, config.steps)]
    if shared == math.inf or not good:
        where = f"from step {shared} on" if shared < math.inf else f"beyond step {config.steps}"
        raise ValueError(f"{prefix}its checkpoints, of steps {', '.join(map(str, steps))}, are all {where}; {other}")
    return good[-1]


def _keep_aside(stored: Config, config: Config, workdir: Path) -> None:
    """Moves the checkpoints after the last step that a changed run shares with the stored one to a workdir of their own."""
    last = _first_step_that_differs(stored, config, workdir)
    if last is None:
        return
    aside = workdir / f"steps-{stored.steps}"
    number = 1
    while aside.exists():
        number += 1
        aside = workdir / f"steps-{stored.steps}-{number}"
    (aside / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_json(aside / CONFIG, dataclasses.asdict(stored) | {"workdir": str(aside)}, indent=1)
    for name in (FACTS, TOKENIZER, "metrics.jsonl", "evaluation.json"):
        if (workdir / name).exists():
            write_atomically(aside / name, (workdir / name).read_bytes())
    (workdir / "evaluation.json").unlink(missing_ok=True)
    for path in sorted((workdir / "checkpoints").iterdir()):
        if path.name.isdecimal() and int(path.name) > last:
            move(path, aside / "checkpoints" / path.name)


def digest_of_arrays(named: Iterable[tuple[str, Any]]) -> str:
    """Returns a SHA-256 sum of named NumPy arrays: of their names, shapes, dtypes and bytes."""
    sums = hashlib.sha256()
    for name, array in named:
        sums.update(json.dumps([name, list(array.shape), str(array.dtype)]).encode())
        sums.update(array.tobytes())
    return sums.hexdigest()
