"""The numbers of a trained model, and what its pictures are made of, as JSON."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax import probes, tasks
from posjax.attention import attention_weights
from posjax.config import Config
from posjax.source import Source, TaskBatches, held_out
from posjax.transformer import Transformer, cross_entropy
from posjax.typing import Array, Params

# What a task is measured by: its name in results, and the words for tables and axes.
MEASURES = {"lm": ("bits_per_byte", "loss (bits per byte)"), "mlm": ("masked_loss", "masked-token loss (nats)")}
TASK_MEASURE = ("error", "error (%)")


def evaluate(config: Config, with_params: Callable[[Params], Transformer], params: Params, source: Source) -> dict[str, Any]:
    """Evaluates a model at every length, or on every test set, of the configuration.

    Returns:
      metrics: {measure: {column: value or None}, "limit": longest sequence or None, "parameters": count}; columns are lengths
      in tokens for text and test sets for synthetic tasks; None where the encoding cannot go that long.
      loss_by_index, attention_distance, decay, line: what the pictures are made of (text only).
    """
    encodings = with_params(params).encodings
    dims = dataclasses.replace(config.transformer(source.vocab_size).dims, max_length=source.max_length)
    limit = min((n for e in encodings if (n := e.max_length(dims)) is not None), default=None)
    metrics: dict[str, Any] = {"limit": limit, "parameters": sum(x.size for x in jax.tree.leaves(params))}
    if source.task is not None:
        return {"metrics": {"error": _task_errors(config, with_params, params, source.task)} | metrics}

    measure = MEASURES[config.task][0]
    losses = jax.jit(token_losses(with_params))
    unit = source.validation.num_bytes / len(source.validation.tokens) * math.log(2) if config.task == "lm" else 1.0
    by_length: dict[str, float | None] = {}
    curve = None
    for length in (config.seq_length * multiple for multiple in config.eval_lengths):
        if limit is not None and length > limit:
            by_length[str(length)] = None
            continue
        mean, curve = mean_loss(losses, params, held_out(config, source, length), config.eval_tokens)
        by_length[str(length)] = mean / unit
    result = {"metrics": {measure: by_length} | metrics}
    if curve is not None:
        index, loss = curve
        result["loss_by_index"] = {"index": index.tolist(), "loss": (loss / unit).tolist()}
    return result | _probe(config, with_params, params, source)


def token_losses(with_params: Callable[[Params], Transformer]) -> Callable[[Params, dict[str, Array]], Array]:
    def losses(params: Params, batch: dict[str, Array]) -> Array:
        logits = with_params(params)(batch["tokens"], batch["positions"], batch["segment_ids"])
        return cross_entropy(logits, batch["targets"], batch["weights"])[0]

    return losses


def mean_loss(
    losses: Callable[[Params, Any], Array], params: Params, batch_iterator: Iterator[Any], tokens: int
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Mean nats a counted token over the first ``tokens`` tokens, and by token index, (index, mean loss) of up to 32 bins."""
    total, weight = 0.0, 0.0
    seen = 0
    for batch in batch_iterator:
        total = total + np.asarray(losses(params, batch), np.float64).sum(0)
        weight = weight + np.asarray(batch["weights"], np.float64).sum(0)
        seen += batch["tokens"].size
        if seen >= tokens:
            break
    length = len(total)
    mean = np.divide(total, weight, out=np.zeros(length), where=weight > 0)
    curve = probes.loss_by_index(jnp.asarray(mean)[None], jnp.asarray(weight)[None], min(32, length))
    return float(total.sum() / weight.sum()), tuple(np.asarray(x) for x in curve)


def _task_errors(config: Config, with_params: Callable, params: Params, task: tasks.Task) -> dict[str, float]:
    """Share of wrong answers in percent, on the task itself and on its variants."""

    @jax.jit
    def wrong(params: Params, batch: dict[str, Array]) -> tuple[Array, Array]:
        logits = with_params(params)(batch["tokens"], batch["positions"], batch["segment_ids"])
        return ((logits.argmax(-1) != batch["targets"]) * batch["weights"]).sum(), batch["weights"].sum()

    errors = {}
    for name, variant in {"in distribution": task, **task.variants}.items():
        sampler = TaskBatches(variant, config.batch_size, seed=2**31)
        count = max(1, config.eval_tokens // (config.batch_size * variant.length))
        sums = np.sum([jax.device_get(wrong(params, next(sampler))) for _ in range(count)], axis=0)
        errors[name] = float(100 * sums[0] / sums[1])
    return errors


# What the pictures are made of ---------------------------------------------------------------------------------------


def _probe(config: Config, with_params: Callable[[Params], Transformer], params: Params, source: Source) -> dict[str, Any]:
    is_causal = config.task != "mlm"
    probed: dict[str, Any] = {"decay": _decay(config, with_params, params, source)}
    if config.attention == "linear":
        return probed
    batch = next(held_out(config, source, config.seq_length))
    tokens, segments, positions = (jnp.asarray(batch[name][:8]) for name in ("tokens", "segment_ids", "positions"))

    @jax.jit
    def distances(params: Params) -> list[Array]:
        return [
            probes.attention_distance(
                attention_weights(
                    record.query,
                    record.key,
                    record.encoding,
                    record.params,
                    value=record.value,
                    is_causal=is_causal,
                    segment_ids=segments,
                    query_positions=positions,
                    key_positions=positions,
                    local_window_size=config.local_window_size,
                    logits_soft_cap=config.logits_soft_cap,
                ),
                positions,
                positions,
            )
            for record in with_params(params).records(tokens, positions, segments)
        ]

    probed["attention_distance"] = [layer.tolist() for layer in jax.device_get(distances(params))]
    line = _cope_line(config, with_params, params, source) if is_causal else None
    return probed | ({"line": line} if line else {})


def _cope_line(
    config: Config, with_params: Callable[[Params], Transformer], params: Params, source: Source
) -> dict[str, Any] | None:
    """Gates and contextual positions over a real line of the validation text, as its last character sees them.

    The heads are those of the last layer that counts; the line is read with the text before it. None where no layer counts,
    where tokens are not characters, or where no line is of a length to draw.
    """
    model = with_params(params)
    counting = [layer for layer, index in enumerate(model.layout) if model.encodings[index].is_contextual]
    text = bytes(source.validation.tokens[:200_000]) if config.tokenizer == "bytes" else b""
    longest = min(70, config.seq_length)  # in bytes, with the end of the line
    shortest = min(40, longest // 2)
    line_form = rb"\n((?=.{%d,%d}\n) *\w[ -~]*\n)" % (shortest - 1, longest - 1)
    found = re.search(line_form, text[config.seq_length :])
    if found is None or not counting:
        return None
    end = config.seq_length + found.end(1)
    tokens = np.frombuffer(text[end - config.seq_length : end], np.uint8)[None].astype(np.int32)

    @jax.jit
    def counted(params: Params) -> tuple[Array, Array]:
        record = with_params(params).records(tokens)[counting[-1]]
        return probes.cope_positions(record.query, record.key, record.value, record.encoding, record.params)

    gates, positions = (x[0, :, -1, -len(found[1]) :].tolist() for x in jax.device_get(counted(params)))
    return {"layer": counting[-1], "text": found[1].decode(), "gates": gates, "positions": positions}


def _decay(config: Config, with_params: Callable[[Params], Transformer], params: Params, source: Source) -> dict[str, Any]:
    """The score by distance that the first layer's encoding alone gives."""
    dims = dataclasses.replace(config.transformer(source.vocab_size).dims, max_length=source.max_length)
    model = with_params(params)
    encoding, limit = model.encodings[0], model.encodings[0].max_length(dims)
    reach = 4 * config.seq_length
    distances = np.arange(0, reach if limit is None else min(reach, limit - 1))
    values = jax.jit(lambda p: probes.decay_curve(encoding, p, distances, dims))(model.encoding_params(0))
    return {"distance": distances.tolist(), "score": np.asarray(values).tolist()}
