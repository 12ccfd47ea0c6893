"""posjax evaluate: evaluates the newest checkpoints of a run, or of the runs of a comparison."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from posjax.cli.common import chosen_runs, given, parse, print_data, printer, report_rows
from posjax.storage import run_path


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Configures an evaluation, in addition to the fields of a configuration.

    Attributes:
      out: folder for results.json, results.md and the figures. Empty: the results are printed, and nothing is written.
    """

    out: str = ""


def arguments(args: Sequence[str]) -> tuple[Any, Evaluation, set[str]]:
    """Parses the command line after the verb and returns (configuration, options, names of the flags)."""
    options, config = parse(args, "evaluate", Evaluation)
    return config, options, given(args)


def evaluate(config: Any, options: Evaluation, flags: set[str], command: str) -> None:
    """Runs posjax evaluate: prints the results of every run in a workdir, or of a checkpoint. Nothing is written to either."""
    from posjax.lab import run as runs
    from posjax.lab.source import open_source
    from posjax.lab.trained import open_data, open_pretrained, open_trained

    out = run_path(options.out) if options.out else None
    if "from_pretrained" in flags:
        source, say = open_source(config), printer()
        print_data(source, say)
        run = open_pretrained(config)
        row = runs.evaluate_params(run.config, config.encoding, run.params, source)
        rows = [{"encoding": config.encoding, "seed": config.seed} | row]
        return report_rows(rows, config, source, out, say, is_trained=False)
    chosen = chosen_runs(config, flags)
    source = open_data(chosen, is_other_text=bool(flags & {"data", "validation_data"}))
    say = printer()
    rows = []
    for stored, reading in chosen:
        run = open_trained(stored, reading)
        if len(chosen) > 1:
            say(f"evaluating {run.path}, step {run.step}")
        row = runs.evaluate_params(run.config, run.config.encoding, run.params, source)
        rows.append({"encoding": run.config.encoding, "seed": run.config.seed} | row)
    report_rows(rows, config, source, out, say)
