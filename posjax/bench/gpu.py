"""``posjax bench gpu``: speed and accuracy of the attention kernels on this machine's GPU, in one run of about eight minutes.

    python -m posjax.bench.gpu --out runs/gpu        # needs only jax, flax and optax

    speed      attention over 8,192 tokens, forward and backward, interleaved: cuDNN, no position, RoPE, CoPE, RoPE + CoPE
    accuracy   each encoding and dtype against float32 on the CPU, compared with XLA's dense attention here; bitwise repeatability
    decoder    1.1 billion parameters: tokens per second of prefill and of a train step

A section ends when its share of the time has elapsed, and notes what it omitted. gpu.json is rewritten after every row.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from posjax import plots
from posjax.bench import results
from posjax.bench.attention import Row, check_workdir, make_folder, show_progress, versions
from posjax.bench.gpu_machine import Clock, check_gpu, hardware
from posjax.bench.gpu_sections import ENCODINGS, References, accuracy, decoder, speed
from posjax.checks import check_at_least
from posjax.encodings.spec import parse_encoding

FILES = ("gpu.json", "gpu.md", "gpu.png")
_SHARES = {"speed": 3, "accuracy": 3, "decoder": 4}  # relative shares of the time


@dataclasses.dataclass(frozen=True)
class GpuBench:
    """Measures speed and accuracy of the attention kernels, and the speed of a decoder, on the GPU of this machine.

    Attributes:
      sections: sections to run, in this order.
      seconds: time limit; the measurement in progress is completed.
      length: sequence length of the speed section, in tokens.
      heads: N, number of heads in the speed section; with a workdir, it must equal the model's.
      head_dim: H, channels per head in the speed section; with a workdir, it must equal the model's.
      workdir: folder with checkpoints, as in posjax bench attention; adds the gates of its model to the speed section.
      layer: index of that model's layer, from 0.
      encodings: encodings of the accuracy section.
      dtypes: dtypes of the accuracy section.
      head_dims: channels per head in the accuracy section.
      contexts: sequence lengths of the decoder, in tokens.
      layers: number of layers of the decoder.
      embed_dim: width of the decoder, a multiple of 128; its heads have 128 channels.
      repeats: number of rounds; each calls every contestant.
      out: folder for gpu.json, gpu.md and gpu.png.
    """

    sections: tuple[Literal["speed", "accuracy", "decoder"], ...] = ("speed", "accuracy", "decoder")
    seconds: float = 420.0
    length: int = 8192
    heads: int = 16
    head_dim: int = 128
    workdir: str = ""
    layer: int = 0
    encodings: tuple[str, ...] = ("identity", "rope", "alibi", "t5", "tupe", "cope(64)", "rope + cope(64)")
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float16", "float32")
    head_dims: tuple[int, ...] = (128, 64)
    contexts: tuple[int, ...] = (4096, 16384)
    layers: int = 22
    embed_dim: int = 2048
    repeats: int = 10
    out: str = "runs/gpu"

    def __post_init__(self) -> None:
        for name in ("sections", "encodings", "dtypes", "head_dims", "contexts"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty, got ()")
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} must all differ, got {getattr(self, name)}")
        for name in ("heads", "head_dim", "layers", "repeats"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("length", self.length, 2)
        check_at_least("layer", self.layer, 0)
        for name in ("head_dims", "contexts"):
            for size in getattr(self, name):
                check_at_least(name, size, 2)
        if self.embed_dim < 128 or self.embed_dim % 128:
            raise ValueError(f"embed_dim must be a multiple of 128, got {self.embed_dim}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        for spec in self.encodings:
            if isinstance(parse_encoding(spec), tuple):
                raise ValueError(f"encodings must each be for one layer, got {spec!r}; list the encodings of its layers separately")
        if self.workdir:
            check_workdir(self.workdir, self.layer, self.heads, self.head_dim)


def run(config: GpuBench, quiet: bool = False, implementation: str = "pallas") -> list[Row]:
    """Runs the benchmark and writes gpu.json after every row, and gpu.md and gpu.png at the end, even if interrupted.

    Args:
      config: the settings of the benchmark.
      quiet: hides the progress on the terminal.
      implementation: implementation of posjax.attention; only pallas needs a GPU.

    Returns:
      Rows in the order of sections, as in gpu.json. The notes of a failed row give the reason.

    Raises:
      NotImplementedError: there is no GPU that the kernels support.
      ValueError: the folder is not writable.
    """
    begun = time.perf_counter()
    if implementation == "pallas":
        check_gpu("posjax bench gpu", "posjax bench attention runs on any device")
    out = make_folder(config.out)
    rows: list[Row] = []
    specs = config.encodings if "accuracy" in config.sections else ()
    try:
        with (
            TemporaryDirectory(prefix="posjax-bench-") as folder,
            References(specs, config.head_dims, Path(folder)) as references,
            show_progress(quiet) as progress,
        ):
            sections = {"speed": speed, "accuracy": functools.partial(accuracy, references=references), "decoder": decoder}
            for number, name in enumerate(config.sections):
                rest = sum(_SHARES[other] for other in config.sections[number:])
                clock = Clock((config.seconds - (time.perf_counter() - begun)) * _SHARES[name] / rest)
                tell = functools.partial(progress, done=number, total=len(config.sections))
                for row in sections[name](config, implementation, clock, tell):
                    rows.append(row)
                    fill_ratios(rows)
                    _write_json(rows, config, out)
    finally:
        _write_json(rows, config, out)
        missing = _write_tables(rows, config, out)
    if missing and not quiet:
        results.print_text(missing)
    return rows


def _write_json(rows: Sequence[Row], config: GpuBench, out: Path) -> None:
    results.write_json(rows, dataclasses.asdict(config), hardware(), versions(), out / FILES[0], targets=targets(rows))


def _write_tables(rows: Sequence[Row], config: GpuBench, out: Path) -> str | None:
    """Writes gpu.md, and gpu.png if there is anything to draw; returns a message if matplotlib is not installed."""
    machine, missing = hardware(), None
    try:
        if figure := draw(rows):
            plots.save(figure, out / FILES[2])
    except ImportError:
        missing = f"no {FILES[2]}: matplotlib is not installed"
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    shape = f"{config.length:,} tokens, {config.heads} heads of {config.head_dim} channels, bfloat16, causal"
    text = [f"{machine['device_kind']}, {machine['cores']} cores. {packages}. Speed: {shape}.", "", LEGEND, ""]
    for group in groups(rows):
        text += results.markdown(*group)
    (out / FILES[1]).write_text("\n".join([*text, missing or ""]).rstrip() + "\n")
    return missing


# Values derived from the rows -------------------------------------------------------------------------------------------


def fill_ratios(rows: Sequence[Row]) -> None:
    """Sets the ratios of each row: its time to cuDNN's and to identity's, or its tokens per second to RoPE's.

    The row of identity has the same lowering. A ratio is None if one of its values is missing.
    """
    first = _lowerings(rows)[0]
    for row in rows:
        if row["section"] == "speed":
            lowering = row["lowering"] if row["kind"] == "posjax" else first
            row["ratio_to_identity"] = _over(row["ms_min"], _speed(rows, "identity", row["pass"], lowering))
            row["ratio_to_cudnn"] = _over(row["ms_min"], _cudnn(rows, row["pass"]))
        elif row["section"] == "decoder":
            for name in ("prefill", "train"):
                rate = row[f"{name}_tokens_per_second"]
                row[f"{name}_ratio_to_rope"] = _over(rate, _decoder(rows, "rope", row["context"], name))


def targets(rows: Sequence[Row]) -> list[Row]:
    """Returns the performance targets of the kernels: name, limit, whether more is better, measured value, and whether met."""
    ratios = []
    for lowering in _lowerings(rows):
        by_name = f" ({lowering})" if lowering else ""
        for way, limit in (("forward", 1.15), ("both", 1.25)):
            for spec in ENCODINGS[2:]:
                ratio = _over(_speed(rows, spec, way, lowering), _speed(rows, "identity", way, lowering))
                ratios.append((f"time of {spec} over identity's, half gates, {_PASSES[way]}{by_name}", limit, False, ratio))
        for way in _PASSES:
            ratio = _over(_cudnn(rows, way), _speed(rows, "identity", way, lowering))
            limit = 0.8 if lowering == "mosaic" else 0.6
            ratios.append((f"speed of identity over cuDNN's, {_PASSES[way]}{by_name}", limit, True, ratio))
    for spec in ENCODINGS[2:]:
        ratio = _over(_decoder(rows, spec, 4096, "prefill"), _decoder(rows, "rope", 4096, "prefill"))
        ratios.append((f"tokens per second of the decoder's prefill, {spec} over rope, 4,096 tokens", 0.9, True, ratio))
    return [
        {"target": name, "limit": limit, "more_is_better": more, "found": ratio}
        | {"met": None if ratio is None else ratio >= limit if more else ratio <= limit}
        for name, limit, more, ratio in ratios
    ]


_PASSES = {"forward": "forward", "both": "forward and backward"}


def _lowerings(rows: Sequence[Row]) -> list[str]:
    """Returns the lowerings of posjax's kernels in the rows; [""] if there are none."""
    ours = [row["lowering"] for row in rows if row["section"] == "speed" and row["kind"] == "posjax"]
    return list(dict.fromkeys(ours)) or [""]


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _speed(rows: Sequence[Row], spec: str, way: str, lowering: str) -> float | None:
    """Returns the milliseconds of posjax's kernel, with half gates if the encoding has gates."""
    ours = (row for row in rows if row["section"] == "speed" and row["kind"] == "posjax" and row["gates"] in (None, "half"))
    wanted = spec, way, lowering
    return next((row["ms_min"] for row in ours if (row["encoding"], row["pass"], row["lowering"]) == wanted), None)


def _cudnn(rows: Sequence[Row], way: str) -> float | None:
    cudnn = (row for row in rows if row["section"] == "speed" and row["contestant"] == "jax.nn, cudnn")
    return next((row["ms_min"] for row in cudnn if row["pass"] == way), None)


def _decoder(rows: Sequence[Row], spec: str, context: int, part: str) -> float | None:
    rates = (row for row in rows if row["section"] == "decoder")
    return next((row[f"{part}_tokens_per_second"] for row in rates if (row["encoding"], row["context"]) == (spec, context)), None)


# Tables and figure ------------------------------------------------------------------------------------------------------

LEGEND = (
    "ms: minimum over interleaved rounds; TFLOP/s: operations of the visible half of the matrix products per second. error: norm "
    "of the difference from dense attention in float32 on the CPU over its norm; grads: the same for the gradient with the largest "
    "error; xla's: the same for dense attention in this dtype. same bits: whether two runs of the kernel agree bit for bit. every "
    "option: with a window of 200, a soft cap, three documents per row, and two query heads per key head. sparse gates have a mean "
    "of 0.02, all others of 0.5."
)
_COLUMNS = {
    "speed": (
        ("ms", "ms_min", ",.3f"),
        ("median", "ms_median", ",.3f"),
        ("x identity", "ratio_to_identity", ".2f"),
        ("x cuDNN", "ratio_to_cudnn", ".2f"),
        ("TFLOP/s", "tflops", ".0f"),
    ),
    "accuracy": (
        ("error", "error_out", ".1e"),
        ("xla's", "xla_error_out", ".1e"),
        ("grads", "error_grads", ".1e"),
        ("xla's", "xla_error_grads", ".1e"),
        ("same bits", "same_bits", ""),
    ),
    "decoder": (
        ("prefill, tokens/s", "prefill_tokens_per_second", ",.0f"),
        ("x rope", "prefill_ratio_to_rope", ".2f"),
        ("train, tokens/s", "train_tokens_per_second", ",.0f"),
        ("x rope", "train_ratio_to_rope", ".2f"),
    ),
}


def groups(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """Returns (heading, column heads, cells, notes) of each table: the speed passes, accuracy dtypes, decoder, and targets."""
    tables = []
    for heading in dict.fromkeys(_heading(row) for row in rows):
        group = [row for row in rows if _heading(row) == heading]
        columns = _COLUMNS[group[0]["section"]]
        lines, notes = [], {}
        for row in group:
            numbers = ["" if row[name] is None else format(row[name], form) for _, name, form in columns]
            lines.append([*_label(row), *numbers])
            for note in row["notes"]:
                notes.setdefault(note, []).append(", ".join(filter(None, _label(row))))
        texts = [f"{'all' if len(who) == len(group) > 1 else '; '.join(who)}: {note}" for note, who in notes.items()]
        tables.append((heading, [*_HEADS[group[0]["section"]], *(head for head, _, _ in columns)], lines, texts))
    lines = []
    for row in targets(rows):
        limit = f"at {'least' if row['more_is_better'] else 'most'} {row['limit']}"
        measured = "not measured" if row["found"] is None else f"{row['found']:.2f}"
        lines.append([row["target"], limit, measured, {None: "", True: "met", False: "missed"}[row["met"]]])
    return [*tables, ("targets", ["ratio", "target", "measured", ""], lines, [])]


_HEADS = {"speed": ("contestant", "gates"), "accuracy": ("encoding", "call, channels"), "decoder": ("encoding", "context")}


def _heading(row: Row) -> str:
    if row["section"] == "speed":
        return f"speed, {_PASSES[row['pass']]}"
    if row["section"] == "accuracy":
        return f"accuracy, {row['dtype']}"
    return "decoder"


def _label(row: Row) -> tuple[str, str]:
    """Returns the first two columns of a row."""
    name = ", ".join(filter(None, (row["encoding"], row.get("lowering"))))
    if row["section"] == "speed":
        return name if row["kind"] == "posjax" else row["contestant"], row["gates"] or ""
    if row["section"] == "accuracy":
        return name, f"{row['call']}, {row['head_dim']}"
    return row["encoding"], f"{row['context']:,}"


def show(rows: Sequence[Row]) -> None:
    """Prints the tables."""
    for group in groups(rows):
        results.print_table(*group)
    results.print_text(LEGEND)


def draw(rows: Sequence[Row]) -> Any:
    """Plots the milliseconds of each pass and the tokens per second of each context; returns None if nothing was measured."""
    panels: dict[str, tuple[str, dict[str, float]]] = {}
    looks = {}

    def add(title: str, unit: str, row: Row, number: float | None) -> None:
        if number is not None:
            name = ", ".join(filter(None, (_label(row)[0], row.get("gates"))))
            panels.setdefault(title, (unit, {}))[1][name] = number
            looks[name] = row["encoding"]

    for row in rows:
        if row["section"] == "speed":
            add(_heading(row), "time (ms)", row, row["ms_min"])
        elif row["section"] == "decoder":
            for name in ("prefill", "train"):
                add(f"{name}, {row['context']:,} tokens", "tokens per second", row, row[f"{name}_tokens_per_second"])
    return plots.bars(panels, looks) if panels else None


if __name__ == "__main__":
    from posjax.bench import command, gpu

    command.main(gpu, gpu.GpuBench)
