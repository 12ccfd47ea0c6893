"""Checks of arguments, the same words everywhere: an error names the argument, its value and what would work."""

import difflib
import math
import numbers
from typing import Any

import jax
import numpy as np


def check_at_least(name: str, value: Any, least: int) -> None:
    """Raises ValueError where a size is not an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def is_traced(value: Any) -> bool:
    """Whether a value is not known before the program runs: an argument of a function under jit, vmap or grad."""
    return isinstance(value, jax.core.Tracer)


def check_finite(name: str, value: Any) -> None:
    """Raises ValueError where a setting is not one finite number. What is traced is known by its shape alone."""
    is_number = isinstance(value, numbers.Real | jax.Array) and not isinstance(value, bool) and np.shape(value) == ()
    if not is_number or not (is_traced(value) or math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number, or a traced scalar, got {value!r}")


def check_positive(name: str, value: Any, hint: str) -> None:
    """Raises ValueError where a setting is not one positive number. What is traced is known by its shape alone."""
    if np.shape(value) != ():
        raise ValueError(f"{name} must be one number, or a traced scalar, got shape {np.shape(value)}; {hint}")
    # NumPy, because even on a known array a jax operation inside jit gives a value that is not.
    if not is_traced(value) and not np.asarray(value) > 0:
        raise ValueError(f"{name} must be positive, got {value!r}; {hint}")


def near(word: str, candidates) -> str:
    """The end of a message about a word that is not known: the candidate that is like it, or nothing."""
    close = difflib.get_close_matches(str(word), list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
