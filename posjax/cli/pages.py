"""posjax explore and posjax report: write pages of HTML that need no server and no network."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posjax.checks import check_fields, require, short
from posjax.cli.common import chosen_runs, given, parse, printer
from posjax.storage import run_path

EXAMPLE = '''def mean(values):
    """Return the mean of a list of values."""
    total = 0.0
    for value in values:
        total = total + value
    return total / len(values)
'''


@dataclasses.dataclass(frozen=True)
class Exploring:
    """Configures an explorer page, in addition to the fields of a configuration.

    Attributes:
      text: a text, or a file of UTF-8 text; for a synthetic task, words of the task. Empty: a short example.
      out: file to write.
    """

    text: str = ""
    out: str = "explorer.html"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_out(self.out)


@dataclasses.dataclass(frozen=True)
class Reporting:
    """Configures a report page, in addition to the fields of a configuration.

    Attributes:
      out: file to write.
    """

    out: str = "report.html"

    def __post_init__(self) -> None:
        check_fields(self)
        _check_out(self.out)


def _check_out(out: str) -> None:
    if not out or Path(out).is_dir():
        raise ValueError(f"out must be a file to write, got {out!r}" + (", which is a folder" if out else ""))


def explore(args: Sequence[str], command: str) -> None:
    """Runs posjax explore: writes a page that shows what one or two trained models do with a text."""
    require("posjax explore", "plotly")
    from posjax.attention.backends.compile_errors import translate_compile_errors
    from posjax.lab.pages.over_text import explorer_data
    from posjax.lab.summary import hardware, versions
    from posjax.lab.trained import open_pretrained, open_trained
    from posjax.plots.explorer import write_page

    folders, options, config, flags = _parsed(args, "explore", Exploring)
    say = printer()
    if "from_pretrained" in flags:
        opened, results = [open_pretrained(config)], [[]]
    else:
        stored, results = _two_at_most(folders, config, flags)
        opened = [open_trained(run, reading) for run, reading in stored]
    with translate_compile_errors(config.implementation):
        text = _text_of(options.text, opened[0].task)
        data, arrays = explorer_data(opened, text, results)
    provenance = [["command", command], *_versions_and_hardware(versions(), hardware())]
    title = f"posjax explorer: {' and '.join(run['name'] for run in data['runs'])}"
    _write(write_page, options.out, "explorer", title, data | {"provenance": provenance}, arrays, say)


def report(args: Sequence[str], command: str) -> None:
    """Runs posjax report: writes a page of the stored results of runs, comparisons or one ablation."""
    require("posjax report", "plotly")
    from posjax.lab.pages.results import report_data
    from posjax.lab.summary import hardware, versions
    from posjax.plots.explorer import write_page

    folders, options, config, flags = _parsed(args, "report", Reporting)
    data = report_data(folders or (config.workdir,), config, flags)
    facts = [["command", command], *_versions_and_hardware(versions(), hardware())]
    data["provenance"].append({"caption": "This page", "facts": facts})
    _write(write_page, options.out, "report", f"posjax report: {', '.join(folders)}", data, None, printer())


def _parsed(args: Sequence[str], verb: str, options: type) -> tuple[tuple[str, ...], Any, Any, set[str]]:
    """Returns (workdirs, options, configuration of the first, names of the flags)."""
    from posjax.lab.workdir import is_workdir

    count = next((index for index, arg in enumerate(args) if arg.startswith("-")), len(args))
    folders, flags = tuple(args[:count]), given(args)
    if not folders and not flags & {"help", "from_pretrained"} and "-h" not in args:
        raise ValueError(f"posjax {verb} must be followed by the workdir of a run, got {repr(args[0]) if args else 'nothing'}")
    if folders and "from_pretrained" in flags:
        raise ValueError(f"--from_pretrained must stand alone, without a run, got {' '.join(folders)}")
    for folder in folders:
        if not is_workdir(folder):
            raise ValueError(f"runs to {verb} must be workdirs, which hold a config.json, got {folder!r}")
    chosen, config = parse([*args[:1], *args[count:]] if folders else args, verb, options)
    return folders, chosen, config, flags


def _two_at_most(folders: Sequence[str], config: Any, flags: set[str]) -> tuple[list[Any], list[list[Any]]]:
    """Returns the runs to explore, of each encoding the first seed, and the results of all seeds of each.

    Raises:
      ValueError: there are more than two, or two workdirs have several each.
    """
    from posjax.lab import run as runs
    from posjax.lab.workdir import read_config

    chosen, results = [], []
    for folder in folders:
        stored = read_config(run_path(folder))
        own = {name: getattr(config, name) for name in flags & {"encoding", "encodings", "seeds", "mesh", "implementation"}}
        by_encoding: dict[str, list[Any]] = {}
        for run, reading in chosen_runs(dataclasses.replace(stored, **own), flags):
            by_encoding.setdefault(reading.encoding, []).append((run, reading))
        for group in by_encoding.values():
            chosen.append(group[0])
            evaluated = (runs.stored_evaluation(run.path, None) for run, _ in group)
            results.append([result for result in evaluated if result is not None])
    if len(chosen) > 2:
        known = ", ".join(reading.encoding for _, reading in chosen)
        raise ValueError(f"posjax explore shows one run or two, got {len(chosen)}: {known}; choose with --encodings A B")
    return chosen, results


def _text_of(text: str, task: Any) -> str:
    """Returns a text that is given as itself or as a file; an example if it is empty."""
    if not text:
        return EXAMPLE if task is None else _example_of(task)
    try:
        if not Path(text).is_file():
            return text
    except (OSError, ValueError):  # too long for a name, or with a null character
        return text
    try:
        return Path(text).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"text must be a text, or a file of UTF-8 text, got {short(text)}: {error}") from None


def _example_of(task: Any) -> str:
    import jax

    return task.detokenize(task.sample(jax.random.key(0), 1)[0][0])


def _versions_and_hardware(versions: dict[str, str], hardware: dict[str, Any]) -> list[list[str]]:
    from importlib.metadata import version

    packages = versions | {"plotly": version("plotly")}
    return [["versions", ", ".join(f"{name} {number}" for name, number in packages.items())], ["hardware", hardware["devices"]]]


def _write(write_page: Any, out: str, kind: str, title: str, data: dict[str, Any], arrays: Any, say: Any) -> None:
    path = Path(out)
    size = write_page(path, kind, title, data, arrays)
    say(f"{path} ({size / 1e6:.1f} MB); open it in a browser")
