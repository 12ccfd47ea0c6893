"""The command line: posjax train | compare | ablate | evaluate | generate | plan | bench | list."""

import contextlib
import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

USAGE = """\
usage: posjax VERB configs/NAME.py [--field value ...] [--workdir DIR]

  train      trains one encoding; the same command goes on where it stopped
  compare    trains every encoding of the config on the same data, evaluates longer than trained, draws the figures
  ablate     trains a whole grid at once: --sweep learning_rate=1e-3,3e-4 --sweep rope.theta=1e4,1e5 --seeds 8
  evaluate   evaluates the newest checkpoint of a workdir
  generate   goes on from a prompt with the newest checkpoint of a workdir: --prompt "def "
  plan       what a step takes on chips that are not attached: --topology v5p:8x8x8 [--search]
  bench      measures: posjax bench attention [--lengths 2048 8192 ...] | schedule [--generations v6e ...] | gpu | tune
  list       lists the encodings and the configs

posjax VERB configs/NAME.py --help explains every field.

train, compare and evaluate run in several processes too: the same command in each, and a workdir that all can write.
SLURM, Open MPI, TPU pods and Kubernetes jobs are recognised; elsewhere set JAX_COORDINATOR_ADDRESS (host:port of
process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. When one is not heard of for POSJAX_HEARTBEAT_SECONDS (60), all stop.

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by SIGINT (the run is saved), 75 stopped by SIGTERM (saved)
or by the loss of a process: run the same command again
"""
VERBS = ("train", "compare", "ablate", "evaluate", "generate", "plan", "bench", "list")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point. Exits with the codes that USAGE tells."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    verb, *rest = argv
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        _fail(f"verb must be {', '.join(VERBS)}, got {verb!r}" + (f"; did you mean {near[0]}?" if near else ""), code=2)
    if verb == "list":
        return list_all()
    from posjax.attention.backends.refused import KernelRefused
    from posjax.parallel import distributed
    from posjax.training.checkpoints import CheckpointError
    from posjax.training.loop import Interrupted, NonFiniteLoss

    try:
        if verb == "bench":
            return bench(rest)
        if verb == "generate":
            return generate(rest)
        if verb == "plan":
            return plan(rest)
        if verb == "ablate":
            return ablate(rest, shlex.join(["posjax", *argv]))
        run = {"train": train, "compare": compare, "evaluate": evaluate}[verb]
        config = parse(rest)
        distributed.join()
        with _terminable(), distributed.loss_told(lambda: f"to go on, run:\n  {shlex.join(['posjax', *argv])}"):
            run(config, shlex.join(["posjax", *argv]))
            distributed.wait_for_all()  # the first process may still draw figures
    except Interrupted as stopped:  # which has said how to resume
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt as error:  # outside the training loop, or for the second time
        code = distributed.RESTART if isinstance(error, _Terminated) else 130
        _fail(f"interrupted. To go on, run:\n  {shlex.join(['posjax', *argv])}", code, distributed.leave)
    except distributed.ProcessLost as error:
        _fail(str(error), distributed.RESTART, functools.partial(distributed.leave, together=False))
    except (ValueError, ImportError, OSError, NotImplementedError, CheckpointError, NonFiniteLoss, KernelRefused) as error:
        if os.environ.get("POSJAX_TRACEBACK"):
            raise
        _fail(str(error), 1, distributed.leave)


def _fail(message: str, code: int = 1, leave: Callable[[int], None] = sys.exit) -> None:
    print(f"posjax: {message}", file=sys.stderr)
    leave(code)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, outside the training loop, which notes it and saves."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def end(number, frame):
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(args: Sequence[str], options: type | None = None):
    """The Config of ``configs/NAME.py`` with the flags that follow it. tyro answers --help and misspelt flags.

    With ``options``, a dataclass whose fields are flags too: (options, Config).
    """
    import dataclasses

    import tyro

    from posjax.lab.config import Config, load_config

    if not args or args[0].startswith("-"):
        if "--help" not in args and "-h" not in args:
            raise ValueError(
                "a config must come first, such as configs/quickstart.py, got " + (repr(args[0]) if args else "nothing")
            )
        default, flags = Config(), list(args)
    else:
        default, flags = load_config(args[0]), list(args[1:])
    cli = functools.partial(tyro.cli, args=flags, prog="posjax VERB configs/NAME.py")
    if options is None:
        return cli(Config, default=default, config=(tyro.conf.FlagConversionOff,))
    both = dataclasses.make_dataclass("Both", [("verb", options), ("run", Config)])  # the names head two lists in --help
    found = cli(both, default=both(options(), default), config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes))
    return found.verb, found.run


def train(config, command: str) -> None:
    """posjax train: one encoding, one seed; then its evaluation."""
    from posjax.lab import run as runs

    workdir, source = _open(config, (config.encoding,))
    say = _say()
    row = runs.train_and_evaluate(config, config.encoding, config.seed, workdir, source, command=command, say=say)
    _report([{"encoding": config.encoding, "seed": config.seed} | row], config, source, workdir, say)


def compare(config, command: str) -> None:
    """posjax compare: every encoding and seed."""
    from posjax.lab import run as runs

    workdir, source = _open(config, config.encodings)
    say = _say()
    rows = runs.compare(config, workdir, source, command=command, say=say)
    _report(rows, config, source, workdir, say)


def _ablation_flags() -> type:
    """A dataclass; made here because its annotations need tyro, which only the command line does."""
    import dataclasses
    from typing import Annotated

    import tyro

    @dataclasses.dataclass(frozen=True)
    class Ablation:
        """What posjax ablate takes beyond a configuration. There, --seeds 8, a single number, is how many: 0 to 7.

        Attributes:
          sweep: field=a,b,c, once for every field: one of the configuration (learning_rate=1e-3,3e-4) or an argument of an encoding
            (rope.theta=1e4,1e5); all combinations are run. encoding=rope,alibi stands in place of encodings.
          runs_at_once: runs that a device makes at once; None is as many as its memory allows, and one on a CPU.
        """

        sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
        runs_at_once: int | None = None

        def __post_init__(self) -> None:
            if self.runs_at_once is not None and self.runs_at_once < 1:
                raise ValueError(f"runs_at_once must be at least 1, or None for as many as fit, got {self.runs_at_once}")

    return Ablation


def ablate(args: Sequence[str], command: str) -> None:
    """posjax ablate: every combination of encodings and sweeps with every seed, those of the same shapes as one program."""
    from posjax.lab import run as runs
    from posjax.lab.ablation.engine import spread_over_cores
    from posjax.lab.ablation.grids import run_grid
    from posjax.lab.ablation.sweeps import grid, parse_sweep
    from posjax.lab.config import claim_workdir
    from posjax.lab.source import open_source

    ablation, config = parse(args, _ablation_flags())
    points = grid(config, [parse_sweep(text) for text in ablation.sweep])
    seeds = tuple(range(config.seeds[0])) if len(config.seeds) == 1 and config.seeds[0] > 0 else config.seeds
    spread_over_cores(len(points) * len(seeds))
    source = open_source(config)
    for point in points:
        runs.check(point.config, (point.config.encoding,), source, devices=1)
    workdir = claim_workdir(config)
    say = _say()
    rows = run_grid(points, seeds, workdir, source, at_once=ablation.runs_at_once, command=command, say=say)
    _report_ablation(rows, config, source, workdir, say)


def evaluate(config, command: str) -> None:
    """posjax evaluate: the newest checkpoint of a workdir that ``posjax train`` made."""
    from posjax.lab import run as runs

    folder = Path(config.workdir) / "checkpoints"
    if not folder.is_dir():  # and no workdir is made
        raise ValueError(f"workdir must hold checkpoints, which posjax train writes, got {config.workdir!r}: no folder {folder}")
    workdir, source = _open(config, (config.encoding,))
    params = runs.restore_params(config, config.encoding, config.seed, workdir, source)
    row = runs.evaluate_params(config, config.encoding, params, source)
    _report([{"encoding": config.encoding, "seed": config.seed} | row], config, source, workdir, _say())


def generate(args: Sequence[str]) -> None:
    """posjax generate: prompts and what a trained model makes of them, on the terminal as it comes."""
    from posjax.attention.backends.refused import naming_refusals
    from posjax.lab.prompting import Prompting, continue_prompts

    prompting, config = parse(args, Prompting)
    # A model's bytes may spell commands to a terminal.
    controls = {n: "\N{REPLACEMENT CHARACTER}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\n\t"}

    def write(text: str) -> None:
        sys.stdout.write(text.translate(controls) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    try:
        with naming_refusals(config.implementation):
            continue_prompts(config, prompting, write)
    except KeyboardInterrupt:
        write("\n")
        sys.exit(130)


def plan(args: Sequence[str]) -> None:
    """posjax plan: memory, collectives and the roofline of a step, compiled for chips that are not attached."""
    import dataclasses

    from posjax.compile.planning import Planning, run
    from posjax.lab.config import load_config

    planning, config = parse(args, Planning)
    own = load_config(args[0])
    changed = {f.name: v for f in dataclasses.fields(own) if (v := getattr(config, f.name)) != getattr(own, f.name)}
    run(args[0], config, changed, planning)


def bench(args: Sequence[str]) -> None:
    """posjax bench attention | schedule | gpu | tune."""
    import difflib
    import importlib

    import tyro

    known = {
        "attention": "time, memory and error of attention: encodings, implementations and other packages",
        "schedule": "what the TPU compiler makes of attention, counted in cycles, with no TPU attached",
        "gpu": "speed and accuracy of the kernels on the GPU of this machine, and of a decoder of a billion parameters",
        "tune": "block sizes of the kernels for the GPU of this machine",
    }
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  bench {what:<12}{about}" for what, about in known.items()]
        print("usage: posjax bench WHAT [--field value ...]\n\n" + "\n".join(lines) + "\n\nposjax bench WHAT --help for more")
        sys.exit(0 if args else 2)
    if args[0] not in known:
        near = difflib.get_close_matches(args[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"what to bench must be {' or '.join(known)}, got {args[0]!r}{hint}")
    what = importlib.import_module(f"posjax.bench.{args[0]}")
    tables = importlib.import_module("posjax.bench.results") if args[0] == "attention" else what
    names = {"attention": "AttentionBench", "schedule": "ScheduleBench", "gpu": "GpuBench", "tune": "Tune"}
    config = tyro.cli(getattr(what, names[args[0]]), args=args[1:], prog=f"posjax bench {args[0]}")
    try:
        rows = what.run(config)
    except KeyboardInterrupt:
        _fail(f"interrupted; what was measured stands in {config.out}", code=130)
    tables.show(rows)
    print("\n".join(str(Path(config.out) / name) for name in tables.FILES if (Path(config.out) / name).exists()))


def list_all() -> None:
    """posjax list: encodings and configs."""
    from posjax.encodings.spec import CONSTRUCTORS, one_line

    print("encodings (join with +, alternate layers with /):")
    for name in CONSTRUCTORS:
        print(f"  {name:<12} {one_line(name)}")
    print("configs:")
    for path in sorted(Path("configs").glob("*.py")):
        first = path.read_text().lstrip('"').split("\n")[0]
        print(f"  {path!s:<28} {first}")


def _open(config, specs: Sequence[str]):
    """Workdir and data; what cannot work is told here, before the workdir is made and anything is trained."""
    from posjax.encodings.spec import parse_encoding
    from posjax.lab import run as runs
    from posjax.lab.config import claim_workdir
    from posjax.lab.source import open_source
    from posjax.parallel import distributed

    for spec in specs:
        parse_encoding(spec)  # the cheapest first
    with distributed.first_process_first():
        source = open_source(config)
    runs.check(config, specs, source)
    return claim_workdir(config), source


def _say() -> Callable[[str], None]:
    import jax

    return print if jax.process_index() == 0 else lambda text: None


def _report(rows, config, source, workdir: Path, say: Callable[[str], None]) -> None:
    import jax

    if jax.process_index() > 0:
        return
    from posjax.lab import report
    from posjax.lab.evaluation import MEASURES, TASK_MEASURE

    measure, label = MEASURES.get(config.task, TASK_MEASURE)
    heading = _heading(config, source, label) + ("." if source.task is None else "")
    report.write_results(rows, measure, workdir, heading)
    figures = report.write_figures(rows, measure, label, config.seq_length, workdir)
    say("")
    say(heading)
    _print_table(*report.table_cells(rows, measure))
    say("\n".join(str(path) for path in (workdir / "results.json", workdir / "results.md", *figures)))


def _report_ablation(rows, config, source, workdir: Path, say: Callable[[str], None]) -> None:
    from posjax.lab import report
    from posjax.lab.evaluation import MEASURES, TASK_MEASURE

    measure, label = MEASURES.get(config.task, TASK_MEASURE)
    seeds = len({row["seed"] for row in rows})
    heading = _heading(config, source, label) + f".\nMean of {seeds} seed{'s' if seeds > 1 else ''}"
    heading += ", ± standard deviation, [95 % interval of the mean]." if seeds > 1 else "."
    heads, cells = report.write_ablation(rows, measure, label, workdir, heading)
    say("")
    say(heading)
    _print_table(heads, cells)
    files = ("results.json", "results.md", "dots.png", "curves.png")
    say("\n".join(str(workdir / name) for name in files if (workdir / name).exists()))


def _heading(config, source, label: str) -> str:
    """What a table shows, over it."""
    from posjax.data.corpus import unigram_bits_per_byte

    length = config.seq_length if source.task is None else source.task.length
    heading = f"{label}, trained on {length} tokens, {config.steps:,} steps of {config.batch_size} sequences"
    if config.task == "lm":
        entropy = unigram_bits_per_byte(source.validation)
        heading += f"; unigram entropy of the validation text: {entropy:.3f} bits per byte"
    if source.task is None:
        heading += ".\nColumns are evaluation lengths in tokens; 'max n' is where an encoding's table of positions ends"
    return heading


def _print_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for line in cells:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a file has no width of its own


if __name__ == "__main__":
    main()
