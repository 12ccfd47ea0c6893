"""posjax compare: trains every encoding with every seed."""

from posjax.cli.common import open_run, print_data, printer, report_rows


def compare(config, command: str) -> None:
    """Runs posjax compare: trains and evaluates every encoding with every seed."""
    from posjax.lab import run as runs

    workdir, source = open_run(config, config.encodings)
    say = printer()
    print_data(source, say)
    rows = runs.compare(config, workdir, source, command=command, say=say)
    report_rows(rows, config, source, workdir, say)
