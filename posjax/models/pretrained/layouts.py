"""Rows of the table of weights: one tensor of a checkpoint, the parameters that it holds, and how their elements are arranged.

A linear layer of PyTorch stores [out, in], where posjax stores [in, out], with heads as axes of their own:

    query, key, value   [N H, D]     ->   [D, N, H]
    out                 [D, N H]     ->   [N, H, D]
    fused               [N 3 H, D]   ->   [D, N, H] three times

Functions return the rows of one layer of a network, for its weight and, if it has one, its bias.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

Rows = tuple["Weight", ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Describes how the elements of a tensor are arranged in parameters: a function and its inverse.

    Attributes:
      load: from the tensor of one layer to the parameters of that layer, as a tuple of arrays.
      save: the inverse of ``load``, from these arrays to the tensor.
    """

    load: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    save: Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Weight:
    """Describes one row of the table of weights.

    Attributes:
      name: name of the tensor, with "{layer}" for the number of the layer if every layer has one.
      shape: shape of the tensor.
      paths: paths of the parameters that the tensor holds; more than one for a fused projection.
      layout: how it holds them.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    layout: Layout


def _one(load: Callable[[np.ndarray], np.ndarray], save: Callable[[np.ndarray], np.ndarray]) -> Layout:
    return Layout(lambda tensor: (load(tensor),), save)


SAME = _one(lambda tensor: tensor, lambda array: array)
TRANSPOSED = _one(lambda tensor: tensor.T, lambda array: array.T)
ONE_MORE = _one(lambda tensor: 1 + tensor, lambda array: array - 1)  # Gemma stores w for a factor of 1 + w


def skipping(rows: int) -> Layout:
    """Returns the layout of a table whose first rows are not used. Saving sets them to zero."""
    return _one(lambda tensor: tensor[rows:], lambda array: np.pad(array, ((rows, 0), (0, 0))))


def _to_heads(heads: int, head_dim: int) -> Layout:
    return _one(lambda tensor: tensor.T.reshape(-1, heads, head_dim), lambda array: array.reshape(-1, heads * head_dim).T)


def _from_heads(heads: int, head_dim: int) -> Layout:
    return _one(lambda tensor: tensor.T.reshape(heads, head_dim, -1), lambda array: array.reshape(heads * head_dim, -1).T)


def _in_heads(heads: int, head_dim: int) -> Layout:
    return _one(lambda tensor: tensor.reshape(heads, head_dim), lambda array: array.reshape(-1))


def linear(name: str, path: str, source: int, target: int, bias: bool) -> Rows:
    """Returns the rows of a linear layer, [target, source] -> [source, target]."""
    rows = [Weight(f"{name}.weight", (target, source), (f"{path}/kernel",), TRANSPOSED)]
    if bias:
        rows.append(Weight(f"{name}.bias", (target,), (f"{path}/bias",), SAME))
    return tuple(rows)


def to_heads(name: str, path: str, width: int, heads: int, head_dim: int, bias: bool) -> Rows:
    """Returns the rows of a projection to heads, [heads * head_dim, width] -> [width, heads, head_dim]."""
    rows = [Weight(f"{name}.weight", (heads * head_dim, width), (f"{path}/kernel",), _to_heads(heads, head_dim))]
    if bias:
        rows.append(Weight(f"{name}.bias", (heads * head_dim,), (f"{path}/bias",), _in_heads(heads, head_dim)))
    return tuple(rows)


def from_heads(name: str, path: str, width: int, heads: int, head_dim: int, bias: bool) -> Rows:
    """Returns the rows of a projection from heads, [width, heads * head_dim] -> [heads, head_dim, width]."""
    rows = [Weight(f"{name}.weight", (width, heads * head_dim), (f"{path}/kernel",), _from_heads(heads, head_dim))]
    if bias:
        rows.append(Weight(f"{name}.bias", (width,), (f"{path}/bias",), SAME))
    return tuple(rows)


def fused_qkv(name: str, layer: str, width: int, heads: int, head_dim: int, bias: bool) -> Rows:
    """Returns the rows of a projection to query, key and value that is ordered by head, as in GPT-NeoX and BLOOM."""

    def load(tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.moveaxis(tensor.reshape(heads, 3, head_dim, width), (1, 3), (0, 1)))

    def save(*arrays: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.stack(arrays), (0, 1), (1, 3)).reshape(3 * heads * head_dim, width)

    def load_bias(tensor: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(tensor.reshape(heads, 3, head_dim).swapaxes(0, 1))

    def save_bias(*arrays: np.ndarray) -> np.ndarray:
        return np.stack(arrays, axis=1).reshape(-1)

    size = 3 * heads * head_dim
    kernels, biases = (tuple(f"{layer}/{part}/{leaf}" for part in ("query", "key", "value")) for leaf in ("kernel", "bias"))
    rows = [Weight(f"{name}.weight", (size, width), kernels, Layout(load, save))]
    if bias:
        rows.append(Weight(f"{name}.bias", (size,), biases, Layout(load_bias, save_bias)))
    return tuple(rows)


def normalization(name: str, path: str, width: int, kind: Literal["rmsnorm", "layernorm"], layout: Layout = SAME) -> Rows:
    """Returns the rows of a norm."""
    scale = Weight(f"{name}.weight", (width,), (f"{path}/scale",), layout)
    return (scale,) if kind == "rmsnorm" else (scale, Weight(f"{name}.bias", (width,), (f"{path}/bias",), SAME))
