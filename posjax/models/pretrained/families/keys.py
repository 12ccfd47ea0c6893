"""Keys of a config.json, read with checks whose errors name the key and its value."""

from collections.abc import Mapping, Sequence
from typing import Any

from posjax.checks import check, short
from posjax.core.encoding import PositionalEncoding
from posjax.encodings.rope_config import rope_from_config

_REQUIRED: Any = object()


class Keys:
    """Reads the keys of one config.json.

    Every method takes the names of a key, of which the first that is present counts, and a default for an absent key. A key
    without a default must be present. Null counts as absent, except where a default of None is given.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """Returns the value of a key as it is.

        Raises:
          ValueError: the key is absent or null and has no default.
        """
        for name in names:
            if self.config.get(name) is not None:
                return self.config[name]
        if default is _REQUIRED:
            raise ValueError(f"config.json of model_type={self.config.get('model_type')!r} must have the key {names[0]!r}")
        return default

    def _name(self, names: Sequence[str]) -> str:
        return next((name for name in names if self.config.get(name) is not None), names[0])

    def _checked(self, names: Sequence[str], default: Any, kind: Any, **bounds: Any) -> Any:
        value = self.get(*names, default=default)
        return value if value is default else check(f"{self._name(names)} of config.json", value, kind, **bounds)

    def size(self, *names: str, default: Any = _REQUIRED) -> Any:
        """Returns a positive integer."""
        return self._checked(names, default, int, least=1)

    def number(self, *names: str, default: Any = _REQUIRED) -> Any:
        """Returns a positive number."""
        return self._checked(names, default, float, above=0)

    def flag(self, *names: str, default: bool) -> bool:
        """Returns True or False."""
        return self._checked(names, default, bool)

    def choice(self, *names: str, choices: Mapping[str, Any], default: str) -> Any:
        """Returns what ``choices`` has for the value of a key.

        Raises:
          ValueError: the value is not among the choices.
        """
        value = self.get(*names, default=default)
        if not isinstance(value, str) or value not in choices:
            words = " or ".join(map(repr, choices))
            raise ValueError(f"{self._name(names)} of config.json must be {words}, got {short(value)}")
        return choices[value]

    def refuse(self, **expected: Any) -> None:
        """Raises ValueError if a key asks for what posjax does not have: if it is present with another value than the given one."""
        for name, value in expected.items():
            given = self.config.get(name)
            if given is not None and given != value:
                wanted = "null" if value is None else f"{value!r}"
                raise ValueError(f"{name} of config.json must be {wanted} or absent, got {short(given)}")

    def layers(self, name: str, count: int, kinds: Sequence[Any], default: Sequence[Any]) -> tuple[Any, ...]:
        """Returns a list with one of ``kinds`` for each layer.

        Raises:
          ValueError: it is no list of ``count`` values, or has others.
        """
        values = self.get(name, default=default)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            got = f"{len(values)} of them" if isinstance(values, Sequence) and not isinstance(values, str) else short(values)
            raise ValueError(f"{name} of config.json must be a list with a value for each of {count} layers, got {got}")
        if unknown := [value for value in values if value not in kinds]:
            raise ValueError(f"{name} of config.json must have only {' and '.join(map(repr, kinds))}, got {short(unknown[0])}")
        return tuple(values)

    def windows(self, layer_types: Sequence[str], size: int | None) -> int | tuple[int | None, ...] | None:
        """Returns ``local_window_size`` for layers of the given types, of which "sliding_attention" sees ``size`` tokens, itself
        included."""
        if size is None:
            return None
        if size < 2:
            raise ValueError(f"sliding_window of config.json must be at least 2, got {size}")
        windows = tuple(size - 1 if kind == "sliding_attention" else None for kind in layer_types)
        return windows[0] if len(set(windows)) == 1 else windows

    def rotary(self, layers: int) -> tuple[PositionalEncoding, ...]:
        """Returns the rotary encoding of each layer."""
        return tuple(rope_from_config(self.config, layer=layer) for layer in range(layers))
