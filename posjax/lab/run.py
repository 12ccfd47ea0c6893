"""Trains and evaluates the model that a configuration describes, for the command line and for scripts."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from posjax.attention.backends.compile_errors import translate_compile_errors
from posjax.data.corpus import holds_tokens, vocab_size_of
from posjax.encodings.spec import parse_encoding, slug
from posjax.files import DamagedFile, finite, read_json, set_aside, write_json
from posjax.lab.config import Config, load_config
from posjax.lab.evaluation import evaluate, mean_loss, take_tokens, token_losses
from posjax.lab.flops import model_flops
from posjax.lab.source import Source, eval_batches, open_source, train_batches
from posjax.lab.summary import opening_lines, training_curve
from posjax.lab.workdir import StoredRun, add_fact, digest_of_arrays, facts_of, init_or_check_workdir, milestones, stored_runs
from posjax.models.losses import cross_entropy, z_loss
from posjax.models.pretrained.files import open_checkpoint
from posjax.models.pretrained.load import FREE_FIELDS, load_params
from posjax.models.transformer import Transformer, functional
from posjax.parallel.distributed import on_first_process, text_of_first_process
from posjax.parallel.mesh import ROWS, make_mesh, parse_mesh, row_share
from posjax.parallel.partition_rules import PARTITION_RULES, SHARDED_RULES, Rules, shard_state, state_shardings
from posjax.parallel.steps import abstract_train_step, jit_for_all, jit_train_step, pmap_train_step
from posjax.storage import run_path
from posjax.training.checkpoints import CheckpointError, Checkpoints, Restored
from posjax.training.loop import fit
from posjax.training.optimizer import freeze, make_optimizer
from posjax.training.schedule import learning_rate_schedule
from posjax.training.state import TrainState, init_state
from posjax.training.step import make_train_step
from posjax.training.writers import printed
from posjax.typing import Array, Params


def check(config: Config, specs: Sequence[str], source: Source, devices: int | None = None, *, training: bool = True) -> None:
    """Checks that every encoding can be trained and evaluated, without compiling anything.

    Args:
      config, source: the configuration and the data of the run.
      specs: the encodings to train.
      devices: number of devices that a batch is sharded over; None: taken from the configuration's mesh.
      training: False checks evaluation only.

    Raises:
      ValueError: the mesh does not fit the devices, batch_size is not divisible over them, seq_length is not divisible over the
        context axis, the text is shorter than a sequence, two encodings have the same name, or the model does not support an
        encoding.
    """
    mesh = _mesh(config) if devices is None else None
    share = (0, 1) if mesh is None else row_share(mesh)
    if config.parallel == "pmap" and jax.process_count() > 1:
        raise ValueError(f"parallel must be 'jit' with several processes, got 'pmap' and {jax.process_count()} processes")
    devices = _rows(mesh) if devices is None else devices
    parts = devices * config.accumulate_steps if config.parallel == "pmap" else math.lcm(devices, config.accumulate_steps)
    if training and config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts} on {devices} devices with accumulate_steps={config.accumulate_steps}, "
            f"got {config.batch_size}"
        )
    if mesh is not None and source.max_length % (2 * mesh.shape["context"]) and mesh.shape["context"] > 1:
        raise ValueError(
            f"seq_length must be a multiple of {2 * mesh.shape['context']}, two chunks for each of the {mesh.shape['context']} "
            f"devices of the context axis in mesh {config.mesh!r}, got {source.max_length}"
        )
    names = [slug(spec) for spec in specs]
    if twice := [spec for spec, name in zip(specs, names, strict=True) if names.count(name) > 1]:
        raise ValueError(f"encodings must all differ, got {', '.join(map(repr, twice))}")
    split = "train" if training else "validation"
    try:  # without drawing a batch, which takes long if it is large
        _ = train_batches(config, source, config.seed, share) if training else eval_batches(config, source, config.seq_length)
    except ValueError as error:
        raise ValueError(f"seq_length={config.seq_length} does not fit the {split} split of {config.data!r}: {error}") from error
    lengths = [] if source.task is not None else [config.seq_length * multiple for multiple in config.eval_lengths]
    for length in lengths:
        try:
            eval_batches(config, source, length)
        except ValueError as error:
            product = f"eval_lengths={config.eval_lengths} times seq_length={config.seq_length}"
            raise ValueError(f"{product} must fit the validation split of {config.data!r}: {error}") from error
    for spec in specs:
        try:
            with_params, params = abstract_model(config, spec, source)
            key = jax.eval_shape(jax.random.key, 0)
            jax.eval_shape(make_loss(with_params, dropout=False), params, _abstract_batch(config, source), key)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"encoding {spec!r} does not fit this model: {error}") from error
        if training and config.trainable == "encoding" and not jax.tree.leaves(params.get("encoding", {})):
            raise ValueError(f"encoding must have learned parameters with trainable='encoding', got {spec!r}, which has none")


def _abstract_batch(config: Config, source: Source) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a training batch."""
    shape = (config.batch_size, config.seq_length if source.task is None else source.task.length)
    dtypes = dict(tokens=jnp.int32, targets=jnp.int32, weights=jnp.float32, segment_ids=jnp.int32, positions=jnp.int32)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def _mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of a configuration.

    Raises:
      ValueError: the mesh does not use all devices.
    """
    try:
        return make_mesh(**parse_mesh(config.mesh), devices=devices)
    except ValueError as error:
        raise ValueError(f"mesh {config.mesh!r} does not fit: {error}") from error


def mesh_fits(config: Config) -> bool:
    """Returns whether the mesh of a configuration fits the devices of this machine."""
    try:
        return bool(_mesh(config))
    except ValueError:
        return False


def _rows(mesh: Mesh) -> int:
    """Returns the number of devices that the rows of a batch are sharded over."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def _rules(mesh: Mesh) -> Rules:
    """Returns the partition rules: the state is replicated if only rows are sharded, else it is sharded."""
    return PARTITION_RULES if mesh.size == mesh.shape["data"] else SHARDED_RULES


def _maker(config: Config, spec: str, source: Source, seed: int | Array, settings: Sequence[Any]) -> Callable[[], Transformer]:
    shape = dataclasses.replace(config.transformer(source.vocab_size), max_length=source.max_length)
    return lambda: Transformer(shape, parse_encoding(spec, settings), rngs=nnx.Rngs(jax.random.key(seed)))


def abstract_model(
    config: Config, spec: str, source: Source, settings: Sequence[Any] = ()
) -> tuple[Callable[[Params], Transformer], Params]:
    """Returns the result of ``build_model`` with shapes in place of parameters, without drawing or compiling anything."""
    return functional(nnx.eval_shape(_maker(config, spec, source, 0, settings)))


def build_model(
    config: Config, spec: str, source: Source, seed: int | Array, settings: Sequence[Any] = ()
) -> tuple[Callable[[Params], Transformer], Params]:
    """Initializes the model that a configuration and an encoding describe, in its functional form.

    Args:
      config, source: the configuration and the data of the run.
      spec: the encoding; it may have blanks ``_0``, ``_1``, ...
      seed: seed of the parameters; may be traced.
      settings: values of the blanks; may be traced.

    Returns:
      (with_params, params), as ``functional`` returns them.
    """
    return functional(_maker(config, spec, source, seed, settings)())


def make_loss(
    with_params: Callable[[Params], Transformer], dropout: bool, z_weight: float = 0.0, trainable: str = "all"
) -> Callable[[Params, Any, Array], tuple[Array, Array]]:
    """Returns the training loss, a function (params, batch, key) -> (sum of weighted nats, sum of weights).

    Its gradient is zero for parameters that are not ``trainable``. It includes ``z_weight`` times ``z_loss``, but the value does
    not, so that the losses of runs with and without z-loss are comparable.
    """

    def loss(params: Params, batch: dict[str, Array], key: Array) -> tuple[Array, Array]:
        model = with_params(freeze(params, trainable))
        keys = dict(dropout_key=key if dropout else None, place_key=jax.random.fold_in(key, 1))
        logits = model(batch["tokens"], batch["positions"], batch["segment_ids"], **keys)
        _, nats, weight = cross_entropy(logits, batch["targets"], batch["weights"])
        if z_weight:
            penalty = z_weight * z_loss(logits, batch["weights"])
            nats = nats + (penalty - jax.lax.stop_gradient(penalty))
        return nats, weight

    return loss


def abstract_step(
    config: Config | str, devices: Sequence[Any], *, vocab_size: int | None = None, **fields: Any
) -> tuple[Any, tuple[TrainState, Any]]:
    """Builds the train step of a configuration for compilation on devices that need not be attached.

    No parameters are drawn and no text is read; a file of tokens is, for the size of its vocabulary.

        job = {"config": "pretrain_1b", "mesh": "fsdp=64,tensor=4"}
        posjax.compile.aot.compile_ahead("posjax.lab.run:abstract_step", job, "v5e:16x16")

    Args:
      config: a configuration, or the path of a config file.
      devices: the devices of the mesh, all of which are used.
      vocab_size: vocabulary size of a text's tokenizer, including special tokens; None: the configuration's.
      **fields: fields of the configuration to replace.

    Returns:
      The jax.jit object, and (state, batch) as jax.ShapeDtypeStructs with shardings.

    Raises:
      ValueError: the mesh does not fit the devices, batch_size is not divisible over them, or the configuration is invalid.
    """
    config = dataclasses.replace(load_config(config) if isinstance(config, str) else config, **fields)
    mesh = _mesh(config, devices)
    if config.batch_size % (_rows(mesh) * config.accumulate_steps):
        raise ValueError(
            f"batch_size must be a multiple of {_rows(mesh) * config.accumulate_steps} on {len(devices)} devices with "
            f"mesh={config.mesh!r} and accumulate_steps={config.accumulate_steps}, got {config.batch_size}"
        )
    is_text = config.task in ("lm", "mlm")
    if is_text and vocab_size is None and not holds_tokens(config.data):
        vocab_size = vocab_size_of(config.tokenizer, config.vocab_size, config.data_dir)
    source = Source(vocab_size, config.seq_length) if is_text and vocab_size is not None else open_source(config)
    with_params, params = abstract_model(config, config.encoding, source)
    loss = make_loss(with_params, config.dropout_rate > 0, config.z_loss, config.trainable)
    step = make_train_step(loss, optimizer_of(config), accumulate_steps=config.accumulate_steps, ema_decay=config.ema_decay)
    state = jax.eval_shape(lambda params: _first_state(config, params, config.seed), params)
    return abstract_train_step(step, mesh, state, _abstract_batch(config, source), _rules(mesh))


def _abstract_state(config: Config, spec: str, source: Source) -> TrainState:
    """Returns the state of a run as shapes with shardings, without drawing or compiling anything."""
    mesh = _mesh(config)
    params = abstract_model(config, spec, source)[1]
    state = jax.eval_shape(lambda params: _first_state(config, params, config.seed), params)
    if config.parallel == "pmap":
        return state

    def placed(leaf: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(placed, state, state_shardings(state, mesh, _rules(mesh)))


def train(
    config: Config, spec: str, seed: int, workdir: Path, source: Source, *, command: str | None = None, quiet: bool = False
) -> Params:
    """Trains one model, resuming from the newest checkpoint in ``workdir`` if there is one, and returns its parameters.

    If ``config.ema_decay`` is set, their moving average is returned instead. With ``config.init_from`` or
    ``config.from_pretrained``, a run that begins starts from the parameters of that run or checkpoint.

    Raises:
      ValueError: the run in init_from has no parameters of these shapes, or the checkpoint cannot be loaded.
      KernelCompileError: the attention kernel failed to compile on this device.
    """
    with_params, state, mesh = _start(config, spec, seed, source)
    if (config.init_from or config.from_pretrained) and not Checkpoints(workdir / "checkpoints").steps():
        start = _with_params_of if config.init_from else _with_pretrained_params
        state = start(config, spec, source, state, workdir)
    step = make_train_step(
        make_loss(with_params, config.dropout_rate > 0, config.z_loss, config.trainable),
        optimizer_of(config),
        accumulate_steps=config.accumulate_steps,
        axis_name="data" if config.parallel == "pmap" else None,
        ema_decay=config.ema_decay,
    )
    losses = jit_for_all(token_losses(with_params))

    def evaluate_now(state: TrainState) -> dict[str, float]:
        test_batches = take_tokens(eval_batches(config, source, config.seq_length), config.eval_tokens)
        return {"loss": mean_loss(losses, state.eval_params, test_batches)[0]}

    share = row_share(mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    actual = config if source.task is None else dataclasses.replace(config, seq_length=source.task.length)
    if not quiet and jax.process_index() == 0:
        for line in opening_lines(config, spec, source, parameters, mesh.shape, workdir):
            printed(line)
    with translate_compile_errors(config.implementation):
        state = fit(
            pmap_train_step(step) if config.parallel == "pmap" else jit_train_step(step, mesh, _rules(mesh)),
            state,
            train_batches(config, source, seed, share),
            steps=config.steps,
            workdir=workdir,
            config=dataclasses.asdict(config) | {"encoding": spec, "seeds": [seed]},
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            checkpoint_minutes=config.checkpoint_minutes,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            keep_best=config.keep_best,
            loggers=config.loggers,
            keep_steps=milestones(config),
            evaluate=evaluate_now if config.evaluate_every else None,
            evaluate_every=config.evaluate_every,
            resume_command=command,
            quiet=quiet,
            shares=share[1],
            flops_per_token=model_flops(actual, parameters) / (actual.batch_size * actual.seq_length),
        )
    return state.eval_params


def _start(config: Config, spec: str, seed: int, source: Source) -> tuple[Callable[[Params], Transformer], TrainState, Mesh]:
    """Returns the model, its state before the first step, and the mesh.

    A sharded state is initialized in place on the devices, so that no device ever holds all of it.
    """
    mesh = _mesh(config)
    if _rules(mesh) is PARTITION_RULES:
        with_params, params = build_model(config, spec, source, seed)
        state = _first_state(config, params, seed)
        return with_params, state if config.parallel == "pmap" else shard_state(state, mesh), mesh

    def make() -> TrainState:
        return _first_state(config, build_model(config, spec, source, seed)[1], seed)

    shardings = state_shardings(jax.eval_shape(make), mesh, _rules(mesh))
    return abstract_model(config, spec, source)[0], jax.jit(make, out_shardings=shardings)(), mesh


def _first_state(config: Config, params: Params, seed: int) -> TrainState:
    return init_state(params, optimizer_of(config), seed, ema=config.ema_decay is not None)


# Fields of a configuration that may be traced, so that runs that differ only in these share one compiled program.
TRACED_FIELDS = ("learning_rate", "warmup_steps", "end_fraction", "weight_decay", "beta1", "beta2", "clip_norm")


def optimizer_of(config: Config, settings: Mapping[str, Any] | None = None) -> Any:
    """Returns the optimizer of a configuration; ``settings``, which may be traced, override the fields of the same name."""
    chosen = {name: getattr(config, name) for name in TRACED_FIELDS} | dict(settings or {})
    peak, warmup, end = (chosen.pop(name) for name in TRACED_FIELDS[:3])
    schedule = learning_rate_schedule(
        peak, config.steps, warmup, decay=config.decay, end_fraction=end, decay_steps=config.decay_steps
    )
    return make_optimizer(schedule, optimizer=config.optimizer, trainable=config.trainable, **chosen)


def evaluate_params(config: Config, spec: str, params: Params, source: Source) -> dict[str, Any]:
    """Evaluates ``params`` in the model that a configuration and an encoding describe; see ``evaluate``.

    Raises:
      KernelCompileError: the attention kernel failed to compile on this device.
    """
    with translate_compile_errors(config.implementation):
        return evaluate(config, abstract_model(config, spec, source)[0], params, source)


def restore_params(config: Config, spec: str, seed: int, workdir: Path, source: Source) -> Params:
    """Restores the parameters of the newest intact checkpoint in a workdir, or their moving average if one is kept.

    Raises:
      CheckpointError: the workdir has no checkpoint, or none that is intact.
    """
    return restore(config, spec, workdir, source).state.eval_params


def restore(config: Config, spec: str, workdir: Path, source: Source) -> Restored:
    """Restores the newest intact checkpoint in a workdir.

    Raises:
      CheckpointError: the workdir has no checkpoint, or none that is intact.
    """
    restored = Checkpoints(workdir / "checkpoints").restore_latest(_abstract_state(config, spec, source))
    if restored is None:
        raise CheckpointError(f"workdir {workdir} has no checkpoint; run posjax train first")
    return restored


def bare_source(run: StoredRun) -> Source:
    """Returns the sizes of a run's data, without the data if its workdir records them."""
    if run.config.task in ("lm", "mlm") and "vocab_size" in run.facts:
        length = run.config.seq_length
        if run.config.from_pretrained:
            length = run.config.transformer(run.facts["vocab_size"]).max_length
        return Source(run.facts["vocab_size"], length)
    return open_source(run.config)


def check_init_from(config: Config, specs: Sequence[str], source: Source) -> None:
    """Checks that a configuration can start from the parameters of the run in ``init_from``, without reading them.

    Raises:
      ValueError: there is no such run, or its parameters have other names, shapes or dtypes; the message names the first that
        differs.
    """
    if not config.init_from:
        return
    run = _init_run(config)
    theirs = _leaves(abstract_model(run.config, run.config.encoding, bare_source(run))[1])
    for spec in specs:
        ours = _leaves(abstract_model(config, spec, source)[1])
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            if name not in theirs or name not in ours or ours[name].shape != theirs[name].shape:
                there, here = ("absent" if leaf is None else f"{list(leaf.shape)}" for leaf in (theirs.get(name), ours.get(name)))
                raise ValueError(
                    f"init_from must be a run with the same architecture, got {config.init_from!r}: {name} is {there} there and "
                    f"{here} here, with encoding {spec!r}"
                )


def _init_run(config: Config) -> StoredRun:
    """Returns the run in ``init_from``, which must be a single one."""
    if not run_path(config.init_from).is_dir():
        raise ValueError(f"init_from must be the workdir of a run, got {config.init_from!r}, which does not exist")
    runs = stored_runs(config.init_from)
    if len(runs) > 1:
        raise ValueError(f"init_from must be one run, such as {runs[0].path}, got the comparison {config.init_from!r}")
    return runs[0]


def _leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _with_params_of(config: Config, spec: str, source: Source, state: TrainState, workdir: Path) -> TrainState:
    """Replaces the parameters of a first state by those of the run in ``init_from``, and records their digest in the workdir."""
    check_init_from(config, (spec,), source)
    run = _init_run(config)
    on_our_devices = dataclasses.replace(run.config, mesh=config.mesh, parallel=config.parallel)
    restored = restore(on_our_devices, run.config.encoding, run.path, bare_source(run))
    params = restored.state.eval_params
    digest = digest_of_arrays((name, leaf) for name, leaf in _leaves(jax.device_get(params)).items())
    add_fact(workdir, "init_from", {"workdir": str(run.path), "step": restored.step, "digest": digest})
    return _with_params(state, params)


def _with_pretrained_params(config: Config, spec: str, source: Source, state: TrainState, workdir: Path) -> TrainState:
    """Replaces the parameters of a first state by those of a checkpoint, and records their digest in the workdir."""
    params = load_pretrained(config, spec, source)[1]
    digest = digest_of_arrays((name, leaf) for name, leaf in _leaves(jax.device_get(params)).items())
    add_fact(workdir, "from_pretrained", {"path": config.from_pretrained, "digest": digest})
    return _with_params(state, params)


def load_pretrained(config: Config, spec: str, source: Source) -> tuple[Callable[[Params], Transformer], Params]:
    """Returns the model of the checkpoint in ``from_pretrained``, with an encoding, as ``build_model`` does."""
    mesh = None if config.parallel == "pmap" else _mesh(config)
    if mesh is not None and _rules(mesh) is PARTITION_RULES:
        mesh = None
    checkpoint = open_checkpoint(config.from_pretrained)
    model = config.transformer(source.vocab_size)
    fields = {name: getattr(model, name) for name in FREE_FIELDS}
    return load_params(checkpoint, encoding=spec, mesh=mesh, seed=config.seed, **fields)


def _with_params(state: TrainState, params: Params) -> TrainState:
    def copy() -> Params:  # a separate copy for the average, because both are donated
        return jax.tree.map(lambda new, old: jax.device_put(jnp.array(new, old.dtype), old.sharding), params, state.params)

    return dataclasses.replace(state, params=copy(), ema=None if state.ema is None else copy())


# Comparison ----------------------------------------------------------------------------------------------------------


def compare(
    config: Config, workdir: Path, source: Source, *, command: str | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Trains and evaluates every encoding with every seed, and returns the rows of results.

    Results of finished runs are read from disk.
    """
    rows, facts = [], facts_of(config, source)
    pairs = [(spec, seed) for spec in config.encodings for seed in config.seeds]
    for number, (spec, seed) in enumerate(pairs, 1):
        folder = workdir / slug(spec) / f"seed-{seed}"
        say(f"{number} of {len(pairs)}: {spec}, seed {seed}")
        own = dataclasses.replace(config, encoding=spec, seeds=(seed,), workdir=str(folder))
        init_or_check_workdir(own, facts, tokenizer_file(source))
        row = train_and_evaluate(own, spec, seed, folder, source, command=command, say=say)
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
    """Trains and evaluates one encoding with one seed, and returns its results.

    If the run is finished and was evaluated as the configuration says, its results are read from ``evaluation.json``.
    """
    done, evaluated = folder / "evaluation.json", evaluated_as(config, source.digests)

    def read() -> str:
        return json.dumps(stored_evaluation(folder, evaluated, repair=True))

    result = json.loads(text_of_first_process(read))
    if result is not None:
        say(f"{folder} is already trained and evaluated")
        return result
    params = train(config, spec, seed, folder, source, command=command)
    began = time.perf_counter()
    say("evaluating")
    result = finite(evaluate_params(config, spec, params, source) | {"evaluated": evaluated, "curve": training_curve(folder)})
    say(f"evaluated in {time.perf_counter() - began:.1f} s")
    on_first_process(lambda: write_json(done, result))
    return result


def evaluated_as(config: Config, digests: Mapping[str, str]) -> dict[str, Any]:
    """Returns what the results of an evaluation of a finished run depend on; ``digests`` are those of the data."""
    measured = {"eval_lengths": list(config.eval_lengths), "eval_tokens": config.eval_tokens}
    return {"step": config.steps, **measured, "validation": digests.get("validation")}


def stored_evaluation(folder: Path, evaluated: Mapping[str, Any] | None, repair: bool = False) -> dict[str, Any] | None:
    """Reads the evaluation in a workdir.

    Args:
      folder: the workdir.
      evaluated: ``evaluated_as``; None accepts any evaluation. Evaluations of posjax 0.2 do not record it and are accepted.
      repair: sets a damaged file aside, so that it is made again, instead of raising an error.

    Returns:
      The results, or None if there are none, or none of such an evaluation.

    Raises:
      DamagedFile: the file is damaged.
    """
    try:
        result = read_json(folder / "evaluation.json", "metrics")
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        if not repair:
            raise
        set_aside(folder / "evaluation.json", error)
        return None
    return result if evaluated is None or result.get("evaluated") in (None, dict(evaluated)) else None


def tokenizer_file(source: Source) -> Path | None:
    """Returns the file of the tokenizer of a text; None for bytes and synthetic tasks."""
    return None if source.train is None else source.train.tokenizer_path
