"""Attention on each device's local shard, both in kernels that the compiler cannot partition (Pallas calls) and in plain XLA.

A mesh axis shards either the batch or the heads. For explicit axes, the query's type determines which. For automatic axes, only the
names are available during tracing, so the axes named in ``HEAD_AXES`` shard the heads, those named in ``WHOLE_AXES`` shard neither,
and all others shard the batch. If this guess differs from the actual sharding of the arrays, they are resharded; the result is the
same.

``per_shard`` runs a kernel on local shards, and ``on_shards`` runs attention in plain XLA on them. Partitioned by the compiler, a
walk over tiles would communicate between all devices at every tile to find out whether any row needs it, and lookups in per-query
tables would gather the tables of all devices. On local rows and heads no communication is needed.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from posjax.attention.call import AttentionCall
from posjax.core.manual_axes import untracked
from posjax.core.structures import HEAD_AXES, Axes, map_arrays
from posjax.typing import Array

BY_TOKEN = ("query_positions", "key_positions", "query_coordinates", "key_coordinates")  # fields of a call, [B or 1, T or S, ...]
WHOLE_AXES = ("sequence", "seq", "context", "stage", "pipeline", "sp", "cp", "pp")  # shard neither: their devices compute the same


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """Holds the mesh axes that shard the batch and the heads of a call. Hashable, so that it can be static in a custom_vjp.

    Attributes:
      mesh: the mesh that the call runs on; None if there is nothing to shard: on one device, or inside a shard_map over all axes.
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
    def num_batch_shards(self) -> int:
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


def per_shard(function: Callable[..., Any], spec: ShardSpec, inputs: Any, results: Any) -> Callable[..., Any]:
    """Wraps ``function`` so that it runs on each device's local shard of its arguments.

    Args:
      function: a function from arrays to arrays. It receives local shards: B and K (N) are those of one device.
      spec: the axes that shard the call, from ``infer_shard_spec``.
      inputs: for each argument a string with one letter per axis, such as "b...": b is the batch, n the heads (query or key heads),
        and an axis with any other letter is not sharded. One string may stand for every leaf of a pytree, and None for an argument
        without arrays. An axis of length 1 is not sharded.
      results: the same for the results, except that an axis of length 1 must not be called b or n (see ``exact``). A result without
        b is summed over the devices that shard the batch, and one without n over those that shard the heads.

    Returns:
      A function of global arrays.
    """
    if spec.mesh is None:
        return function

    def names(letter: str) -> tuple[str, ...]:
        return {"b": spec.batch, "n": spec.heads}.get(letter, ())

    def partition(letters: Any, leaf: Any) -> PartitionSpec:
        return PartitionSpec(*(names(x) if size > 1 and names(x) else None for x, size in zip(letters, leaf.shape, strict=True)))

    def partitions(letters: Any, tree: Any) -> Any:
        if letters is None or isinstance(letters, str):
            return jax.tree.map(lambda leaf: partition(letters, leaf), tree)
        return tuple(partitions(part, leaf) for part, leaf in zip(letters, tree, strict=True))

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
        mesh = spec.mesh if context.empty else context
        free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        return jax.shard_map(
            lambda *args: total(results, function(*args)),
            mesh=mesh,
            in_specs=partitions(inputs, args),
            out_specs=result_specs(results),
            axis_names=free,
            check_vma=False,  # a kernel's results carry no varying-axes type
        )(*args)

    return whole


def exact(letters: str, x: Array) -> str:
    """Returns the letters for the gradient of an array: those of the array, with "." for axes of length 1."""
    return "".join(letter if size > 1 else "." for letter, size in zip(letters, x.shape, strict=True))


def on_shards(
    function: Callable[[AttentionCall], Array], spec: ShardSpec, sequence_axis: str | None = None
) -> Callable[[AttentionCall], Array]:
    """Wraps an attention function so that it runs on each device's local shard of a call.

    Heads are sharded only if the number of head shards divides the number of key heads. The arrays of structures are sharded by
    the axes that their fields declare.

    Args:
      function: takes a call of local shards and returns [B, T, N, V] for its queries.
      spec: the axes that shard batch and heads.
      sequence_axis: the mesh axis that shards T and S; None leaves them unsharded.

    Returns:
      A function of a call of global arrays.
    """
    if spec.mesh is None or not (spec.batch or spec.heads or sequence_axis):
        return function

    @untracked
    def on_mesh(call: AttentionCall) -> Array:
        heads = spec.heads if call.key.shape[2] % spec.num_head_shards == 0 else ()
        axes_of = {"b": spec.batch or None, "n": heads or None, "t": sequence_axis}

        def partition(letters: str, tree: Any) -> Any:
            """Returns the specs of arrays whose first axes have these letters. An axis of length 1 is not sharded."""

            def of_leaf(x: Array) -> PartitionSpec:
                return PartitionSpec(*(axes_of.get(c) if size > 1 else None for c, size in zip(letters, x.shape, strict=False)))

            return jax.tree.map(of_leaf, tree)

        def of_array(x: Array, axes: Axes) -> PartitionSpec:
            if axes.side is None:
                return partition("n", x)
            return partition("btn" if axes.tokens == 1 else "bnt", x)

        specs = call.replace(
            **{name: partition("btn", getattr(call, name)) for name in ("query", "key", "value")},
            **{name: partition("bt", getattr(call, name)) for name in BY_TOKEN},
            **{name: map_arrays(of_array, getattr(call, name)) for name in ("transforms", "biases", "weights")},
            mask=dataclasses.replace(
                call.mask,
                boolean=partition("bn", call.mask.boolean),
                query_segments=partition("bt", call.mask.query_segments),
                key_segments=partition("bt", call.mask.key_segments),
            ),
            bias=partition("bn", call.bias),
            scale=PartitionSpec(),
        )
        context = jax.sharding.get_abstract_mesh()  # from set_mesh, auto_axes or an outer shard_map; shard_map requires this mesh
        mesh = spec.mesh if context.empty else context
        names = {*spec.batch, *heads}
        if sequence_axis:  # ``function`` may contain a kernel, and then no axis can be left to the compiler
            names = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        return jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=partition("btn", call.query),
            axis_names=names,
            check_vma=False,  # the sums in the loops over tiles carry no varying-axes type
        )(call)

    return on_mesh
