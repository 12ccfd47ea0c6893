"""Code that several verbs share: flags, workdir and data, tables and figures."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def fail(message: str, code: int = 1, leave: Callable[[int], None] = sys.exit) -> None:
    """Prints an error message and ends the command with an exit code."""
    print(f"posjax: {message}", file=sys.stderr)
    leave(code)


def parse(args: Sequence[str], verb: str, options: type | None = None):
    """Parses the name or file of a config and the flags that follow it into a Config; tyro handles --help and misspelled flags.

    Args:
      args: the command line after the verb.
      verb: the verb, for --help.
      options: a dataclass of further flags; the result is then the pair (options, Config).

    Raises:
      ValueError: the first argument is not a config, or the config cannot be loaded.
    """
    import tyro

    from posjax.lab.config import Config, load_config

    if not args or args[0].startswith("-"):
        if "--help" not in args and "-h" not in args:
            raise ValueError(
                "a config must come first, such as quickstart or a Python file of your own, got "
                + (repr(args[0]) if args else "nothing")
            )
        default, flags = Config(), list(args)
    else:
        default, flags = load_config(args[0]), list(args[1:])
        default = dataclasses.replace(default, warmup_steps=_warmup_steps(default, flags))
    cli = functools.partial(tyro.cli, args=flags, prog=f"posjax {verb} CONFIG")
    if options is None:
        return cli(Config, default=default, config=(tyro.conf.FlagConversionOff,))
    both = dataclasses.make_dataclass("Both", [(verb, options), ("config", Config)])  # the field names are headings in --help
    parsed = cli(both, default=both(options(), default), config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes))
    return getattr(parsed, verb), parsed.config


def _warmup_steps(config, flags: Sequence[str]) -> int:
    """Returns the warmup of a config, shortened in proportion if ``--steps`` is set below it.

    This makes ``posjax compare quickstart --steps 20`` a quick try of any config. An explicit ``--warmup_steps`` is not changed.
    """
    values = dict(itertools.pairwise(flags)) | dict(flag.split("=", 1) for flag in flags if "=" in flag)
    steps = values.get("--steps", "")
    if not steps.isdecimal() or int(steps) >= config.warmup_steps:
        return config.warmup_steps
    return config.warmup_steps * int(steps) // config.steps


def open_run(config, specs: Sequence[str]):
    """Checks a run before training starts, creates its workdir if necessary, and returns (workdir, data).

    Raises:
      ValueError: the configuration, an encoding or the data cannot be used. No workdir is created then.
    """
    from posjax.encodings.spec import parse_encoding
    from posjax.lab import run as runs
    from posjax.lab.config import init_or_check_workdir
    from posjax.lab.source import open_source
    from posjax.parallel import distributed

    for spec in specs:
        parse_encoding(spec)  # the cheapest check first
    with distributed.first_process_first():
        source = open_source(config)
    runs.check(config, specs, source)
    return init_or_check_workdir(config), source


def printer() -> Callable[[str], None]:
    """Returns ``print`` in the first process, and a function that does nothing in the others."""
    import jax

    return print if jax.process_index() == 0 else lambda text: None


def print_data(source, say: Callable[[str], None]) -> None:
    """Prints the splits of a text, with warnings; nothing for a synthetic task."""
    if source.summary:
        say("\n".join(source.summary))


def report_rows(rows, config, source, workdir: Path, say: Callable[[str], None]) -> None:
    import jax

    if jax.process_index() > 0:
        return
    from posjax.lab import report
    from posjax.lab.evaluation import measure_of

    measure, label = measure_of(config, source)
    heading = heading_of(config, source, label) + ("." if source.task is None else "")
    report.write_results(rows, measure, workdir, heading)
    figures = report.write_figures(rows, measure, label, config.seq_length, workdir)
    say("")
    say(heading)
    print_table(*report.table_cells(rows, measure))
    say("\n".join(str(path) for path in (workdir / "results.json", workdir / "results.md", *figures)))


def heading_of(config, source, label: str) -> str:
    """Returns the heading of a table of results."""
    from posjax.data.corpus import unigram_bits, unigram_bits_per_byte

    length = config.seq_length if source.task is None else source.task.length
    heading = f"{label}, trained on {length} tokens, {config.steps:,} steps of {config.batch_size} sequences"
    if config.task == "lm":
        per_byte = source.validation.num_bytes is not None
        entropy = unigram_bits_per_byte(source.validation) if per_byte else unigram_bits(source.validation)
        heading += f"; unigram entropy of the validation text: {entropy:.3f} bits per {'byte' if per_byte else 'token'}"
    if source.task is None:
        heading += ".\nColumns are evaluation lengths in tokens; 'max n' marks lengths beyond an encoding's limit of n positions"
    return heading


def print_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a file has no terminal width
