"""A checkpoint's architecture: the Transformer that computes the same, and the table of its weights.

A row of the table connects one tensor of the checkpoint, by its name in transformers, with one or more parameters of posjax:

    model.layers.{layer}.self_attn.q_proj.weight  [N H, D]   ->   layers/query/kernel  [L, D, N, H]

Parameters below "layers/" have a leading axis of layers, and the name of their tensor has the number of the layer in it.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from posjax.core.encoding import PositionalEncoding
from posjax.models.config import TransformerConfig
from posjax.models.pretrained.layouts import Weight
from posjax.typing import Params

_MOST_NAMES = 3  # in a message


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Describes a checkpoint's model in the terms of posjax.

    Attributes:
      config: the configuration of the Transformer.
      encodings: the encoding of each layer.
      weights: the table of weights.
      prefix: the beginning of the names of all tensors but those of the head. Checkpoints of the model without its head lack it.
      renamed: pairs of a regular expression and its replacement, for names in older checkpoints.
      unused: regular expressions of names of tensors that the model does not need, such as stored causal masks.
    """

    config: TransformerConfig
    encodings: tuple[PositionalEncoding, ...]
    weights: tuple[Weight, ...]
    prefix: str
    renamed: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()

    def tensors(self) -> Iterator[tuple[str, int | None, Weight]]:
        """Yields the name of every tensor, its layer (None for one outside of layers), and its row of the table."""
        for weight in self.weights:
            if "{layer}" not in weight.name:
                yield weight.name, None, weight
                continue
            for layer in range(self.config.num_layers):
                yield weight.name.format(layer=layer), layer, weight


def match_names(architecture: Architecture, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Returns the name in ``tensors`` of each tensor that the architecture needs, {name in the table: name in tensors}.

    Args:
      architecture: the architecture of the checkpoint.
      tensors: arrays, or values with a ``shape``, by name.

    Raises:
      ValueError: tensors are missing, unexpected or of another shape. The message names them, at most three of each.
    """
    prefix = architecture.prefix
    has_prefix = any(name.startswith(prefix) for name in tensors)
    names = {}
    for name in tensors:
        known = name
        for pattern, replacement in architecture.renamed:
            known = re.sub(pattern, replacement, known)
        names[known] = name
    needed = {name: weight for name, _, weight in architecture.tensors()}
    if not has_prefix:
        names = {prefix + name if prefix + name in needed else name: own for name, own in names.items()}
    missing = [name for name in needed if name not in names]
    unused = [re.compile(pattern) for pattern in architecture.unused]
    unexpected = [name for name in names if name not in needed and not any(pattern.search(name) for pattern in unused)]
    wrong = []
    for name, weight in needed.items():
        if name in names and tuple(tensors[names[name]].shape) != weight.shape:
            wrong.append(f"{name} {list(tensors[names[name]].shape)} instead of {list(weight.shape)}")
    faults = {"missing": missing, "unexpected": unexpected, "other shapes": wrong}
    if any(faults.values()):
        parts = [f"{what}: {_listed(found)}" for what, found in faults.items() if found]
        raise ValueError(f"the weights must be those of config.json, got {'; '.join(parts)}")
    return {name: names[name] for name in needed}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def params_from(architecture: Architecture, tensors: Mapping[str, Any]) -> Params:
    """Returns the parameters of the Transformer, float32 NumPy arrays in the structure of ``functional(model)[1]``.

    Args:
      architecture: the architecture of the checkpoint.
      tensors: arrays by name, or values with a ``shape`` whose ``read()`` returns an array.

    Raises:
      ValueError: as in ``match_names``.
    """
    names = match_names(architecture, tensors)
    params: Params = {}
    arrays: dict[str, np.ndarray] = {}
    for name, layer, weight in architecture.tensors():
        tensor = tensors[names[name]]
        loaded = weight.layout.load(np.asarray(tensor.read() if hasattr(tensor, "read") else tensor).astype(np.float32))
        for path, array in zip(weight.paths, loaded, strict=True):
            if layer is None:
                arrays[path] = array
                continue
            if layer == 0:
                arrays[path] = np.empty((architecture.config.num_layers, *array.shape), np.float32)
            arrays[path][layer] = array
    for path, array in arrays.items():
        *folders, last = path.split("/")
        into = params
        for folder in folders:
            into = into.setdefault(folder, {})
        into[last] = np.ascontiguousarray(array)
    return params


def tensors_from(architecture: Architecture, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the name and the array of every tensor of a checkpoint; the inverse of ``params_from``."""
    for name, layer, weight in architecture.tensors():
        arrays = []
        for path in weight.paths:
            value: Any = params
            for part in path.split("/"):
                value = value[part]
            arrays.append(np.asarray(value if layer is None else value[layer]))
        yield name, np.ascontiguousarray(weight.layout.save(*arrays))
