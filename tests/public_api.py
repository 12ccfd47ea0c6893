"""The public API as text, a line for each name: what ``tests/public_api.txt`` holds.

python tests/public_api.py > tests/public_api.txt
"""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

MODULES = {  # other than posjax itself, whose names are those of __all__
    "posjax.core.sequence": ("prefix_sum", "short_conv"),
    "posjax.lab.config": ("Config",),
    "posjax.models.transformer": ("Transformer", "TransformerConfig"),
    "posjax.testing": ("check_encoding",),
}


def parameters(function: Any) -> str:
    """Returns the parameters with their defaults, without annotations, whose text differs between versions of Python."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def describe(name: str, value: Any) -> Iterator[str]:
    """Yields the lines of one name: its parameters and, for a class, its public methods and properties."""
    if not inspect.isclass(value):
        yield f"{name}{parameters(value)}"
        return
    shown = parameters(value)
    yield name + (parameters(value.__init__) if shown == "(*args, **kwargs)" else shown)  # a metaclass hides those of a Flax module
    import posjax

    known = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    known |= set(getattr(value, "_fields", ()))  # of a named tuple
    known |= set(dir(posjax.PositionalEncoding)) if value is not posjax.PositionalEncoding else set()
    for member in sorted(set(dir(value)) - known):
        if member.startswith("_"):
            continue
        attribute = inspect.getattr_static(value, member)
        owner = next(cls for cls in value.__mro__ if member in vars(cls))
        if not owner.__module__.startswith("posjax"):
            continue
        attribute = attribute.__func__ if isinstance(attribute, classmethod | staticmethod) else attribute
        yield f"{name}.{member}" + (parameters(attribute) if inspect.isfunction(attribute) else "")


def lines() -> list[str]:
    """Returns all lines, sorted within a module."""
    import posjax

    found = []
    for module, names in {"posjax": posjax.__all__, **MODULES}.items():
        for name in sorted(names):
            found += describe(f"{module}.{name}", getattr(importlib.import_module(module), name))
    return found


if __name__ == "__main__":
    print("\n".join(lines()))
