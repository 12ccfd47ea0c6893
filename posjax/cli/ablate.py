"""posjax ablate: trains every combination of encodings and swept values with every seed."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from posjax.checks import check
from posjax.cli.common import heading_of, parse, print_data, print_table, printer, writing
from posjax.storage import is_bucket


def _ablation_flags() -> type:
    """Returns the dataclass of flags, defined in a function because its annotations need tyro, which only the command line has."""
    from typing import Annotated

    import tyro

    @dataclasses.dataclass(frozen=True)
    class Ablation:
        """Configures an ablation, in addition to the fields of a configuration. --seeds 8, a single number, means seeds 0 to 7.

        Attributes:
          sweep: field=a,b,c, once per field: a field of the configuration (learning_rate=1e-3,3e-4) or an argument of an encoding
            (rope.theta=1e4,1e5). All combinations are run. encoding=rope,alibi replaces encodings.
          runs_at_once: number of concurrent runs on a device; None means as many as fit in its memory, and one on a CPU.
        """

        sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
        runs_at_once: int | None = None

        def __post_init__(self) -> None:
            what = "be at least 1, or None for as many as fit in memory"
            check("runs_at_once", self.runs_at_once, int | None, least=1, what=what)

    return Ablation


def ablate(args: Sequence[str], command: str) -> None:
    """Runs posjax ablate: trains every combination with every seed; runs of equal shapes share one compiled program."""
    from posjax.lab.ablation.engine import spread_over_cores
    from posjax.lab.ablation.sweeps import grid, parse_sweep

    ablation, config = parse(args, "ablate", _ablation_flags())
    if config.mesh:
        raise ValueError(f"mesh must be '' in an ablation, each of whose runs takes one device, got {config.mesh!r}")
    points = grid(config, [parse_sweep(text) for text in ablation.sweep])
    seeds = tuple(range(config.seeds[0])) if len(config.seeds) == 1 and config.seeds[0] > 0 else config.seeds
    for name in ("init_from", "from_pretrained"):
        if start := getattr(config, name):
            raise ValueError(f"{name} must be '' in an ablation, whose runs start from random parameters, got {start!r}")
    if is_bucket(config.workdir):
        raise ValueError(f"workdir must be on a disk in an ablation, got {config.workdir!r}")
    spread_over_cores(len(points) * len(seeds))
    with writing(config.workdir):
        _ablate(ablation, config, points, seeds, command)


def _ablate(ablation, config, points, seeds: Sequence[int], command: str) -> None:
    from posjax.lab import run as runs
    from posjax.lab.ablation.grids import run_grid
    from posjax.lab.flops import check_step_fits
    from posjax.lab.source import open_source
    from posjax.lab.workdir import EVALUATION, check_workdir, facts_of, init_or_check_workdir

    check_workdir(config, fixed=(*EVALUATION, "steps"))  # the results of an ablation are stored with the groups of its runs
    for point in points:
        check_step_fits(point.config)
    source = open_source(config)
    for point in points:
        runs.check(point.config, (point.config.encoding,), source, devices=1)
    workdir = init_or_check_workdir(config, facts_of(config, source), runs.tokenizer_file(source))
    say = printer()
    print_data(source, say)
    rows = run_grid(points, seeds, workdir, source, at_once=ablation.runs_at_once, command=command, say=say)
    report_ablation(rows, config, source, workdir, say)


def report_ablation(rows, config, source, workdir: Path, say: Callable[[str], None]) -> None:
    from posjax.lab import report
    from posjax.lab.evaluation import MEASURES, measure_in

    measure = measure_in(rows)
    label = MEASURES[measure]
    seeds = len({row["seed"] for row in rows})
    heading = heading_of(config, source, label) + f".\nMean of {seeds} seed{'s' if seeds > 1 else ''}"
    heading += ", ± standard deviation, [95 % interval of the mean]." if seeds > 1 else "."
    heads, cells = report.write_ablation(rows, measure, label, workdir, heading)
    say("")
    say(heading)
    print_table(heads, cells)
    files = ("results.json", "results.md", "dots.png", "curves.png")
    say("\n".join(str(workdir / name) for name in files if (workdir / name).exists()))
