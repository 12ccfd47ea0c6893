"""Whole runs: a configuration in; a trained, evaluated model and its numbers out. Everything below the command line meets here."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from posjax import probes, tasks
from posjax.attention import attention_weights
from posjax.checkpoints import CheckpointError, Checkpoints
from posjax.config import Config
from posjax.datasets.corpus import Corpus, excerpts, load_corpus
from posjax.datasets.pipeline import batches
from posjax.encoding import PositionalEncoding
from posjax.loop import fit
from posjax.sharding import jit_train_step, make_mesh, pmap_train_step
from posjax.specs import parse_encoding, slug
from posjax.training import TrainState, init_state, learning_rate_schedule, make_optimizer, make_train_step
from posjax.transformer import Transformer, cross_entropy, functional
from posjax.typing import Array, Params

# What a task is measured by: its name in results, and the words for tables and axes.
MEASURES = {"lm": ("bits_per_byte", "bits per byte"), "mlm": ("masked_loss", "masked-token loss (nats)")}
TASK_MEASURE = ("error", "error (%)")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where batches come from: two splits of a corpus, or a synthetic task.

    Attributes:
      vocab_size: V.
      max_length: the longest sequence that the model will train on.
      train, validation: a text's splits, the second cut down to what is evaluated; None for synthetic tasks.
      task: a synthetic task; None for text.
    """

    vocab_size: int
    max_length: int
    train: Corpus | None = None
    validation: Corpus | None = None
    task: tasks.Task | None = None


def open_source(config: Config) -> Source:
    """Loads (and on first use prepares) what the configuration trains on."""
    if config.task in ("lm", "mlm"):
        options = dict(
            tokenizer=config.tokenizer,
            vocab_size=config.vocab_size if config.tokenizer == "bpe" else None,
            data_dir=config.data_dir or None,
        )
        try:
            train, validation = (load_corpus(config.data, split, **options) for split in ("train", "validation"))
        except ValueError as error:
            raise ValueError(f"data {config.data!r} cannot be used: {error}") from error
        # One token less than the longest rows, which begin with the token that opens a document.
        longest = config.seq_length * max(config.eval_lengths) - 1
        validation = excerpts(validation, longest, max(1, config.eval_tokens // longest))
        return Source(train.vocab_size, config.seq_length, train=train, validation=validation)
    length = config.seq_length
    task = {
        "flip_flop": lambda: tasks.flip_flop(length=length),
        "selective_copy": lambda: tasks.selective_copy(num_tokens=length // 2, num_blanks=length // 2),
        "counting": lambda: tasks.counting(max_operations=length, length=length),
    }[config.task]()
    return Source(task.vocab_size, max(t.length for t in (task, *task.variants.values())), task=task)


def check(config: Config, specs: Sequence[str], source: Source) -> None:
    """Tells what could not be trained or evaluated, without compiling anything.

    Raises:
      ValueError: a batch that does not divide over the devices, a text shorter than a sequence, encodings that cannot be told
        apart, or one that the model cannot take.
    """
    devices = jax.device_count()
    parts = devices * config.accumulate_steps if config.parallel == "pmap" else math.lcm(devices, config.accumulate_steps)
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts} on {devices} devices with accumulate_steps={config.accumulate_steps}, "
            f"got {config.batch_size}"
        )
    names = [slug(spec) for spec in specs]
    if twice := [spec for spec, name in zip(specs, names, strict=True) if names.count(name) > 1]:
        raise ValueError(f"encodings must all differ, got {', '.join(map(repr, twice))}")
    try:
        batch = next(train_batches(config, source, config.seed))
    except ValueError as error:
        raise ValueError(f"seq_length={config.seq_length} does not fit the train split of {config.data!r}: {error}") from error
    lengths = [] if source.task is not None else [config.seq_length * multiple for multiple in config.eval_lengths]
    for length in lengths:
        try:
            _held_out(config, source, length)
        except ValueError as error:
            what = f"eval_lengths={config.eval_lengths} times seq_length={config.seq_length}"
            raise ValueError(f"{what} must fit the validation split of {config.data!r}: {error}") from error
    for spec in specs:
        try:
            with_params, params = _abstract_model(config, spec, source)
            jax.eval_shape(make_loss(with_params, dropout=False), params, batch, jax.random.key(0))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"encoding {spec!r} does not fit this model: {error}") from error


def _maker(config: Config, spec: str, source: Source, seed: int) -> Callable[[], Transformer]:
    shape = dataclasses.replace(config.transformer(source.vocab_size), max_length=source.max_length)
    return lambda: Transformer(shape, parse_encoding(spec), rngs=nnx.Rngs(seed))


def _abstract_model(config: Config, spec: str, source: Source) -> tuple[Callable[[Params], Transformer], Params]:
    """``build_model`` with shapes in place of parameters: nothing is drawn and nothing compiled."""
    return functional(nnx.eval_shape(_maker(config, spec, source, 0)))


def build_model(config: Config, spec: str, source: Source, seed: int) -> tuple[Callable[[Params], Transformer], Params]:
    """``functional`` of the model that a configuration and an encoding describe."""
    return functional(_maker(config, spec, source, seed)())


class _TaskBatches:
    """Endless batches of a synthetic task, each a function of the seed and its number."""

    def __init__(self, task: tasks.Task, batch_size: int, seed: int):
        self.drawn = 0
        self.draw = jax.jit(lambda number: task.batch(jax.random.fold_in(jax.random.key(seed), number), batch_size))

    def __iter__(self) -> "_TaskBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self.drawn += 1
        return jax.device_get(self.draw(self.drawn - 1))

    def get_state(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def set_state(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def train_batches(config: Config, source: Source, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a run: the same for every encoding."""
    if source.task is not None:
        return _TaskBatches(source.task, config.batch_size, seed)
    return batches(
        source.train,
        length=config.seq_length,
        batch_size=config.batch_size,
        seed=seed,
        masked=config.task == "mlm",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def make_loss(with_params: Callable[[Params], Transformer], dropout: bool) -> Callable[[Params, Any, Array], tuple[Array, Array]]:
    """(params, batch, key) -> (sum of weighted nats, sum of weights)."""

    def loss(params: Params, batch: dict[str, Array], key: Array) -> tuple[Array, Array]:
        model = with_params(params)
        logits = model(batch["tokens"], batch["positions"], batch["segment_ids"], dropout_key=key if dropout else None)
        return cross_entropy(logits, batch["targets"], batch["weights"])[1:]

    return loss


def train(
    config: Config, spec: str, seed: int, workdir: Path, source: Source, *, command: str | None = None, quiet: bool = False
) -> Params:
    """Trains one model, or goes on where its workdir stopped, and returns its parameters."""
    with_params, params = build_model(config, spec, source, seed)
    step = make_train_step(
        make_loss(with_params, config.dropout_rate > 0),
        _optimizer(config),
        accumulate_steps=config.accumulate_steps,
        axis_name="data" if config.parallel == "pmap" else None,
    )
    losses = jax.jit(_token_losses(with_params))

    def evaluate_now(state: TrainState) -> dict[str, float]:
        batch_iterator = _held_out(config, source, config.seq_length)
        return {"loss": _mean_loss(losses, state.params, batch_iterator, config.eval_tokens)[0]}

    state = fit(
        pmap_train_step(step) if config.parallel == "pmap" else jit_train_step(step, make_mesh()),
        init_state(params, _optimizer(config), seed),
        train_batches(config, source, seed),
        steps=config.steps,
        workdir=workdir,
        config=dataclasses.asdict(config) | {"encoding": spec, "seeds": [seed]},
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep_checkpoints,
        evaluate=evaluate_now if config.evaluate_every else None,
        evaluate_every=config.evaluate_every,
        resume_command=command,
        quiet=quiet,
    )
    return state.params


def _optimizer(config: Config) -> Any:
    schedule = learning_rate_schedule(
        config.learning_rate, config.steps, config.warmup_steps, decay=config.decay, end_fraction=config.end_fraction
    )
    return make_optimizer(
        schedule, beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay, clip_norm=config.clip_norm
    )


def restore_params(config: Config, spec: str, seed: int, workdir: Path, source: Source) -> Params:
    """The parameters of a workdir's newest good checkpoint.

    Raises:
      CheckpointError: there is none, or none that is whole.
    """
    _, params = build_model(config, spec, source, seed)
    restored = Checkpoints(workdir / "checkpoints").restore_latest(init_state(params, _optimizer(config), seed))
    if restored is None:
        raise CheckpointError(f"workdir {workdir} has no checkpoint to evaluate; posjax train makes one")
    return restored.state.params


# Evaluation ----------------------------------------------------------------------------------------------------------


def evaluate(config: Config, spec: str, params: Params, seed: int, source: Source) -> dict[str, Any]:
    """The numbers of a trained model, as JSON.

    Returns:
      metrics: {measure: {column: value or None}, "limit": longest sequence or None, "parameters": count}; columns are lengths
      in tokens for text and test sets for synthetic tasks; None where the encoding cannot go that long.
      loss_by_index, attention_distance, decay, line: what the pictures are made of (text only).
    """
    with_params, _ = _abstract_model(config, spec, source)
    encodings = with_params(params).encodings
    dims = dataclasses.replace(config.transformer(source.vocab_size).dims, max_length=source.max_length)
    limit = min((n for e in encodings if (n := e.max_length(dims)) is not None), default=None)
    metrics: dict[str, Any] = {"limit": limit, "parameters": sum(x.size for x in jax.tree.leaves(params))}
    if source.task is not None:
        return {"metrics": {"error": _task_errors(config, with_params, params, source.task)} | metrics}

    measure = MEASURES[config.task][0]
    losses = jax.jit(_token_losses(with_params))
    unit = source.validation.num_bytes / len(source.validation.tokens) * math.log(2) if config.task == "lm" else 1.0
    by_length: dict[str, float | None] = {}
    curve = None
    for length in (config.seq_length * multiple for multiple in config.eval_lengths):
        if limit is not None and length > limit:
            by_length[str(length)] = None
            continue
        mean, curve = _mean_loss(losses, params, _held_out(config, source, length), config.eval_tokens)
        by_length[str(length)] = mean / unit
    result = {"metrics": {measure: by_length} | metrics}
    if curve is not None:
        index, loss = curve
        result["loss_by_index"] = {"index": index.tolist(), "loss": (loss / unit).tolist()}
    return result | _probe(config, with_params(params), source)


def _token_losses(with_params: Callable[[Params], Transformer]) -> Callable[[Params, dict[str, Array]], Array]:
    def losses(params: Params, batch: dict[str, Array]) -> Array:
        logits = with_params(params)(batch["tokens"], batch["positions"], batch["segment_ids"])
        return cross_entropy(logits, batch["targets"], batch["weights"])[0]

    return losses


def _held_out(config: Config, source: Source, length: int) -> Iterator[dict[str, np.ndarray]]:
    """The validation text in its own order: every length reads the same."""
    if source.task is not None:
        return _TaskBatches(source.task, config.batch_size, seed=2**31)
    rows = max(1, config.batch_size * config.seq_length // length)
    options = dict(length=length, batch_size=rows, seed=0, shuffle=False, repeat=False)
    return batches(source.validation, **options, masked=config.task == "mlm")


def _mean_loss(
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
        sampler = _TaskBatches(variant, config.batch_size, seed=2**31)
        count = max(1, config.eval_tokens // (config.batch_size * variant.length))
        sums = np.sum([jax.device_get(wrong(params, next(sampler))) for _ in range(count)], axis=0)
        errors[name] = float(100 * sums[0] / sums[1])
    return errors


# What the pictures are made of ---------------------------------------------------------------------------------------


def _probe(config: Config, model: Transformer, source: Source) -> dict[str, Any]:
    batch = next(_held_out(config, source, config.seq_length))
    rows = slice(0, min(8, len(batch["tokens"])))
    segments = jnp.asarray(batch["segment_ids"][rows])
    positions = jnp.asarray(batch["positions"][rows])
    is_causal = config.task != "mlm"
    probed: dict[str, Any] = {}
    if config.attention == "softmax":
        distances = []
        for record in model.records(jnp.asarray(batch["tokens"][rows]), positions, segments):
            weights = attention_weights(
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
            )
            distances.append(np.asarray(probes.attention_distance(weights, positions, positions)).tolist())
        probed["attention_distance"] = distances
    line = _cope_line(config, model, source) if is_causal and config.attention == "softmax" else None
    return probed | ({"line": line} if line else {}) | {"decay": _decay(config, model, source)}


def _cope_line(config: Config, model: Transformer, source: Source) -> dict[str, Any] | None:
    """Gates and contextual positions over a real line of the validation text, as its last character sees them.

    The heads are those of the last layer that counts; the line is read with the text before it. None where no layer counts,
    where tokens are not characters, or where no line is of a length to draw.
    """
    text = bytes(source.validation.tokens[:200_000]) if config.tokenizer == "bytes" else b""
    longest = min(70, config.seq_length)  # in bytes, with the end of the line
    shortest = min(40, longest // 2)
    line_form = rb"\n((?=.{%d,%d}\n) *\w[ -~]*\n)" % (shortest - 1, longest - 1)
    found = re.search(line_form, text[config.seq_length :])
    if found is None:
        return None
    end = config.seq_length + found.end(1)
    tokens = np.frombuffer(text[end - config.seq_length : end], np.uint8)[None].astype(np.int32)
    counting = [(i, r) for i, r in enumerate(model.records(jnp.asarray(tokens))) if r.encoding.is_contextual]
    if not counting:
        return None
    layer, record = counting[-1]
    gates, positions = probes.cope_positions(record.query, record.key, record.value, record.encoding, record.params)
    line = slice(-len(found[1]), None)
    return {
        "layer": layer,
        "text": found[1].decode(),
        "gates": np.asarray(gates[0, :, -1, line]).tolist(),
        "positions": np.asarray(positions[0, :, -1, line]).tolist(),
    }


def _decay(config: Config, model: Transformer, source: Source) -> dict[str, Any]:
    """The score by distance that the first layer's encoding alone gives."""
    dims = dataclasses.replace(config.transformer(source.vocab_size).dims, max_length=source.max_length)
    encoding: PositionalEncoding = model.encodings[0]
    reach = 4 * config.seq_length
    limit = encoding.max_length(dims)
    distances = np.arange(0, reach if limit is None else min(reach, limit - 1))
    values = probes.decay_curve(encoding, model.encoding_params(0), distances, dims)
    return {"distance": distances.tolist(), "score": np.asarray(values).tolist()}


# Comparison ----------------------------------------------------------------------------------------------------------


def compare(
    config: Config, workdir: Path, source: Source, *, command: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Trains and evaluates every encoding with every seed; each finished pair is kept and not done again."""
    rows = []
    pairs = [(spec, seed) for spec in config.encodings for seed in config.seeds]
    for number, (spec, seed) in enumerate(pairs, 1):
        folder = workdir / slug(spec) / f"seed-{seed}"
        say(f"{number} of {len(pairs)}: {spec}, seed {seed}")
        row = train_and_evaluate(config, spec, seed, folder, source, command=command, say=say)
        rows.append({"encoding": spec, "seed": seed} | row)
    return rows


def train_and_evaluate(
    config: Config,
    spec: str,
    seed: int,
    folder: Path,
    source: Source,
    *,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """One row of results, read from ``evaluation.json`` where it was written before."""
    done = folder / "evaluation.json"
    if done.exists():
        say(f"{folder} is trained and evaluated already: done")
        return json.loads(done.read_text())
    params = train(config, spec, seed, folder, source, command=command)
    result = evaluate(config, spec, params, seed, source)
    part = done.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.replace(done)
    return result
