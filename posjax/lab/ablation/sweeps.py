"""Grids of settings: parses sweeps, forms the points of a grid, and groups the runs that share one program.

"learning_rate=1e-3,3e-4", "rope.theta=1e4,1e5" -> points -> groups of runs that differ only in traced numbers
"""

import ast
import dataclasses
import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from posjax.checks import checked
from posjax.encodings.frequencies import Scaling
from posjax.encodings.spec import parametrize_spec, parse_encoding, parse_scaling, substitute, with_argument
from posjax.lab.config import Config
from posjax.lab.run import TRACED_FIELDS
from posjax.lab.workdir import RUN_ONLY

# Fields that do not change results, that have a flag of their own, or that all points of a grid must share.
_NOT_SWEPT = {*RUN_ONLY, "seeds", "eval_lengths", "eval_tokens", "task", "data", "tokenizer"}


@dataclasses.dataclass(frozen=True)
class Point:
    """Represents one setting of a grid.

    Attributes:
      config: the configuration; its ``encoding`` is the encoding of the point.
      settings: the swept values, by name; scalings as text, because results are files of JSON.
    """

    config: Config
    settings: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Returns the name of the point in tables: the encoding and the other swept fields."""
        fields = [f"{name}={value}" for name, value in self.settings.items() if name in _fields()]
        return ", ".join([self.config.encoding, *fields])


@dataclasses.dataclass(frozen=True)
class Run:
    """Represents one run of a group: the index of its point in the grid, its seed, and its traced numbers by name."""

    point: int
    seed: int
    traced: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """Holds runs that share one compiled program.

    Attributes:
      config: the configuration of the runs, except for the traced fields.
      spec: their encoding, with blanks ``_0``, ``_1``, ... for traced numbers.
      runs: at least one run; the keys of ``traced``, fields of the configuration and blanks, are the same in all.
    """

    config: Config
    spec: str
    runs: tuple[Run, ...]


@checked()
def parse_sweep(text: str) -> tuple[str, tuple[Any, ...]]:
    """Parses a sweep "field=a,b,c" into ("field", values).

    The field is a field of the configuration, or an argument of an encoding such as "rope.theta". Commas inside brackets and quotes
    belong to a value: "encoding=rope,cope(64, gates='keys')".

    Raises:
      ValueError: the text does not have this form, a value is empty or occurs twice, or the field is unknown or cannot be swept.
        The message suggests the most similar field that can be swept.
    """
    name, equals, values = text.partition("=")
    name = name.strip()
    if not equals or not values.strip():
        raise ValueError(f"sweep must look like learning_rate=1e-3,3e-4 or rope.theta=1e4,1e5, got {text!r}")
    member, dot, argument = name.partition(".")
    if dot:
        try:
            with_argument(member, member, argument, 0)
        except ValueError as error:
            raise ValueError(f"invalid sweep {text!r}: {error}") from None
    else:
        sweepable = [field for field in _fields() if field not in _NOT_SWEPT]
        if name not in sweepable:
            near = difflib.get_close_matches(name, sweepable, n=1)
            why = f"{name} cannot be swept" if name in _fields() else f"the configuration has no field {name!r}"
            raise ValueError(f"invalid sweep {text!r}: {why}" + (f"; did you mean {near[0]}?" if near else ""))
    words = _split(values)
    if "" in words:
        raise ValueError(f"sweep must not have empty values, got {text!r}")
    try:
        parsed = tuple(_value(word) for word in words) if name != "encoding" else tuple(words)
    except ValueError as error:
        raise ValueError(f"invalid sweep {text!r}: {error}") from None
    if repeated := [word for word, value in zip(words, parsed, strict=True) if parsed.count(value) > 1]:
        raise ValueError(f"sweep values must all differ, got {repeated[0]} more than once in {text!r}")
    return name, parsed


def grid(config: Config, sweeps: Iterable[tuple[str, Sequence[Any]]]) -> list[Point]:
    """Forms the grid of all combinations of the encodings and the values of every sweep.

    The encodings are those of the configuration, unless they are swept. Combinations that differ only in arguments that their
    encoding does not have (rope.theta for alibi) form a single point.

    Raises:
      ValueError: a field is swept twice, or the field or the encoding does not accept a value.
    """
    sweeps = dict_of(sweeps)
    encodings = sweeps.pop("encoding", config.encodings)
    points: dict[Any, Point] = {}
    for spec, *values in itertools.product(encodings, *sweeps.values()):
        fields, settings, encoding = {}, {}, spec
        for name, value in zip(sweeps, values, strict=True):
            if "." not in name:
                fields[name] = settings[name] = value
                continue
            changed = with_argument(encoding, *name.split("."), value)
            if changed != encoding:
                encoding, settings[name] = changed, repr(value) if isinstance(value, Scaling) else value
        parse_encoding(encoding)
        changed = dataclasses.replace(config, **fields, encoding=encoding)
        point = Point(changed, settings)
        points.setdefault(point.config, point)
    return list(points.values())


def dict_of(sweeps: Iterable[tuple[str, Sequence[Any]]]) -> dict[str, Sequence[Any]]:
    """Returns the sweeps as a dict by name.

    Raises:
      ValueError: a name occurs twice.
    """
    by_name: dict[str, Sequence[Any]] = {}
    for name, values in sweeps:
        if name in by_name:
            raise ValueError(f"each field must be swept only once, got two sweeps of {name}; put all values into one sweep")
        by_name[name] = values
    return by_name


def groups(points: Sequence[Point], seeds: Sequence[int]) -> list[Group]:
    """Groups the runs of a grid: runs that differ only in seeds and traceable numbers share a group."""
    members_of: dict[Any, list[tuple[int, str, tuple[float, ...]]]] = {}
    for index, point in enumerate(points):
        spec, numbers = parametrize_spec(point.config.encoding)
        neutral = {name: 0 for name in TRACED_FIELDS if name != "clip_norm"} | {"learning_rate": 1.0}
        if point.config.clip_norm is not None:
            neutral["clip_norm"] = 1.0
        key = dataclasses.replace(point.config, **neutral, encoding=spec, encodings=("identity",))
        members_of.setdefault(key, []).append((index, spec, numbers))
    return [_group(points, members, seeds) for members in members_of.values()]


def _group(points: Sequence[Point], members: Sequence[tuple[int, str, tuple[float, ...]]], seeds: Sequence[int]) -> Group:
    """Builds a group in which only the numbers that differ between its runs are traced.

    Numbers that all runs share become constants, so that a grid over seeds alone compiles to the program of a single run.
    """
    configs = [points[index].config for index, _, _ in members]
    fields = [name for name in TRACED_FIELDS if len({getattr(config, name) for config in configs}) > 1]
    columns = list(zip(*(numbers for _, _, numbers in members), strict=True))
    shared = {place: column[0] for place, column in enumerate(columns) if len(set(column)) == 1}
    free = [column for place, column in enumerate(columns) if place not in shared]
    runs = [
        Run(
            index,
            seed,
            {name: float(getattr(config, name)) for name in fields} | {f"_{i}": column[row] for i, column in enumerate(free)},
        )
        for row, (config, (index, _, _)) in enumerate(zip(configs, members, strict=True))
        for seed in seeds
    ]
    # If nothing is traced, keep the encoding as the user wrote it: substituting blanks would spell out its default arguments.
    spec = substitute(members[0][1], shared) if free else configs[0].encoding
    return Group(configs[0], spec, tuple(runs))


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Config)]


def _split(text: str) -> list[str]:
    """Splits a text at the commas outside brackets and quotes."""
    words, depth, quote, start = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([":
            depth += 1
        elif letter in ")]":
            depth -= 1
        elif letter == "," and not depth:
            words.append(text[start:place].strip())
            start = place + 1
    return [*words, text[start:].strip()]


def _value(word: str) -> Any:
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        scaling = parse_scaling(word)
        return word if scaling is None else scaling
