"""Bad calls of the Python API from a seeded generator: right calls of every public function in which one argument is changed.

``bad_calls(seed)`` yields calls and ``verdict`` runs one. A call passes if it raises one clear line that names the argument, or if
it is right after all: the changed value is in the domain of its argument, which ``right_calls`` states by hand, and the call means
what the same call with a plain Python value means.

    PYTHONPATH=. python tests/bad_calls.py 5000 7               prints the faults among 5,000 calls of seed 7
    PYTHONPATH=. python tests/bad_calls.py 5000 7 laboratory    the same for the laboratory
"""

import collections
import contextlib
import dataclasses
import fractions
import math
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from right_calls import B, Call, H, N, Refused, T, calls

import posjax as pj

MOST_BYTES, MOST_SECONDS, MOST_LETTERS = 10**9, 10.0, 400


# What is changed -----------------------------------------------------------------------------------------------------------------


class Odd:
    """An object whose repr has several lines."""

    def __repr__(self) -> str:
        return "an odd\nobject"


SCALARS = [
    None,
    True,
    False,
    np.bool_(True),
    0,
    1,
    2,
    3,
    -1,
    -7,
    2.0,
    2.5,
    0.5,
    -0.5,
    1.0,
    1e-9,
    1e300,
    1e-300,
    math.nan,
    math.inf,
    -math.inf,
    10**9,
    10**12,
    10**18,
    -(10**12),
    10**400,
    np.int64(4),
    np.int32(3),
    np.int64(10**12),
    np.float32(0.5),
    np.float64(math.nan),
    1j,
    "64",
    "2.5",
    "no",
    "True",
    "rope",
    "",
    "half",
    "softmax",
    b"64",
    [],
    [2],
    (2,),
    (1, 2),
    (1, "2"),
    ("a",),
    {},
    {"a": 1},
    set(),
    Odd(),
    object(),
    len,
    int,
    np.zeros(3),
    np.array(3),
    np.array("a"),
    np.array([None, 2], dtype=object),
    np.zeros((0, 2)),
    range(3),
    Ellipsis,
    fractions.Fraction(1, 2),
    np.datetime64("2020"),
    NotImplemented,
]
# Arrays and values of posjax, made when they are drawn.
MADE = [
    lambda: jnp.ones(2),
    lambda: jnp.asarray(2.0),
    lambda: jnp.asarray(True),
    lambda: jnp.asarray(5),
    lambda: jax.random.key(0),
    lambda: jnp.asarray(math.nan),
    lambda: jnp.asarray(math.inf),
    lambda: jnp.asarray(0.25),
    lambda: jnp.ones((3, 3)),
    lambda: pj.rope(),
    lambda: pj.rope,
    lambda: pj.cope(8),
    lambda: pj.Dims(2, 8),
    lambda: jax.ShapeDtypeStruct((B, T, N, H), jnp.float32),
    lambda: [jnp.ones(2)],
]
OF_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "without its first axis": lambda x: x[0],
    "with one more axis": lambda x: x[None],
    "as integers": lambda x: x.astype(jnp.int32),
    "as booleans": lambda x: x.astype(bool),
    "as bfloat16": lambda x: x.astype(jnp.bfloat16),
    "as float32": lambda x: x.astype(jnp.float32),
    "as complex numbers": lambda x: x.astype(jnp.complex64),
    "without its last entries": lambda x: x[..., :-1],
    "empty": lambda x: x[:0],
    "twice": lambda x: jnp.concatenate([x, x]),
    "as NumPy's": np.asarray,
    "as a list": lambda x: np.asarray(x).tolist(),
    "negative": lambda x: -x.astype(jnp.int32) - 1,
    "as the name of its dtype": lambda x: str(x.dtype),
}


# What a message may name instead: arguments that no longer go with the one that is changed.
GO_WITH = {
    "encoding": ("is_causal", "params", "bias"),
    "tokens": ("positions", "segment_ids"),
    "spec": ("encoding",),
    "text": ("mesh", "sweep"),
    "path": ("config",),
}


@dataclasses.dataclass(frozen=True)
class BadCall:
    """A right call with one argument changed: name, argument, what was done, and the keyword arguments."""

    name: str
    call: Call = dataclasses.field(repr=False)
    argument: str
    change: str
    arguments: dict[str, Any]
    names: tuple[str, ...] = ()  # what a message may name instead of the argument

    def __str__(self) -> str:
        return f"{self.name}: {self.argument} {self.change}"


def bad_calls(seed: int, table: Mapping[str, Call] | None = None) -> Iterator[BadCall]:
    """Yields changed calls of a table, by default ``right_calls.calls()``, without end; the same for the same seed."""
    draw = random.Random(seed)
    table = calls() if table is None else table
    names, weights = list(table), [call.weight for call in table.values()]
    while True:
        name = draw.choices(names, weights)[0]
        call = table[name]
        arguments = {argument: value for argument, (value, _) in call.arguments.items()}
        argument = draw.choice(list(arguments))
        given = arguments[argument]
        is_array = isinstance(given, jax.Array) and not jnp.issubdtype(given.dtype, jax.dtypes.extended)
        kind = draw.random()
        if kind < 0.04 and len(argument) > 2:
            at = draw.randrange(len(argument))
            misspelt = argument[:at] + argument[at + 1 :]
            arguments[misspelt] = arguments.pop(argument)
            yield BadCall(name, call, misspelt, f"for {argument}", arguments, (argument,))
        elif kind < 0.08 and argument in call.required:
            del arguments[argument]
            yield BadCall(name, call, argument, "left out", arguments)
        elif is_array and kind < 0.6:
            change = draw.choice(list(OF_ARRAYS))
            yield BadCall(name, call, argument, change, arguments | {argument: OF_ARRAYS[change](given)})
        else:
            value = draw.choice([*SCALARS, *MADE])
            value = value() if any(value is make for make in MADE) else value
            yield BadCall(name, call, argument, f"= {' '.join(repr(value).split())[:60]}", arguments | {argument: value})


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(call: Call, arguments: dict[str, Any]) -> Any:
    """Returns the result of a call; of one that is traced, the program and its constants."""
    if not call.traced:
        return call.function(**arguments)
    program = jax.make_jaxpr(lambda: call.function(**arguments))()
    consts = [np.asarray(x).tobytes() for x in program.consts if not jnp.issubdtype(x.dtype, jax.dtypes.extended)]
    return re.sub(r"0x[0-9a-f]+", "", str(program)), consts


def verdict(bad: BadCall) -> str | None:
    """Runs a call; returns what is wrong with how posjax takes it, or None."""
    call = bad.call
    try:
        domain = call.arguments[bad.argument][1]
        means = domain(bad.arguments[bad.argument])
        is_right = True
    except (Refused, KeyError):
        is_right = False
    except Exception:  # the value cannot even be compared
        is_right = False
    before, start, error, result = _peak(), time.process_time(), None, None
    try:
        result = run(call, bad.arguments)
    except Exception as raised:
        error = raised
    seconds, grown = time.process_time() - start, _peak() - before  # of the processor: machines are shared
    if seconds > MOST_SECONDS:
        return f"takes {seconds:.0f} s"
    if grown > MOST_BYTES:
        return f"allocates {grown / 1e9:.1f} GB"
    if error is None:
        if not is_right:
            return "is accepted in silence"
        canonical = bad.arguments | {bad.argument: means}
        if call.equal and means is not bad.arguments[bad.argument] and run(call, canonical) != result:
            return f"does not mean the same as {means!r}"
        return None
    said = str(error)
    if not isinstance(error, TypeError | ValueError | NotImplementedError):
        return f"raises {type(error).__name__}: {said[:200]}"
    if "\n" in said.strip() or len(said) > MOST_LETTERS:
        return f"says too much, {len(said)} letters in {len(said.splitlines())} lines: {said[:200]!r}"
    names = "|".join(map(re.escape, (bad.argument, *bad.names, *GO_WITH.get(bad.argument, ()))))
    if not re.search(rf"(?<![a-zA-Z])({names})(?![a-zA-Z])", said, re.IGNORECASE):
        return f"does not name the argument: {type(error).__name__}: {said[:200]}"
    if is_right and isinstance(bad.arguments[bad.argument], np.generic):
        try:
            run(call, bad.arguments | {bad.argument: means})
        except Exception:
            return None
        return f"is refused although {means!r} is not: {said[:200]}"
    return None


def main(count: int, seed: int, table: Mapping[str, Call]) -> None:
    faults = collections.defaultdict(list)
    generator, wrong, slowest = bad_calls(seed, table), 0, (0.0, "")
    for number in range(count):
        bad = next(generator)
        start = time.perf_counter()
        if (fault := verdict(bad)) is not None:
            wrong += 1
            faults[f"{bad.name}: {bad.argument}"].append(f"{bad.change} {fault}")
        slowest = max(slowest, (time.perf_counter() - start, str(bad)))
        if number % 500 == 499:
            print(f"  {number + 1} calls, {wrong} wrong", file=sys.stderr, flush=True)
    for name, found in sorted(faults.items()):
        print(name)
        for one in sorted(set(found)):
            print("   ", one)
    print(f"{wrong} of {count} calls of seed {seed} are wrong; the slowest took {slowest[0]:.1f} s: {slowest[1]}")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:3]]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # some calls write to a folder named by a drawn word
        if "laboratory" in sys.argv:
            from right_calls_laboratory import laboratory_calls

            main(*numbers, laboratory_calls(Path(folder)))
        else:
            main(*numbers, calls())
