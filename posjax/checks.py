"""Argument checks with uniform messages: an error names the argument, its value and what would work.

A check goes by the annotation of an argument and by bounds:

    annotation                accepts
    bool                      True, False
    int                       integers, within int32
    float                     integers and floats that float32 holds: finite, and not so small that they become zero
    str, Literal[...], None   a string, one of the values, None
    jax.Array                 an array of numbers, which may be traced, of at most ``rank`` axes
    tuple[X, ...]             a tuple of these, or a list, which becomes one
    Callable[...]             a function or another callable
    A | B                     either

A bool is not a number, and neither is a string such as "3". NumPy scalars are converted to Python scalars. An annotation with any
other part is not checked, so that user-defined classes may have fields of any type.

``check`` checks one argument, ``checked`` all arguments of a function, and ``check_fields`` the fields of a dataclass, whose bounds
are in their metadata (``bounded``).
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

_F = typing.TypeVar("_F", bound=Callable[..., Any])
Number = int | float
INT32 = 2**31 - 1  # the largest integer in arrays of positions and ids, and the default limit of integers
_TINIEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_BASES = (Callable, bool, int, float, str, types.NoneType, jax.Array)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Describes the numbers that an argument accepts.

    Attributes:
      least, most: inclusive bounds.
      above, below: exclusive bounds.
      rank: largest number of axes of an array; None for any.
      what: wording of the bounds in messages, such as "be positive, or None to disable clipping"; None derives it from the bounds.
      hint: the end of messages, about what would work.
    """

    least: Number | None = None
    most: Number | None = None
    above: Number | None = None
    below: Number | None = None
    rank: int | None = None
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
        """Returns the bounds for floats in words, to follow "must" in a message."""
        if self.what is not None:
            return self.what
        low, high = self.least if self.above is None else self.above, self.most if self.below is None else self.below
        if low is None and high is None:
            return "be a finite number"
        if high is None:
            return "be positive" if self.above == 0 else f"be {'at least' if self.above is None else 'above'} {low:g}"
        if low is None:
            return f"be {'at most' if self.below is None else 'below'} {high:g}"
        return f"lie in {'[' if self.above is None else '('}{low:g}, {high:g}{']' if self.below is None else ')'}"

    def of_int(self, exceeds: bool = False) -> str:
        """Returns the accepted integers in words, with the upper bound only if a value exceeds it."""
        most = INT32 if self.most is None else self.most
        if self.least is None:
            return f"an integer of at most {most}" if exceeds else "an integer"
        return f"an integer from {self.least} to {most}" if exceeds else f"an integer of at least {self.least}"


def bounded(default: Any = dataclasses.MISSING, *, traced: bool = False, **bounds: Any) -> Any:
    """Declares a dataclass field with ``Bounds``, for ``check_fields``."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(**bounds), "traced": traced})


def check_fields(value: Any) -> None:
    """Checks the fields of a dataclass by their annotations and bounds; NumPy scalars become Python scalars.

    Raises:
      ValueError: a field has another type or is out of bounds; the message names it.
    """
    for name, kinds, bounds in _checks_of(type(value)):
        given = getattr(value, name)
        plain = _checked(name, given, kinds, bounds)
        if plain is not given:
            object.__setattr__(value, name, plain)


def check(name: str, value: Any, annotation: Any, **bounds: Any) -> Any:
    """Returns ``value``, with a NumPy scalar as a Python scalar, if it has the annotated type and lies within ``Bounds``.

    Raises:
      ValueError: the value has another type or is out of bounds; the message names the argument.
    """
    return _checked(name, value, _kinds(annotation) or (), Bounds(**bounds))


def checked(**bounds: Mapping[str, Any]) -> Callable[[_F], _F]:
    """Returns a decorator that checks the arguments of a function by their annotations, classes included.

    Args:
      **bounds: ``Bounds`` of arguments, e.g. ``length=dict(least=1)``.

    The decorated function raises ValueError, with the name of the argument, if a value has another type or is out of bounds.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)

        @functools.cache  # not at once: an annotation may name a class that is defined later
        def checks() -> dict[str, tuple[tuple[Any, ...], Bounds]]:
            hints = typing.get_type_hints(function)
            kinds = {name: _kinds(hints[name], classes=True) for name in signature.parameters if name in hints}
            return {name: (kind, Bounds(**bounds.get(name, {}))) for name, kind in kinds.items() if kind}

        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            bound = signature.bind(*args, **keywords)
            for name, value in bound.arguments.items():
                if name in checks():
                    bound.arguments[name] = _checked(name, value, *checks()[name])
            return function(*bound.args, **bound.kwargs)

        return typing.cast(_F, call)

    return decorate


def check_at_least(name: str, value: Any, least: int, most: int = INT32) -> int:
    """Returns ``value`` if it is an integer from ``least`` to ``most``; raises ValueError if it is not."""
    return check(name, value, int, least=least, most=most)


def check_one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raises ValueError if ``value`` is not one of the strings in ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {short(value)}")


def is_traced(value: Any) -> bool:
    """Returns whether a value is known only at run time: an argument of a function under jit, vmap or grad."""
    return isinstance(value, jax.core.Tracer)


def is_array(value: Any, *kinds: Any) -> bool:
    """Returns whether a value is a JAX or NumPy array and, given kinds such as ``jnp.integer``, has a dtype of one of them."""
    return isinstance(value, jax.Array | np.ndarray) and (not kinds or any(jnp.issubdtype(value.dtype, kind) for kind in kinds))


def is_symbolic(*sizes: Any) -> bool:
    """Returns whether a size is unknown until the program runs: a symbolic dimension of ``jax.export``."""
    return any(map(jax.export.is_symbolic_dim, sizes))


def round_up(size: Any, multiple: int) -> Any:
    """Rounds ``size`` up to a multiple, in a form that makes symbolic dimensions divisible by it."""
    return (size + multiple - 1) // multiple * multiple


def check_dtype(name: str, dtype: Any, *kinds: Any) -> np.dtype:
    """Converts to a dtype; raises ValueError if it is not a dtype of one of the kinds, such as ``jnp.floating``."""
    try:
        found = jnp.dtype(dtype) if isinstance(dtype, str | type | np.dtype) else None
    except TypeError:
        found = None
    if found is None or not any(jnp.issubdtype(found, kind) for kind in kinds):
        raise ValueError(f"{name} must be a dtype of {' or '.join(kind.__name__ for kind in kinds)} numbers, got {short(dtype)}")
    return found


def require(what: str, *modules: str, extra: str = "lab") -> None:
    """Raises ModuleNotFoundError with installation instructions if modules are missing.

    Args:
      what: the feature that needs them, for the message.
      modules: names of top-level modules.
      extra: the extra of posjax that installs them.
    """
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise ModuleNotFoundError(f"{what} needs {', '.join(missing)}: pip install 'posjax[{extra}]'", name=missing[0])


def _is_installed(name: str) -> bool:
    try:
        return sys.modules.get(name) is not None or importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def short(value: Any) -> str:
    """Formats a value for a message in one line: an array as its dtype and shape, anything else as the beginning of its repr."""
    if is_array(value) and (value.size != 1 or is_traced(value) or value.dtype == object):
        return f"{value.dtype}{list(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F))}


def printable(text: str) -> str:
    """Returns a text with control characters, which a terminal would execute, as escapes; line ends and tabs stay.

    Bytes of a file name that are not UTF-8 become escapes, too, so that the text can be encoded.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    return text.translate({code: escape for code, escape in _CONTROLS.items() if chr(code) not in "\n\t"})


def near(word: str, candidates: Iterable[str]) -> str:
    """Returns the end of a message about an unknown word: a suggestion of the closest candidate, or an empty string."""
    close = difflib.get_close_matches(str(word), list(candidates), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# Memory ---------------------------------------------------------------------------------------------------------------


def check_fits(what: str, shapes: Any, count: Number = 1) -> None:
    """Raises ValueError if ``count`` copies of a tree of arrays, or of their shapes, take more memory than the host or a device."""
    leaves = [leaf for leaf in jax.tree.leaves(shapes) if hasattr(leaf, "shape")]
    size = count * sum(math.prod(leaf.shape) * _itemsize(leaf.dtype) for leaf in leaves)
    if size > (limit := memory()):
        raise ValueError(f"{what} must fit the memory of this machine, {limit / 2**30:,.0f} GiB, got {size / 2**30:,.0f} GiB")


def _itemsize(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.extended) else np.dtype(dtype).itemsize


@functools.cache
def memory() -> int:
    """Returns the memory of the host, up to the limits of this process, or of a device, whichever is larger, in bytes."""
    host = min(_host_limits(), default=2**40)
    stats = (device.memory_stats() for device in jax.local_devices())
    return max(host, *((own or {}).get("bytes_limit", 0) for own in stats))


def _host_limits() -> Iterator[int]:
    """Yields the physical memory, and the limits that containers and ``ulimit`` set, in bytes, where the system tells them."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        yield os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            yield int((Path("/sys/fs/cgroup") / limit).read_text())
    with contextlib.suppress(ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit


# What annotations accept ----------------------------------------------------------------------------------------------


@functools.cache
def _checks_of(cls: type) -> tuple[tuple[str, tuple[Any, ...], Bounds], ...]:
    """Returns name, kinds and bounds of every field of a dataclass whose annotation can be checked."""
    try:
        hints = typing.get_type_hints(cls)
    except Exception:  # an annotation names something that is not defined at run time
        hints = {field.name: field.type for field in dataclasses.fields(cls)}
    fields = ((field, _kinds(hints.get(field.name))) for field in dataclasses.fields(cls))
    return tuple((field.name, kinds, field.metadata.get("bounds", Bounds())) for field, kinds in fields if kinds)


def _kinds(annotation: Any, classes: bool = False) -> tuple[Any, ...] | None:
    """Returns the kinds of an annotation: bases, ("one of", values) and ("many", kinds); None if any part is something else.

    With ``classes``, a class is a kind, too, and a sequence stands for a tuple or list.
    """
    annotation = types.NoneType if annotation is None else annotation
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if found := [base for base in _BASES if annotation is base or origin is base]:
        return tuple(found)
    if origin is Literal:
        return (("one of", args),)
    if (origin is tuple and len(args) == 2 and args[1] is Ellipsis) or (classes and origin is Sequence):
        kinds = _kinds(args[0], classes)
        return None if kinds is None else (("many", kinds),)
    if origin not in (typing.Union, types.UnionType):
        cls = origin or annotation
        return (cls,) if classes and isinstance(cls, type) and cls not in (object, Any) else None
    parts = [_kinds(arg, classes) for arg in args]
    return None if None in parts else tuple(kind for part in parts for kind in part)


def _checked(name: str, given: Any, kinds: tuple[Any, ...], bounds: Bounds) -> Any:
    value = given.item() if isinstance(given, np.generic) else given
    faults = []
    for kind in kinds:
        fault = _fault(value, kind, bounds)
        if fault is None:
            return tuple(value) if isinstance(value, list) else value
        faults.append(fault)
    hint = f"; {bounds.hint}" if bounds.hint else ""
    if fault := next(filter(None, faults), ""):  # the type is right
        got = f"shape {np.shape(value)}" if fault.startswith("be one number") else short(given)
        raise ValueError(f"{name} must {fault}, got {got}{hint}")
    raise ValueError(f"{name} must be {_words(kinds, bounds)}, got {short(given)}{hint}")


def _fault(value: Any, kind: Any, bounds: Bounds) -> str | None:
    """Returns what a kind requires of a value, in words: None if the value satisfies it, "" if it has another type."""
    if kind is jax.Array:
        return _fault_of_array(value, bounds) if is_array(value) else ""
    if kind is int or kind is float:
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return ""
        return _fault_of_int(value, bounds) if kind is int else _fault_of_float(value, bounds)
    if not isinstance(kind, tuple):
        return None if (callable(value) if kind is Callable else isinstance(value, kind)) else ""
    if kind[0] == "one of":
        return None if any(type(value) is type(one) and value == one for one in kind[1]) else ""
    if not isinstance(value, tuple | list):
        return ""
    each = ([_fault(one, own, bounds) for own in kind[1]] for one in value)
    return None if all(None in faults for faults in each) else ""


def _fault_of_int(value: int, bounds: Bounds) -> str | None:
    most = INT32 if bounds.most is None else bounds.most
    least = -INT32 if bounds.least is None else bounds.least
    if value > most:
        return f"be {bounds.of_int(exceeds=True)}"
    return None if value >= least else bounds.what or f"be {bounds.of_int()}"


def _fault_of_float(value: Number, bounds: Bounds) -> str | None:
    if math.inf in (value, -value) or value != value:
        if bounds.of_float() == "be a finite number":
            return ""
        return bounds.of_float() + (" and finite" if value == value and bounds.what is None else "")
    if not bounds.hold(value):
        return bounds.of_float()
    if abs(value) > _LARGEST or 0 < abs(value) < _TINIEST or not bounds.hold(float(np.float32(value))):
        return f"{bounds.of_float()} in float32, which holds {_TINIEST:.1e} to {_LARGEST:.1e}"
    return None


def _fault_of_array(value: Any, bounds: Bounds) -> str | None:
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        return ""
    if bounds.rank is not None and value.ndim > bounds.rank:
        return "be one number"
    # NumPy, because inside jit a jax operation returns a tracer even for a concrete array.
    return None if is_traced(value) or value.ndim else _fault_of_float(float(np.asarray(value)), bounds)


def _words(kinds: tuple[Any, ...], bounds: Bounds) -> str:
    kinds = tuple(kind for kind in kinds if kind is not int or float not in kinds)
    words = [word for kind in kinds for word in _nouns(kind, bounds)]
    words.sort(key=lambda word: (word == "None", word in _ARRAYS))  # numbers first, then arrays, None last
    if len(words) == 2 and words[1] in _ARRAYS:
        return ", or ".join(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


_ARRAYS = "a traced scalar", "an array of numbers"


def _nouns(kind: Any, bounds: Bounds) -> list[str]:
    if isinstance(kind, tuple):
        return list(map(repr, kind[1])) if kind[0] == "one of" else [f"a tuple, each {_words(kind[1], bounds)}"]
    if kind is int:
        return [bounds.of_int()]
    if kind is jax.Array:
        return [_ARRAYS[bounds.rank is None]]
    if kind is not float:
        words = {bool: "True or False", str: "a string", Callable: "a function", types.NoneType: "None", os.PathLike: "a path"}
        return [words.get(kind) or f"{'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}"]
    verb, _, rest = ("be", "", "a finite number") if bounds.what else bounds.of_float().partition(" ")
    if verb == "lie":
        return [f"a number {rest}"]
    return [{"positive": "a positive number", "a finite number": rest}.get(rest, f"a number of {rest}")]
