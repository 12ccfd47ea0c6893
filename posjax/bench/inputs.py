"""Inputs of the contestants of a benchmark: flat dicts of float32 arrays, the same for all contestants, stored as .npz files.

query, key, value, cotangent [B, T, N, H]
params/...                   the encoding's parameters
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from posjax.core.encoding import Dims
from posjax.encodings.spec import parse_encoding, slug
from posjax.typing import Params

# Means of q.k / sqrt(H). With its standard deviation of one, the mean gates are 0.5, 0.02 and 0.98.
GATES = {"half": 0.0, "sparse": -4.4, "saturating": 4.4}


def make_inputs(
    spec: str, gates: str, length: int, config: Any, recorded: dict[str, Any] | None, kv_heads: int | None = None
) -> dict[str, np.ndarray]:
    """Draws normally distributed query, key, value and cotangent, and parameters without zero leaves, as after training.

    A constant in the last channel of query and key sets mean gates other than 0.5. RoPE rotates that channel most slowly, so that
    gates from rotated logits keep their mean over thousands of tokens.

    Args:
      spec: the encoding.
      gates: one of GATES, or "trained" for ``recorded``.
      length: T.
      config: configuration of the benchmark: batch, heads, head_dim, dtype.
      recorded: result of ``recorded_inputs``, for gates="trained".
      kv_heads: number of key and value heads; None: as many as query heads.
    """
    rng = np.random.default_rng(length)
    shape = (config.batch, length, config.heads, config.head_dim)
    arrays = {name: rng.standard_normal(shape, np.float32) for name in ("query", "key", "value", "cotangent")}
    encoding = parse_encoding(spec)
    dims = Dims(config.heads, config.head_dim, max_length=length, num_kv_heads=kv_heads)
    arrays |= {name: arrays[name][:, :, :kv_heads] for name in ("key", "value")}
    params = jax.tree.map(np.asarray, encoding.init(jax.random.key(0), dims))
    params = jax.tree_util.tree_map_with_path(lambda path, leaf: _as_if_learned(path, leaf, length, config.head_dim, rng), params)
    if encoding.needs_hidden:
        arrays["hidden"] = rng.standard_normal((config.batch, length, dims.embed_dim), np.float32)
    if gates == "trained":
        arrays |= {name: _end_to_end(recorded[name], shape[:2]) for name in ("query", "key", "value")}
        if slug(recorded["encoding"]) == slug(spec):
            params = recorded["params"]
            arrays |= {name: _end_to_end(recorded[name], shape[:2]) for name in ("hidden",) if name in recorded}
    elif mean := GATES[gates]:
        size = math.sqrt(abs(mean) * math.sqrt(config.head_dim))
        arrays["query"][..., -1], arrays["key"][..., -1] = size, math.copysign(size, mean)
    dtype = jax.numpy.dtype(config.dtype)
    # Rounded, so that the reference computes with the same numbers as the contestants.
    rounded = {name: x.astype(dtype).astype(np.float32) for name, x in arrays.items()}
    return rounded | flatten(params)


def _as_if_learned(path: tuple, leaf: np.ndarray, length: int, head_dim: int, rng: np.random.Generator) -> np.ndarray:
    """Replaces zero leaves by random values, because a bias of zero would hide errors, and its gates would have no gradient."""
    if leaf.any():
        return leaf
    # CoPE_MLP's output grows with the count, which has no upper bound.
    size = 1 / length if path[-1].key == "weight_out" else head_dim**-0.5
    return size * rng.standard_normal(leaf.shape, np.float32)


def recorded_inputs(workdir: str, layer: int, tokens: int) -> dict[str, Any]:
    """Records the inputs of attention in one layer of a trained model, over at least ``tokens`` tokens of its validation data.

    Rows have the training length of the model. ``make_inputs`` concatenates and truncates them, so that a longer sequence consists
    of several texts, with gates between their unrelated tokens.

    Args:
      workdir: a folder with checkpoints: a workdir of posjax train, or DIR/ENCODING/seed-N of posjax compare.
      layer: index of the layer, from 0.
      tokens: number of tokens to record; the result has fewer if the validation data have fewer.

    Returns:
      A dict: query, key, value [rows, T, N, H] (keys and values repeated where heads share them), hidden [rows, T, D] if the
      encoding needs it, encoding (its text), params.

    Raises:
      ValueError: ``workdir`` is not a workdir with checkpoints.
      IndexError: the model has no such layer.
      CheckpointError: no checkpoint is intact.
    """
    from posjax.lab import run as runs
    from posjax.lab.source import eval_batches, open_source

    config, spec = workdir_config(workdir)
    source = open_source(config)
    params = runs.restore_params(config, spec, config.seed, Path(workdir), source)
    with_params, _ = runs.abstract_model(config, spec, source)

    @jax.jit
    def attend(params: Params, batch: dict[str, Any]) -> tuple[dict[str, Any], Params]:
        record = with_params(params).records(batch["tokens"], batch["positions"], batch["segment_ids"])[layer]
        arrays = {name: getattr(record, name) for name in ("query", "key", "value", "hidden")}
        return {name: x for name, x in arrays.items() if x is not None}, record.params

    batches: list[dict[str, np.ndarray]] = []
    for batch in eval_batches(config, source, config.seq_length):
        arrays, used = jax.device_get(attend(params, {name: batch[name] for name in ("tokens", "positions", "segment_ids")}))
        repeat = arrays["query"].shape[2] // arrays["key"].shape[2]
        batches.append({name: np.repeat(x, repeat if name in ("key", "value") else 1, axis=2) for name, x in arrays.items()})
        if sum(x["query"][..., 0, 0].size for x in batches) >= tokens:
            break
    joined = {name: np.concatenate([x[name] for x in batches]) for name in batches[0]}
    return joined | {"encoding": spec, "params": used}


def workdir_config(workdir: str) -> tuple[Any, str]:
    """Returns the Config of a trained workdir, and its encoding.

    Raises:
      ValueError: ``workdir`` is not the workdir of one run.
    """
    from posjax.lab.workdir import stored_runs

    runs = stored_runs(workdir)
    if len(runs) > 1:
        raise ValueError(f"workdir must be that of one run, such as {runs[0].path}, got the comparison {workdir!r}")
    return runs[0].config, runs[0].config.encoding


def _end_to_end(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Concatenates rows [rows, T', ...] to [B, T, ...], repeating them from the beginning where they are too short."""
    flat = x.reshape(-1, *x.shape[2:])
    return np.resize(flat, (shape[0] * shape[1], *x.shape[2:])).reshape(*shape, *x.shape[2:])


def flatten(tree: Params, prefix: str = "params") -> dict[str, np.ndarray]:
    """Flattens a tree of dicts to {"params/name/...": array}, with float32 arrays."""
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree, np.float32)}
    return {name: leaf for key, value in tree.items() for name, leaf in flatten(value, f"{prefix}/{key}").items()}


def unflatten(arrays: dict[str, Any], prefix: str = "params") -> Params:
    """Reverses ``flatten``: rebuilds the tree of the arrays whose names start with ``prefix``."""
    tree: Params = {}
    for name, leaf in arrays.items():
        first, *path = name.split("/")
        if first != prefix:
            continue
        place = tree
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = leaf
    return tree
