"""Combination of several encodings into one."""

from collections.abc import Mapping
from typing import Any

import jax

from posjax.core.bias import BiasTerm, Rotation
from posjax.core.encoding import AttentionInputs, Dims, PositionalEncoding, as_value, what_is
from posjax.typing import Array, Params


def chain(*encodings: PositionalEncoding) -> PositionalEncoding:
    """Combines several encodings into one: embeddings and rotations apply in their order, biases are summed.

    In ``chain(rope(), cope(64))`` CoPE's gates use the logits after rotation, and its position embeddings are multiplied with the
    query before rotation.

    Args:
      *encodings: at least one encoding. ``init`` returns {name: params} for the members that have parameters; a second member of
        the same name is called name_1, and so on.

    Raises:
      ValueError: no encoding is given.
      TypeError: an argument is not a PositionalEncoding.
    """
    if not encodings:
        raise ValueError("chain needs at least one encoding, got none; identity() is the empty encoding")
    for encoding in encodings:
        if not isinstance(encoding, PositionalEncoding):
            raise TypeError(f"chain takes PositionalEncoding values such as rope(), got {what_is(encoding)}")
    return Chain(encodings)


@as_value
class Chain(PositionalEncoding):
    """Applies its members in order: the encoding that ``chain`` returns.

    Attributes:
      encodings: the members, in their order.
    """

    encodings: tuple[PositionalEncoding, ...]

    @property
    def members(self) -> dict[str, PositionalEncoding]:
        """Returns the members by the names of their params."""
        members: dict[str, PositionalEncoding] = {}
        for encoding in self.encodings:
            name, repeat = encoding.name, 0
            while name in members:
                repeat += 1
                name = f"{encoding.name}_{repeat}"
            members[name] = encoding
        return members

    @property
    def name(self) -> str:
        return "+".join(encoding.name for encoding in self.encodings)

    @property
    def per_layer(self) -> Mapping[str, Any]:
        return {name: member.per_layer for name, member in self.members.items()}

    @property
    def is_contextual(self) -> bool:
        return any(encoding.is_contextual for encoding in self.encodings)

    @property
    def changes_query(self) -> bool:
        return any(encoding.changes_query for encoding in self.encodings)

    def init(self, key: Array, dims: Dims) -> Params:
        members = self.members
        keys = jax.random.split(key, len(members))
        params = {name: member.init(k, dims) for k, (name, member) in zip(keys, members.items(), strict=True)}
        return {name: one for name, one in params.items() if one}

    def embed(self, params: Params, x: Array, positions: Array) -> Array:
        for name, member in self.members.items():
            x = member.embed(_part(params, name), x, positions)
        return x

    def condition(self, params: Params, hidden: Array) -> Params:
        extended = {name: member.condition(_part(params, name), hidden) for name, member in self.members.items()}
        return {name: one for name, one in extended.items() if one}

    def rotate(self, params: Params, query: Array, key: Array, inputs: AttentionInputs) -> tuple[Array, Array]:
        for name, member in self.members.items():
            query, key = member.rotate(_part(params, name), query, key, inputs)
        return query, key

    def rotation(self, params: Params, inputs: AttentionInputs) -> Rotation | None:
        changing = [(name, member) for name, member in self.members.items() if member.changes_query]
        if len(changing) != 1:
            return None
        ((name, member),) = changing
        return member.rotation(_part(params, name), inputs)

    def bias(self, params: Params, inputs: AttentionInputs) -> tuple[BiasTerm, ...]:
        return tuple(term for name, member in self.members.items() for term in member.bias(_part(params, name), inputs))

    def max_length(self, dims: Dims) -> int | None:
        return min((limit for one in self.encodings if (limit := one.max_length(dims)) is not None), default=None)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.encodings))})"


def _part(params: Params, name: str) -> Params:
    return (params or {}).get(name, {})
