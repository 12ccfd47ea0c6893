"""Tables of the reference: the command line, the configurations, where each encoding runs, and the log of hardware."""

import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import api

import examples
from posjax.core.encoding import PositionalEncoding
from posjax.encodings.spec import spec_of
from posjax.testing import where_it_runs

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Returns a Markdown table; ``align`` has a letter for each column, l, c or r."""
    marks = {"l": "---", "c": ":-:", "r": "---:"}
    rule = [marks[letter] for letter in align.ljust(len(heads), "l")]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (heads, rule, *rows)) + "\n"


# The command line ----------------------------------------------------------------------------------------------------------------


class _Parsed(BaseException):
    """Ends a command as soon as it parses its flags."""


def parsed_classes(argv: Sequence[str]) -> tuple[type, Any]:
    """Returns the dataclass that a command parses its flags into, and the instance with their defaults, None if there is none."""
    from posjax import cli

    def capture(cls: type, *, default: Any = None, **_: Any) -> typing.NoReturn:
        raise _Parsed(cls, default)

    with mock.patch("tyro.cli", capture):
        try:
            cli._run(list(argv))
        except _Parsed as parsed:
            return parsed.args
    raise RuntimeError(f"posjax {' '.join(argv)} did not parse its flags with tyro")


@dataclasses.dataclass(frozen=True)
class Flag:
    """Describes a flag of a command.

    Attributes:
      name: its field.
      values: what it takes, such as "int" or "a | b".
      default: its default, as text.
      about: its description.
    """

    name: str
    values: str
    default: str
    about: str


def flags_of(options: type, default: Any = None) -> list[Flag]:
    """Returns the flags of a dataclass, with the defaults of an instance."""
    about = dict(api.items(api.sections(inspect.getdoc(options) or "").get("Attributes", "")))
    hints = typing.get_type_hints(options, include_extras=True)
    found = []
    for field in dataclasses.fields(options):
        value = field.default if default is None else getattr(default, field.name)
        found.append(Flag(field.name, _values(hints[field.name]), _default(value), about[field.name]))
    return found


def _values(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return "" if "Counter" in repr(hint) else _values(args[0])
    if origin is typing.Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"{_values(args[0])} ..."
    if origin in (types.UnionType, typing.Union):
        return " | ".join(dict.fromkeys("none" if arg is type(None) else _values(arg) for arg in args if inspect.isclass(arg)))
    return {"str": "text", "PositionalEncoding": "text", "bool": "true | false"}.get(hint.__name__, hint.__name__)


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f'"{x}"' if " " in str(x) else str(x) for x in value)
    return "" if value is dataclasses.MISSING else str(value)


def _options(flags: Sequence[Flag], program: str) -> str:
    lines = ["````{eval-rst}", f".. program:: {program}", ""]
    for flag in flags:
        values = f" <{flag.values}>" if flag.values else ""
        default = f" Default: ``{flag.default}``." if flag.default not in ("", "None") else ""
        about = re.sub(r"([*|_`\\])", r"\\\1", flag.about)
        lines += [f".. option:: --{flag.name}{values}", "", f"   {about[0].upper()}{about[1:].rstrip('.')}.{default}", ""]
    return "\n".join([*lines, "````", ""])


@functools.cache
def commands() -> dict[str, list[Flag]]:
    """Returns the flags of every command but those of a configuration, {"train": [], "bench attention": [...]}."""
    from posjax import cli
    from posjax.cli.bench import BENCHMARKS

    found: dict[str, list[Flag]] = {}
    for verb in cli.VERBS:
        if verb == "list":
            found[verb] = []
        elif verb == "bench":
            for name in BENCHMARKS:
                found[f"bench {name}"] = flags_of(*parsed_classes(["bench", name]))
        else:
            cls, default = parsed_classes([verb, "--help"])
            if cls.__name__ == "Both":
                own, _ = (field.type for field in dataclasses.fields(cls))
                found[verb] = flags_of(own)
            else:
                found[verb] = [] if cls.__name__ == "Config" else flags_of(cls, default)
    return found


def usage() -> str:
    """Returns the usage of ``posjax --help``."""
    from posjax import cli

    return f"```text\n{cli.USAGE.rstrip()}\n```\n"


def verbs() -> str:
    """Returns a section for every command, with its own flags."""
    from posjax import cli
    from posjax.cli.bench import BENCHMARKS

    parts = []
    for name, flags in commands().items():
        verb = name.split()[0]
        if name.startswith("bench "):
            about = BENCHMARKS[name.removeprefix("bench ")]
        else:
            line = next(line for line in cli.USAGE.splitlines() if line.startswith(f"  {verb} "))
            about = line.split(maxsplit=1)[1]
        parts.append(f"## posjax {name}\n\n{about[0].upper()}{about[1:].rstrip('.')}.\n")
        parts.append(_options(flags, f"posjax {name}") if flags else "It has no flags of its own.\n")
    return "\n".join(parts)


def fields() -> str:
    """Returns the fields of a configuration, which are flags of most commands."""
    from posjax.lab.config import Config

    return _options(flags_of(Config), "posjax")


def configs() -> str:
    """Returns a section for every named configuration: what it is, and the fields that differ from their defaults."""
    from posjax.lab import named_configs
    from posjax.lab.config import Config, load_config

    parts = []
    for name, path in named_configs().items():
        config = load_config(name)
        doc = inspect.cleandoc(re.match(r'"""(.*?)"""', path.read_text(), re.DOTALL)[1])
        rows = []
        for field in dataclasses.fields(Config):
            value = getattr(config, field.name)
            if value != field.default and field.name != "workdir":
                rows.append(
                    [f"`{field.name}`", f"`{_default(value)}`", f"`{_default(field.default)}`" if field.default != "" else ""]
                )
        parts += [f"## {name}\n", f"````{{eval-rst}}\n{api.rst(doc)}\n````\n", table(["field", "value", "default"], rows)]
    return "\n".join(parts)


# Where encodings run -------------------------------------------------------------------------------------------------------------

BACKENDS = {
    "xla": "dense",
    "xla_chunked": "tiles",
    "tpu": "TPU kernel",
    "gpu": "GPU kernel",
    "ring": "ring",
    "decoding": "decoding",
}
OPTIONS: dict[str, Mapping[str, Any]] = {"": {}, "packed": {"segment_ids": True}, "window": {"local_window_size": 256}}


@functools.cache
def support(encoding: PositionalEncoding) -> dict[str, dict[str, str | None]]:
    """Returns {backend: {option: reason}}; see ``where_it_runs``."""
    found = {option: where_it_runs(encoding, **given) for option, given in OPTIONS.items()}
    return {backend: {option: found[option][backend] for option in OPTIONS} for backend in BACKENDS}


def support_rows(encodings: Sequence[PositionalEncoding]) -> Iterator[list[str]]:
    """Yields a row for each encoding: its text form, and whether every backend runs it, also packed and with a window."""
    for encoding in encodings:
        cells = []
        for reasons in support(encoding).values():
            missing = [option for option, reason in reasons.items() if reason is not None]
            cells.append("yes" if not missing else "no" if "" in missing else f"not {' or '.join(missing)}")
        yield [f"`{spec_of(encoding)}`", *cells]


def reasons_of(encodings: Sequence[PositionalEncoding]) -> dict[str, list[str]]:
    """Returns {reason: the encodings and backends that it concerns}."""
    found: dict[str, list[str]] = {}
    for encoding in encodings:
        for backend, reasons in support(encoding).items():
            for reason in dict.fromkeys(filter(None, reasons.values())):
                found.setdefault(reason, []).append(f"`{spec_of(encoding)}` ({BACKENDS[backend]})")
    return found


def support_matrix() -> str:
    """Returns the table of all encodings of the registry, with the variants in the examples of their docstrings."""
    encodings = [encoding for name in examples.names() for encoding in examples.of(name).encodings]
    parts = [table(["encoding", *BACKENDS.values()], list(support_rows(encodings)), "lcccccc")]
    parts += [f"- {reason}: {', '.join(whom)}" for reason, whom in reasons_of(encodings).items()]
    return "\n".join(parts) + "\n"


# What ran where ------------------------------------------------------------------------------------------------------------------


def hardware_log() -> str:
    """Returns a table of the results in experiments/results: the machine that produced each, and the versions."""
    rows = []
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            continue
        rows.append([f"`{path.name}`", *_machine(found)])
    return table(["result", "ran on", "compiled for", "jax"], rows)


def _machine(found: Mapping[str, Any]) -> tuple[str, str, str]:
    hardware = found.get("hardware", "")
    versions = found.get("versions") or found
    if isinstance(hardware, Mapping):
        cores = hardware.get("cpu_cores") or hardware.get("cores")
        kind = hardware.get("cpu") or hardware.get("device_kind", "")
        hardware = f"CPU, {cores} cores" if hardware.get("platform") == "cpu" else f"{hardware.get('devices')} x {kind}"
    target = f"TPU (libtpu {found.get('libtpu') or versions.get('libtpu')})" if "libtpu" in {*found, *versions} else ""
    chips = {row.get("chip") for row in found.get("rows", ()) if isinstance(row, Mapping)} | {found.get("chip")}
    chips = ", ".join(sorted(filter(None, chips)))
    target = f"{target} {chips or found.get('compiled_for', '')}".strip()
    return str(hardware) or ("nothing, only compiled" if target else "not recorded"), target, str(versions.get("jax", ""))
