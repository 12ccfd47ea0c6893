"""posjax train: trains and evaluates one encoding with one seed."""

from posjax.cli.common import open_run, print_data, printer, report_rows, writing


def train(config, command: str) -> None:
    """Runs posjax train: trains and evaluates one encoding with one seed."""
    with writing(config.workdir):
        _train(config, command)


def _train(config, command: str) -> None:
    from posjax.lab import run as runs

    workdir, source = open_run(config, (config.encoding,))
    say = printer()
    print_data(source, say)
    row = runs.train_and_evaluate(config, config.encoding, config.seed, workdir, source, command=command, say=say)
    report_rows([{"encoding": config.encoding, "seed": config.seed} | row], config, source, workdir, say)
