"""Encodings by name, as the examples in their docstrings construct them.

An encoding is known by its registration alone: its docstring has the code to use it, and the values that this code constructs are
the variants that tables and figures show. The first is named ``encoding``. Without an example, it is the encoding with its default
arguments.
"""

import dataclasses
import doctest
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import posjax as pj
from posjax.core.encoding import PositionalEncoding, registered

GLOBALS = {"jax": jax, "jnp": jnp, "np": np, "pj": pj}


@dataclasses.dataclass(frozen=True)
class Example:
    """Holds the example of an encoding.

    Attributes:
      code: the code, without prompts, results and parameters.
      encodings: the encodings of the class that it constructs, without duplicates.
    """

    code: str
    encodings: tuple[PositionalEncoding, ...]


def names() -> list[str]:
    """Returns the names of posjax's own encodings, in the order of their registration."""
    return [name for name, cls in registered().items() if cls.__module__.startswith("posjax.")]


@functools.cache
def of(name: str) -> Example:
    """Runs the example of an encoding.

    Raises:
      ValueError: the encoding needs arguments, and its docstring has no example.
    """
    cls = registered()[name]
    parsed = doctest.DocTestParser().get_examples(inspect.getdoc(cls) or "", name)
    made: list[PositionalEncoding] = []
    original = cls.__post_init__

    def record(self: Any) -> None:
        original(self)
        made.append(self)

    namespace = dict(GLOBALS)
    cls.__post_init__ = record  # type: ignore[method-assign]
    try:
        for example in parsed:
            exec(compile(example.source, f"the example of {name}", "exec"), namespace)
    finally:
        cls.__post_init__ = original
    unique = tuple(dict.fromkeys(encoding for encoding in made if _is_plain(encoding)))
    if not unique:
        if any(field.default is dataclasses.MISSING for field in dataclasses.fields(cls)):
            raise ValueError(f"the docstring of {name!r} must have an example, because it needs arguments")
        unique = (cls(),)
    shown = [example.source for example in parsed if not example.want and not example.source.startswith("params ")]
    return Example("".join(shown), unique)


def _is_plain(encoding: PositionalEncoding) -> bool:
    """Returns whether no argument of an encoding is traced or an array."""
    return not jax.tree.leaves(encoding)
