"""Argument checks with uniform messages: an error names the argument, its value and what would work.

A check goes by the annotation of an argument and by bounds:

    annotation                accepts
    bool                      True, False
    int                       integers, within int32
    float                     integers and floats that float32 holds: finite, and not so small that they become zero
    str, Literal[...], None   a string, one of the values, None
    jax.Array                 a scalar array of numbers, which may be traced
    tuple[X, ...]             a tuple or list of these
    A | B                     either

A bool is not a number, nor is a string that looks like one. NumPy's scalars count as what they hold, and become Python's. An
annotation with any other part is not checked, so that classes of users may hold what they please.

``check`` checks one argument, and ``check_fields`` the fields of a dataclass, whose bounds are in their metadata (``bounded``).
"""

import dataclasses
import difflib
import functools
import math
import os
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

INT32 = 2**31 - 1  # the largest integer that arrays of positions and ids hold, and the limit of sizes without one of their own
_FLOAT32 = np.finfo(np.float32)
_BASES = (bool, int, float, str, types.NoneType, jax.Array)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Limits the numbers that an argument takes.

    Attributes:
      least, most: smallest and largest number.
      above, below: bounds that are excluded.
      rank: largest number of axes of an array.
      what: the words for the bounds in messages, such as "be positive, or None not to clip"; None composes them.
      hint: what would work, which ends messages.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    rank: int = 0
    what: str | None = None
    hint: str = ""

    def hold(self, value: Any) -> bool:
        """Returns whether a number lies within the bounds."""
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def of_float(self) -> str:
        """Returns the bounds of floats in words."""
        low, high = (self.least, "[") if self.above is None else (self.above, "("), (self.most, "]")
        high = high if self.below is None else (self.below, ")")
        if self.what is not None:
            return self.what
        if low[0] is None and high[0] is None:
            return "be a finite number"
        if high[0] is None:
            return "be positive" if low == (0, "(") else f"be {'above' if low[1] == '(' else 'at least'} {low[0]:g}"
        return f"lie in {low[1]}{low[0]:g}, {high[0]:g}{high[1]}"

    def of_int(self, with_most: bool = False) -> str:
        """Returns the bounds of integers in words; the upper one only if it was exceeded or is of this argument."""
        most = INT32 if self.most is None else self.most
        if self.least is None:
            return f"an integer of at most {most}" if with_most else "an integer"
        return f"an integer from {self.least} to {most}" if with_most else f"an integer of at least {self.least}"


def bounded(default: Any = dataclasses.MISSING, *, traced: bool = False, **bounds: Any) -> Any:
    """Declares a field of a dataclass with ``Bounds`` for ``check_fields``."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds), "traced": traced})


def check_fields(value: Any) -> None:
    """Checks the fields of a dataclass by their annotations and bounds; NumPy's scalars become Python's.

    Raises:
      ValueError: a field holds something else; the message names it.
    """
    for name, kinds, bounds in _checks_of(type(value)):
        given = getattr(value, name)
        plain = _checked(name, given, kinds, bounds)
        if plain is not given:
            object.__setattr__(value, name, plain)


def check(name: str, value: Any, annotation: Any, **bounds: Any) -> Any:
    """Returns ``value``, a NumPy scalar as one of Python, if it is what an annotation and ``Bounds`` say.

    Raises:
      ValueError: it is not; the message names the argument.
    """
    return _checked(name, value, _kinds(annotation) or (), Bounds(**bounds))


def check_at_least(name: str, value: Any, least: int, most: int = INT32) -> int:
    """Returns ``value`` if it is an integer from ``least`` to ``most``; raises ValueError if it is not."""
    return check(name, value, int, least=least, most=most)


def check_one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError if ``value`` is none of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {short(value)}")


def is_traced(value: Any) -> bool:
    """Returns whether a value is known only at run time: an argument of a function under jit, vmap or grad."""
    return isinstance(value, jax.core.Tracer)


def is_array(value: Any) -> bool:
    """Returns whether a value is an array of JAX or NumPy."""
    return isinstance(value, jax.Array | np.ndarray)


def short(value: Any) -> str:
    """Returns a value in one line of a message: an array by its dtype and shape, anything else by the beginning of its repr."""
    if is_array(value) and np.size(value) != 1:
        return f"{value.dtype}{list(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def near(word: str, candidates: Iterable[str]) -> str:
    """Returns the end of a message about an unknown word: a suggestion of the closest candidate, or an empty string."""
    close = difflib.get_close_matches(str(word), list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# Memory ---------------------------------------------------------------------------------------------------------------


def check_fits(what: str, shapes: Any) -> None:
    """Raises ValueError if a tree of arrays or of their shapes takes more memory than the host or any device has."""
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "shape")]
    size = sum(math.prod(leaf.shape) * _itemsize(leaf.dtype) for leaf in leaves)
    if size > (limit := memory()):
        raise ValueError(f"{what} must fit the memory of this machine, {limit / 2**30:,.0f} GiB, got {size / 2**30:,.0f} GiB")


def _itemsize(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize


@functools.cache
def memory() -> int:
    """Returns the bytes of memory of the host or of a device, whichever has more."""
    try:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not POSIX
        host = 2**40
    stats = (device.memory_stats() for device in jax.local_devices())
    return max(host, *((own or {}).get("bytes_limit", 0) for own in stats))


# What annotations accept ----------------------------------------------------------------------------------------------


@functools.cache
def _checks_of(cls: type) -> tuple[tuple[str, tuple[Any, ...], Bounds], ...]:
    """Returns name, kinds and bounds of every field of a dataclass whose annotation says what it accepts."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # an annotation names something that is not there when the program runs
        hints = {field.name: field.type for field in dataclasses.fields(cls)}
    fields = ((field, _kinds(hints.get(field.name))) for field in dataclasses.fields(cls))
    return tuple((field.name, kinds, field.metadata.get("bounds", Bounds())) for field, kinds in fields if kinds)


def _kinds(annotation: Any) -> tuple[Any, ...] | None:
    """Returns what an annotation accepts: bases, ("one of", values) and ("many", kinds); None if a part of it is anything else."""
    annotation = types.NoneType if annotation is None else annotation
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if any(annotation is base for base in _BASES):
        return (annotation,)
    if origin is Literal:
        return (("one of", args),)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        kinds = _kinds(args[0])
        return None if kinds is None else (("many", kinds),)
    if origin not in (typing.Union, types.UnionType):
        return None
    parts = [_kinds(arg) for arg in args]
    return None if None in parts else tuple(kind for part in parts for kind in part)


def _checked(name: str, given: Any, kinds: tuple[Any, ...], bounds: Bounds) -> Any:
    value = given.item() if isinstance(given, np.generic) else given
    faults = []
    for kind in kinds:
        fault = _fault(value, kind, bounds)
        if fault is None:
            return value
        faults.append(fault)
    hint = f"; {bounds.hint}" if bounds.hint else ""
    if fault := next(filter(None, faults), ""):  # of the right type
        got = f"shape {np.shape(value)}" if fault.startswith("be one number") else short(given)
        raise ValueError(f"{name} must {fault}, got {got}{hint}")
    raise ValueError(f"{name} must be {_words(kinds, bounds)}, got {short(given)}{hint}")


def _fault(value: Any, kind: Any, bounds: Bounds) -> str | None:
    """Returns what a value must be by a kind: None if it is that, "" if it has another type."""
    if kind is jax.Array:
        return _fault_of_array(value, bounds) if is_array(value) else ""
    if kind is int or kind is float:
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return ""
        return _fault_of_int(value, bounds) if kind is int else _fault_of_float(value, bounds)
    if not isinstance(kind, tuple):
        return None if isinstance(value, kind) else ""
    if kind[0] == "one of":
        return None if any(type(value) is type(one) and value == one for one in kind[1]) else ""
    if not isinstance(value, tuple | list):
        return ""
    each = ([_fault(one, own, bounds) for own in kind[1]] for one in value)
    return None if all(None in faults for faults in each) else ""


def _fault_of_int(value: int, bounds: Bounds) -> str | None:
    most = INT32 if bounds.most is None else bounds.most
    least = -INT32 if bounds.least is None else bounds.least
    return None if least <= value <= most else bounds.what or f"be {bounds.of_int(value > most)}"


def _fault_of_float(value: float, bounds: Bounds) -> str | None:
    if not (isinstance(value, int) or math.isfinite(value)):
        if bounds.of_float() == "be a finite number":
            return ""
        return bounds.of_float() + (" and finite" if math.isinf(value) else "")
    if not bounds.hold(value):
        return bounds.of_float()
    if abs(value) > _FLOAT32.max or 0 < abs(value) < _FLOAT32.tiny or not bounds.hold(float(np.float32(value))):
        return f"{bounds.of_float()} in float32, which holds {_FLOAT32.tiny:.1e} to {_FLOAT32.max:.1e}"
    return None


def _fault_of_array(value: Any, bounds: Bounds) -> str | None:
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        return ""
    if value.ndim > bounds.rank:
        return "be one number, or a traced scalar"
    # NumPy, because inside jit a jax operation returns a tracer even for a concrete array.
    return None if is_traced(value) or value.ndim else _fault_of_float(float(np.asarray(value)), bounds)


def _words(kinds: tuple[Any, ...], bounds: Bounds) -> str:
    words = []
    for kind in kinds:
        if isinstance(kind, tuple) and kind[0] == "one of":
            words += map(repr, kind[1])
        elif isinstance(kind, tuple):
            words.append(f"a tuple, each {_words(kind[1], bounds)}")
        else:
            words.append({bool: "True or False", int: bounds.of_int(), float: _number(bounds)}.get(kind) or _NOUNS[kind])
    # In the order of a sentence: numbers, then what stands for them.
    words.sort(key=lambda word: (word == "None", word == "a traced scalar"))
    if len(words) == 2 and words[1] == "a traced scalar":
        return ", or ".join(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


_NOUNS = {str: "a string", jax.Array: "a traced scalar", types.NoneType: "None"}


def _number(bounds: Bounds) -> str:
    verb, _, rest = ("be", "", "a finite number") if bounds.what else bounds.of_float().partition(" ")
    if verb == "lie":
        return f"a number {rest}"
    return {"positive": "a positive number", "a finite number": rest}.get(rest, f"a number of {rest}")
