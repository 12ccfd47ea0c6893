"""``posjax bench schedule``: instruction bundles of attention as the TPU compiler schedules it, with no TPU attached.

    contestants x generations -> posjax.compile.aot, in separate processes -> kernels: loops, bundles of a tile, VMEM, HBM
        -> distance to the roofline of the chip: schedule.json, schedule.md

A bundle takes one cycle. The count excludes stalls on memory and on busy matrix units, so it is a lower bound on the time. It is
reproducible: the same program always has the same count.
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from posjax.attention.api import attention
from posjax.attention.backends.gpu.blocks import GpuBlocks
from posjax.attention.backends.tpu.blocks import Blocks
from posjax.bench import results
from posjax.bench.attention import Row, make_folder, show_progress, versions
from posjax.checks import check_at_least
from posjax.compile import aot
from posjax.core.encoding import Dims
from posjax.encodings.spec import parse_encoding
from posjax.hardware import GENERATIONS

FILES = ("schedule.json", "schedule.md")
_DEFAULT_TILE = 128  # tile size of splash's BlockSizes.get_default()
# Matrix products per tile, by a part of the kernel's name. Splash's fused backward kernel has the name of its dkv kernel.
_PRODUCTS = (("dq", 3), ("dkv", 4), ("fwd", 2), ("forward", 2), ("backward", 5))


@dataclasses.dataclass(frozen=True)
class ScheduleBench:
    """Compiles causal attention for TPUs that are not attached and counts the bundles of its kernels.

    Needs libtpu: pip install 'posjax[tpu-aot]'.

    Attributes:
      generations: TPU generations.
      encodings: encodings such as rope, "cope(64)" or "rope + cope(64)", compiled with implementation="pallas".
      passes: forward, or both: forward and backward with gradients of query, key, value and all parameters.
      seq_len: sequence length in tokens.
      heads: N, number of heads.
      kv_heads: K, number of key and value heads, a divisor of heads; None: heads.
      head_dim: H, channels per head.
      batch: B, batch size.
      dtype: dtype of query, key and value; parameters are float32.
      peers: includes splash attention, with its default block sizes and with ``tile``.
      tile: number of queries and keys per tile of splash attention.
      out: folder for schedule.json and schedule.md.
    """

    generations: tuple[Literal["v4", "v5e", "v5p", "v6e", "tpu7x"], ...] = ("v4", "v5e", "v5p", "v6e", "tpu7x")
    encodings: tuple[str, ...] = ("identity", "rope", "alibi", "t5", "tupe", "cope(64)", "rope + cope(64)")
    passes: tuple[Literal["forward", "both"], ...] = ("forward", "both")
    seq_len: int = 8192
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 128
    batch: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    peers: bool = True
    tile: int = 512
    out: str = "runs/bench"

    def __post_init__(self) -> None:
        for name in ("generations", "passes"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty, got ()")
        for name in ("generations", "encodings", "passes"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must all differ, got {getattr(self, name)}")
        if not self.encodings and not self.peers:
            raise ValueError("encodings must not be empty without peers, got ()")
        check_at_least("seq_len", self.seq_len, 2)
        for name in ("heads", "head_dim", "batch"):
            check_at_least(name, getattr(self, name), 1)
        if self.kv_heads is not None:
            check_at_least("kv_heads", self.kv_heads, 1)
            if self.heads % self.kv_heads:
                raise ValueError(f"kv_heads must divide heads={self.heads}, got {self.kv_heads}")
        if self.tile < 128 or self.tile % 128:
            raise ValueError(f"tile must be a multiple of 128, got {self.tile}")
        for spec in self.encodings:
            if isinstance(parse_encoding(spec), tuple):
                raise ValueError(f"encodings must each be for one layer, got {spec!r}; list the encodings of its layers separately")


def run(config: ScheduleBench, quiet: bool = False) -> list[Row]:
    """Compiles all contestants and writes schedule.json and schedule.md after each group of contestants.

    Returns:
      Rows in the order of generations, passes and contestants, as in schedule.json. The notes of a failed row give the reason.

    Raises:
      ImportError: libtpu is not installed.
      RuntimeError: no compilation could start, e.g. because libtpu does not support a generation.
      ValueError: the folder is not writable.
    """
    out = make_folder(config.out)
    chips = {name: dataclasses.asdict(GENERATIONS[name]) for name in config.generations}
    wanted = _contestants(config)
    jobs: dict[tuple[str, str], list[int]] = {}  # one process for both passes of an encoding, and one for splash
    for n, (fields, _) in enumerate(wanted):
        jobs.setdefault((fields["kind"], fields["encoding"]), []).append(n)
    rows: list[Row] = []
    with show_progress(quiet) as progress:
        for number, name in enumerate(config.generations):
            before, compiled = rows, {}
            for part, numbers in enumerate(jobs.values()):
                kind, encoding = wanted[numbers[0]][0]["kind"], wanted[numbers[0]][0]["encoding"]
                label = f"{name}: {encoding if kind == 'posjax' else kind}"
                progress(label, number * len(jobs) + part, len(config.generations) * len(jobs))
                reports = aot.compile_all([wanted[n][1] for n in numbers], GENERATIONS[name].topology)
                compiled |= {n: _row(config, name, wanted[n][0], report) for n, report in zip(numbers, reports, strict=True)}
                rows = before + [compiled[n] for n in sorted(compiled)]
                _write(rows, config, chips, out)
    return rows


def _write(rows: Sequence[Row], config: ScheduleBench, chips: Row, out: Path) -> None:
    results.write_json(rows, dataclasses.asdict(config), {"generations": chips}, versions(), out / FILES[0])
    text = [_heading(config), "", LEGEND, ""]
    text += [line for group in groups(rows) for line in results.markdown(*group)]
    (out / FILES[1]).write_text("\n".join(text).rstrip() + "\n")


def _heading(config: ScheduleBench) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in versions().items() if name in ("posjax", "jax", "libtpu"))
    heads = f"{config.heads} heads" + (f" over {config.kv_heads}" if config.kv_heads else "")
    return f"{packages}. {config.seq_len:,} tokens, batch {config.batch}, {heads} of {config.head_dim}, {config.dtype}, causal."


def _contestants(config: ScheduleBench) -> list[tuple[Row, aot.Job]]:
    """Returns (fields of its row, its compilation job) of every contestant, pass by pass."""
    sizes = {name: getattr(config, name) for name in ("seq_len", "heads", "head_dim", "batch", "dtype")}
    sizes["kv_heads"] = config.kv_heads or config.heads
    contestants: list[tuple[Row, aot.Job]] = []
    for direction in config.passes:
        for spec in config.encodings:
            fields = {"contestant": f"{spec}, pallas", "kind": "posjax", "encoding": spec, "pass": direction}
            job = sizes | {"spec": spec, "with_gradients": direction == "both"}
            contestants.append((fields, ("posjax.bench.schedule:posjax_job", job)))
        for tile in dict.fromkeys((_DEFAULT_TILE, config.tile)) if config.peers else ():
            for fused in (False, True) if direction == "both" else (False,):
                name = f"splash {tile} x {tile}" + (", fused backward" if fused else "")
                fields = {"contestant": name, "kind": "splash", "encoding": "identity", "pass": direction, "tile": [tile, tile]}
                job = sizes | {"tile": tile, "with_gradients": direction == "both", "fused": fused}
                contestants.append((fields, ("posjax.bench.schedule:splash_job", job)))
    return contestants


# In the compiler's process ----------------------------------------------------------------------------------------------


def posjax_job(
    spec: str,
    with_gradients: bool,
    seq_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    dtype: str,
    block_sizes: Sequence[int] | dict[str, Any] | None = None,
) -> tuple[Callable, tuple]:
    """Builds a call of posjax.attention for posjax.compile.aot; ``block_sizes`` is a dict for GPU kernels, a sequence for TPUs."""
    if block_sizes is not None:
        block_sizes = GpuBlocks(**block_sizes) if isinstance(block_sizes, dict) else Blocks(*block_sizes)
    encoding = parse_encoding(spec)
    dims = Dims(heads, head_dim, max_length=seq_len, num_kv_heads=kv_heads)

    def forward(query: Any, key: Any, value: Any, params: Any) -> Any:
        return attention(query, key, value, encoding, params, is_causal=True, implementation="pallas", block_sizes=block_sizes)

    params = jax.eval_shape(lambda: encoding.init(jax.random.key(0), dims))
    query = jax.ShapeDtypeStruct((batch, seq_len, heads, head_dim), dtype)
    key = jax.ShapeDtypeStruct((batch, seq_len, kv_heads, head_dim), dtype)
    return _maybe_both(forward, (query, key, key, params), query, with_gradients)


def splash_job(
    tile: int,
    with_gradients: bool,
    fused: bool,
    seq_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    batch: int,
    dtype: str,
) -> tuple[Callable, tuple]:
    """Builds a call of splash attention (jax.experimental.pallas) for posjax.compile.aot."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    names += () if fused else ("block_q_dq", "block_kv_dq")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys(names, tile), use_fused_bwd_kernel=fused)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((seq_len, seq_len))] * heads)
    kernel = splash_attention_kernel.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    query = jax.ShapeDtypeStruct((batch, heads, seq_len, head_dim), dtype)
    key = jax.ShapeDtypeStruct((batch, kv_heads, seq_len, head_dim), dtype)
    return _maybe_both(jax.vmap(kernel), (query, key, key), query, with_gradients)


def _maybe_both(forward: Callable, args: tuple, cotangent: Any, with_gradients: bool) -> tuple[Callable, tuple]:
    if not with_gradients:
        return forward, args

    def both(cotangent: Any, *args: Any) -> Any:
        out, pull = jax.vjp(forward, *args)
        return out, pull(cotangent)

    return both, (cotangent, *args)


# Rows -------------------------------------------------------------------------------------------------------------------


def _row(config: ScheduleBench, generation: str, fields: Row, report: aot.Report) -> Row:
    tile = fields.get("tile") or _posjax_tile(config, generation)
    row = {"generation": generation, **fields, "tile": tile, "compile_seconds": report.seconds, "device_kind": report.device_kind}
    row |= {"hbm_bytes": report.memory, "xla_flops": report.flops, "xla_bytes_accessed": report.bytes_accessed}
    row["kernels"] = [_kernel(config, generation, tile, "fused" in fields["contestant"], report, k) for k in report.kernels]
    row["notes"] = [] if report.failed is None else [report.failed.strip().split("\n")[0][:300]]
    return row


def _posjax_tile(config: ScheduleBench, generation: str) -> list[int] | None:
    """Returns the queries and keys of a tile of posjax's kernel; None if the package has no TPU kernel."""
    if importlib.util.find_spec("posjax.attention.backends.tpu.blocks") is None:
        return None
    from posjax.attention.backends.tpu.blocks import CHIPS

    blocks = CHIPS[generation].blocks(config.dtype, config.head_dim)
    return [blocks.block_q, blocks.block_kv]


def _kernel(
    config: ScheduleBench, generation: str, tile: Sequence[int] | None, fused: bool, report: aot.Report, kernel: aot.Kernel
) -> Row:
    """Describes a kernel for its row; variants that process a full tile have a distance to the roofline."""
    roofline = _roofline(config, generation, tile, fused, report, kernel.name) if tile else None
    forms = [
        dataclasses.asdict(work)
        | {"turn": turn, "has_loops": nested, "distance": turn / roofline if whole and roofline is not None else None}
        for work, turn, nested, whole in forms_of(kernel)
    ]
    return {
        "name": kernel.name,
        "bundles": kernel.bundles,
        "vmem_bytes": kernel.vmem,
        "loops": [dataclasses.asdict(loop) for loop in kernel.loops],
        "tiles": forms,
        "roofline_bundles": roofline,
    }


def forms_of(kernel: aot.Kernel) -> list[tuple[aot.Section, int, bool, bool]]:
    """Returns (work, bundles per iteration, whether the work has loops, whether it processes a full tile) of ``kernel.tiles``.

    Work on a strip of a tile does not process a full tile. Neither do loops next to the loop over tiles, such as one that rotates
    keys as they are loaded.
    """
    outermost = min((work.depth for work, _ in kernel.tiles), default=0)
    branches = any(work.kind == "branch" and work.depth == outermost for work, _ in kernel.tiles)
    forms = []
    for work, turn in kernel.tiles:
        nested = any(work.contains(loop) for loop in kernel.loops)
        whole = not nested and work.depth == outermost and (work.kind == "branch" or not branches)
        forms.append((work, turn, nested, whole))
    return forms


def _roofline(
    config: ScheduleBench, generation: str, tile: Sequence[int], fused: bool, report: aot.Report, name: str
) -> float | None:
    """Computes the bundles of a tile at the roofline, or returns None for a kernel whose matrix products are unknown.

    The roofline is the longer of two times: the matrix products at peak, and moving the inputs and outputs of the call once.
    """
    products = next((count for part, count in _PRODUCTS if part in name), None)
    if products is None:
        return None
    products = 5 if fused and "dkv" in name else products
    chip = GENERATIONS[generation]
    queries, keys = tile
    rows = range(0, config.seq_len, queries)
    tiles = config.batch * config.heads * sum(math.ceil(min(row + queries, config.seq_len) / keys) for row in rows)
    moved = (report.memory["argument"] + report.memory["output"]) / tiles
    return chip.clock * max(products * 2 * queries * keys * config.head_dim / chip.flops, moved / chip.bandwidth)


# Tables -----------------------------------------------------------------------------------------------------------------

LEGEND = (
    "tile: bundles of the work on a tile, for each variant (with and without a mask, counting a strip), and of other loops that "
    "multiply matrices; + if it contains loops, which count for one iteration. iteration: bundles of one iteration of the loop "
    "around the work, including other code in that loop. x roof: ratio of an iteration to the time of a full tile at the chip's "
    "peak (its matrix products, or moving inputs and outputs of the call once); below 1, the kernel would wait for the matrix "
    "units. Clock rates other than v4's are derived from published peaks. bundles: bundles of the whole kernel. VMEM: MB "
    "that the kernel occupies. HBM: peak MB of the whole call."
)
_HEADS = ["contestant", "kernel", "tile", "iteration", "x roof", "bundles", "VMEM", "HBM"]


def groups(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """Returns (heading, column heads, cells, notes) for each generation and pass, with a line for each kernel."""
    tables = []
    for generation, direction in dict.fromkeys((row["generation"], row["pass"]) for row in rows):
        group = [row for row in rows if (row["generation"], row["pass"]) == (generation, direction)]
        lines, notes = [], {}
        for row in group:
            lines += [_cells(row, kernel, first=n == 0) for n, kernel in enumerate(row["kernels"])]
            if not row["kernels"]:
                lines.append([row["contestant"], "", *["-"] * (len(_HEADS) - 2)])
            for note in row["notes"]:
                notes.setdefault(note, []).append(row["contestant"])
        texts = [f"{'; '.join(who)}: {note}" for note, who in notes.items()]
        tables.append((f"{generation}, {'forward' if direction == 'forward' else 'forward and backward'}", _HEADS, lines, texts))
    return tables


def _cells(row: Row, kernel: Row, first: bool) -> list[str]:
    tiles, peak = kernel["tiles"], row["hbm_bytes"].get("peak")
    return [
        row["contestant"] if first else "",
        re.sub(r"splash_mha_|posjax_attention_|jvp_|transpose_|_*\.\d+$", "", kernel["name"]),
        " / ".join(f"{form['bundles']}{'+' if form['has_loops'] else ''}" for form in tiles),
        " / ".join(str(form["turn"]) for form in tiles),
        " / ".join("" if form["distance"] is None else f"{form['distance']:.1f}" for form in tiles),
        "" if kernel["bundles"] is None else str(kernel["bundles"]),
        "" if kernel["vmem_bytes"] is None else f"{kernel['vmem_bytes'] / 1e6:.1f}",
        f"{peak / 1e6:.0f}" if first and peak is not None else "",
    ]


def show(rows: Sequence[Row]) -> None:
    """Prints the tables."""
    for group in groups(rows):
        results.print_table(*group)
    results.print_text(LEGEND)
