"""posjax plot: draws the table and the figures of runs from their stored results."""

import dataclasses
from collections.abc import Sequence

from posjax.cli.common import given, parse, printer, report_rows
from posjax.storage import run_path


@dataclasses.dataclass(frozen=True)
class Plotting:
    """Configures the figures, in addition to the fields of a configuration.

    Attributes:
      out: folder for results.json, results.md and the figures. Empty: the workdir of the run.
    """

    out: str = ""


def plot(args: Sequence[str]) -> None:
    """Runs posjax plot: needs the stored results only, and neither data nor checkpoints."""
    from posjax.lab.trained import stored_rows

    options, config = parse(args, "plot", Plotting)
    rows, source = stored_rows(config, given(args))
    report_rows(rows, config, source, run_path(options.out or config.workdir), printer())
