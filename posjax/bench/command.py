"""The command line of ``python -m posjax.bench.gpu`` and ``.tune``: flags from a dataclass, using only the standard library.

``posjax bench`` parses the same flags with tyro, which may be missing on a machine that is used only for measurements.
"""

import argparse
import dataclasses
import inspect
import os
import re
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posjax.attention.backends.compile_errors import KernelCompileError


def parse(options: type, prog: str, argv: Sequence[str]) -> Any:
    """Parses ``--field value ...`` into a dataclass; exits with code 2 on wrong usage and 0 after ``--help``.

    Fields may be strings, numbers, Literals of these, and tuples of any length. Their help text comes from the Attributes section
    of the dataclass's docstring.
    """
    words = re.findall(r"^  (\w+): (.+(?:\n {4,}.+)*)", inspect.getdoc(options) or "", re.MULTILINE)
    about = {name: " ".join(text.split()) for name, text in words}
    parser = argparse.ArgumentParser(prog=prog, description=inspect.getdoc(options).split("\n")[0], allow_abbrev=False)
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        kind, shape = hints[field.name], {}
        if typing.get_origin(kind) is tuple:
            kind, shape = typing.get_args(kind)[0], {"nargs": "+"}
        if typing.get_origin(kind) is typing.Literal:
            shape["choices"] = typing.get_args(kind)
            kind = type(shape["choices"][0])
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        help_text = f"{about[field.name]} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help=help_text, **shape)
    given = vars(parser.parse_args(argv))
    try:
        return options(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()})
    except ValueError as error:
        parser.error(str(error))


def main(module: Any, options: type, argv: Sequence[str] | None = None) -> None:
    """Runs a benchmark module: calls its ``run(config)`` and ``show(rows)``, then prints its ``FILES`` in ``config.out``.

    Exits with code 1 on failure, 2 on wrong usage, and 130 if interrupted.
    """
    config = parse(options, f"python -m {module.__name__}", sys.argv[1:] if argv is None else argv)
    try:
        rows = module.run(config)
    except KeyboardInterrupt:
        _leave(f"interrupted; the results so far are in {config.out}", 130)
    except (ValueError, ImportError, OSError, NotImplementedError, KernelCompileError) as error:
        if os.environ.get("POSJAX_TRACEBACK"):
            raise
        _leave(str(error), 1)
    module.show(rows)
    print("\n".join(str(Path(config.out) / name) for name in module.FILES if (Path(config.out) / name).exists()))


def _leave(message: str, code: int) -> typing.NoReturn:
    print(f"posjax: {message}", file=sys.stderr)
    sys.exit(code)
