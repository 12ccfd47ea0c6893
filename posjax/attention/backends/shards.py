"""Running a kernel that the compiler cannot cut, a Pallas call say, on each device's own part of its arrays.

A mesh axis cuts either the batch or the heads. Which one is read from the query's type where axes are explicit; the compiler's own
(automatic) axes say no more than their names while tracing, so those named in ``HEAD_AXES`` cut heads, the others the batch. A
guess that differs from where the arrays really lie costs a move of theirs, never a different result.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from posjax.typing import Array

HEAD_AXES = ("tensor", "model", "heads", "tp", "mp")
WHOLE_AXES = ("sequence", "seq", "context", "stage", "pipeline", "sp", "cp", "pp")  # cut neither: each part computes the same


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is cut over which axes of the mesh that a call runs on. Hashable, so that it can be static in a custom_vjp.

    Attributes:
      mesh: None where there is nothing to cut: one device, or inside a shard_map over all axes.
      batch: names of the axes that cut B.
      heads: names of the axes that cut K, and with it N.
    """

    mesh: Any = None
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def head_parts(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.heads) if self.heads else 1

    @property
    def batch_parts(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.batch) if self.batch else 1


def find_cut(query: Array) -> Cut:
    """The cut of a call with that query [B, T, N, H], to be found before ``auto_axes`` hides an explicit sharding."""
    sharding = jax.typeof(query).sharding
    mesh = sharding.mesh if not sharding.mesh.empty else jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = [name for name in mesh.axis_names if types[name] != AxisType.Manual]
    if all(mesh.shape[name] == 1 for name in free):
        return Cut()
    given = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in sharding.spec]
    given += [()] * (4 - len(given))
    batch, heads = ([name for name in names if types[name] == AxisType.Explicit] for names in (given[0], given[2]))
    for name in free:
        if types[name] != AxisType.Auto or mesh.shape[name] == 1:
            continue
        names, size = (heads, query.shape[2]) if name in HEAD_AXES else (batch, query.shape[0])
        if name not in WHOLE_AXES and size % math.prod(mesh.shape[n] for n in [*names, name]) == 0:
            names.append(name)
    return Cut(mesh, tuple(batch), tuple(heads))


def per_shard(function: Callable[..., Any], cut: Cut, inputs: Any, results: Any) -> Callable[..., Any]:
    """``function`` on each device's part of its arguments.

    Args:
      function: arrays in, arrays out. It sees parts: B and K (N) are those of one device.
      cut: from ``find_cut``.
      inputs: for each argument a string with a letter an axis, "b..." say: b is the batch, n heads (of either kind), all other
        letters are whole everywhere. One string may stand for a whole pytree; None for one without arrays. An axis of length 1
        is not cut.
      results: the same for what comes back, but that an axis of length 1 must not be called b or n (see ``exact``). A result
        without b, or without n, is summed over the devices that cut b, or n.

    Returns:
      A function of whole arrays.
    """
    if cut.mesh is None:
        return function

    def names(letter: str) -> tuple[str, ...]:
        return {"b": cut.batch, "n": cut.heads}.get(letter, ())

    def spec(letters: str, leaf: Any) -> PartitionSpec:
        return PartitionSpec(*(names(x) if size > 1 and names(x) else None for x, size in zip(letters, leaf.shape, strict=True)))

    def specs(letters: Any, tree: Any) -> Any:
        if letters is None or isinstance(letters, str):
            return jax.tree.map(lambda leaf: spec(letters, leaf), tree)
        return tuple(specs(part, leaf) for part, leaf in zip(letters, tree, strict=True))

    def total(letters: Any, tree: Any) -> Any:
        if isinstance(letters, tuple):
            return tuple(total(part, leaf) for part, leaf in zip(letters, tree, strict=True))
        over = tuple(name for x in "bn" if x not in letters for name in names(x))
        return jax.lax.psum(tree, over) if over else tree

    def result_specs(letters: Any) -> Any:
        if isinstance(letters, tuple):
            return tuple(result_specs(part) for part in letters)
        return PartitionSpec(*(names(x) or None for x in letters))

    def whole(*args: Any) -> Any:
        context = jax.sharding.get_abstract_mesh()  # that of set_mesh, auto_axes or an outer shard_map, which shard_map insists on
        mesh = cut.mesh if context.empty else context
        free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        return jax.shard_map(
            lambda *args: total(results, function(*args)),
            mesh=mesh,
            in_specs=specs(inputs, args),
            out_specs=result_specs(results),
            axis_names=free,
            check_vma=False,  # a kernel's results do not say over which axes they vary
        )(*args)

    return whole


def exact(letters: str, x: Array) -> str:
    """The letters of an array, "." for its axes of length 1: those of its gradient."""
    return "".join(letter if size > 1 else "." for letter, size in zip(letters, x.shape, strict=True))
