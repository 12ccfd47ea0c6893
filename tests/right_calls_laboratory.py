"""Right calls of the laboratory's public functions: data, configurations, training, sweeps and statistics. See ``right_calls``."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from right_calls import Call, Refused, choice, flag, integer, number, only, text

from posjax.data import synthetic
from posjax.data.corpus import excerpts, load_corpus
from posjax.data.on_device import on_device
from posjax.data.pipeline import batches, count_rows
from posjax.encodings.spec import parse_encoding
from posjax.lab import statistics
from posjax.lab.ablation.sweeps import parse_sweep
from posjax.lab.config import Config, load_config
from posjax.lab.prompting import Prompting
from posjax.parallel.mesh import parse_mesh
from posjax.training.checkpoints import Checkpoints
from posjax.training.loop import fit
from posjax.training.schedule import learning_rate_schedule


def texts(x: Any) -> Any:
    """A tuple or list of strings."""
    if not isinstance(x, tuple | list) or not all(isinstance(one, str) and one for one in x):
        raise Refused
    return x


def path_in(*known: Any) -> Callable[[Any], Any]:
    """One of some paths, as a string or a Path."""

    def canonical(x: Any) -> Any:
        if not isinstance(x, str | os.PathLike) or str(x) not in map(str, known):
            raise Refused
        return x

    return canonical


def loggers(x: Any) -> Any:
    if not isinstance(x, tuple | list) or not all(isinstance(one, str) and one in ("tensorboard", "csv", "wandb") for one in x):
        raise Refused
    return x


def any_path(x: Any) -> Any:
    if not isinstance(x, str | os.PathLike):
        raise Refused
    return x


def numbers(least: int = 1) -> Callable[[Any], Any]:
    """Finite numbers in a sequence or an array."""

    def canonical(x: Any) -> Any:
        try:
            values = np.asarray(x)
        except ValueError:
            raise Refused from None
        if isinstance(x, str | bytes) or values.dtype.kind not in "iuf" or values.ndim != 1 or len(values) < least:
            raise Refused
        if not np.isfinite(values.astype(float)).all():
            raise Refused
        return x

    return canonical


def even(x: Any) -> Any:
    if integer(4)(x) % 2:
        raise Refused
    return int(x)


def any_ids(x: Any) -> Any:
    """Ids of bytes, in an array or sequence of any shape."""
    try:
        values = np.asarray(x)
    except (TypeError, ValueError):
        raise Refused from None
    if values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 257):
        raise Refused
    return x


def data_calls(folder: Path) -> dict[str, Call]:
    (folder / "text.txt").write_text("the rotary position encoding counts tokens\n" * 100)
    source = str(folder / "text.txt")
    corpus = load_corpus(source, data_dir=folder / "cache")
    is_corpus = only(lambda x: isinstance(x, type(corpus)))
    tokens = len(corpus.tokens)
    rows = {
        "corpus": (corpus, is_corpus),
        "length": (16, integer(1, tokens)),
        "batch_size": (4, integer(1)),
        "masked": (False, flag),
    }
    loading = {
        "source": (source, path_in(source, "stdlib")),
        "split": ("train", choice("train", "validation")),
        "tokenizer": ("bytes", choice("bytes", "bpe")),
        "vocab_size": (None, only(lambda x: x is None)),
        "validation_data": ("", only(lambda x: isinstance(x, str) and x == "")),
        "include": ((), texts),
        "exclude": ((), texts),
        "text_key": ("text", only(lambda x: isinstance(x, str) and x)),
        "data_dir": (str(folder / "cache"), lambda x: x if x is None else any_path(x)),
        "workdir": (None, lambda x: x if x is None else any_path(x)),
    }
    pipeline = rows | {
        "seed": (0, integer(0, 2**32 - 1)),
        "shuffle": (True, flag),
        "repeat": (True, flag),
        "process_index": (0, integer(0, 0)),
        "process_count": (1, integer(1, 10**6)),
    }
    return {
        "load_corpus": Call(load_corpus, loading, equal=False, weight=2),
        "excerpts": Call(
            excerpts,
            {"corpus": (corpus, is_corpus), "length": (16, integer(1)), "count": (2, integer(1))},
            equal=False,
            required=("corpus", "length", "count"),
        ),
        "batches": Call(batches, pipeline, equal=False, weight=2, required=("corpus", "length", "batch_size", "seed")),
        "on_device": Call(on_device, rows, equal=False, required=("corpus", "length", "batch_size")),
        "count_rows": Call(count_rows, {n: rows[n] for n in ("corpus", "length", "masked")}, required=("corpus", "length")),
        "Corpus.encode": Call(corpus.encode, {"text": ("words", only(lambda x: isinstance(x, str | bytes)))}, equal=False),
        "Corpus.decode": Call(corpus.decode, {"tokens": (np.array([1, 2]), any_ids)}, equal=False),
        "flip_flop": Call(synthetic.flip_flop, {"length": (16, even)}, equal=False),
        "selective_copy": Call(
            synthetic.selective_copy, {"num_tokens": (8, integer(1)), "num_blanks": (8, integer(0))}, equal=False
        ),
    }


def training_calls(folder: Path) -> dict[str, Call]:
    file = folder / "config.py"
    file.write_text("from posjax.lab.config import Config\ndef get_config():\n    return Config(steps=200)\n")
    count = {"steps": (1, integer(1)), "log_every": (1, integer(1)), "keep_last": (3, integer(1)), "keep_best": (0, integer(0))}
    optional = {name: (None, integer(1, none=True)) for name in ("keep_every", "evaluate_every")}
    config = {
        "init_from": ("", text),
        "data": ("stdlib", only(lambda x: isinstance(x, str) and x.strip())),
        "validation_data": ("", text),
        "include": ((), texts),
        "exclude": ((), texts),
        "text_key": ("text", only(lambda x: isinstance(x, str) and x)),
        "keep_last": count["keep_last"],
        "keep_every": optional["keep_every"],
        "keep_best": count["keep_best"],
        "checkpoint_minutes": (None, number(lambda x: x > 0, none=True)),
        "vocab_size": (4096, integer(1, 2**20)),
        "decay_steps": (None, integer(1, 1000, none=True)),
        "loggers": (("tensorboard",), loggers),
        "figure_format": ("png", choice("png", "svg", "pdf")),
    }
    prompting = {
        "prompt": ((), only(lambda x: isinstance(x, tuple | list) and all(isinstance(one, str) for one in x))),
        "prompt_file": ("", text),
        "max_new_tokens": (8, integer(1)),
        "temperature": (1.0, number(lambda x: x >= 0)),
        "top_k": (None, integer(1, none=True)),
        "top_p": (None, number(lambda x: 0 < x <= 1, none=True)),
        "seed": (0, integer(0)),
        "stop": ((), texts),
    }
    wsd = {
        "peak": (1e-3, number(lambda x: x >= 0, array=True)),
        "steps": (10, integer(1)),
        "decay": ("wsd", choice("cosine", "linear", "constant", "wsd")),
        "decay_steps": (4, integer(1, 10, none=True)),
    }
    loop = count | optional
    loop |= {
        "step_fn": (lambda state, batch: (state, {}), only(callable)),
        "batches": ([], only(lambda x: hasattr(x, "__iter__") and not (isinstance(x, np.ndarray | jax.Array) and x.ndim == 0))),
        "workdir": (str(folder / "fit"), any_path),
        "checkpoint_every": (1, integer(1, none=True)),
        "checkpoint_minutes": (None, number(lambda x: x > 0, none=True)),
        "quiet": (True, flag),
        "loggers": config["loggers"],
    }

    def fit_at_its_end(**arguments: Any) -> Any:
        """Checks its arguments; the state is that of the last step, so that there is nothing to train."""
        return fit(state=State(jnp.int32(1)), **arguments)

    keep = {name: loop[name] for name in ("keep_last", "keep_every", "keep_best")}
    return {
        "Config of the laboratory": Call(Config, config, weight=3),
        "Prompting": Call(Prompting, prompting, weight=2),
        "load_config": Call(load_config, {"path": (str(file), path_in(file, "quickstart"))}, equal=False),
        "learning_rate_schedule with wsd": Call(learning_rate_schedule, wsd, equal=False, required=("peak", "steps")),
        "Checkpoints": Call(Checkpoints, {"directory": (str(folder / "checkpoints"), any_path)} | keep, equal=False),
        "fit": Call(fit_at_its_end, loop, equal=False, weight=2, required=("step_fn", "batches", "workdir")),
        "parse_encoding": Call(parse_encoding, {"spec": ("rope", choice("rope"))}, equal=False),
        "parse_sweep": Call(parse_sweep, {"text": ("steps=3,4", choice("steps=3,4"))}, equal=False),
        "parse_mesh": Call(parse_mesh, {"text": ("data=2", choice("data=2", ""))}, equal=False),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array


def statistics_calls() -> dict[str, Call]:
    values, some = (0.1, 0.2, 0.4), numbers()
    return {
        "summary": Call(statistics.summary, {"values": (values, numbers(0))}, equal=False),
        "difference": Call(
            statistics.difference, {"first": (values, some), "second": (values, some), "paired": (False, flag)}, equal=False
        ),
        "sign_flips": Call(statistics.sign_flips, {"differences": (values, some)}, equal=False),
        "binomial_bounds": Call(statistics.binomial_bounds, {"wrong": (3, integer(0, 10)), "total": (10, integer(3))}),
        "benjamini_hochberg": Call(statistics.benjamini_hochberg, {"p_values": (values, numbers(0))}, equal=False),
    }


def laboratory_calls(folder: Path) -> dict[str, Call]:
    """All right calls of the laboratory by name; they read and write files in a folder."""
    return data_calls(folder) | training_calls(folder) | statistics_calls()
