"""Collects what trained models do with a text, layer by layer, as the data of an explorer page.

Numbers of a pair of tokens are float16, [N, T, T] if all pairs fit into the page. Otherwise the k keys with the largest weights of
every query and head are kept: their indices in ascending order, uint16 [N, T, k], and their numbers, [N, T, k].
Letters in shapes: T tokens, L layers, N query heads, R rotated channels.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.backends.bias_terms import bias_terms
from posjax.attention.backends.reference import scores_of
from posjax.attention.call import prepare
from posjax.core.structures import Rotate
from posjax.lab import probes
from posjax.lab.evaluation import MEASURES, layer_weights, measure_in
from posjax.lab.pages.tables import series_of_seeds
from posjax.lab.prompting import token_bytes
from posjax.lab.trained import TrainedRun, token_losses, tokens_of
from posjax.models.transformer import LayerRecord
from posjax.plots.explorer import Arrays, fixed_size, loss_by_length_figure
from posjax.typing import Array

NO_KEY = 2**16 - 1  # index that fills rows with fewer than k keys
MOST_PAIRS = 2**28  # pairs of tokens and heads of a layer, which are computed at once
MOST_BYTES = 19_500_000  # of a page
PHASES = ("query_cos", "query_sin", "key_cos", "key_sin")
_PAIR_BYTES = 4  # of a pair in a page, roughly: a weight and another number, compressed, as base64


# One layer -----------------------------------------------------------------------------------------------------------------------


def layers_of(run: TrainedRun, tokens: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Yields the numbers of one layer after another over a text; only one layer's are in memory.

    Args:
      run: a run with softmax attention, or with stick-breaking.
      tokens: int32 [T], as ``tokens_of`` returns them.

    Yields:
      A dict of float32 arrays [N, T, T], query by key, with those entries that the layer's encoding has:

        weight: attention probabilities, as ``posjax.lab.trained.attention_maps`` returns them.
        gate, position: CoPE's gates and contextual positions, as ``gates_and_positions`` returns them.
        bias: the sum of the encoding's biases of the score, in nats.
        rotation: the change of the score by the rotation of query and key, in nats.

      and float32 [T, N or 1, R / 2], if the encoding rotates: query_cos, query_sin, key_cos, key_sin of its phases.
    """

    def records(model: Any, tokens: Any) -> list[LayerRecord]:
        return model.records(tokens)

    config = run.model.config
    counts = [config.is_causal and probes.counts_by_gates(encoding, config.dims) for encoding in run.model.encodings]
    programs: dict[Any, Callable[..., Any]] = {}
    for layer, record in enumerate(run._apply(records, np.asarray(tokens)[None])):
        index, window = run.model.layout[layer], config.windows[layer]
        if (index, window) not in programs:
            programs[index, window] = jax.jit(functools.partial(_numbers, config, layer, counts[index]))
        yield jax.device_get(programs[index, window](record))


def _numbers(config: Any, layer: int, counts: bool, record: LayerRecord) -> dict[str, Array]:
    found = {"weight": layer_weights(config, layer, record)[0].astype(jnp.float32)}
    arrays, options = (record.query, record.key, record.value), {"hidden": record.hidden, "scale": config.attention_scale}
    if counts:
        gates, positions = probes.cope_positions(*arrays, record.encoding, record.params, **options)
        found |= {"gate": gates[0], "position": positions[0]}
    options |= {"is_causal": config.is_causal, "local_window_size": config.windows[layer]}
    call = prepare(*arrays, record.encoding, record.params, **options)
    tile, _ = scores_of(call)
    length, heads = record.query.shape[1:3]
    allowed = jnp.broadcast_to(tile.allowed, (1, heads, length, length))[0]
    if terms := bias_terms(call.transformed()):
        found["bias"] = jnp.where(allowed, jnp.stack([term.dense(tile) for term in terms]).sum(0)[0], 0.0)
    if call.rotations:
        unrotated, _ = scores_of(call.replace(transforms=tuple(t for t in call.transforms if not isinstance(t, Rotate)), biases=()))
        found["rotation"] = jnp.where(allowed, (tile.logits - unrotated.logits)[0], 0.0)
        found |= _phases(call.rotations, length, heads)
    return found


def _phases(rotations: Sequence[Rotate], length: int, heads: int) -> dict[str, Array]:
    """Returns cosine and sine of the phases of all rotations, side by side, [T, N or 1, R / 2] each."""
    found = {}
    for side in ("query", "key"):
        phases = []
        for rotation in rotations:
            own, other = rotation.query_phase, rotation.key_phase
            own, other = (own, other) if side == "query" else (other, own)
            phase = (jnp.zeros_like(other) if own is None else own)[0]
            phases.append(phase if phase.shape[1] == 1 else jnp.repeat(phase, heads // phase.shape[1], axis=1))
        most = max(phase.shape[1] for phase in phases)
        joined = jnp.concatenate([jnp.broadcast_to(phase, (length, most, phase.shape[2])) for phase in phases], axis=-1)
        found |= {f"{side}_cos": jnp.cos(joined), f"{side}_sin": jnp.sin(joined)}
    return found


# What fits into a page -----------------------------------------------------------------------------------------------------------


class LayerNumbers(NamedTuple):
    """Holds the numbers of one layer as a page stores them.

    Attributes:
      pairs: float16 [N, T, T], or [N, T, k] and the entry "key", as ``largest`` returns them.
      phases: float16 [T, N or 1, R / 2]: query_cos, query_sin, key_cos and key_sin; empty if the encoding does not rotate.
      total: [N], the sum of all weights of a head.
    """

    pairs: Mapping[str, np.ndarray]
    phases: Mapping[str, np.ndarray]
    total: np.ndarray


def largest(pairs: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """Keeps the k keys with the largest weights of every query and head.

    Args:
      pairs: "weight" and others, each [N, T, S]; "key" among them are the indices of the keys, by default 0 to S - 1.
      k: at most S.

    Returns:
      The same entries, [N, T, k], and "key": uint16 [N, T, k], the indices of the keys in ascending order. A key with weight zero
      is not kept: its index is ``NO_KEY``, after the others, and its numbers are zero.
    """
    places = np.argpartition(pairs["weight"], pairs["weight"].shape[-1] - k, axis=-1)[..., -k:]
    kept = {name: np.take_along_axis(values, places, axis=-1) for name, values in pairs.items()}
    is_kept = kept["weight"] > 0
    keys = np.where(is_kept, kept.pop("key", places), NO_KEY)
    order = np.argsort(keys, axis=-1)
    sorted_by_key = {name: np.take_along_axis(np.where(is_kept, values, 0), order, axis=-1) for name, values in kept.items()}
    return {"key": np.take_along_axis(keys, order, axis=-1).astype(np.uint16)} | sorted_by_key


def collect(run: TrainedRun, tokens: np.ndarray, k: int | None) -> list[LayerNumbers]:
    """Returns the numbers of every layer, of the k largest weights or, if k is None, of all pairs."""
    layers = []
    for numbers in layers_of(run, tokens):
        phases = {name: values.astype(np.float16) for name, values in numbers.items() if name in PHASES}
        pairs = {name: values for name, values in numbers.items() if name not in PHASES}
        total = pairs["weight"].sum((1, 2), dtype=np.float64)
        pairs = pairs if k is None else largest(pairs, k)
        layers.append(LayerNumbers({name: _as_half(values) for name, values in pairs.items()}, phases, total))
    return layers


def _as_half(values: np.ndarray) -> np.ndarray:
    """Returns numbers as float16, clipped to its range; indices stay as they are."""
    most = float(np.finfo(np.float16).max)
    return values if values.dtype == np.uint16 else np.clip(values, -most, most).astype(np.float16)


def _stored(arrays: Arrays, layers: Sequence[LayerNumbers], titles: Sequence[str]) -> list[dict[str, Any]]:
    """Adds the numbers of layers to the arrays of a page and returns the entries of its data."""
    found = []
    for layer, title in zip(layers, titles, strict=True):
        share = layer.pairs["weight"].sum((1, 2), dtype=np.float64) / np.maximum(layer.total, 1e-30)
        numbers = {name: arrays.add(values) for name, values in {**layer.pairs, **layer.phases}.items()}
        found.append({"encoding": title, "share": [round(min(1.0, float(x)), 4) for x in share], "arrays": numbers})
    return found


def _fitted(opened: Sequence[TrainedRun], tokens: np.ndarray, room: int) -> tuple[Arrays, list[list[dict[str, Any]]], int | None]:
    """Returns the arrays, the layers of every run, and k, the number of keys that fits into a page; None if all pairs fit."""
    length = len(tokens)
    titles = [_layer_titles(run) for run in opened]
    rows = sum(run.model.config.num_heads * len(run.model.layout) for run in opened) * length

    def packed(numbers: Sequence[Sequence[LayerNumbers]]) -> tuple[Arrays, list[list[dict[str, Any]]]]:
        arrays = Arrays()
        return arrays, [_stored(arrays, each, names) for each, names in zip(numbers, titles, strict=True)]

    if rows * length * _PAIR_BYTES <= room:
        arrays, runs = packed([collect(run, tokens, None) for run in opened])
        if arrays.size <= room:
            return arrays, runs, None
    k = max(1, min(length, 2 * room // (rows * _PAIR_BYTES)))
    numbers = [collect(run, tokens, k) for run in opened]
    while True:
        arrays, runs = packed(numbers)
        if arrays.size <= room or k == 1:
            return arrays, runs, k
        k = max(1, min(k - 1, int(k * room / arrays.size)))
        numbers = [[layer._replace(pairs=largest(layer.pairs, k)) for layer in each] for each in numbers]


# The page ------------------------------------------------------------------------------------------------------------------------


def explorer_data(
    opened: Sequence[TrainedRun],
    text: str,
    results: Sequence[Sequence[Mapping[str, Any]]],
    *,
    most_bytes: int = MOST_BYTES,
) -> tuple[dict[str, Any], Arrays]:
    """Returns the data and the arrays of an explorer page.

    Args:
      opened: one run, or two to compare.
      text: the text, or words of a synthetic task.
      results: for each run, rows of results of its encoding, one per seed; none for a checkpoint of another library.
      most_bytes: size of the page, from which follows how many weights it keeps.

    Raises:
      ValueError: a run cannot be explored or cannot read the text, or the runs have different tokenizers or tasks.
    """
    check_alike(opened)
    *_, tokens = [check_text(run, text) for run in opened]
    room = most_bytes - fixed_size("explorer") - 100_000 - 60 * len(tokens)
    arrays, runs, kept = _fitted(opened, tokens, room)
    labels = _labels(opened[0], tokens)
    names = _names(opened)
    entries = [
        {
            "name": name,
            "heads": run.model.config.num_heads,
            "isCausal": run.model.config.is_causal,
            "loss": _losses(run, text),
            "layers": layers,
            "provenance": _provenance(run),
        }
        for name, run, layers in zip(names, opened, runs, strict=True)
    ]
    figures = _figures(names, opened, results)
    return {"tokens": labels, "kept": kept, "runs": entries, "figures": figures}, arrays


def check_text(run: TrainedRun, text: str) -> np.ndarray:
    """Returns the tokens of a text after a check that an explorer page can show what the run does with them.

    Raises:
      ValueError: the run has linear attention, or cannot read the text, or the text is too long.
    """
    if run.config.attention == "linear":
        raise ValueError(
            f"run must have softmax attention, because linear attention has no probabilities, got attention='linear' in {run.path}"
        )
    if not text:
        raise ValueError("text must have at least one token, got an empty text")
    tokens, heads = tokens_of(run, text), run.model.config.num_heads
    most = min(NO_KEY, math.isqrt(MOST_PAIRS // heads))
    if len(tokens) > most:
        raise ValueError(f"text must have at most {most:,} tokens with {heads} heads, got {len(tokens):,}")
    return tokens


def check_alike(opened: Sequence[TrainedRun]) -> None:
    """Raises ValueError if runs read a text as different tokens."""

    def reading(run: TrainedRun) -> tuple[Any, ...]:
        if run.task is not None:
            return run.task.words
        assert run.tokenizer is not None  # every run of a text has one
        path = run.tokenizer.tokenizer_path
        return run.tokenizer.vocab_size, run.tokenizer.bos, b"" if path is None else path.read_bytes()

    for other in opened[1:]:
        if reading(other) != reading(opened[0]):
            raise ValueError(
                "runs to explore must have the same tokenizer, so that they read the same tokens, got different ones in "
                f"{opened[0].path} and {other.path}"
            )


def _labels(run: TrainedRun, tokens: np.ndarray) -> list[str]:
    """Returns the text of every token; bytes that are no characters by themselves are escaped."""
    bytes_of = token_bytes(run)
    texts = [bytes_of(int(token)).decode("utf-8", "backslashreplace") for token in tokens]
    return [text or "∅" for text in texts]


def _layer_titles(run: TrainedRun) -> list[str]:
    """Returns the encoding of every layer: the run's own words where all layers have the same."""
    if len(run.model.encodings) == 1:
        return [run.config.encoding] * len(run.model.layout)
    return [run.model.encodings[index].title for index in run.model.layout]


def _names(opened: Sequence[TrainedRun]) -> list[str]:
    """Returns the encodings, with the seed or the folder where they are the same."""
    names = [run.config.encoding for run in opened]
    if len(set(names)) < len(names):
        names = [f"{run.config.encoding}, seed {run.config.seed}" for run in opened]
    if len(set(names)) < len(names):
        names = [f"{run.config.encoding} ({run.path})" for run in opened]
    return names


def _losses(run: TrainedRun, text: str) -> list[float | None] | None:
    """Returns the loss of every token in nats, None for tokens that are not predicted; None for an encoder."""
    if run.config.task == "mlm":
        return None
    count = len(tokens_of(run, text))
    losses = [float(f"{x:.6g}") if math.isfinite(x) else None for x in token_losses(run, text).tolist()] if count > 1 else []
    return [None] * (count - len(losses)) + losses


def _provenance(run: TrainedRun) -> list[list[str]]:
    config = run.config
    facts = [["checkpoint", f"{run.path}, step {run.step:,}"], ["encoding", config.encoding]]
    if not config.from_pretrained or run.step:
        facts += [["seed", str(config.seed)], ["task", config.task], ["training length", f"{config.seq_length:,} tokens"]]
        facts += [["steps", f"{config.steps:,} of {config.batch_size} sequences"]]
    shape = run.model.config
    facts += [["model", f"{shape.num_layers} layers, {shape.num_heads} heads, width {shape.embed_dim}"]]
    return facts


def _figures(
    names: Sequence[str], opened: Sequence[TrainedRun], results: Sequence[Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Returns the figure of the loss by evaluation length, if there are results of several lengths."""
    table: dict[str, dict[str, list[float]]] = {}
    measures = set()
    for name, rows in zip(names, results, strict=True):
        for row in rows:
            measure = measure_in([row])
            measures.add(measure)
            for column, value in row["metrics"][measure].items():
                if column.isdigit() and value is not None:
                    table.setdefault(name, {}).setdefault(column, []).append(value)
    if len(measures) != 1 or not any(len(row) > 1 for row in table.values()):
        return []
    lengths = {run.config.seq_length for run in opened}
    train_length = lengths.pop() if len(lengths) == 1 else None
    return [loss_by_length_figure(series_of_seeds(table), train_length, MEASURES[measures.pop()])]
