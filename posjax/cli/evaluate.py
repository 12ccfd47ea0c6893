"""posjax evaluate: evaluates the newest checkpoint of a workdir."""

from pathlib import Path

from posjax.cli.common import open_run, printer, report_rows


def evaluate(config, command: str) -> None:
    """Runs posjax evaluate: evaluates the newest checkpoint in a workdir that ``posjax train`` wrote."""
    from posjax.lab import run as runs

    folder = Path(config.workdir) / "checkpoints"
    if not folder.is_dir():  # checked first, so that no workdir is created
        raise ValueError(
            f"workdir must hold checkpoints, which posjax train writes, got {config.workdir!r}: {folder} does not exist"
        )
    workdir, source = open_run(config, (config.encoding,))
    params = runs.restore_params(config, config.encoding, config.seed, workdir, source)
    row = runs.evaluate_params(config, config.encoding, params, source)
    report_rows([{"encoding": config.encoding, "seed": config.seed} | row], config, source, workdir, printer())
