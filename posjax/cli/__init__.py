"""The command line: posjax train | compare | ablate | evaluate | generate | plan | bench | list.

Each verb is a module of this package and is imported, with its dependencies, only when it is called.
"""

import contextlib
import functools
import importlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from posjax.checks import require
from posjax.cli.common import fail, parse

USAGE = """\
usage: posjax VERB CONFIG [--field value ...] [--workdir DIR]

  train      trains one encoding; the same command goes on where it stopped
  compare    trains every encoding of the config on the same data, evaluates longer than trained, draws the figures
  ablate     trains a whole grid at once: --sweep learning_rate=1e-3,3e-4 --sweep rope.theta=1e4,1e5 --seeds 8
  evaluate   evaluates the newest checkpoint of a workdir
  generate   goes on from a prompt with the newest checkpoint of a workdir: --prompt "def "
  plan       what a step takes on chips that are not attached: --topology v5p:8x8x8 [--search]
  bench      measures: posjax bench attention [--lengths 2048 8192 ...] | schedule [--generations v6e ...] | gpu | tune
  list       lists the encodings and the configs

CONFIG is a name that posjax list shows, such as quickstart, or a Python file of your own.
posjax VERB CONFIG --help explains every field.

train, compare and evaluate run in several processes too: the same command in each, and a workdir that all can write.
SLURM, Open MPI, TPU pods and Kubernetes jobs are recognised; elsewhere set JAX_COORDINATOR_ADDRESS (host:port of
process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. When one is not heard of for POSJAX_HEARTBEAT_SECONDS (60), all stop.

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by SIGINT (the run is saved), 75 stopped by SIGTERM (saved)
or by the loss of a process: run the same command again
"""
VERBS = ("train", "compare", "ablate", "evaluate", "generate", "plan", "bench", "list")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line, the entry point of ``posjax``; exits with the codes listed in USAGE."""
    argv = list(sys.argv[1:] if argv is None else argv)
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
    from posjax.training.checkpoints import CheckpointError
    from posjax.training.loop import Interrupted, NonFiniteLoss

    try:
        run = getattr(importlib.import_module(f"posjax.cli.{verb}"), verb)  # each verb's module has a function of the same name
        if verb in ("bench", "generate", "plan"):
            return run(rest)
        if verb == "ablate":
            return run(rest, shlex.join(["posjax", *argv]))
        config = parse(rest)
        distributed.join()
        with _terminable(), distributed.on_peer_loss(lambda: f"to go on, run:\n  {shlex.join(['posjax', *argv])}"):
            run(config, shlex.join(["posjax", *argv]))
            distributed.wait_for_all()  # the first process may still draw figures
    except Interrupted as stopped:  # the training loop has printed how to resume
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt as error:  # outside the training loop, or a second interrupt
        code = distributed.RESTART if isinstance(error, _Terminated) else 130
        fail(f"interrupted. To go on, run:\n  {shlex.join(['posjax', *argv])}", code, distributed.leave)
    except distributed.ProcessLost as error:
        fail(str(error), distributed.RESTART, functools.partial(distributed.leave, together=False))
    except (ValueError, ImportError, OSError, NotImplementedError, CheckpointError, NonFiniteLoss, KernelCompileError) as error:
        if os.environ.get("POSJAX_TRACEBACK"):
            raise
        fail(str(error), 1, distributed.leave)


class _Terminated(KeyboardInterrupt):
    """Signals a SIGTERM outside the training loop; inside it, the loop handles the signal and saves."""


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
