"""Attention on each device's local shard, both in kernels that the compiler cannot partition (Pallas calls) and in plain XLA.

A mesh axis shards either the batch or the heads. For explicit axes, the query's type says which. For automatic axes, only the names
are available during tracing, so the axes named in ``HEAD_AXES`` shard the heads, those named in ``WHOLE_AXES`` shard neither, and
all others shard the batch. If this guess differs from the actual sharding of the arrays, they are resharded; the result is the
same.

``per_shard`` runs a kernel on local shards, and ``on_parts`` runs attention in plain XLA on them. Partitioned by the compiler, a
walk over tiles would communicate between all devices at every tile to find out whether any row needs it, and lookups in per-query
tables would gather the tables of all devices. On local rows and heads no communication is needed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from posjax.core.bias import BiasTerm
from posjax.typing import Array

HEAD_AXES = ("tensor", "model", "heads", "tp", "mp")
WHOLE_AXES = ("sequence", "seq", "context", "stage", "pipeline", "sp", "cp", "pp")  # shard neither: all compute the same


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """Holds the mesh axes that shard the batch and the heads of a call. Hashable, so that it can be static in a custom_vjp.

    Attributes:
      mesh: the mesh that the call runs on; None where there is nothing to shard: one device, or inside a shard_map over all axes.
      batch: names of the axes that shard B.
      heads: names of the axes that shard K, and therefore N.
    """

    mesh: Any = None
    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def num_head_shards(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.heads) if self.heads else 1

    @property
    def batch_parts(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.batch) if self.batch else 1


def infer_shard_spec(query: Array) -> ShardSpec:
    """Returns the ShardSpec of a call with this query [B, T, N, H]. Call it before ``auto_axes`` hides an explicit sharding."""
    sharding = jax.typeof(query).sharding
    mesh = sharding.mesh if not sharding.mesh.empty else jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    free = [name for name in mesh.axis_names if types[name] != AxisType.Manual]
    if all(mesh.shape[name] == 1 for name in free):
        return ShardSpec()
    given = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in sharding.spec]
    given += [()] * (4 - len(given))
    batch, heads = ([name for name in names if types[name] == AxisType.Explicit] for names in (given[0], given[2]))
    for name in free:
        if types[name] != AxisType.Auto or mesh.shape[name] == 1:
            continue
        names, size = (heads, query.shape[2]) if name in HEAD_AXES else (batch, query.shape[0])
        if name not in WHOLE_AXES and size % math.prod(mesh.shape[n] for n in [*names, name]) == 0:
            names.append(name)
    return ShardSpec(mesh, tuple(batch), tuple(heads))


def per_shard(function: Callable[..., Any], cut: ShardSpec, inputs: Any, results: Any) -> Callable[..., Any]:
    """Wraps ``function`` so that it runs on each device's local shard of its arguments.

    Args:
      function: a function from arrays to arrays. It receives local shards: B and K (N) are those of one device.
      cut: the axes that shard the call, from ``infer_shard_spec``.
      inputs: for each argument a string with one letter per axis, such as "b...": b is the batch, n the heads (query or key heads),
        and an axis with any other letter is not sharded. One string may stand for every leaf of a pytree, and None for an argument
        without arrays. An axis of length 1 is not sharded.
      results: the same for the results, except that an axis of length 1 must not be called b or n (see ``exact``). A result without
        b is summed over the devices that shard the batch, and one without n over those that shard the heads.

    Returns:
      A function of global arrays.
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
        context = jax.sharding.get_abstract_mesh()  # from set_mesh, auto_axes or an outer shard_map; shard_map requires this mesh
        mesh = cut.mesh if context.empty else context
        free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        return jax.shard_map(
            lambda *args: total(results, function(*args)),
            mesh=mesh,
            in_specs=specs(inputs, args),
            out_specs=result_specs(results),
            axis_names=free,
            check_vma=False,  # a kernel's results carry no varying-axes type
        )(*args)

    return whole


def exact(letters: str, x: Array) -> str:
    """Returns the letters for the gradient of an array: those of the array, with "." for axes of length 1."""
    return "".join(letter if size > 1 else "." for letter, size in zip(letters, x.shape, strict=True))


Function = Callable[..., Array]


def on_parts(function: Function, cut: ShardSpec, along: str | None = None) -> Function:
    """Wraps an attention function so that it runs on each device's local shard of its arguments.

    Heads are sharded only if the number of head shards divides the number of key heads, and every term declares which axes of its
    tables are head axes (``BiasTerm.heads``) or has no tables.

    Args:
      function: takes query, key, value, terms, mask, positions, rotation and scale by name, as local shards, and returns
        [B, T, N, V] for its queries.
      cut: the axes that shard batch and heads.
      along: the mesh axis that shards T and S; None leaves them unsharded.

    Returns:
      A function of the same arguments as global arrays.
    """
    if cut.mesh is None or not (cut.batch or cut.heads or along):
        return function

    def whole(query: Array, key: Array, terms: tuple[BiasTerm, ...], scale: Any, **rest: Any) -> Array:
        call = dict(query=query, key=key, terms=terms, scale=jnp.asarray(scale, jnp.float32)) | rest
        static = {name: x for name, x in rest.items() if x is None or isinstance(x, float | int)}
        call = {name: x for name, x in call.items() if name not in static}
        heads = cut.heads if key.shape[2] % cut.num_head_shards == 0 and all(_tells(term) for term in terms) else ()
        of = {"b": cut.batch or None, "n": heads or None, "t": along}

        def spec(letters: str, x: Array) -> PartitionSpec:
            """Returns the spec of an array whose first axes have these letters. An axis of length 1 is not sharded."""
            return PartitionSpec(*(of.get(letter) if size > 1 else None for letter, size in zip(letters, x.shape, strict=False)))

        def specs(letters: str, tree: Any) -> Any:
            return jax.tree.map(functools.partial(spec, letters), tree)

        def of_term(term: BiasTerm) -> BiasTerm:
            tables, structure = jax.tree.flatten(term.tables)
            axes = term.heads if heads else [None] * len(tables)
            cuts = [PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, heads) for axis in axes]
            along = {name: specs("bnt", getattr(term, name)) for name in ("rows", "columns", "carry")}
            return dataclasses.replace(term, tables=jax.tree.unflatten(structure, cuts), **along)

        of_call = {name: specs("btn", x) for name, x in call.items() if name not in ("terms", "scale", "mask")}
        mask = call["mask"]
        of_call["mask"] = dataclasses.replace(
            mask,
            boolean=specs("bn", mask.boolean),
            query_segments=specs("bt", mask.query_segments),
            key_segments=specs("bt", mask.key_segments),
        )
        if "rotation" in call:
            of_call["rotation"] = specs("bt", call["rotation"])
        of_call |= dict(terms=tuple(map(of_term, terms)), scale=PartitionSpec())
        around = jax.sharding.get_abstract_mesh()  # from set_mesh, auto_axes or an outer shard_map; shard_map requires this mesh
        mesh = cut.mesh if around.empty else around
        names = {*cut.batch, *heads}
        if along:  # ``function`` may contain a kernel, and then no axis can be left to the compiler
            names = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        return jax.shard_map(
            lambda call: function(**call, **static),
            mesh=mesh,
            in_specs=(of_call,),
            out_specs=spec("btn", query),
            axis_names=names,
            check_vma=False,  # the sums in the loops over tiles carry no varying-axes type
        )(call)

    return whole


def _tells(term: BiasTerm) -> bool:
    return term.heads is not None or not jax.tree.leaves(term.tables)
