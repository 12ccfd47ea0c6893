"""``posjax bench tune``: tunes the block sizes of the attention kernels for the GPU of this machine.

    python -m posjax.bench.tune --out runs/tune        # with nothing installed beyond jax, flax and optax

A kind of call is a line of posjax/attention/backends/gpu/gpu_blocks.json: bytes per number, maximum channels, and whether the
encoding is contextual; each lowering may have a line. The search starts from the blocks of the table and moves to the fastest
neighbor, which differs in one size, until no neighbor is faster in forward and backward together. Blocks that fail to compile or
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
CHANNELS = (64, 128, 288)  # maximum channels of the lines; 288 is for heads of up to 256, and of 128 widened by untied positions
_GAIN = 0.99  # relative time below which blocks count as faster: smaller differences are noise
# Relative errors beyond rounding: of the output, and of gradients, which are discontinuous where a count crosses an integer.
_WRONG, _WRONG_GRADIENT = 2.0**-4, 0.5
_FORWARD, _BOTH = "forward_ms", "ms"


@dataclasses.dataclass(frozen=True)
class Tune:
    """Searches for the fastest block sizes of the attention kernels on the GPU of this machine, for each kind of call.

    Attributes:
      dtypes: dtypes of query, key and value; each stands for all dtypes of its size.
      channels: maximum channels per head.
      encodings: one encoding that is not contextual and one that is, as representatives; the mean gate is 0.5.
      seconds: time limit; kinds of calls that are not reached keep their blocks.
      length: sequence length in tokens.
      heads: N, number of heads.
      repeats: rounds in which the compared blocks are timed in turn.
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
                raise ValueError(f"channels must be of {', '.join(map(str, CHANNELS))}, got {size}")
        for spec in self.encodings:
            if isinstance(parse_encoding(spec), tuple):
                raise ValueError(f"encodings must each be for one layer, got {spec!r}; give its layers one by one")
        if len(set(map(counts, self.encodings))) < len(self.encodings):
            raise ValueError(f"encodings must be at most one that counts and one that does not, got {self.encodings}")
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

    Strips are never larger than the keys of a tile, nor rows than its queries.
    """
    sizes = ("block_q", "block_kv", "block_q_rows", "num_warps", *(("block_kv_count",) if counting else ()))
    made = [blocks._replace(**{name: size}) for name in sizes for size in (getattr(blocks, name) // 2, getattr(blocks, name) * 2)]
    made += [blocks._replace(num_stages=blocks.num_stages + more) for more in (-1, 1)]
    made = [b._replace(block_kv_count=min(b.block_kv_count, b.block_kv), block_q_rows=min(b.block_q_rows, b.block_q)) for b in made]
    return [b for b in dict.fromkeys(made) if b != blocks and _is_possible(b)]


def _is_possible(blocks: GpuBlocks) -> bool:
    try:
        check_gpu_blocks(blocks)
    except ValueError:
        return False
    return True


def run(config: Tune, quiet: bool = False, anywhere: bool = False, near: Neighbours = neighbours) -> list[Row]:
    """Runs the search and writes gpu_blocks.json and tune.json after every kind of call, and if interrupted.

    Args:
      config: what to search.
      quiet: hides the progress on the terminal.
      anywhere: also runs without a GPU, with interpreted kernels.
      near: (blocks, whether the calls are contextual) -> the neighbors of blocks.

    Returns:
      A row for each combination of kind and blocks that was tried, as in tune.json. The notes of a failed row have the reason.

    Raises:
      NotImplementedError: there is no GPU that the kernels support.
      ValueError: the folder cannot be written.
    """
    begun = time.perf_counter()
    if not anywhere:
        check_gpu("posjax bench tune", f"Without one the kernels take the blocks of {SHIPPED}")
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
    own = []
    for dtype, channels, counting in itertools.product(("bfloat16", "float32"), CHANNELS, (False, True)):
        kind = {"capability": capability, "bytes": jnp.dtype(dtype).itemsize, "channels": channels, "counts": counting}
        own_rows = [row for row in rows if (row["dtype"], row["channels"], row["counts"]) == (dtype, channels, counting)]
        best = sorted((row for row in own_rows if row["best"]), key=lambda row: row[_BOTH])
        found = {row["blocks"]["lowering"]: row["blocks"] for row in best}
        shipped = {blocks.lowering: blocks._asdict() for blocks in _starts(capability, dtype, channels, counting)}
        own += [kind | blocks for blocks in (found | {name: x for name, x in shipped.items() if name not in found}).values()]
    others = [line for line in lines if line["capability"] != capability]
    return sorted([*others, *own], key=lambda line: [line[name] for name in ("capability", "bytes", "channels", "counts")])


def text_of(lines: Sequence[Row]) -> str:
    """Formats the lines of a table as the text of its file."""
    return "[\n" + ",\n".join(f" {json.dumps(line)}" for line in lines) + "\n]\n"


def _starts(capability: int, dtype: str, channels: int, counting: bool) -> list[GpuBlocks]:
    """Returns the package's blocks for each lowering that supports such calls, the preferred one first."""
    first = blocks_for(capability, dtype, channels, counting)
    found = [first]
    for lowering in LOWERINGS:
        with contextlib.suppress(ValueError):
            found.append(blocks_for(capability, dtype, channels, counting, lowerings=(lowering,)))
    return list(dict.fromkeys(found))


# One kind of call -------------------------------------------------------------------------------------------------------


def _search(config: Tune, kind: Kind, clock: Clock, tell: Callable[[str], None], near: Neighbours) -> list[Row]:
    """Searches the blocks of one kind of call, and returns the rows of all blocks that were tried."""
    dtype, channels, spec = kind
    about = {"dtype": dtype, "channels": channels, "counts": counts(spec), "encoding": spec}
    starts = _starts(capability(), dtype, channels, counts(spec))
    first = starts[0]
    rows: dict[GpuBlocks, Row] = {}

    def row(blocks: GpuBlocks) -> Row:
        empty = {_BOTH: None, _FORWARD: None, "present": blocks == first, "best": False, "notes": []}
        return rows.setdefault(blocks, about | {"blocks": blocks._asdict()} | empty)

    row(first)
    if clock.left <= 0:
        rows[first]["notes"].append(LATE)
        return list(rows.values())
    bench = _Bench(config, kind, clock)

    def measure(several: Sequence[GpuBlocks]) -> list[float | str]:
        tell(f"{dtype}, {channels} channels, {spec}: {len(rows)} tried")
        found = bench.measure(several, with_gradients=True)
        for blocks, answer in zip(several, found, strict=True):
            row(blocks)[_BOTH] = None if isinstance(answer, str) else answer
            row(blocks)["notes"] = [answer] if isinstance(answer, str) else []
        return found

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
    """Descends from the first blocks to blocks that no neighbor beats by more than noise; returns None if nothing ran.

    Neighbors are timed in the same rounds as the blocks that they are compared with.
    """
    tried, center = {first}, first
    while True:
        new = [blocks for blocks in near(center) if blocks not in tried]
        tried.update(new)
        found = dict(zip((center, *new), measure((center, *new)), strict=True))
        times = {blocks: answer for blocks, answer in found.items() if not isinstance(answer, str)}
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
        given = {name: jnp.asarray(arrays[name], dtype) for name in ("query", "key", "value", "hidden") if name in arrays}
        given["params"] = jax.tree.map(jnp.asarray, inputs.unflatten(arrays))
        self.args = given, jnp.asarray(arrays["cotangent"], dtype)
        self.programs: dict[tuple[GpuBlocks, bool], Prepared | str] = {}
        (made,) = side_by_side([lambda: self._compiled(self._in_tiles, True)()], clock)
        self.want = made  # the expected results, or why there are none

    def measure(self, several: Sequence[GpuBlocks], with_gradients: bool) -> list[float | str]:
        """Returns the milliseconds of each of ``several`` blocks, or why there is no time."""
        if isinstance(self.want, str):
            return [self.want] * len(several)
        new = [blocks for blocks in dict.fromkeys(several) if (blocks, with_gradients) not in self.programs]
        tasks = [functools.partial(self._prepared, blocks, with_gradients) for blocks in new]
        for blocks, made in zip(new, side_by_side(tasks, self.clock), strict=True):
            self.programs[blocks, with_gradients] = made if isinstance(made, str) else self._checked(made, with_gradients)
        ready = {b: self.programs[b, with_gradients] for b in several if not isinstance(self.programs[b, with_gradients], str)}
        rounds = dict(zip(ready, milliseconds(list(ready.values()), self.repeats, self.clock), strict=True))
        found = [rounds.get(b, self.programs[b, with_gradients]) for b in several]
        return [times if isinstance(times, str) else min(times) for times in found]

    def _prepared(self, blocks: GpuBlocks, with_gradients: bool) -> Prepared:
        check_gpu_blocks(blocks)
        if (why := self._refused(blocks)) is not None:
            raise NotImplementedError(why)
        launch = self._compiled(functools.partial(self._in_kernel, blocks), with_gradients)
        return Prepared(call=lambda: jax.block_until_ready(launch()), launch=launch, fetch=dict)

    def _checked(self, prepared: Prepared, with_gradients: bool) -> Prepared | str:
        """Returns a program if the results of its first call are right, else a description of the error."""
        try:
            found = prepared.call()
        except Exception as error:  # e.g. too little shared memory
            return reason(error)
        off, *gradients = map(float, _distances(found, self.want if with_gradients else self.want[0]))
        right = off < _WRONG and all(x < _WRONG_GRADIENT for x in gradients)  # false for NaN
        return prepared if right else f"wrong: the output by {off:.1e} of its norm, gradients by {max(gradients, default=0.0):.1e}"

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

    def _refused(self, blocks: GpuBlocks) -> str | None:
        return gpu.unsupported_reason(self._call(self.args[0]), block_sizes=blocks)

    def _in_kernel(self, blocks: GpuBlocks, given: Row) -> Any:
        return gpu.attention(self._call(given), block_sizes=blocks)

    def _in_tiles(self, given: Row) -> Any:
        return attention(**given, encoding=self.encoding, is_causal=True, implementation="xla_chunked")


@jax.jit
def _distances(found: Any, want: Any) -> list[Any]:
    """Computes the relative error of each array, the norm of the difference over the norm; NaN if a number is not finite."""
    pairs = zip(*(map(jnp.float32, jax.tree.leaves(tree)) for tree in (found, want)), strict=True)
    return [jnp.linalg.norm((one - other).ravel()) / jnp.linalg.norm(other.ravel()) for one, other in pairs]


# Tables -----------------------------------------------------------------------------------------------------------------

LEGEND = (
    "Blocks: queries, keys, strip, rows, warps, stages, lowering; now: those of the package. ms: forward and backward; x: that "
    "time now over the best, and of the forward pass alone. pj.attention takes a line of gpu_blocks.json as "
    f"block_sizes=pj.GpuBlocks(...); the whole file in place of {SHIPPED} makes it the default."
)


def groups(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """Returns a single table of all kinds: (heading, column heads, cells, notes)."""
    lines, notes = [], []
    for kind in dict.fromkeys((row["dtype"], row["channels"], row["encoding"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["channels"], row["encoding"]) == kind]
        (now,), best = [row for row in own if row["present"]], [row for row in own if row["best"]]
        best = min(best, key=lambda row: row[_BOTH], default=None)
        name = f"{kind[0]}, {kind[1]}, {kind[2]}"
        numbers = [_ratio(now, best, _BOTH), _ratio(now, best, _FORWARD)]
        milli = "" if best is None or best[_BOTH] is None else f"{best[_BOTH]:.2f}"
        lines.append([name, _named(best), _named(now), milli, *numbers, str(len(own))])
        notes += [f"{name}, {_named(row)}: {note}" for row in own for note in row["notes"]]
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
