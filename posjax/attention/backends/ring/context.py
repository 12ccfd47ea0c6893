"""Finds the mesh axis that shards the sequence of a call, if any."""

import dataclasses

import jax
from jax.sharding import AxisType

from posjax.attention.backends.shards import ShardSpec, infer_shard_spec
from posjax.typing import Array

CONTEXT_AXES = ("context", "sequence", "seq", "cp", "sp")  # names by which an automatic mesh axis shards sequences


@dataclasses.dataclass(frozen=True)
class Context:
    """Holds the mesh axes that shard a context-parallel call.

    Attributes:
      spec: the axes that shard B and the heads. Its mesh has more than one device along ``axis``.
      axis: the name of the axis that shards T and S.
    """

    spec: ShardSpec
    axis: str

    @property
    def parts(self) -> int:
        return self.spec.mesh.shape[self.axis]


def find_context(query: Array) -> Context | None:
    """Returns the Context of a call with this query [B, T, N, H]; None if no axis of the mesh shards the sequence.

    As in ``shards.infer_shard_spec``, an explicit axis is taken from the query's type, and an automatic axis is recognized by its
    name. A length that is not a multiple of twice the number of devices, such as the single token of a decoder, is not sharded.
    """
    spec = infer_shard_spec(query)
    if spec.mesh is None:
        return None
    types = dict(zip(spec.mesh.axis_names, spec.mesh.axis_types, strict=True))
    along = jax.typeof(query).sharding.spec[1:2]
    given = [name for part in along if part is not None for name in ((part,) if isinstance(part, str) else part)]
    names = [name for name in types if types[name] == AxisType.Auto and name in CONTEXT_AXES]
    names += [name for name in given if types[name] == AxisType.Explicit]
    fits = (n for n in names if spec.mesh.shape[n] > 1 and query.shape[1] % (2 * spec.mesh.shape[n]) == 0)
    axis = next(fits, None)
    return None if axis is None else Context(spec, axis)
