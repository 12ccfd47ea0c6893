"""Opens trained runs, for evaluation, generation and analysis in Python.

    run = posjax.load("runs/mine")
    losses = token_losses(run, "def f(x):\\n")     # [T], nats
    maps = attention_maps(run, "def f(x):\\n")     # [L, N, T, T]

Letters in shapes: T tokens of a text, L layers, N query heads.
"""

import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from posjax.checks import near
from posjax.data import synthetic
from posjax.data.corpus import cache_folder
from posjax.data.sources import TOKENIZERS
from posjax.data.tokenizers import NUM_BYTES, NUM_SPECIAL, Vocabulary, cached_tokenizer
from posjax.encodings.spec import modules_of, parse_encoding
from posjax.files import write_atomically
from posjax.lab import probes
from posjax.lab import run as runs
from posjax.lab.config import Config
from posjax.lab.evaluation import layer_weights, max_eval_length, measure_in
from posjax.lab.source import Source, open_source
from posjax.lab.workdir import EVALUATION, READING, TOKENIZER, StoredRun, choose_runs, read_config, stored_runs
from posjax.models.pretrained.tokenizer import PretrainedTokenizer, opened
from posjax.models.transformer import Transformer
from posjax.parallel.distributed import first_process_first
from posjax.storage import is_bucket, run_path, with_retries
from posjax.typing import Float, Int, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer(Vocabulary):
    """Converts text to tokens and back, as a run was trained, without its data.

    Attributes:
      vocab_size: V, including the two special tokens.
      path: file of the tokenizer; None if tokens are bytes, or ids of a tokenizer that is not known, which a text is then.
    """

    vocab_size: int
    path: Path | None = None

    @property
    def tokenizer_path(self) -> Path | None:
        return self.path

    @property
    def num_bytes(self) -> int | None:
        return 0 if self.path is not None or self.vocab_size == NUM_BYTES + NUM_SPECIAL else None


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRun:
    """Holds a trained model and all that is needed to use it.

    Attributes:
      path: folder of the run.
      config: its configuration.
      step: step of the checkpoint.
      model: the Transformer with the trained parameters, the moving average if the run keeps one.
      params: these parameters, as ``with_params`` takes them.
      with_params: parameters -> model, a pure function.
      tokenizer: None for a synthetic task.
      task: the synthetic task; None for text.
    """

    path: Path
    config: Config
    step: int
    model: Transformer
    params: Params
    with_params: Callable[[Params], Transformer]
    tokenizer: Tokenizer | PretrainedTokenizer | None
    task: synthetic.Task | None

    @functools.cached_property
    def _programs(self) -> dict[str, Callable[..., Any]]:
        return {}

    def _apply(self, function: Callable[[Transformer, Any], Any], tokens: Any) -> Any:
        """Applies a function of (model, tokens) to the trained model, compiled once per length of the text."""
        compiled = jax.jit(lambda params, tokens: function(self.with_params(params), tokens))
        return jax.device_get(self._programs.setdefault(function.__qualname__, compiled)(self.params, tokens))


def load(path: str | Path, *, encoding: str | None = None, seed: int | None = None) -> TrainedRun:
    """Opens a trained run from its workdir. See ``posjax.load``."""
    if not run_path(path).is_dir():
        raise ValueError(f"path must be the workdir of a run, got {str(path)!r}, which is not a folder")
    chosen = [
        run
        for run in stored_runs(path)
        if (encoding is None or run.config.encoding == encoding) and (seed is None or run.config.seed == seed)
    ]
    if len(chosen) != 1:
        known = ", ".join(f"{run.config.encoding!r} with seed {run.config.seed}" for run in stored_runs(path))
        raise ValueError(f"encoding and seed must select one run of {path}, which holds {known}; got {encoding!r} and {seed!r}")
    return open_trained(chosen[0], chosen[0].config)


def one_run(config: Config) -> tuple[StoredRun, Config]:
    """Returns the run in a configuration's workdir, of a comparison the one with its encoding and seed."""
    chosen = choose_runs(config)
    return chosen[0] if len(chosen) == 1 else choose_runs(config, (config.encoding,), (config.seed,))[0]


def open_trained(run: StoredRun, config: Config) -> TrainedRun:
    """Restores the newest intact checkpoint of a run.

    Args:
      run: the run on disk.
      config: its configuration, in which fields that do not change the training may differ from the stored one. If the devices do
        not fit the stored mesh, the parameters are replicated.

    Raises:
      ValueError: the mesh of ``config`` does not fit the devices, or the encoding cannot be imported.
      CheckpointError: no checkpoint is intact.
    """
    config = fitting(config, run)
    source = runs.bare_source(run)
    with_params, _ = runs.abstract_model(config, config.encoding, source)
    restored = runs.restore(config, config.encoding, run.path, source)
    params = restored.state.eval_params
    tokenizer = None
    if source.task is None:
        path = _tokenizer_of(run) or runs.tokenizer_file(source)
        if config.from_pretrained and path is not None:
            tokenizer = opened(config.pretrained.config, path, config.pretrained.adds_bos)
        else:
            tokenizer = Tokenizer(source.vocab_size, path)
    return TrainedRun(run.path, config, restored.step, with_params(params), params, with_params, tokenizer, source.task)


def open_pretrained(config: Config) -> TrainedRun:
    """Opens the checkpoint in ``from_pretrained`` as if it were a run.

    Raises:
      ValueError: it cannot be loaded, or its encoding cannot be replaced by the configuration's.
    """
    pretrained = config.pretrained
    source = Source(pretrained.architecture.config.vocab_size, pretrained.architecture.config.max_length)
    with_params, params = runs.load_pretrained(config, config.encoding, source)
    path = cached_tokenizer(config.tokenizer, cache_folder(config.data_dir) / TOKENIZERS)
    tokenizer = opened(pretrained.config, path, pretrained.adds_bos)
    return TrainedRun(Path(config.from_pretrained), config, 0, with_params(params), params, with_params, tokenizer, None)


def _tokenizer_of(run: StoredRun) -> Path | None:
    """Returns the tokenizer's file in a workdir, None if there is none; that of a bucket is copied to this machine."""
    stored = run.path / TOKENIZER
    if not stored.exists():
        return None
    if not is_bucket(stored):
        return stored
    content = with_retries(stored.read_bytes)
    local = Path(tempfile.gettempdir()) / f"posjax-{hashlib.sha256(content).hexdigest()[:24]}-{TOKENIZER}"
    if not local.exists():
        write_atomically(local, content)
    return local


def fitting(config: Config, run: StoredRun) -> Config:
    """Returns a configuration that replicates parameters if the run's own mesh does not fit the devices of this machine.

    Raises:
      ValueError: the encoding is the user's own and cannot be imported here; the message says where the run imported it from.
    """
    try:
        parse_encoding(config.encoding)
    except ValueError as error:
        folders = run.facts.get("imported_from") or {}
        if missing := [name for name in modules_of(config.encoding) if name in folders and f"{name}:" in str(error)]:
            where = f"the run imported it from {folders[missing[0]]}: start the command there, or add that folder to PYTHONPATH"
            raise ValueError(f"{error}; {where}") from None
        raise
    if config.mesh == run.config.mesh and config.mesh and not runs.mesh_fits(config):
        return dataclasses.replace(config, mesh="")
    return config


def open_data(chosen: Sequence[tuple[StoredRun, Config]], *, is_other_text: bool) -> Source:
    """Opens the data that runs are evaluated on, with the tokenizer that they were trained with.

    Args:
      chosen: the runs and the configurations to evaluate them with, which name the same data.
      is_other_text: whether the data may differ from those that the runs were trained with.

    Raises:
      ValueError: the data cannot be used with these runs, or have changed.
    """
    first, reading = chosen[0]
    config = fitting(reading, first)
    if not config.from_pretrained:  # whose architecture the workdir holds
        config = dataclasses.replace(config, workdir="")
    if (stored := _tokenizer_of(first)) is not None:  # the file that it was made from may be gone, or be another now
        config = dataclasses.replace(config, tokenizer=str(stored))
    with first_process_first():
        source = open_source(config)
    for run, reading in chosen:
        data, name = run.facts.get("data") or {}, "validation"
        if not is_other_text and data.get(name) and source.digests.get(name) not in (None, data[name]):
            raise ValueError(
                f"data: the validation text at {config.data!r} differs from the one that run {run.path} was trained with; restore "
                f"it, or pass --data {config.data} to evaluate on the text as it is"
            )
        if run.facts.get("vocab_size", source.vocab_size) != source.vocab_size:
            raise ValueError(
                f"data must be tokens of the run's vocabulary, {run.facts['vocab_size']} ids, got {source.vocab_size}, because "
                f"tokenizer={config.tokenizer!r} was trained on another text"
            )
        ours, theirs = runs.tokenizer_file(source), _tokenizer_of(run)
        if ours is not None and theirs is not None and ours.read_bytes() != theirs.read_bytes():
            raise ValueError(f"data {config.data!r} must be read with the tokenizer of run {run.path}, got one of another text")
        runs.check(fitting(reading, run), (reading.encoding,), source, training=False)
    return source


def rows_of(
    workdirs: Sequence[str], config: Config, flags: Set[str], say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], Source, list[Config]]:
    """Returns the results of runs as rows for ``posjax.lab.report``, the data of the first, and the configurations.

    Evaluations that are missing are made; nothing is trained or written.

    Args:
      workdirs: workdirs of runs or of comparisons.
      config: the configuration of the first, whose evaluation all runs share.
      flags: names of the fields that were chosen for this evaluation.
      say: called with each line of progress.

    Raises:
      ValueError: a workdir has no runs, or the runs have different tasks.
    """
    rows, configs, first, is_other_text = [], [], None, bool(flags & {"data", "validation_data"})
    evaluation = {name: getattr(config, name) for name in {*EVALUATION, *(flags & READING)}}
    for workdir in workdirs:
        stored = read_config(run_path(workdir))
        if stored.task != config.task:
            tasks = f"{config.task!r} in {workdirs[0]} and {stored.task!r} in {workdir}"
            raise ValueError(f"runs to compare must have the same task, got {tasks}")
        chosen = choose_runs(dataclasses.replace(stored, **evaluation))
        results = []
        for run, reading in chosen:
            evaluated = runs.evaluated_as(reading, run.facts.get("data") or {})
            results.append(None if is_other_text else runs.stored_evaluation(run.path, evaluated))
        source = open_data(chosen, is_other_text=is_other_text) if None in results else bare(stored)
        first = first or source
        configs.append(chosen[0][1])
        for (run, reading), result in zip(chosen, results, strict=True):
            if result is None:
                say(f"evaluating {run.path}")
                trained = open_trained(run, reading)
                result = runs.evaluate_params(trained.config, trained.config.encoding, trained.params, source)
            rows.append({"encoding": reading.encoding, "seed": reading.seed, "workdir": workdir} | result)
    assert first is not None  # there is at least one workdir
    return with_distinct_names(_of_common_columns(rows, measure_in(rows))), first, configs


def bare(config: Config) -> Source:
    """Returns the synthetic task of a configuration, or an empty source for a text."""
    return open_source(config) if config.task not in ("lm", "mlm") else Source(0, config.seq_length)


def stored_rows(config: Config, flags: Set[str]) -> tuple[list[dict[str, Any]], Source]:
    """Returns the stored results in a configuration's workdir as rows, without opening data or checkpoints.

    Raises:
      ValueError: there are none.
    """
    encodings = (config.encoding,) if "encoding" in flags else config.encodings if "encodings" in flags else None
    rows = []
    for run, reading in choose_runs(config, encodings, config.seeds if "seeds" in flags else None):
        if (result := runs.stored_evaluation(run.path, None)) is not None:
            rows.append({"encoding": reading.encoding, "seed": reading.seed} | result)
    if not rows:
        raise ValueError(f"workdir must hold an evaluated run, got {config.workdir!r}; run posjax evaluate {config.workdir} first")
    return rows, bare(config)


def _of_common_columns(rows: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    """Reduces rows to the columns, such as evaluation lengths, that all of them have.

    Raises:
      ValueError: there are none.
    """
    columns = [column for column in rows[0]["metrics"][measure] if all(column in row["metrics"][measure] for row in rows)]
    if not columns:
        lengths = "; ".join(f"{row['workdir']}: {', '.join(row['metrics'][measure])}" for row in rows)
        raise ValueError(f"runs to compare must be evaluated at a common length, set by --eval_lengths, got {lengths}")
    return [
        row | {"metrics": row["metrics"] | {measure: {column: row["metrics"][measure][column] for column in columns}}}
        for row in rows
    ]


def with_distinct_names(rows: list[dict[str, Any]], name: str = "encoding") -> list[dict[str, Any]]:
    """Adds the workdir to the names of rows in different workdirs that have the same name."""
    workdirs: dict[str, set[str]] = {}
    for row in rows:
        workdirs.setdefault(row[name], set()).add(row["workdir"])
    return [row | {name: f"{row[name]} ({row['workdir']})"} if len(workdirs[row[name]]) > 1 else row for row in rows]


# What a trained model does with a text -----------------------------------------------------------------------------------


def tokens_of(run: TrainedRun, text: str) -> Int[np.ndarray, " T"]:
    """Returns the tokens that the model reads for a text: ``bos`` and the text's tokens; of a synthetic task, the words.

    Args:
      run: a trained run, from ``posjax.load``.
      text: the text; for a synthetic task, words of the task.

    Raises:
      ValueError: the text has a word that is not in the task's vocabulary, or more tokens than the encoding supports.
    """
    if run.task is None:
        assert run.tokenizer is not None  # every run of a text has one
        tokens = run.tokenizer.prompt(text)
    else:
        tokens = task_tokens(run.task, text, "text")
    source = Source(run.model.config.vocab_size, run.model.config.max_length)
    limit = max_eval_length(run.config, run.model.encodings, source)
    if limit is not None and len(tokens) > limit:
        raise ValueError(f"text must have at most {limit} tokens with encoding {run.config.encoding!r}, got {len(tokens)}")
    return tokens


def task_tokens(task: synthetic.Task, text: str, argument: str) -> Int[np.ndarray, " T"]:
    """Returns the tokens of a text that consists of words of a synthetic task.

    Raises:
      ValueError: there is no word, or one that is not in the task's vocabulary; the message suggests the closest.
    """
    words, known = text.split(), ", ".join(task.words[:20])
    if not words:
        raise ValueError(f"{argument} must have at least one word of {task.name}, such as {known}; got {text!r}")
    for word in words:
        if word not in task.words:
            raise ValueError(f"{argument} must be words of {task.name}, {known}, got {word!r}{near(word, task.words)}")
    return np.asarray([task.words.index(word) for word in words], np.int32)


def token_losses(run: TrainedRun, text: str) -> Float[np.ndarray, " T"]:
    """Returns the loss of every token of a text, given those before it.

    Args:
      run: a trained run, from ``posjax.load``.
      text: the text; for a synthetic task, words of the task.

    Returns:
      float32 [T], nats: -log p of each token that ``run.tokenizer.encode(text)`` returns; for a synthetic task, of each word but
      the first.

    Raises:
      ValueError: the model is an encoder, which predicts masked tokens only; or see ``tokens_of``.
    """
    if run.config.task == "mlm":
        raise ValueError("run must be a decoder, because an encoder does not predict the next token; got a run with task='mlm'")
    tokens = tokens_of(run, text)

    def losses(model: Transformer, tokens: Any) -> Any:
        return model.losses(tokens[:, :-1], tokens[:, 1:], jnp.ones((1, tokens.shape[1] - 1)))[0]

    return run._apply(losses, tokens[None])


def attention_maps(run: TrainedRun, text: str) -> Float[np.ndarray, "L N T T"]:
    """Returns the attention probabilities of every layer and head over a text.

    Args:
      run: a trained run, from ``posjax.load``.
      text: the text; for a synthetic task, words of the task.

    Returns:
      float32 [L, N, T, T]: of queries (rows) for keys (columns), for the T tokens that ``tokens_of`` returns.

    Raises:
      ValueError: the model has linear attention; or see ``tokens_of``.
    """
    if run.config.attention == "linear":
        raise ValueError("run must have softmax attention, because linear attention has no probabilities, got attention='linear'")

    def maps(model: Transformer, tokens: Any) -> Any:
        weights = (layer_weights(model.config, *layer) for layer in enumerate(model.records(tokens)))
        return jnp.stack([each[0].astype(jnp.float32) for each in weights])

    return run._apply(maps, tokens_of(run, text)[None])


def gates_and_positions(run: TrainedRun, text: str) -> tuple[list[int], Float[np.ndarray, "M N T T"], Float[np.ndarray, "M N T T"]]:
    """Returns CoPE's gates and contextual positions over a text, in the layers whose encoding counts by gates.

    Args:
      run: a trained run, from ``posjax.load``.
      text: the text; for a synthetic task, words of the task.

    Returns:
      (layers, gates, positions): the M layers, from 0, and float32 [M, N, T, T] each, query by key, for the T tokens that
      ``tokens_of`` returns. A position is the sum of the gates from the key to the query, before it is clamped to the last
      embedding; gates of keys after the query are 0.

    Raises:
      ValueError: no layer counts by gates; or see ``tokens_of``.
    """
    dims = run.model.config.dims
    counts = [probes.counts_by_gates(encoding, dims) for encoding in run.model.encodings]
    layers = [layer for layer, index in enumerate(run.model.layout) if counts[index]]
    if not layers:
        raise ValueError(f"run must have a layer that counts by gates, such as cope(64), got {run.config.encoding!r}")

    def gates_and_sums(model: Transformer, tokens: Any) -> Any:
        records = model.records(tokens)
        pairs = []
        for record in (records[layer] for layer in layers):
            arrays, scale = (record.query, record.key, record.value), model.config.attention_scale
            pairs.append(probes.cope_positions(*arrays, record.encoding, record.params, hidden=record.hidden, scale=scale))
        return tuple(jnp.stack([pair[index][0] for pair in pairs]) for index in (0, 1))

    return layers, *run._apply(gates_and_sums, tokens_of(run, text)[None])
