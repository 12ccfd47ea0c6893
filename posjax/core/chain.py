"""Combination of several encodings into one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from posjax.checks import short
from posjax.core.encoding import AttentionInputs, Dims, PositionalEncoding, Tokens, as_value, what_is
from posjax.core.structures import ScoreModifications, Softmax
from posjax.typing import Array, Params


def chain(*encodings: PositionalEncoding) -> PositionalEncoding:
    """Combines several encodings into one: embeddings and transforms are applied in order, biases are summed.

    In ``chain(rope(), cope(64))`` CoPE's gates use the logits after rotation, and its position embeddings are multiplied with the
    query before rotation.

    Args:
      *encodings: at least one encoding. ``init`` returns {name: params} of the members that have parameters; a second member with
        the same name is called name_1, and so on.

    Returns:
      The chain, or the encoding itself if it is the only one.

    Raises:
      ValueError: no encoding is given.
      TypeError: an argument is not a PositionalEncoding.

    Example:
      >>> encoding = pj.chain(pj.rope(), pj.cope(64))
      >>> sorted(encoding.init(jax.random.key(0), pj.Dims(num_heads=4, head_dim=8)))
      ['cope']
    """
    if not encodings:
        raise ValueError("encodings must be at least one, got none; identity() is an encoding without effect")
    for encoding in encodings:
        if not isinstance(encoding, PositionalEncoding):
            raise TypeError(f"encodings must be PositionalEncoding values such as rope(), got {what_is(encoding)}")
    return Chain(encodings)


@as_value
class Chain(PositionalEncoding):
    """Applies its members in order; ``chain`` constructs it.

    Attributes:
      encodings: the members, in order.
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
    def axes(self) -> int:
        return max(encoding.axes for encoding in self.encodings)

    @property
    def needs_hidden(self) -> bool:
        return any(encoding.needs_hidden for encoding in self.encodings)

    @property
    def needs_causal(self) -> bool:
        return any(encoding.needs_causal for encoding in self.encodings)

    @property
    def title(self) -> str:
        return "+".join(encoding.title for encoding in self.encodings)

    @property
    def cache(self) -> str:
        return "raw" if any(encoding.cache == "raw" for encoding in self.encodings) else "transformed"

    def init(self, key: Array, dims: Dims) -> Params:
        members = self.members
        keys = jax.random.split(key, len(members))
        params = {name: member.init(k, dims) for k, (name, member) in zip(keys, members.items(), strict=True)}
        return {name: one for name, one in params.items() if one}

    def place(self, tokens: Tokens, key: Array | None = None) -> Array | None:
        keys = [None] * len(self.encodings) if key is None else jax.random.split(key, len(self.encodings))
        for encoding, one in zip(self.encodings, keys, strict=True):
            tokens = dataclasses.replace(tokens, coordinates=encoding.place(tokens, one))
        return tokens.coordinates

    def embed(self, params: Params, x: Array, tokens: Tokens) -> Array:
        for name, member in self.members.items():
            x = member.embed(self._part(params, name), x, tokens)
        return x

    def attend(self, params: Params, inputs: AttentionInputs) -> ScoreModifications:
        transforms, biases, weights, states = inputs.transforms, (), [], {}
        for name, member in self.members.items():
            before = (inputs.state or {}).get(name)
            mods = member.attend(self._part(params, name), dataclasses.replace(inputs, transforms=transforms, state=before))
            transforms, biases = transforms + mods.transforms, biases + mods.biases
            states |= {} if mods.state is None else {name: mods.state}
            is_plain = isinstance(mods.weights, Softmax) and mods.weights.sink is None
            weights += [] if is_plain else [(name, mods.weights)]
        if len(weights) > 1:
            raise ValueError(f"only one member of a chain may define weights, got {' and '.join(name for name, _ in weights)}")
        transforms = transforms[len(inputs.transforms) :]
        return ScoreModifications(transforms, biases, *(own for _, own in weights), state=states or None)

    def max_length(self, dims: Dims) -> int | None:
        return min((limit for one in self.encodings if (limit := one.max_length(dims)) is not None), default=None)

    def _part(self, params: Params, name: str) -> Params:
        """Returns the params of a member, {} if there are none.

        Raises:
          ValueError: params are no dict, or hold what no member is called.
        """
        params = {} if params is None else params
        if not isinstance(params, Mapping) or (unknown := [own for own in params if own not in self.members]):
            names, got = ", ".join(map(repr, self.members)), repr(unknown[0]) if isinstance(params, Mapping) else short(params)
            raise ValueError(f"params of {short(self)} must be a dict by the names of its members, {names}, got {got}")
        return params.get(name, {})

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.encodings))})"
