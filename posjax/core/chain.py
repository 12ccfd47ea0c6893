"""Combination of several encodings into one."""

import jax

from posjax.core.bias import BiasTerm, Rotation
from posjax.core.encoding import AttentionInputs, Dims, PositionalEncoding
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
            raise TypeError(f"chain takes PositionalEncoding values, got {encoding!r}; call the function: chain(rope(), cope(64))")
    members: dict[str, PositionalEncoding] = {}
    for encoding in encodings:
        name, repeat = encoding.name, 0
        while name in members:
            repeat += 1
            name = f"{encoding.name}_{repeat}"
        members[name] = encoding

    def part(params: Params, name: str) -> Params:
        return (params or {}).get(name, {})

    def init(key: Array, dims: Dims) -> Params:
        keys = jax.random.split(key, len(members))
        made = {name: member.init(k, dims) for k, (name, member) in zip(keys, members.items(), strict=True)}
        return {name: params for name, params in made.items() if params}

    def embed(params: Params, x: Array, positions: Array) -> Array:
        for name, member in members.items():
            x = member.embed(part(params, name), x, positions)
        return x

    def condition(params: Params, hidden: Array) -> Params:
        made = {name: member.condition(part(params, name), hidden) for name, member in members.items()}
        return {name: value for name, value in made.items() if value}

    def rotate(params: Params, query: Array, key: Array, inputs: AttentionInputs) -> tuple[Array, Array]:
        for name, member in members.items():
            query, key = member.rotate(part(params, name), query, key, inputs)
        return query, key

    turning = {name: member for name, member in members.items() if member.turns}

    def rotation(params: Params, inputs: AttentionInputs) -> Rotation:
        ((name, member),) = turning.items()
        return member.rotation(part(params, name), inputs)

    def bias(params: Params, inputs: AttentionInputs) -> tuple[BiasTerm, ...]:
        return tuple(term for name, member in members.items() for term in member.bias(part(params, name), inputs))

    def max_length(dims: Dims) -> int | None:
        limits = [limit for member in members.values() if (limit := member.max_length(dims)) is not None]
        return min(limits, default=None)

    return PositionalEncoding(
        name="+".join(encoding.name for encoding in encodings),
        init=init,
        embed=embed,
        condition=condition,
        rotate=rotate if turning else PositionalEncoding.rotate,
        rotation=rotation if [member.rotation is not None for member in turning.values()] == [True] else None,
        bias=bias,
        per_layer={name: member.per_layer for name, member in members.items()},
        max_length=max_length,
        is_contextual=any(member.is_contextual for member in members.values()),
    )
