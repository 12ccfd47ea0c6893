"""Code that several verbs share: flags, workdir and data, tables and figures."""

import contextlib
import dataclasses
import functools
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from posjax.checks import printable
from posjax.storage import run_path


def fail(message: str, code: int = 1, leave: Callable[[int], None] = sys.exit) -> None:
    """Prints an error message and ends the command with an exit code."""
    print(f"posjax: {printable(message)}", file=sys.stderr)
    leave(code)


def parse_flags(cls: type, args: Sequence[str], prog: str, **options: Any) -> Any:
    """Parses flags into a dataclass with tyro, which prints --help and exits.

    Raises:
      ValueError: a flag is unknown, or its value is wrong. The message is one line, without the frame that tyro draws.
    """
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(cls, args=list(args), prog=prog, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(_without_frame(said.getvalue())) from None


def _without_frame(text: str) -> str:
    """Returns tyro's message as one line, with the flag that it suggests.

    Its parts are a title, the message, suggestions and a hint, between rules; the title is in the frame where there is one.
    """
    rows = [row.strip(" │") for row in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    plain = "\n".join(row for row in rows if not row.startswith(("╭", "╰")))
    parts = re.split(r"^[─-]{4,}$", plain, flags=re.MULTILINE)
    message = parts[0] if "╭" in text or len(parts) == 1 else parts[1]
    line = re.sub(r"^Error parsing \w+: ", "", " ".join(message.partition("\nGot errors:")[0].split()))
    suggested = re.search(r"Perhaps you meant:\s+(--\S+)", plain)
    line = line if len(line) <= 300 else f"{line[:140]} ... {line[-140:]}"
    return f"{line}; did you mean {suggested[1]}?" if suggested else line


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
        if not given(args) & {"help", "from_pretrained"} and "-h" not in args:
            raise ValueError(
                "a config must come first, such as quickstart or a Python file of your own, or --from_pretrained, got "
                + (repr(args[0]) if args else "nothing")
            )
        default, flags = Config(), list(args)
    else:
        default, flags = load_config(args[0]), list(args[1:])
    default = dataclasses.replace(default, warmup_steps=_warmup_steps(default, flags))
    cli = functools.partial(parse_flags, args=flags, prog=f"posjax {verb} CONFIG")
    if options is None:
        config = _completed(cli(Config, default=default, config=(tyro.conf.FlagConversionOff,)), args)
        _check_encodings(config)
        return config
    both = dataclasses.make_dataclass("Both", [(verb, options), ("config", Config)])  # the field names are headings in --help
    parsed = cli(both, default=both(options(), default), config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes))
    config = _completed(parsed.config, args)
    _check_encodings(config)
    return getattr(parsed, verb), config


def _completed(config, args: Sequence[str]):
    """Returns a configuration with the architecture of its checkpoint; a stored one has it already."""
    from posjax.lab.config import with_pretrained
    from posjax.lab.workdir import is_workdir

    flags = given(args)
    is_stored = bool(args) and (is_workdir(args[0]) or args[0].endswith(".json")) and "from_pretrained" not in flags
    return with_pretrained(config, flags) if config.from_pretrained and not is_stored else config


def _check_encodings(config) -> None:
    """Raises ValueError if an encoding of a config is wrong, even one that the verb does not use."""
    from posjax.encodings.spec import parse_encoding

    for spec in (config.encoding, *config.encodings):
        parse_encoding(spec)


def _warmup_steps(config, flags: Sequence[str]) -> int:
    """Returns the warmup of a config, shortened in proportion if ``--steps`` is set below it.

    This makes ``posjax compare quickstart --steps 20`` a quick try of any config. An explicit ``--warmup_steps`` is not changed.
    A run whose warmup was shortened like this keeps it when it is given more steps.
    """
    from posjax.lab.workdir import is_workdir, read_config

    def shortened(steps: int) -> int:
        return config.warmup_steps if steps >= config.warmup_steps else config.warmup_steps * steps // config.steps

    values = dict(itertools.pairwise(flags)) | dict(flag.split("=", 1) for flag in flags if "=" in flag)
    steps, workdir = values.get("--steps", ""), values.get("--workdir", config.workdir)
    with contextlib.suppress(ValueError, OSError):  # reported when the workdir is opened
        if is_workdir(workdir) and (stored := read_config(run_path(workdir))).warmup_steps == shortened(stored.steps):
            return stored.warmup_steps if not steps.isdecimal() or int(steps) >= stored.warmup_steps else shortened(int(steps))
    return shortened(int(steps)) if steps.isdecimal() else config.warmup_steps


def given(args: Sequence[str]) -> set[str]:
    """Returns the names of the flags on a command line, as fields of a configuration."""
    return {arg[2:].partition("=")[0].replace("-", "_") for arg in args if arg.startswith("--")}


def chosen_runs(config, flags: set[str]):
    """Returns the runs in a workdir that the flags choose, all by default, each with the configuration to read it with."""
    from posjax.lab.workdir import choose_runs

    encodings = (config.encoding,) if "encoding" in flags else config.encodings if "encodings" in flags else None
    return choose_runs(config, encodings, config.seeds if "seeds" in flags else None)


@contextlib.contextmanager
def writing(workdir: str) -> Iterator[None]:
    """Holds the lock of a workdir, after a check that a bucket can be written."""
    from posjax.storage import check_bucket, run_path
    from posjax.training.lock import locked

    check_bucket(run_path(workdir))
    with locked(workdir):
        yield


def open_run(config, specs: Sequence[str]):
    """Checks a run before training starts, creates its workdir if necessary, and returns (workdir, data).

    The caller holds the lock of the workdir.

    Raises:
      ValueError: the configuration, an encoding or the data cannot be used. No workdir is created then.
    """
    from posjax.lab import run as runs
    from posjax.lab.flops import check_step_fits
    from posjax.lab.source import open_source
    from posjax.lab.workdir import check_workdir, facts_of, init_or_check_workdir
    from posjax.parallel import distributed

    check_step_fits(config)
    check_workdir(config)
    with distributed.first_process_first():
        source = open_source(config)
    runs.check(config, specs, source)
    runs.check_init_from(config, specs, source)
    return init_or_check_workdir(config, facts_of(config, source), runs.tokenizer_file(source)), source


def printer() -> Callable[[str], None]:
    """Returns a function that prints a text, with control characters escaped, in the first process and nothing in the others."""
    import jax

    return (lambda text: print(printable(text))) if jax.process_index() == 0 else lambda text: None


def print_data(source, say: Callable[[str], None]) -> None:
    """Prints the splits of a text, with warnings; nothing for a synthetic task."""
    if source.summary:
        say("\n".join(source.summary))


def report_rows(
    rows,
    config,
    source,
    workdir: Path | None,
    say: Callable[[str], None],
    others: Sequence[Any] = (),
    *,
    is_trained: bool = True,
) -> None:
    """Prints the results of runs and writes them to a folder, in the first process.

    Args:
      rows, config, source: the results, and the configuration and data that they come from.
      workdir: the folder; None: nothing is written.
      say: prints a line.
      others: configurations of further runs among the rows.
      is_trained: False for a checkpoint of another library, whose training is not the configuration's.

    Raises:
      NonFiniteLoss: a loss is not finite. The results have been written.
    """
    import jax

    if jax.process_index() > 0:
        return
    from posjax.lab import report
    from posjax.lab.evaluation import MEASURES, measure_in, not_finite
    from posjax.lab.summary import record
    from posjax.training.loop import NonFiniteLoss

    measure = measure_in(rows)
    label = MEASURES[measure]
    heading = heading_of(config, source, label, others, is_trained=is_trained) + ("." if source.task is None else "")
    written = []
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        report.write_results(rows, measure, workdir, heading, record(config, source))
        figures = report.write_figures(rows, measure, label, config.seq_length, workdir, config.figure_format)
        written = [workdir / "results.json", workdir / "results.md", *figures]
    say("")
    say(heading)
    print_table(*report.table_cells(rows, measure))
    say("\n".join(map(str, written)) or "Nothing was written; --out FOLDER writes results.json, results.md and the figures.")
    for row in rows:
        if columns := not_finite(row["metrics"], measure):
            raise NonFiniteLoss(
                f"encoding {row['encoding']!r} with seed {row['seed']} ended with a loss that is not finite, at "
                f"{', '.join(columns)}. Try a lower learning rate, a smaller clip_norm or float32 in another --workdir."
            )


def heading_of(config, source, label: str, others: Sequence[Any] = (), *, is_trained: bool = True) -> str:
    """Returns the heading of a table of results of a configuration, and of other ones that differ in their sizes."""
    from posjax.data.corpus import unigram_bits, unigram_bits_per_byte

    def sizes(of: Callable[[Any], int]) -> str:
        each = sorted({of(one) for one in (config, *others)})
        return f"{each[0]:,}" if len(each) == 1 else f"{each[0]:,} to {each[-1]:,}"

    length = sizes(lambda one: one.seq_length) if source.task is None else source.task.length
    steps, rows = sizes(lambda one: one.steps), sizes(lambda one: one.batch_size)
    heading = f"{label}, trained on {length} tokens, {steps} steps of {rows} sequences"
    if not is_trained:
        heading = f"{label} of {config.from_pretrained}"
    if config.task == "lm" and source.validation is not None:
        per_byte = source.validation.num_bytes is not None
        entropy = unigram_bits_per_byte(source.validation) if per_byte else unigram_bits(source.validation)
        heading += f"; unigram entropy of the validation text: {entropy:.3f} bits per {'byte' if per_byte else 'token'}"
    if source.task is None:
        heading += ".\nColumns are evaluation lengths in tokens; 'max n' marks lengths beyond an encoding's limit of n positions"
    return heading


def print_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, head in enumerate(heads):
        table.add_column(Text(printable(head)), justify="right" if number else "left", overflow="fold")
    for line in cells:
        table.add_row(*(Text(printable(cell)) for cell in line))  # rich would read brackets in a str as markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a file has no terminal width
