"""Evaluates a trained model and returns its metrics and the data of its figures as JSON values."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.attention.api import attention_weights
from posjax.core.encoding import PositionalEncoding
from posjax.lab import probes
from posjax.lab.config import Config
from posjax.lab.source import Source, eval_batches, test_rows
from posjax.models.config import TransformerConfig
from posjax.models.transformer import LayerRecord, Transformer
from posjax.parallel.steps import jit_for_all
from posjax.training.loop import json_number
from posjax.typing import Array, Params

# Names of metrics in results, and their labels in tables and on axes.
MEASURES = {
    "bits_per_byte": "loss (bits per byte)",
    "bits_per_token": "loss (bits per token)",
    "masked_loss": "masked-token loss (nats)",
    "error": "error (%)",
}


def measure_of(config: Config, source: Source) -> str:
    """Returns the name of the metric of a task on a text."""
    if source.task is not None:
        return "error"
    if config.task == "mlm":
        return "masked_loss"
    return "bits_per_token" if source.validation.num_bytes is None else "bits_per_byte"


def measure_in(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns the name of the metric in rows of results.

    Raises:
      ValueError: the rows have different metrics.
    """
    names = {name for row in rows for name in MEASURES if name in row["metrics"]}
    if len(names) != 1:
        raise ValueError(f"runs to compare must have the same metric, got {' and '.join(sorted(names)) or 'none'}")
    return names.pop()


def evaluate(config: Config, with_params: Callable[[Params], Transformer], params: Params, source: Source) -> dict[str, Any]:
    """Evaluates a model at every length, or on every test set, of the configuration.

    Returns:
      A dict with the entries
        metrics: {measure: {column: value or None}, "limit": longest sequence or None, "parameters": count}. Columns are lengths in
          tokens for text, and test sets for synthetic tasks; a value is None if the encoding does not support that length, or if
          it is not finite.
        loss_by_index, attention_distance, decay, line: the data of the figures (text only; none if a loss is not finite).
    """
    limit = max_eval_length(config, with_params(params).encodings, source)
    metrics: dict[str, Any] = {"limit": limit, "parameters": sum(x.size for x in jax.tree.leaves(params))}
    if source.task is not None:
        return {"metrics": {"error": _task_errors(config, with_params, params, source)} | metrics}

    measure = measure_of(config, source)
    losses = jit_for_all(token_losses(with_params))
    scale = metric_scale(config, source)
    by_length: dict[str, float | None] = {}
    curve = None
    for column, tests in test_sets(config, source, limit).items():
        if tests is None:
            by_length[column] = None
            continue
        mean, curve = mean_loss(losses, params, tests)
        by_length[column] = json_number(mean * scale)
    result = {"metrics": {measure: by_length} | metrics}
    if not_finite(result["metrics"], measure):
        return result
    if curve is not None:
        index, loss = curve
        result["loss_by_index"] = {"index": index.tolist(), "loss": (loss * scale).tolist()}
    return result | _probe(config, with_params, params, source)


def not_finite(metrics: Mapping[str, Any], measure: str) -> list[str]:
    """Returns the columns of a measure whose values are not finite, as opposed to beyond the limit of the encoding."""
    limit = metrics["limit"]
    beyond = [] if limit is None else [column for column in metrics[measure] if column.isdigit() and int(column) > limit]
    return [column for column, value in metrics[measure].items() if value is None and column not in beyond]


def max_eval_length(config: Config, encodings: Iterable[PositionalEncoding], source: Source) -> int | None:
    """Returns the longest sequence length that all these encodings support; None if there is no limit."""
    dims = dataclasses.replace(config.transformer(source.vocab_size).dims, max_length=source.max_length)
    return min((n for e in encodings if (n := e.max_length(dims)) is not None), default=None)


@dataclasses.dataclass(frozen=True, eq=False)
class EvalSet:
    """Holds a test set: the rows that every model is scored on.

    Attributes:
      batches: inputs of the model, all of one shape.
      items: integers [rows of all batches], the item of each row; None: every row is an item. An item, e.g. an excerpt of text, is
        the unit of resampling for intervals; its score is the quotient of two sums over its rows.
      by_row: scores each row as one answer, which is wrong if any answer in the row is wrong.
      local_window_size: number of earlier positions that a token attends to during scoring; None: the configuration's value.
      steps: training steps after which a grid scores this set, besides the last step.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    items: np.ndarray | None = None
    by_row: bool = False
    local_window_size: int | None = None
    steps: frozenset[int] = frozenset()


def test_sets(config: Config, source: Source, limit: int | None) -> dict[str, Iterator[dict[str, np.ndarray]] | None]:
    """Returns the test batches of each column of the results, up to about ``eval_tokens`` tokens each.

    A column is a length in tokens, or a synthetic task or one of its variants. The value of a length beyond ``limit`` is None. All
    models of a configuration get the same batches.
    """
    if source.task is not None:
        variants = {"in distribution": source.task, **source.task.variants}
        by_column = {name: test_rows(config, source, task) for name, task in variants.items()}
    else:
        lengths = (config.seq_length * multiple for multiple in config.eval_lengths)
        by_column = {str(n): None if limit is not None and n > limit else eval_batches(config, source, n) for n in lengths}
    return {
        column: None if batch_iterator is None else take_tokens(batch_iterator, config.eval_tokens)
        for column, batch_iterator in by_column.items()
    }


def take_tokens(batch_iterator: Iterator[dict[str, np.ndarray]], tokens: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches until they hold at least ``tokens`` tokens."""
    for batch in batch_iterator:
        yield batch
        tokens -= batch["tokens"].size
        if tokens <= 0:
            return


def metric_scale(config: Config, source: Source) -> float:
    """Returns the factor that converts a mean score to the unit of the tables.

    The error rate of a synthetic task becomes percent; the loss of an lm, in nats per token, becomes bits per byte,
    or bits per token if the tokenizer of the text is not known.
    """
    if source.task is not None:
        return 100.0
    if config.task == "mlm":
        return 1.0
    num_tokens, num_bytes = source.validation.num_tokens, source.validation.num_bytes
    return (1.0 if num_bytes is None else num_tokens / num_bytes) / math.log(2)


def score(
    config: Config, with_params: Callable[[Params], Transformer]
) -> Callable[[Params, dict[str, Array]], tuple[Array, Array]]:
    """Returns a function (params, batch) -> (numerator, denominator), both [B], that scores each row of a batch.

    The numerator is the weighted number of wrong answers, or the loss in nats; the denominator is the total weight of the answers
    or tokens. The mean over several rows is the quotient of the two sums.
    """

    def wrong(params: Params, batch: dict[str, Array]) -> tuple[Array, Array]:
        logits = with_params(params)(batch["tokens"], batch["positions"], batch["segment_ids"])
        is_wrong = jnp.where(jnp.isfinite(logits.max(-1)), logits.argmax(-1) != batch["targets"], jnp.nan)
        return (is_wrong * batch["weights"]).sum(1), batch["weights"].sum(1)

    def nats(params: Params, batch: dict[str, Array]) -> tuple[Array, Array]:
        return token_losses(with_params)(params, batch).sum(1), batch["weights"].sum(1)

    return nats if config.task in ("lm", "mlm") else wrong


def token_losses(with_params: Callable[[Params], Transformer]) -> Callable[[Params, dict[str, Array]], Array]:
    def losses(params: Params, batch: dict[str, Array]) -> Array:
        names = ("tokens", "targets", "weights", "positions", "segment_ids")
        return with_params(params).losses(*(batch[name] for name in names))

    return losses


def mean_loss(
    losses: Callable[[Params, Any], Array], params: Params, batches: Iterable[Any]
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Returns the mean loss in nats per weighted token, and the curve (index, mean loss) over token indices in up to 32 bins."""
    total, weight = 0.0, 0.0
    for batch in batches:
        total = total + np.asarray(losses(params, batch), np.float64).sum(0)
        weight = weight + np.asarray(batch["weights"], np.float64).sum(0)
    length = len(total)
    mean = np.divide(total, weight, out=np.zeros(length), where=weight > 0)
    curve = probes.loss_by_index(jnp.asarray(mean)[None], jnp.asarray(weight)[None], min(32, length))
    return float(total.sum() / weight.sum()), tuple(np.asarray(x) for x in curve)


def _task_errors(config: Config, with_params: Callable, params: Params, source: Source) -> dict[str, float | None]:
    """Computes the percentage of wrong answers on a task and on each of its variants."""
    wrong = jit_for_all(score(config, with_params))
    errors = {}
    for column, tests in test_sets(config, source, None).items():
        sums = np.sum([np.sum(jax.device_get(wrong(params, batch)), axis=1) for batch in tests], axis=0, dtype=np.float64)
        errors[column] = json_number(metric_scale(config, source) * sums[0] / sums[1])
    return errors


def layer_weights(
    config: TransformerConfig, layer: int, record: LayerRecord, positions: Array | None = None, segments: Array | None = None
) -> Array:
    """Returns the attention probabilities of a layer of a model, [B, N, T, T], from the inputs of its attention."""
    return attention_weights(
        record.query,
        record.key,
        record.encoding,
        record.params,
        value=record.value,
        hidden=record.hidden,
        is_causal=config.is_causal,
        segment_ids=segments,
        query_positions=positions,
        key_positions=positions,
        local_window_size=config.windows[layer],
        scale=config.attention_scale,
        logits_soft_cap=config.logits_soft_cap,
    )


_MOST_WEIGHTS = 2**27  # of a layer's attention that a figure is made from: 512 MiB

# The data of the figures ----------------------------------------------------------------------------------------------


def _probe(config: Config, with_params: Callable[[Params], Transformer], params: Params, source: Source) -> dict[str, Any]:
    is_causal = config.task != "mlm"
    probed: dict[str, Any] = {"decay": _decay(config, with_params, params, source)}
    if config.attention == "linear":
        return probed
    batch = next(eval_batches(config, source, config.seq_length))
    heads = config.transformer(source.vocab_size).num_heads
    length = min(config.seq_length, math.isqrt(_MOST_WEIGHTS // heads))
    rows = max(1, min(8, _MOST_WEIGHTS // (heads * length**2)))
    tokens, segments, positions = (jnp.asarray(batch[name][:rows, :length]) for name in ("tokens", "segment_ids", "positions"))

    @jit_for_all
    def distances(params: Params) -> list[Array]:
        model = with_params(params)
        records = model.records(tokens, positions, segments)
        weights = (layer_weights(model.config, *layer, positions, segments) for layer in enumerate(records))
        return [probes.attention_distance(each, positions, positions) for each in weights]

    probed["attention_distance"] = [layer.tolist() for layer in jax.device_get(distances(params))]
    line = _cope_line(config, with_params, params, source) if is_causal else None
    return probed | ({"line": line} if line else {})


def _cope_line(
    config: Config, with_params: Callable[[Params], Transformer], params: Params, source: Source
) -> dict[str, Any] | None:
    """Computes CoPE's gates and contextual positions over a line of the validation text, with its last character as the query.

    The heads are those of the last layer that counts by gates (a forgetting gate does not); the text before the line is part of the
    input. Returns None if no layer counts by gates, if tokens are not bytes, or if no line has a suitable length.
    """
    model = with_params(params)
    dims = dataclasses.replace(config.transformer(source.vocab_size).dims, max_length=source.max_length)
    counts = [probes.counts_by_gates(encoding, dims) for encoding in model.encodings]
    counting = [layer for layer, index in enumerate(model.layout) if counts[index]]
    text = bytes(source.validation.tokens[:200_000]) if source.validation.is_bytes else b""
    max_bytes = min(70, config.seq_length)  # including the newline
    min_bytes = min(40, max_bytes // 2)
    line_form = rb"\n((?=.{%d,%d}\n) *\w[ -~]*\n)" % (min_bytes - 1, max_bytes - 1)
    line_match = re.search(line_form, text[config.seq_length :])
    if line_match is None or not counting:
        return None
    end = config.seq_length + line_match.end(1)
    tokens = np.frombuffer(text[end - config.seq_length : end], np.uint8)[None].astype(np.int32)

    @jit_for_all
    def gates_and_positions(params: Params) -> tuple[Array, Array]:
        model = with_params(params)
        record = model.records(tokens)[counting[-1]]
        arrays, scale = (record.query, record.key, record.value), model.config.attention_scale
        return probes.cope_positions(*arrays, record.encoding, record.params, hidden=record.hidden, scale=scale)

    gates, positions = (x[0, :, -1, -len(line_match[1]) :].tolist() for x in jax.device_get(gates_and_positions(params)))
    return {"layer": counting[-1], "text": line_match[1].decode(), "gates": gates, "positions": positions}


def _decay(config: Config, with_params: Callable[[Params], Transformer], params: Params, source: Source) -> dict[str, Any]:
    """Computes the contribution of the first layer's encoding to the attention score at each distance."""
    dims = dataclasses.replace(config.transformer(source.vocab_size).dims, max_length=source.max_length)
    model = with_params(params)
    encoding, limit = model.encodings[0], model.encodings[0].max_length(dims)
    reach = 4 * config.seq_length
    distances = np.arange(0, reach if limit is None else min(reach, limit - 1))
    values = jit_for_all(lambda p: probes.decay_curve(encoding, p, distances, dims))(model.encoding_params(0))
    return {"distance": distances.tolist(), "score": np.asarray(values).tolist()}
