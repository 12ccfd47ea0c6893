"""Attention in plain XLA on each device's own part of a mesh.

Left to the compiler, a walk over tiles would ask all devices, tile by tile, whether any row has something to see there, and lookups
in tables of their own for every query would gather the tables of all. On its own rows and heads a device asks nobody.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from posjax.attention.backends.shards import Cut
from posjax.core.bias import BiasTerm
from posjax.typing import Array

Function = Callable[..., Array]


def on_parts(function: Function, cut: Cut, along: str | None = None) -> Function:
    """``function`` of a call's query, key, value, terms, mask, positions, rotation and scale, on each device's part of them.

    Heads are cut where the devices divide key heads too, and where all terms tell which axes of their tables are those of heads.

    Args:
      function: it sees parts, and returns [B, T, N, V] of its queries.
      cut: of batch and heads.
      along: the mesh axis that cuts T and S; None: they are whole.
    """
    if cut.mesh is None or not (cut.batch or cut.heads or along):
        return function

    def whole(query: Array, key: Array, terms: tuple[BiasTerm, ...], scale: Any, **rest: Any) -> Array:
        call = dict(query=query, key=key, terms=terms, scale=jnp.asarray(scale, jnp.float32)) | rest
        static = {name: x for name, x in rest.items() if x is None or isinstance(x, float | int)}
        call = {name: x for name, x in call.items() if name not in static}
        heads = cut.heads if key.shape[2] % cut.head_parts == 0 and all(_tells(term) for term in terms) else ()
        of = {"b": cut.batch or None, "n": heads or None, "t": along}

        def spec(letters: str, x: Array) -> PartitionSpec:
            """Of an array whose first axes have those letters; one of length 1 is not cut."""
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
        around = jax.sharding.get_abstract_mesh()  # of set_mesh, auto_axes or an outer shard_map, which shard_map insists on
        mesh = cut.mesh if around.empty else around
        names = {*cut.batch, *heads}
        if along:  # there may be a kernel within, which no axis can be left to the compiler with
            names = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        return jax.shard_map(
            lambda call: function(**call, **static),
            mesh=mesh,
            in_specs=(of_call,),
            out_specs=spec("btn", query),
            axis_names=names,
            check_vma=False,  # the loops of a walk do not say over which axes their sums vary
        )(call)

    return whole


def _tells(term: BiasTerm) -> bool:
    return term.heads is not None or not jax.tree.leaves(term.tables)
