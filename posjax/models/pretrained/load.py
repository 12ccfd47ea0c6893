"""Loads the weights of a checkpoint into a Transformer, and saves them so that transformers loads them.

    model = from_pretrained("models/SmolLM2-135M")
    logits = model(tokens)                                                # [B, T, V]
    save_pretrained(model, "models/mine", source="models/SmolLM2-135M")

On a mesh, each device's part of a parameter is made from the slices of the file that it needs, so that no device and no process
holds more than its share of the model, and one parameter's worth of buffers besides.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from posjax.checks import check_one_of, near, short
from posjax.core.chain import Chain
from posjax.core.encoding import PositionalEncoding
from posjax.encodings.spec import parse_encoding
from posjax.files import write_json
from posjax.models.config import TransformerConfig, check_memory
from posjax.models.pretrained.architecture import Architecture, Weight, match_names, tensors_from
from posjax.models.pretrained.families import architecture_of
from posjax.models.pretrained.files import CONFIG, INDEX, TOKENIZER, WEIGHTS, Checkpoint, Tensor, open_checkpoint, write_tensors
from posjax.models.transformer import Transformer, functional
from posjax.parallel.partition_rules import SHARDED_RULES, state_shardings
from posjax.typing import Params

Encoding = PositionalEncoding | Sequence[PositionalEncoding] | str
# Fields of a TransformerConfig that do not change what the weights compute, or only where they compute it.
FREE_FIELDS = ("max_length", "dropout_rate", "remat", "scan_layers", "compute_dtype", "implementation")
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in ("float32", "bfloat16", "float16")}
SHARD_BYTES = 5 * 10**9  # of a file that is written: transformers' own size
# Encodings that leave a model as it is until they are trained: their table, or the last layer of their network, starts at zero.
_NEUTRAL = ("identity", "cope", "cope_mlp", "t5")
_COPIED = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.json", "merges.txt")
_COPIED += ("added_tokens.json", "tokenizer.model", "chat_template.jinja", "chat_template.json")


def from_pretrained(
    path: str | os.PathLike,
    *,
    encoding: Encoding | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    mesh: Mesh | None = None,
    seed: int = 0,
    **fields: Any,
) -> Transformer:
    """Returns a Transformer with the architecture, positional encoding and weights of a checkpoint.

    Args:
      path: a folder with config.json and safetensors files, as transformers' ``save_pretrained`` writes it, or a .gguf file.
      encoding: a positional encoding, or one for each of several layers, in place of the checkpoint's; a text such as
        "rope(100000.0) + cope(64)" is parsed. Learned parameters are carried over where an encoding of the checkpoint is part of
        the new one. A warning says what is not.
      dtype: dtype of the matrices. Biases, scales of norms and parameters of encodings stay float32; activations have
        ``compute_dtype``.
      mesh: mesh that the parameters are sharded over by ``posjax.parallel.partition_rules.SHARDED_RULES``; None puts them on the
        default device.
      seed: seed of the parameters of a new encoding.
      **fields: fields of ``TransformerConfig`` that leave the weights as they are: max_length, dropout_rate, remat, scan_layers,
        compute_dtype and implementation.

    Raises:
      ValueError: the checkpoint is damaged, incomplete or of a model that posjax does not have, or an argument does not fit it.
      ImportError: a package that reads GGUF files is not installed.
    """
    checkpoint = open_checkpoint(path)
    with_params, params = load_params(checkpoint, encoding=encoding, dtype=dtype, mesh=mesh, seed=seed, **fields)
    return with_params(params)


def load_params(
    checkpoint: Checkpoint,
    *,
    encoding: Encoding | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    mesh: Mesh | None = None,
    seed: int = 0,
    **fields: Any,
) -> tuple[Callable[[Params], Transformer], Params]:
    """Returns the model of a checkpoint as ``posjax.models.transformer.functional`` does; see ``from_pretrained``.

    Args:
      checkpoint: the checkpoint, from ``open_checkpoint``.
      encoding, dtype, mesh, seed, fields: as in ``from_pretrained``.

    Raises:
      ValueError: as ``from_pretrained``.
    """
    check_one_of("dtype", dtype, ("float32", "bfloat16"))
    architecture = architecture_in(checkpoint)
    config = configured(architecture.config, fields)
    encodings = layers_of(encoding, architecture)
    if message := not_carried_over(architecture.encodings, encodings):
        warnings.warn(f"encoding: {message}", stacklevel=3)
    check_memory(config, DTYPES[dtype].itemsize / 4 / (1 if mesh is None else mesh.size))

    def make(key: Any) -> Transformer:
        return Transformer(config, pattern_of(encodings), rngs=nnx.Rngs(key))

    key = jax.random.key(seed)
    with_params, abstract = functional(nnx.eval_shape(make, key))
    old = _Old(architecture.encodings, encodings)
    rows = _rows(architecture, checkpoint, old)
    new = _new_params(make, key, abstract, rows, mesh)
    shardings = None if mesh is None else state_shardings(abstract, mesh, SHARDED_RULES)

    def filled(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        sharding = None if shardings is None else functools.reduce(lambda tree, key: tree[key.key], path, shardings)
        is_matrix = name.endswith(("kernel", "embedding")) and not name.startswith("encoding/")
        own = DTYPES[dtype] if is_matrix else leaf.dtype  # Gemma's 1 + w must not be rounded
        if name in new:
            return new[name].astype(own)
        return _filled(name, leaf.shape, own, rows[name], sharding)

    return with_params, jax.tree_util.tree_map_with_path(filled, abstract)


def architecture_in(checkpoint: Checkpoint) -> Architecture:
    """Returns the architecture of a checkpoint.

    Raises:
      ValueError: posjax does not have it, or the weights are quantized in another way than in GGUF.
    """
    try:
        return architecture_of(checkpoint.config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None


def configured(config: TransformerConfig, fields: Mapping[str, Any]) -> TransformerConfig:
    """Returns the configuration of a checkpoint's model with some fields replaced.

    Raises:
      ValueError: there is no such field, or its value contradicts the weights.
    """
    known = {field.name for field in dataclasses.fields(config)}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"fields must be those of TransformerConfig, got {name!r}{near(name, known)}")
        if name not in FREE_FIELDS and value != getattr(config, name):
            free = f"only {', '.join(FREE_FIELDS)} may differ"
            raise ValueError(f"{name} must be that of the checkpoint, {getattr(config, name)!r}, got {value!r}; {free}")
    return dataclasses.replace(config, **fields)


# Encodings -----------------------------------------------------------------------------------------------------------------


def layers_of(encoding: Encoding | None, architecture: Architecture) -> tuple[PositionalEncoding, ...]:
    """Returns the encoding of each layer.

    Raises:
      ValueError: the number of encodings does not divide the number of layers.
    """
    if encoding is None:
        return architecture.encodings
    parsed = parse_encoding(encoding) if isinstance(encoding, str) else encoding
    pattern = (parsed,) if isinstance(parsed, PositionalEncoding) else tuple(parsed)
    layers = architecture.config.num_layers
    if not pattern or layers % len(pattern):
        raise ValueError(f"encoding must be one, or a sequence whose length divides num_layers={layers}, got {len(pattern)}")
    return pattern * (layers // len(pattern))


def pattern_of(encodings: tuple[PositionalEncoding, ...]) -> PositionalEncoding | tuple[PositionalEncoding, ...]:
    """Returns the encoding of all layers, or the shortest sequence that is repeated over them."""
    count = len(encodings)
    pattern = next(encodings[:n] for n in range(1, count + 1) if count % n == 0 and encodings[:n] * (count // n) == encodings)
    return pattern[0] if len(pattern) == 1 else pattern


def members_of(encoding: PositionalEncoding) -> dict[str, PositionalEncoding]:
    """Returns the members of an encoding by the path of their parameters: {"": encoding} if it is not a chain."""
    return dict(encoding.members) if isinstance(encoding, Chain) else {"": encoding}


def not_carried_over(old: Sequence[PositionalEncoding], new: Sequence[PositionalEncoding]) -> str:
    """Returns one line on what changes if encodings take the place of a checkpoint's; empty if the model computes the same."""
    kept: dict[str, None] = {}
    lost: dict[str, None] = {}
    added: dict[str, None] = {}
    for before, after in zip(old, new, strict=True):
        ours, theirs = list(members_of(before).values()), list(members_of(after).values())
        kept |= dict.fromkeys(repr(one) for one in ours if one in theirs)
        lost |= dict.fromkeys(repr(one) for one in ours if one not in theirs and one.registered_name != "identity")
        added |= dict.fromkeys(repr(one) for one in theirs if one not in ours and one.registered_name not in _NEUTRAL)
    if not lost and not added:
        return ""
    parts = [(f"{', '.join(lost)} of the checkpoint is not used", lost), (f"{', '.join(added)} is new", added)]
    parts += [(f"{', '.join(kept)} is carried over", kept)]
    return f"{'; '.join(text for text, some in parts if some)}. The weights were not trained with this encoding."


class _Old:
    """Finds the learned parameters of a checkpoint's encodings in a model with other encodings."""

    def __init__(self, old: tuple[PositionalEncoding, ...], new: tuple[PositionalEncoding, ...]):
        self.is_same = old == new
        self.old, self.new = list(dict.fromkeys(old)), list(dict.fromkeys(new))
        self.layouts = tuple(map(self.old.index, old)), tuple(map(self.new.index, new))

    def places(self, path: str) -> list[str]:
        """Returns the paths of a parameter; none if its encoding is not part of the new ones."""
        if self.is_same or not path.startswith("encoding/"):
            return [path]
        _, index, rest = path.split("/", 2)
        found = []
        for place, encoding in enumerate(self.new):
            same_layers = [a == int(index) for a in self.layouts[0]] == [b == place for b in self.layouts[1]]
            for name, member in members_of(encoding).items():
                if member == self.old[int(index)] and same_layers:
                    found.append("/".join(filter(None, ("encoding", str(place), name, rest))))
        return found


def _new_params(
    make: Callable[[Any], Transformer], key: jax.Array, abstract: Params, rows: Mapping[str, Any], mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Returns the parameters that the checkpoint does not hold, those of a new encoding, by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    missing = [name for name in names if name not in rows]
    if not missing:
        return {}
    assert all(name.startswith("encoding/") for name in missing), missing  # the table of an architecture has all weights

    def some(key: jax.Array) -> list[jax.Array]:  # under jit, the rest is never computed
        return [leaf for name, leaf in zip(names, jax.tree.leaves(functional(make(key))[1]), strict=True) if name not in rows]

    sharding = None if mesh is None else NamedSharding(mesh, jax.sharding.PartitionSpec())
    return dict(zip(missing, jax.jit(some, out_shardings=sharding)(key), strict=True))


# From tensors to parameters ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Part:
    """A tensor that holds a parameter, or one layer of it.

    Attributes:
      tensor: the tensor.
      weight: its row of the table.
      number: which of the row's parameters it is.
      layer: the layer, or None if the parameter is not one of layers.
    """

    tensor: Tensor
    weight: Weight
    number: int
    layer: int | None

    def read(self) -> np.ndarray:
        """Returns the part in the parameter's layout: a view of the file if the layout only moves elements."""
        stored = self.tensor.read()
        loaded = self.weight.layout.load(stored)[self.number]
        if np.may_share_memory(loaded, stored):
            return loaded
        return self.weight.layout.load(stored.astype(np.float32))[self.number]  # arithmetic, which half precision would round


def _rows(architecture: Architecture, checkpoint: Checkpoint, old: _Old) -> dict[str, list[_Part]]:
    """Returns the tensors that each parameter is made from, by its path.

    Raises:
      ValueError: a tensor is missing, unexpected, of another shape, or holds no floating-point numbers.
    """
    try:
        names = match_names(architecture, checkpoint.tensors)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    rows: dict[str, list[_Part]] = {}
    for name, layer, weight in architecture.tensors():
        tensor = checkpoint.tensors[names[name]]
        if tensor.dtype.name not in ("float64", *DTYPES):
            how = "load the model without quantization, or its GGUF file"
            raise ValueError(f"{tensor.file}: {names[name]} must be float32, bfloat16 or float16, got {tensor.stored}; {how}")
        for number, path in enumerate(weight.paths):
            for place in old.places(path):
                rows.setdefault(place, []).append(_Part(tensor, weight, number, layer))
    return rows


def _filled(name: str, shape: tuple[int, ...], dtype: np.dtype, parts: list[_Part], sharding: NamedSharding | None) -> jax.Array:
    """Returns a parameter; on a mesh, each device's part is read on its own.

    Quantized tensors are dequantized once for all devices, because they cannot be read in slices.
    """
    is_sliced = sharding is not None and not sharding.is_fully_replicated
    is_quantized = is_sliced and any(part.tensor.stored.startswith(("Q", "IQ", "TQ", "MX")) for part in parts)
    read = functools.cache(_Part.read) if is_quantized else _Part.read

    def piece(part: _Part, expected: tuple[int, ...]) -> np.ndarray:
        array = read(part)
        if array.shape != expected:
            got = f"{list(array.shape)} in {part.tensor.file}"
            hint = (
                "; max_length must be the checkpoint's, because its positions are a table" if name.startswith("encoding/") else ""
            )
            raise ValueError(f"{name} must have the shape {list(expected)}, without an axis of layers, got {got}{hint}")
        return array

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        if parts[0].layer is None:
            return np.ascontiguousarray(piece(parts[0], shape)[index].astype(dtype))
        sizes = [len(range(size)[one]) for size, one in zip(shape, index, strict=True)]
        out = np.empty(sizes, dtype)
        for row, part in enumerate(parts[index[0]]):
            out[row] = piece(part, shape[1:])[index[1:]]
        return out

    if sharding is None:
        return jnp.asarray(shard((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, shard)


# Saving --------------------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: Transformer,
    folder: str | os.PathLike,
    source: str | os.PathLike | Mapping[str, Any],
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Saves a model as config.json and safetensors files, which transformers loads and which compute the same there.

    Args:
      model: a Transformer with the architecture and encoding that ``source`` describes.
      folder: the folder to write; it must not hold another checkpoint.
      source: the checkpoint that the model comes from, whose config.json and tokenizer are saved with it, or a config.json as a
        dict, for example one whose ``rope_scaling`` was changed along with the model's encoding.
      dtype: dtype of the tensors.
      shard_bytes: largest file. A larger model is written as several files with an index.

    Returns:
      The folder.

    Raises:
      ValueError: the model is not one that ``source`` describes, such as one with an encoding that transformers does not have, or
        the folder cannot be used.
    """
    check_one_of("dtype", dtype, tuple(DTYPES))
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a Transformer, got {short(model)}")
    checkpoint, config = None, dict[str, Any]()
    if isinstance(source, Mapping):
        config |= source
    else:
        checkpoint = open_checkpoint(source)
        config |= checkpoint.config
    architecture = architecture_of(config)
    _check_same(model, architecture)
    folder = Path(os.fspath(folder)).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    files = _write_weights(folder, architecture, functional(model)[1], DTYPES[dtype], shard_bytes)
    if len(files) > 1:
        total = sum(math.prod(weight.shape) for _, _, weight in architecture.tensors()) * DTYPES[dtype].itemsize
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if checkpoint is not None:
        _copy_tokenizer(checkpoint, folder)
    config.pop("dtype", None)
    write_json(folder / CONFIG, config | {"torch_dtype": dtype}, indent=1)  # last: without it, the folder is no checkpoint
    return folder


def _check_same(model: Transformer, architecture: Architecture) -> None:
    """Raises ValueError if a model is not one of an architecture."""
    for field in dataclasses.fields(TransformerConfig):
        ours, theirs = getattr(model.config, field.name), getattr(architecture.config, field.name)
        if field.name not in FREE_FIELDS and ours != theirs:
            raise ValueError(f"source must describe the model, whose {field.name} is {ours!r}, got one with {theirs!r}")
    encodings = tuple(model.encodings[index] for index in model.layout)
    for layer, (ours, theirs) in enumerate(zip(encodings, architecture.encodings, strict=True)):
        if ours != theirs:
            raise ValueError(
                f"model must have the encoding that source describes, {theirs!r} in layer {layer}, got {ours!r}; transformers "
                "would compute something else"
            )


def _write_weights(
    folder: Path, architecture: Architecture, params: Params, dtype: np.dtype, shard_bytes: int
) -> dict[str, list[str]]:
    """Writes the tensors, and returns the files with the names of their tensors."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, _, weight in architecture.tensors():
        own = math.prod(weight.shape) * dtype.itemsize
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    files = [WEIGHTS] if len(shards) == 1 else [
        WEIGHTS.replace(".", f"-{number:05d}-of-{len(shards):05d}.") for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    tensors = tensors_from(architecture, params)
    for file, names in zip(files, shards, strict=True):  # the arrays of one file are in memory at a time
        write_tensors(
            folder / file, {name: array.astype(dtype, copy=False) for name, array in itertools.islice(tensors, len(names))}
        )
    return dict(zip(files, shards, strict=True))


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the files of a tokenizer; that of a GGUF file is converted."""
    if checkpoint.path.is_dir():
        for name in (TOKENIZER, *_COPIED):
            if (checkpoint.path / name).is_file():
                shutil.copyfile(checkpoint.path / name, folder / name)
        return
    from posjax.data.gguf_tokenizer import convert

    try:
        content = convert(checkpoint.path)
    except (ValueError, ImportError) as error:
        warnings.warn(f"the tokenizer of {checkpoint.path} is not saved: {error}", stacklevel=3)
        return
    (folder / TOKENIZER).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
