"""``posjax bench tune``: tunes the block sizes of the attention kernels for the GPU of this machine.

    python -m posjax.bench.tune --out runs/tune        # needs only jax, flax and optax

A kind of call is a line of posjax/attention/backends/gpu/gpu_blocks.json: bytes per number, maximum channels, and whether the
encoding is contextual; each lowering may have a line. The search starts from the blocks in the table and moves to the fastest
neighbor, which differs in one size, until no neighbor is faster, forward and backward together. Blocks that fail to compile or
produce wrong results are excluded, with the reason. The faster lowering becomes the preferred one.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from posjax.attention.api import attention
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.gpu import blocks as gpu_blocks
from posjax.attention.backends.gpu.blocks import LOWERINGS, GpuBlocks, blocks_for, capability, check_gpu_blocks
from posjax.attention.call import AttentionCall
from posjax.attention.call import prepare as prepare_call
from posjax.bench import inputs, results
from posjax.bench.attention import Row, make_folder, show_progress, versions
from posjax.bench.contestants import Prepared, counts
from posjax.bench.gpu_machine import LATE, Clock, check_gpu, hardware, milliseconds, reason, side_by_side
from posjax.checks import check_at_least
from posjax.encodings.spec import parse_encoding

FILES = ("gpu_blocks.json", "tune.json")
SHIPPED = Path(gpu_blocks.__file__).with_name("gpu_blocks.json")
CHANNELS = (64, 128, 288)  # maximum channels per line of the table; 288: heads of up to 256, and of 128 with TUPE's positions
_GAIN = 0.99  # relative time below which blocks count as faster; smaller differences are noise
# Relative errors that rounding cannot explain: of the output, and of gradients, which are discontinuous at integer counts.
_WRONG, _WRONG_GRADIENT = 2.0**-4, 0.5
_FORWARD, _BOTH = "forward_ms", "ms"


@dataclasses.dataclass(frozen=True)
class Tune:
    """Searches for the fastest block sizes of the attention kernels on the GPU of this machine, for each kind of call.

    Attributes:
      dtypes: dtypes of query, key and value; each represents all dtypes of its size.
      channels: maximum channels per head.
      encodings: one encoding that is not contextual and one that is, as representatives; the mean gate is 0.5.
      seconds: time limit; kinds of calls that the search does not reach keep their blocks.
      length: sequence length in tokens.
      heads: N, number of heads.
      repeats: number of rounds in which the compared blocks are timed in turn.
      out: folder for gpu_blocks.json and tune.json.
    """

    dtypes: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    channels: tuple[Literal[64, 128, 288], ...] = (128, 64, 288)
    encodings: tuple[str, ...] = ("identity", "cope(64)")
    seconds: float = 900.0
    length: int = 8192
    heads: int = 16
    repeats: int = 5
    out: str = "runs/tune"

    def __post_init__(self) -> None:
        for name in ("dtypes", "channels", "encodings"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty, got ()")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must all differ, got {getattr(self, name)}")
        for size in self.channels:
            if size not in CHANNELS:
                raise ValueError(f"channels must be among {', '.join(map(str, CHANNELS))}, got {size}")
        for spec in self.encodings:
            if isinstance(parse_encoding(spec), tuple):
                raise ValueError(f"encodings must each be for one layer, got {spec!r}; list the encodings of its layers separately")
        if len(set(map(counts, self.encodings))) < len(self.encodings):
            raise ValueError(f"encodings must have at most one that is contextual and one that is not, got {self.encodings}")
        check_at_least("length", self.length, 2)
        for name in ("heads", "repeats"):
            check_at_least(name, getattr(self, name), 1)
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")


Kind = tuple[str, int, str]  # dtype, channels, encoding
Measure = Callable[[Sequence[GpuBlocks]], list[float | str]]  # milliseconds, or why there is no time
Neighbours = Callable[[GpuBlocks, bool], Sequence[GpuBlocks]]


def neighbours(blocks: GpuBlocks, counting: bool) -> list[GpuBlocks]:
    """Returns the neighbors of blocks: one size halved or doubled, or one pipeline stage more or less.

    block_kv_count never exceeds block_kv, and block_q_rows never exceeds block_q.
    """
    sizes = ("block_q", "block_kv", "block_q_rows", "num_warps", *(("block_kv_count",) if counting else ()))
    tried = [blocks._replace(**{name: size}) for name in sizes for size in (getattr(blocks, name) // 2, getattr(blocks, name) * 2)]
    tried += [blocks._replace(num_stages=blocks.num_stages + more) for more in (-1, 1)]
    tried = [
        b._replace(block_kv_count=min(b.block_kv_count, b.block_kv), block_q_rows=min(b.block_q_rows, b.block_q)) for b in tried
    ]
    return [b for b in dict.fromkeys(tried) if b != blocks and _is_possible(b)]


def _is_possible(blocks: GpuBlocks) -> bool:
    try:
        check_gpu_blocks(blocks)
    except ValueError:
        return False
    return True


def run(config: Tune, quiet: bool = False, anywhere: bool = False, near: Neighbours = neighbours) -> list[Row]:
    """Runs the search and writes gpu_blocks.json and tune.json after every kind of call, and when interrupted.

    Args:
      config: the settings of the search.
      quiet: hides the progress on the terminal.
      anywhere: also runs without a GPU, with interpreted kernels.
      near: (blocks, whether the calls are contextual) -> the neighbors of blocks.

    Returns:
      A row for each combination of kind and blocks that was tried, as in tune.json. The notes of a failed row give the reason.

    Raises:
      NotImplementedError: there is no GPU that the kernels support.
      ValueError: the folder is not writable.
    """
    begun = time.perf_counter()
    if not anywhere:
        check_gpu("posjax bench tune", f"Without one, the kernels use the blocks in {SHIPPED}")
    out, rows = make_folder(config.out), []
    kinds = list(itertools.product(config.dtypes, config.channels, config.encodings))
    try:
        with show_progress(quiet) as progress:
            for number, kind in enumerate(kinds):
                clock = Clock((config.seconds - (time.perf_counter() - begun)) / (len(kinds) - number))
                tell = functools.partial(progress, done=number, total=len(kinds))
                rows += _search(config, kind, clock, tell, near)
                _write(rows, config, out)
    finally:
        _write(rows, config, out)
    return rows


def _write(rows: Sequence[Row], config: Tune, out: Path) -> None:
    lines = table(json.loads(SHIPPED.read_text()), capability(), rows)
    (out / FILES[0]).write_text(text_of(lines))
    results.write_json(rows, dataclasses.asdict(config), hardware(), versions(), out / FILES[1])


def table(lines: Sequence[Row], capability: int, rows: Sequence[Row]) -> list[Row]:
    """Returns the lines of a table with those of one compute capability replaced.

    The new lines have the best blocks of each lowering, the fastest first; lowerings without a result keep the package's blocks.
    """
    new_lines = []
    for dtype, channels, counting in itertools.product(("bfloat16", "float32"), CHANNELS, (False, True)):
        kind = {"capability": capability, "bytes": jnp.dtype(dtype).itemsize, "channels": channels, "counts": counting}
        kind_rows = [row for row in rows if (row["dtype"], row["channels"], row["counts"]) == (dtype, channels, counting)]
        best = sorted((row for row in kind_rows if row["best"]), key=lambda row: row[_BOTH])
        tuned = {row["blocks"]["lowering"]: row["blocks"] for row in best}
        shipped = {blocks.lowering: blocks._asdict() for blocks in _starts(capability, dtype, channels, counting)}
        new_lines += [kind | blocks for blocks in (tuned | {name: x for name, x in shipped.items() if name not in tuned}).values()]
    others = [line for line in lines if line["capability"] != capability]
    return sorted([*others, *new_lines], key=lambda line: [line[name] for name in ("capability", "bytes", "channels", "counts")])


def text_of(lines: Sequence[Row]) -> str:
    """Formats the lines of a table as the text of its file."""
    return "[\n" + ",\n".join(f" {json.dumps(line)}" for line in lines) + "\n]\n"


def _starts(capability: int, dtype: str, channels: int, counting: bool) -> list[GpuBlocks]:
    """Returns the package's blocks for each lowering that supports such calls, the preferred one first."""
    first = blocks_for(capability, dtype, channels, counting)
    starts = [first]
    for lowering in LOWERINGS:
        with contextlib.suppress(ValueError):
            starts.append(blocks_for(capability, dtype, channels, counting, lowerings=(lowering,)))
    return list(dict.fromkeys(starts))


# One kind of call -------------------------------------------------------------------------------------------------------


def _search(config: Tune, kind: Kind, clock: Clock, tell: Callable[[str], None], near: Neighbours) -> list[Row]:
    """Searches for the blocks of one kind of call, and returns the rows of all blocks that were tried."""
    dtype, channels, spec = kind
    fields = {"dtype": dtype, "channels": channels, "counts": counts(spec), "encoding": spec}
    starts = _starts(capability(), dtype, channels, counts(spec))
    first = starts[0]
    rows: dict[GpuBlocks, Row] = {}

    def row(blocks: GpuBlocks) -> Row:
        empty = {_BOTH: None, _FORWARD: None, "present": blocks == first, "best": False, "notes": []}
        return rows.setdefault(blocks, fields | {"blocks": blocks._asdict()} | empty)

    row(first)
    if clock.left <= 0:
        rows[first]["notes"].append(LATE)
        return list(rows.values())
    bench = _Bench(config, kind, clock)

    def measure(several: Sequence[GpuBlocks]) -> list[float | str]:
        tell(f"{dtype}, {channels} channels, {spec}: {len(rows)} tried")
        answers = bench.measure(several, with_gradients=True)
        for blocks, answer in zip(several, answers, strict=True):
            row(blocks)[_BOTH] = None if isinstance(answer, str) else answer
            row(blocks)["notes"] = [answer] if isinstance(answer, str) else []
        return answers

    ends = {start: walk(start, measure, lambda blocks: near(blocks, counts(spec))) for start in starts}
    ends = {start: end for start, end in ends.items() if end is not None}
    if ends:
        last = tuple(dict.fromkeys((*ends, *ends.values())))
        if len(last) > 1:
            measure(last)  # these may not have been timed together before
        best = [min(pair, key=lambda blocks: rows[blocks][_BOTH] or math.inf) for pair in ends.items()]
        for blocks, answer in zip(last, bench.measure(last, with_gradients=False), strict=True):
            rows[blocks][_FORWARD] = None if isinstance(answer, str) else answer
            rows[blocks]["best"] = blocks in best and rows[blocks][_BOTH] is not None
    return list(rows.values())


def walk(first: GpuBlocks, measure: Measure, near: Callable[[GpuBlocks], Sequence[GpuBlocks]]) -> GpuBlocks | None:
    """Descends from the first blocks to blocks that no neighbor beats by more than noise; returns None if no blocks ran.

    Neighbors are timed in the same rounds as the blocks that they are compared with.
    """
    tried, center = {first}, first
    while True:
        new = [blocks for blocks in near(center) if blocks not in tried]
        tried.update(new)
        answers = dict(zip((center, *new), measure((center, *new)), strict=True))
        times = {blocks: answer for blocks, answer in answers.items() if not isinstance(answer, str)}
        if not times:
            return None
        best = min(times, key=times.get)
        if best == center or (center in times and times[best] > _GAIN * times[center]):
            return center
        center = best


class _Bench:
    """Holds the inputs of a kind of call, the expected results, and the programs compiled so far."""

    def __init__(self, config: Tune, kind: Kind, clock: Clock):
        dtype, channels, spec = kind
        self.repeats, self.clock, self.encoding = config.repeats, clock, parse_encoding(spec)
        sizes = SimpleNamespace(batch=1, heads=config.heads, head_dim=min(channels, 256), dtype=dtype)
        arrays = inputs.make_inputs(spec, "half", config.length, sizes, None)
        call_inputs = {name: jnp.asarray(arrays[name], dtype) for name in ("query", "key", "value", "hidden") if name in arrays}
        call_inputs["params"] = jax.tree.map(jnp.asarray, inputs.unflatten(arrays))
        self.args = call_inputs, jnp.asarray(arrays["cotangent"], dtype)
        self.programs: dict[tuple[GpuBlocks, bool], Prepared | str] = {}
        (expected,) = side_by_side([lambda: self._compiled(self._in_tiles, True)()], clock)
        self.expected = expected  # the results of xla_chunked, or why there are none

    def measure(self, several: Sequence[GpuBlocks], with_gradients: bool) -> list[float | str]:
        """Returns the milliseconds of each of ``several`` blocks, or the reason of a failure."""
        if isinstance(self.expected, str):
            return [self.expected] * len(several)
        new = [blocks for blocks in dict.fromkeys(several) if (blocks, with_gradients) not in self.programs]
        tasks = [functools.partial(self._prepared, blocks, with_gradients) for blocks in new]
        for blocks, program in zip(new, side_by_side(tasks, self.clock), strict=True):
            self.programs[blocks, with_gradients] = program if isinstance(program, str) else self._checked(program, with_gradients)
        ready = {b: self.programs[b, with_gradients] for b in several if not isinstance(self.programs[b, with_gradients], str)}
        rounds = dict(zip(ready, milliseconds(list(ready.values()), self.repeats, self.clock), strict=True))
        times = [rounds.get(b, self.programs[b, with_gradients]) for b in several]
        return [t if isinstance(t, str) else min(t) for t in times]

    def _prepared(self, blocks: GpuBlocks, with_gradients: bool) -> Prepared:
        check_gpu_blocks(blocks)
        if (why := self._unsupported_reason(blocks)) is not None:
            raise NotImplementedError(why)
        launch = self._compiled(functools.partial(self._in_kernel, blocks), with_gradients)
        return Prepared(call=lambda: jax.block_until_ready(launch()), launch=launch, fetch=dict)

    def _checked(self, prepared: Prepared, with_gradients: bool) -> Prepared | str:
        """Returns a program if the results of its first call are right, else a description of the error."""
        try:
            results = prepared.call()
        except Exception as error:  # e.g. too little shared memory
            return reason(error)
        off, *gradients = map(float, _distances(results, self.expected if with_gradients else self.expected[0]))
        right = off < _WRONG and all(x < _WRONG_GRADIENT for x in gradients)  # false for NaN
        worst = max(gradients, default=0.0)
        return prepared if right else f"wrong: relative error {off:.1e} of the output, {worst:.1e} of gradients"

    def _compiled(self, forward: Callable[[Any], Any], with_gradients: bool) -> Callable[[], Any]:
        def both(given: Any, cotangent: Any) -> Any:
            out, pull = jax.vjp(forward, given)
            return out, pull(cotangent)[0]

        args = self.args if with_gradients else self.args[:1]
        program = jax.jit(both if with_gradients else forward).lower(*args).compile()
        return lambda: program(*args)

    def _call(self, given: Row) -> AttentionCall:
        args = given["query"], given["key"], given["value"], self.encoding, given["params"]
        return prepare_call(*args, is_causal=True, hidden=given.get("hidden"))

    def _unsupported_reason(self, blocks: GpuBlocks) -> str | None:
        return gpu.unsupported_reason(self._call(self.args[0]), block_sizes=blocks)

    def _in_kernel(self, blocks: GpuBlocks, given: Row) -> Any:
        return gpu.attention(self._call(given), block_sizes=blocks)

    def _in_tiles(self, given: Row) -> Any:
        return attention(**given, encoding=self.encoding, is_causal=True, implementation="xla_chunked")


@jax.jit
def _distances(results: Any, expected: Any) -> list[Any]:
    """Computes the relative error of each array, the norm of the difference over the norm; NaN if a number is not finite."""
    pairs = zip(*(map(jnp.float32, jax.tree.leaves(tree)) for tree in (results, expected)), strict=True)
    return [jnp.linalg.norm((one - other).ravel()) / jnp.linalg.norm(other.ravel()) for one, other in pairs]


# Tables -----------------------------------------------------------------------------------------------------------------

LEGEND = (
    "Blocks are block_q/block_kv/block_kv_count/block_q_rows/num_warps/num_stages/lowering; now: the package's current blocks. ms: "
    "time of the best blocks, forward and backward. x, x fwd: time of the current blocks over that, with and without the backward "
    f"pass. Pass a line of gpu_blocks.json as pj.attention(block_sizes=pj.GpuBlocks(...)), or replace {SHIPPED} by the file "
    "to make it the default."
)


def groups(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """Returns a single table of all kinds: (heading, column heads, cells, notes)."""
    lines, notes = [], []
    for kind in dict.fromkeys((row["dtype"], row["channels"], row["encoding"]) for row in rows):
        kind_rows = [row for row in rows if (row["dtype"], row["channels"], row["encoding"]) == kind]
        (now,), best = [row for row in kind_rows if row["present"]], [row for row in kind_rows if row["best"]]
        best = min(best, key=lambda row: row[_BOTH], default=None)
        name = f"{kind[0]}, {kind[1]}, {kind[2]}"
        numbers = [_ratio(now, best, _BOTH), _ratio(now, best, _FORWARD)]
        milli = "" if best is None or best[_BOTH] is None else f"{best[_BOTH]:.2f}"
        lines.append([name, _named(best), _named(now), milli, *numbers, str(len(kind_rows))])
        notes += [f"{name}, {_named(row)}: {note}" for row in kind_rows for note in row["notes"]]
    return [("block sizes", ["call", "best", "now", "ms", "x", "x fwd", "tried"], lines, notes)]


def _named(row: Row | None) -> str:
    return "" if row is None else "/".join(map(str, row["blocks"].values()))


def _ratio(now: Row, best: Row | None, name: str) -> str:
    return "" if best is None or not now[name] or not best[name] else f"{now[name] / best[name]:.2f}"


def show(rows: Sequence[Row]) -> None:
    """Prints the table."""
    for group in groups(rows):
        results.print_table(*group)
    results.print_text(LEGEND)


if __name__ == "__main__":
    from posjax.bench import command, tune

    command.main(tune, tune.Tune)
