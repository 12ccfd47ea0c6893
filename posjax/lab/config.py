"""The configuration of a run: a frozen dataclass whose fields are the flags of the command line."""

import dataclasses
import difflib
import functools
import importlib.util
import os
import sys
import traceback
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from posjax.checks import bounded, check_at_least, check_fields, check_one_of, checked, short
from posjax.data.tokenizers import check_tokenizer
from posjax.encodings.spec import spec_of
from posjax.files import read_json
from posjax.lab import named_configs
from posjax.models.pretrained.architecture import Architecture
from posjax.models.pretrained.families import architecture_of
from posjax.models.pretrained.files import open_checkpoint
from posjax.models.pretrained.load import FREE_FIELDS, architecture_in, pattern_of
from posjax.models.pretrained.tokenizer import adds_bos, special_tokens, with_all_stops
from posjax.models.transformer import TransformerConfig
from posjax.parallel.mesh import parse_mesh
from posjax.storage import is_bucket, run_path
from posjax.training.schedule import check_decay_steps

PRETRAINED = "pretrained.json"  # in a workdir


@dataclasses.dataclass(frozen=True)
class Config:
    """Configures a training run: the task and data, the model, the optimizer, and the evaluation.

    Attributes:
      workdir: folder for all outputs of the run. Empty: runs/NAME for configs/NAME.py.
      init_from: workdir of a finished or interrupted run whose parameters (their moving average, if it keeps one) this run starts
        from, with a fresh optimizer at step 0. Empty: the parameters are drawn at random.
      from_pretrained: checkpoint of another library that this run starts from: a folder with config.json and safetensors files, or
        a .gguf file. Its architecture, tokenizer and encoding become those of the run; only the encoding may differ. Empty: none.
      task: lm (next token), mlm (masked tokens, an encoder with [CLS]), or a synthetic task: flip_flop, selective_copy, counting.
      data: stdlib (source code of Python's standard library), tfds:NAME, a file or folder of text or of tokens, or a mixture of
        these with weights, such as books:0.7,code:0.3.
      validation_data: a source for validation, with the same choices as data, which is then all training text. Empty: part of data,
        namely its files named after validation, or else its last tenth.
      include: patterns of the files of a folder to read, such as '*.txt' or 'books/**'; none means all.
      exclude: patterns of the files of a folder to leave out.
      text_key: key of JSONL, or column of Parquet and Arrow, that holds the text.
      data_dir: folder for prepared data. Empty: $POSJAX_DATA_DIR, or else ~/.cache/posjax.
      tokenizer: bytes, bpe (trained on the train split), or the path of a tokenizer.json or a .gguf file.
      vocab_size: vocabulary size of the bpe tokenizer; for a file of tokens, if it is not the default, the number of ids of the
        tokenizer that made them.
      seq_length: tokens per training sequence; synthetic tasks derive their own length from it.
      num_variables: number of variables in the counting task, 1 to 26.
      num_examples: size of a fixed training set for a synthetic task; None draws new examples at every step.
      batch_size: sequences per step, over all devices.
      encoding: encoding for train and evaluate, e.g. rope, "rope + cope(64)", or "cope(64) / identity" for alternating layers;
        package.module:name is an encoding of your own. Config also accepts the encoding as a Python value.
      encodings: encodings for compare.
      seeds: seeds for compare; train uses the first.
      num_layers: number of Transformer layers.
      embed_dim: width of the Transformer.
      num_heads: number of query heads.
      num_kv_heads: number of key and value heads; None means num_heads.
      head_dim: channels per head; None means embed_dim / num_heads.
      mlp_dim: hidden width of the MLP; None means 4 embed_dim (8/3 embed_dim with a gate).
      norm: rmsnorm or layernorm.
      norm_position: pre, post, output (of each branch), or sandwich (input and output).
      activation: gelu or gelu_exact, or swiglu or geglu, which have a gate.
      tie_embeddings: uses the token embeddings as the output projection, too.
      dropout_rate: dropout rate after the embedding and after each attention and MLP block.
      remat: what the backward pass recomputes to save memory: none, attention (all but attention) or full (whole layers).
      scan_layers: compiles one layer and scans over all; False compiles each layer separately, which makes steps of small models
        faster and compilation slower.
      compute_dtype: float32 or bfloat16; parameters stay float32.
      attention: softmax, or linear (for encodings that only rotate).
      local_window_size: number of earlier positions that a token attends to; None means all.
      logits_soft_cap: soft cap of the attention scores; None disables it.
      implementation: attention implementation: xla (dense), xla_chunked (tiled) or pallas (kernels); None selects the fastest.
      steps: number of optimizer steps.
      optimizer: adamw, or muon: Muon for the matrices of the layers and AdamW for all else, with the same learning rate.
      trainable: all, or encoding to train the parameters of the encodings and leave all others as they are.
      learning_rate: peak learning rate.
      warmup_steps: steps of linear warmup to the peak; shortened in proportion if --steps is set too small for it.
      decay: shape of the learning rate after the peak: cosine, linear, constant, or wsd (constant, then linear in the last
        decay_steps steps). A run with constant or wsd can be extended by more steps.
      decay_steps: length of the final decay of wsd in steps; None means a tenth of the steps.
      end_fraction: learning rate at the last step, as a fraction of the peak.
      weight_decay: weight decay, on matrices only.
      beta1: first-moment decay of AdamW.
      beta2: second-moment decay of AdamW.
      clip_norm: maximum global norm of the gradient; None disables clipping.
      z_loss: weight of the mean of logsumexp(logits)^2 in the training loss, e.g. 1e-4; the logged loss excludes it.
      ema_decay: decay of a moving average of the parameters for evaluation and generation, e.g. 0.999; None keeps no average.
      accumulate_steps: micro-batches per step.
      parallel: jit (with named sharding) or pmap.
      mesh: devices per axis, e.g. data=2,fsdp=4; the axes are data, fsdp, context and tensor. Empty: data over all devices.
      log_every: steps between log lines.
      checkpoint_every: steps between checkpoints.
      checkpoint_minutes: also saves after this many minutes without a checkpoint; None saves by steps alone.
      keep_last: number of newest checkpoints to keep.
      keep_every: also keeps the checkpoints of multiples of this step; None keeps no others for this reason.
      keep_best: also keeps this many checkpoints with the lowest evaluation loss, which evaluate_every determines.
      loggers: where metrics go besides metrics.jsonl: tensorboard, csv, wandb.
      figure_format: png, svg or pdf.
      evaluate_every: steps between evaluations during training; None evaluates only at the end.
      eval_lengths: lengths of the final evaluation, as multiples of seq_length.
      eval_tokens: number of validation tokens to evaluate at each length.
    """

    workdir: str = ""
    init_from: str = ""
    from_pretrained: str = ""
    task: Literal["lm", "mlm", "flip_flop", "selective_copy", "counting"] = "lm"
    data: str = "stdlib"
    validation_data: str = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_key: str = "text"
    data_dir: str = ""
    tokenizer: str = "bytes"
    # No tokenizer in use has as many as a million.
    vocab_size: int = bounded(4096, least=1, most=2**20, hint="this is the vocabulary of the tokenizer")
    seq_length: int = bounded(256, least=2)  # an input token and a target, or [CLS] and a token
    num_variables: int = bounded(1, least=1, most=26)
    num_examples: int | None = bounded(None, least=1, hint="the examples of a synthetic task are held in memory")
    batch_size: int = bounded(16, least=1)
    encoding: str = "rope"
    encodings: tuple[str, ...] = (
        "identity",
        "sinusoidal",
        "learned",
        "rope",
        "alibi",
        "tupe",
        "cope(64)",
        "rope + cope(64)",
    )
    seeds: tuple[int, ...] = (0,)
    num_layers: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_position: Literal["pre", "post", "output", "sandwich"] = "pre"
    activation: Literal["gelu", "gelu_exact", "swiglu", "geglu"] = "gelu"
    tie_embeddings: bool = True
    dropout_rate: float = 0.0
    remat: Literal["none", "attention", "full"] = "none"
    scan_layers: bool = True
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["softmax", "linear"] = "softmax"
    local_window_size: int | None = None
    logits_soft_cap: float | None = None
    implementation: Literal["xla", "xla_chunked", "pallas"] | None = None
    steps: int = bounded(1000, least=1)
    optimizer: Literal["adamw", "muon"] = "adamw"
    trainable: Literal["all", "encoding"] = "all"
    learning_rate: float = bounded(1e-3, above=0)
    warmup_steps: int = 100
    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_steps: int | None = bounded(None, least=1)
    end_fraction: float = bounded(0.1, least=0, most=1)
    weight_decay: float = bounded(0.1, least=0)
    beta1: float = bounded(0.9, least=0, below=1)
    beta2: float = bounded(0.99, least=0, below=1)
    clip_norm: float | None = bounded(1.0, above=0, what="be positive, or None to disable clipping")
    z_loss: float = bounded(0.0, least=0)
    ema_decay: float | None = bounded(None, least=0, below=1, what="lie in [0, 1), or be None to keep no average")
    accumulate_steps: int = bounded(1, least=1)
    parallel: Literal["jit", "pmap"] = "jit"
    mesh: str = ""
    log_every: int = bounded(20, least=1)
    checkpoint_every: int = bounded(500, least=1)
    checkpoint_minutes: float | None = bounded(None, above=0)
    keep_last: int = bounded(3, least=1)
    keep_every: int | None = bounded(None, least=1)
    keep_best: int = bounded(0, least=0)
    loggers: tuple[Literal["tensorboard", "csv", "wandb"], ...] = ("tensorboard",)
    figure_format: Literal["png", "svg", "pdf"] = "png"
    evaluate_every: int | None = bounded(None, least=1)
    eval_lengths: tuple[int, ...] = (1, 2, 4, 8)
    eval_tokens: int = bounded(32_768, least=1)

    def __post_init__(self) -> None:
        if not isinstance(self.encoding, str):
            object.__setattr__(self, "encoding", spec_of(self.encoding))
        if not isinstance(self.encodings, tuple | list):
            raise ValueError(f"encodings must be a tuple of encodings, got {short(self.encodings)}")
        object.__setattr__(self, "encodings", tuple(e if isinstance(e, str) else spec_of(e) for e in self.encodings))
        for field in dataclasses.fields(self):
            if typing.get_origin(field.type) is Literal:
                check_one_of(field.name, getattr(self, field.name), typing.get_args(field.type))
        check_fields(self)
        check_tokenizer(self.tokenizer)
        if self.tokenizer == "bpe":
            check_at_least("vocab_size", self.vocab_size, 259)  # 256 bytes, two special tokens, one merge
        for name in ("encodings", "seeds", "eval_lengths"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} must not be empty, got ()")
            if repeated := [value for value in values if values.count(value) > 1]:  # it would count twice in a mean
                raise ValueError(
                    f"{name} must all differ, got {repeated[0]!r} {values.count(repeated[0])} times in {short(values)}"
                )
        if not self.data.strip():
            raise ValueError(f"data must be 'stdlib', 'tfds:NAME' or an existing file or folder, got {self.data!r}")
        if not self.text_key:
            raise ValueError("text_key must be the name of a key or column, got ''")
        if any(multiple < 1 for multiple in self.eval_lengths):
            raise ValueError(f"eval_lengths must be multiples of seq_length, integers of at least 1, got {self.eval_lengths}")
        if self.warmup_steps < 0 or self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must lie in [0, steps={self.steps}], got {self.warmup_steps}")
        check_decay_steps(self.decay, self.steps - self.warmup_steps, self.decay_steps)
        if parse_mesh(self.mesh) and self.parallel == "pmap":
            raise ValueError(f"mesh must be '' with parallel='pmap', which shards rows over all devices, got {self.mesh!r}")
        if any(not 0 <= seed < 2**31 for seed in self.seeds):  # 2^31 is the seed of the evaluation
            raise ValueError(f"seeds must lie in [0, 2**31), got {self.seeds}")
        if self.from_pretrained and self.init_from:
            raise ValueError(f"init_from must be '' with from_pretrained={self.from_pretrained!r}, got {self.init_from!r}")
        if not self.from_pretrained:
            self.transformer(vocab_size=2)

    def transformer(self, vocab_size: int) -> TransformerConfig:
        """Returns the model configuration; tables of positions are as long as the training sequences.

        With ``from_pretrained``, the sizes are the checkpoint's, the vocabulary and the tables of positions included.

        Args:
          vocab_size: V, that of the tokenizer or of the task.
        """
        names = {f.name for f in dataclasses.fields(self)}
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TransformerConfig) if f.name in names}
        if self.from_pretrained:
            own = self.pretrained.architecture.config
            return dataclasses.replace(own, **{name: value for name, value in shared.items() if name in FREE_FIELDS})
        return TransformerConfig(**shared | {"vocab_size": vocab_size}, max_length=self.seq_length, is_causal=self.task != "mlm")

    @property
    def pretrained(self) -> "Pretrained":
        """Returns what the run knows about the checkpoint that it starts from: by its workdir, or else by the checkpoint.

        Raises:
          ValueError: neither can be read.
        """
        stored = run_path(self.workdir) / PRETRAINED if self.workdir else None
        if stored is not None and stored.is_file():
            return _stored_pretrained(str(stored), stored.stat().st_mtime_ns if not is_bucket(stored) else 0)
        path = Path(self.from_pretrained).expanduser()
        header = path / "config.json" if path.is_dir() else path
        return _pretrained_of(self.from_pretrained, header.stat().st_mtime_ns if header.exists() else 0)

    @property
    def seed(self) -> int:
        """Returns the first of the seeds, with which ``posjax train`` runs."""
        return self.seeds[0]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Describes the checkpoint that a run starts from; its workdir holds this as pretrained.json.

    Attributes:
      config: the checkpoint's config.json, with the stop tokens of its generation_config.json.
      adds_bos: whether its tokenizer puts a token before a text.
    """

    config: dict[str, Any]
    adds_bos: bool

    @functools.cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.config)


@functools.lru_cache(maxsize=8)
def _pretrained_of(path: str, changed: int) -> Pretrained:
    checkpoint = open_checkpoint(path)
    architecture_in(checkpoint)
    return Pretrained(with_all_stops(checkpoint), adds_bos(checkpoint))


@functools.lru_cache(maxsize=8)
def _stored_pretrained(path: str, changed: int) -> Pretrained:
    return Pretrained(**read_json(run_path(path), "config", "adds_bos"))


def with_pretrained(config: Config, chosen: Collection[str]) -> Config:
    """Returns a configuration with the architecture, tokenizer and encoding of the checkpoint in ``from_pretrained``.

    Args:
      config: the configuration.
      chosen: fields that were chosen for this run, such as flags of the command line. They must not contradict the checkpoint,
        whereas the others are replaced by its values.

    Raises:
      ValueError: the checkpoint cannot be used, or a field contradicts it.
    """
    checkpoint = open_checkpoint(config.from_pretrained)
    architecture = architecture_in(checkpoint)
    fields: dict[str, Any] = {"workdir": config.workdir or f"runs/{checkpoint.path.stem}"}
    if not architecture.config.is_causal:
        raise ValueError(
            f"from_pretrained must be a decoder, got {config.from_pretrained!r}, an encoder; posjax.models.pretrained loads it"
        )
    if config.task != "lm":
        raise ValueError(f"task must be 'lm' with from_pretrained={config.from_pretrained!r}, got {config.task!r}")
    names = {field.name for field in dataclasses.fields(config)}
    for field in dataclasses.fields(architecture.config):
        if field.name not in names or field.name in FREE_FIELDS:
            continue
        value = getattr(architecture.config, field.name)
        if field.name in chosen and getattr(config, field.name) != value:
            where = f"the one of the checkpoint {config.from_pretrained}"
            raise ValueError(f"{field.name} must be {value!r}, {where}, got {getattr(config, field.name)!r}")
        if not isinstance(value, tuple):  # windows by layer are the checkpoint's alone
            fields[field.name] = value
    if "encoding" not in chosen:
        fields["encoding"] = spec_of(pattern_of(architecture.encodings))
    if "tokenizer" not in chosen:
        if checkpoint.tokenizer is None:
            raise ValueError(f"tokenizer must be chosen, because {config.from_pretrained!r} has no tokenizer.json")
        fields["tokenizer"] = str(checkpoint.tokenizer)
    special_tokens(checkpoint.config)
    return dataclasses.replace(config, **fields)


@checked()
def load_config(path: str | os.PathLike) -> Config:
    """Loads the Config that ``get_config()`` in a Python file returns; an empty workdir becomes runs/NAME.

    Args:
      path: name of a configuration of posjax, such as quickstart, or path of a Python file, or a workdir or its config.json.

    Returns:
      The configuration.

    Raises:
      ValueError: there is no such name or file, the file raises an exception, or it has no ``get_config() -> Config``.

    Example:
      >>> from posjax.lab.config import load_config
      >>> load_config("quickstart").encoding
      'rope'
    """
    from posjax.lab.workdir import is_workdir, read_config

    path = os.fspath(path)
    if is_workdir(path) or path.endswith(".json"):
        return read_config(run_path(path))
    file = named_configs().get(path, Path(path))
    if not file.is_file() or file.suffix != ".py":
        files = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        names = list(named_configs())
        near = difflib.get_close_matches(path, [*names, *files], n=1) or difflib.get_close_matches(file.stem, names, n=1)
        raise ValueError(
            f"config must be a Python file, or a name that posjax list shows, such as quickstart, got {path!r}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    try:
        config = _module_of(file).get_config()
    except (Exception, SystemExit) as error:
        what = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
        raise ValueError(f"config {path} failed to load{_line_of(error, file)}: {type(error).__name__}: {what}") from error
    if not isinstance(config, Config):
        raise ValueError(f"get_config() of {path} must return a posjax.lab.config.Config, got {type(config).__name__}")
    return config if config.workdir else dataclasses.replace(config, workdir=f"runs/{file.stem}")


def _module_of(file: Path) -> types.ModuleType:
    """Runs a config file as Python runs a script: it may import files beside it. Dataclasses need it in ``sys.modules``."""
    name, folder = f"posjax_config_{file.stem}", str(file.resolve().parent)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:  # at the end from now on, for encodings in a file beside it, without hiding any other module
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    return module


def _line_of(error: BaseException, file: Path) -> str:
    """Returns " at line N", the line of a config file that raised an exception; an empty string if no line of it did."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == os.path.abspath(file)]
    if isinstance(error, SyntaxError) and error.filename == os.path.abspath(file):
        lines = [error.lineno]
    return f" at line {lines[-1]}" if lines else ""
