"""Argument checks with uniform messages: an error names the argument, its value and what would work."""

import difflib
import importlib.util
import math
import numbers
import sys
from typing import Any

import jax
import jax.export
import numpy as np


def check_at_least(name: str, value: Any, least: int) -> None:
    """Raises ValueError if ``value`` is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def is_traced(value: Any) -> bool:
    """Returns whether a value is known only at run time: an argument of a function under jit, vmap or grad."""
    return isinstance(value, jax.core.Tracer)


def is_symbolic(*sizes: Any) -> bool:
    """Returns whether a size is unknown until the program runs: a symbolic dimension of ``jax.export``."""
    return any(map(jax.export.is_symbolic_dim, sizes))


def round_up(size: Any, multiple: int) -> Any:
    """Returns the least multiple that is not below ``size``, in a form that symbolic dimensions can be divided by it."""
    return (size + multiple - 1) // multiple * multiple


def check_finite(name: str, value: Any) -> None:
    """Raises ValueError if ``value`` is not one finite number; a traced value is checked by shape alone."""
    is_number = isinstance(value, numbers.Real | jax.Array) and not isinstance(value, bool) and np.shape(value) == ()
    if not is_number or not (is_traced(value) or math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number, or a traced scalar, got {value!r}")


def check_positive(name: str, value: Any, hint: str) -> None:
    """Raises ValueError if ``value`` is not one positive number; a traced value is checked by shape alone."""
    if np.shape(value) != ():
        raise ValueError(f"{name} must be one number, or a traced scalar, got shape {np.shape(value)}; {hint}")
    # NumPy, because inside jit a jax operation returns a tracer even for a concrete array.
    if not is_traced(value) and not np.asarray(value) > 0:
        raise ValueError(f"{name} must be positive, got {value!r}; {hint}")


def require(what: str, *modules: str) -> None:
    """Raises ModuleNotFoundError, which says how to install them, if modules that the extra [lab] installs are missing.

    Args:
      what: what needs them, for the message.
      modules: names of top-level modules.
    """
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise ModuleNotFoundError(f"{what} needs {', '.join(missing)}: pip install 'posjax[lab]'", name=missing[0])


def _is_installed(name: str) -> bool:
    try:
        return sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def near(word: str, candidates) -> str:
    """Returns the end of a message about an unknown word: a suggestion of the closest candidate, or an empty string."""
    close = difflib.get_close_matches(str(word), list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
