"""posjax compare: trains every encoding with every seed, or puts the results of trained runs in one table."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from posjax.cli.common import given, open_run, parse, print_data, printer, report_rows, writing
from posjax.storage import run_path


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Configures a comparison of trained runs, in addition to the fields of a configuration.

    Attributes:
      out: folder for results.json, results.md and the figures. Empty: the workdir, or runs/comparison for trained runs.
    """

    out: str = ""


def arguments(args: Sequence[str]) -> tuple[Any, Comparison, tuple[str, ...], set[str]]:
    """Parses the command line after the verb and returns (configuration, options, runs, names of the flags).

    Without any runs, the configuration is to be trained.
    """
    from posjax.lab.workdir import is_workdir

    count = next((index for index, arg in enumerate(args) if arg.startswith("-")), len(args))
    folders = tuple(args[:count]) if count and is_workdir(args[0]) else ()
    for folder in folders:
        if not is_workdir(folder):
            raise ValueError(f"runs to compare must be workdirs, which hold a config.json, got {folder!r}")
    rest = [*args[:1], *args[count:]] if folders else args
    options, config = parse(rest, "compare", Comparison)
    return config, options, folders, given(args)


def compare(config: Any, options: Comparison, folders: tuple[str, ...], flags: set[str], command: str) -> None:
    """Runs posjax compare."""
    if folders:
        return _compare_trained(folders, options, config, flags)
    with writing(config.workdir):
        _train_all(options, config, command)


def _train_all(options: Comparison, config: Any, command: str) -> None:
    """Trains and evaluates every encoding with every seed."""
    from posjax.lab import run as runs

    workdir, source = open_run(config, config.encodings)
    say = printer()
    print_data(source, say)
    rows = runs.compare(config, workdir, source, command=command, say=say)
    report_rows(rows, config, source, run_path(options.out) if options.out else workdir, say)


def _compare_trained(folders: Sequence[str], options: Comparison, config: Any, flags: set[str]) -> None:
    """Reads the results of runs and evaluates what is missing; all runs are evaluated alike, and nothing is trained."""
    from posjax.lab.trained import rows_of

    say = printer()
    rows, source, configs = rows_of(folders, config, flags, say)
    report_rows(rows, configs[0], source, run_path(options.out or "runs/comparison"), say, configs[1:])
