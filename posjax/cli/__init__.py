"""The command line: posjax train | compare | ablate | evaluate | generate | plot | explore | report | plan | bench | list.

Each verb is a function of the same name in a module of this package, which is imported, with its dependencies, only when it is
called.
"""

import functools
import importlib
import os
import shlex
import sys
from collections.abc import Sequence

from posjax.checks import require
from posjax.cli import endings
from posjax.cli.common import fail, parse

USAGE = """\
usage: posjax VERB CONFIG [--field value ...] [--workdir DIR]

  train      trains and evaluates one encoding
  compare    trains every encoding of the config on the same data, evaluates beyond the training length, draws figures
  ablate     trains a grid of settings: --sweep learning_rate=1e-3,3e-4 --sweep rope.theta=1e4,1e5 --seeds 8
  evaluate   evaluates the newest checkpoint of a run: posjax evaluate RUN --eval_lengths 1 4 16
  generate   completes a prompt with the newest checkpoint of a run: posjax generate RUN --prompt "def "
  plot       draws the table and figures of runs again: posjax plot RUN
  explore    writes a page of HTML with attention, gates and losses over a text: posjax explore RUN [RUN2] --text FILE
  report     writes a page of HTML with the results of runs: posjax report RUN ...
  plan       predicts memory and time of a step on chips that are not attached: --topology v5p:8x8x8 [--search]
  bench      runs a benchmark: attention [--lengths 2048 8192 ...] | schedule [--generations v6e ...] | gpu | tune
  list       lists the encodings and the configs

CONFIG is a name that posjax list shows, such as quickstart, a Python file of your own, or the config.json of a run.
RUN is the workdir of a run, which needs nothing else; compare RUN RUN ... puts the results of several runs in one table.
train, evaluate and generate --from_pretrained PATH use the checkpoint of another library, a folder with config.json and safetensors
files or a .gguf file, and then need neither CONFIG nor RUN.
Run posjax VERB CONFIG --help for a description of every field.
Rerun train, compare or ablate to resume; a finished run exits at once.

train, compare and evaluate also run in several processes: start the same command in each, with a shared workdir.
SLURM, Open MPI, TPU pods and Kubernetes jobs are detected; elsewhere set JAX_COORDINATOR_ADDRESS (host:port of
process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. If a process sends no heartbeat for POSJAX_HEARTBEAT_SECONDS
(default 60), all processes stop.

exit codes: 0 success; 1 error; 2 wrong usage, such as a value that cannot work; 130 interrupted by SIGINT
(Ctrl-C); 75 stopped by SIGTERM, SIGHUP or SIGUSR1, or by the loss of a process. After 130 or 75, rerun the command to
resume from the newest checkpoint.
The first signal lets the current step finish and saves. A second Ctrl-C ends the command within seconds, and a third
at once; checkpoints that are complete stay so.
"""
VERBS = ("train", "compare", "ablate", "evaluate", "generate", "plot", "explore", "report", "plan", "bench", "list")
MODULES = {"explore": "pages", "report": "pages"}  # the other verbs are modules of their own


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line, the entry point of ``posjax``; exits with the codes listed in USAGE."""
    if argv is None:
        endings.own_process()
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _run(argv)
    except KeyboardInterrupt as error:  # outside the training loop, or a second interrupt
        endings.defer_interrupts()
        fail(f"interrupted. To resume, run:\n  {shlex.join(['posjax', *argv])}", endings.exit_code(error), endings.leave)


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if argv else 2)
    verb, *rest = argv
    if "" not in sys.path:  # package.module:name may name a file in the current folder, as under python -m
        sys.path.append("")
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        fail(f"verb must be {', '.join(VERBS)}, got {verb!r}" + (f"; did you mean {near[0]}?" if near else ""), code=2)
    if verb == "list":
        from posjax.cli.list_all import list_all

        return list_all()
    try:
        require(f"posjax {verb}", "flax", "optax", "orbax", "rich", "tyro")
    except ModuleNotFoundError as error:
        fail(str(error))
    from posjax.attention.backends.compile_errors import KernelCompileError
    from posjax.parallel import distributed
    from posjax.training.checkpoints import CheckpointError, SaveError
    from posjax.training.loop import NonFiniteLoss
    from posjax.training.signals import Interrupted

    endings.hide_tracebacks()
    config = None
    try:
        module = importlib.import_module(f"posjax.cli.{MODULES.get(verb, verb)}")
        run = getattr(module, verb)
        if verb in ("bench", "generate", "plan", "plot"):
            return run(rest)
        if verb in ("ablate", "explore", "report"):
            with endings.terminable():
                return run(rest, shlex.join(["posjax", *argv]))
        parsed = module.arguments(rest) if hasattr(module, "arguments") else (parse(rest, verb),)
        config = parsed[0]
        distributed.join()
        with (
            endings.terminable(),
            distributed.abort_message(lambda: endings.abort_text(config), 1),
            distributed.on_peer_loss(lambda: f"to resume, run:\n  {shlex.join(['posjax', *argv])}"),
        ):
            run(*parsed, shlex.join(["posjax", *argv]))
            distributed.wait_for_all()  # the first process may still draw figures
    except Interrupted as stopped:  # the training loop has printed how to resume
        endings.leave(stopped.exit_code)
    except distributed.ProcessLost as error:
        fail(str(error), distributed.RESTART, functools.partial(distributed.leave, together=False))
    except (ValueError, NotImplementedError, ImportError, OSError, CheckpointError, NonFiniteLoss, KernelCompileError) as error:
        if os.environ.get("POSJAX_TRACEBACK"):
            raise
        code = 2 if isinstance(error, ValueError | NotImplementedError) else 1
        fail(endings.with_space(error, config), code, distributed.leave)
    except SaveError as error:
        fail(str(error), 1, endings.leave)
    except (RuntimeError, AssertionError, MemoryError) as error:
        if os.environ.get("POSJAX_TRACEBACK") or (line := endings.explain(error, config)) is None:
            raise
        fail(line, 1, endings.leave)
