"""Encodings written as text, for configurations and command lines.

rope                                   an encoding with its defaults
cope(max_position=64, gates="keys")    with arguments, as in Python
rope + cope(64)                        chain
cope(64) / identity / identity         layer by layer, repeated down the stack
"""

import ast
import difflib
import functools
import inspect
import re
import types
from collections.abc import Callable

from posjax.absolute import learned, sinusoidal
from posjax.contextual import cope, cope_alibi, cope_mlp
from posjax.encoding import PositionalEncoding, chain, identity
from posjax.relative import alibi, t5
from posjax.rotary import rope
from posjax.untied import tupe

CONSTRUCTORS: types.MappingProxyType[str, Callable[..., PositionalEncoding]] = types.MappingProxyType(
    {f.__name__: f for f in (identity, sinusoidal, learned, rope, alibi, t5, tupe, cope, cope_alibi, cope_mlp)}
)


def parse_encoding(spec: str) -> PositionalEncoding | tuple[PositionalEncoding, ...]:
    """The encoding that a text names, or a tuple of them where it names one for each of several layers.

    Args:
      spec: names of posjax's encodings with literal arguments, joined by ``+`` (chain) and ``/`` (next layer).

    Returns:
      One encoding, or, with ``/``, a tuple in which equal parts are the same object.

    Raises:
      ValueError: text that is not of this form, an unknown name (with the nearest known one), or arguments the encoding refuses.
    """
    parts = [part.strip() for part in spec.split("/")]
    if len(parts) == 1:
        return _parse(parts[0], spec)
    made = {part: _parse(part, spec) for part in parts}
    return tuple(made[part] for part in parts)


def _parse(part: str, spec: str) -> PositionalEncoding:
    try:
        tree = ast.parse(part, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"encoding must look like 'rope' or 'rope + cope(64)', got {spec!r}: {error.msg}") from None
    members: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        members.insert(0, tree.right)
        tree = tree.left
    encodings = [_construct(member, spec) for member in (tree, *members)]
    return encodings[0] if len(encodings) == 1 else chain(*encodings)


def _construct(node: ast.expr, spec: str) -> PositionalEncoding:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    if not isinstance(call.func, ast.Name) or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(f"encoding must look like 'rope' or 'rope + cope(64)', got {spec!r}")
    name = call.func.id
    if name not in CONSTRUCTORS:
        near = difflib.get_close_matches(name, CONSTRUCTORS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"encoding must be made of {', '.join(CONSTRUCTORS)}, got {name!r} in {spec!r}; {hint}posjax list shows all"
        )
    try:
        args = [ast.literal_eval(arg) for arg in call.args]
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError:
        raise ValueError(f"arguments of {name} must be plain values such as 64 or 'keys', got {spec!r}") from None
    try:
        inspect.signature(CONSTRUCTORS[name]).bind(*args, **keywords)
    except TypeError as error:
        raise ValueError(f"{name} takes {name}{inspect.signature(CONSTRUCTORS[name])}, got {spec!r}: {error}") from None
    try:
        return CONSTRUCTORS[name](*args, **keywords)
    except TypeError as error:  # such as 8 < "a"
        usage = f"{name}{inspect.signature(CONSTRUCTORS[name])}"
        raise ValueError(f"{name} takes {usage}, got {spec!r}: {error}") from None


def slug(spec: str) -> str:
    """A file's or folder's name for an encoding: "cope(64) / identity" is cope-64-then-identity."""
    return re.sub(r"[^a-z0-9_]+", "-", spec.lower().replace("/", " then ")).strip("-")


@functools.cache
def one_line(name: str) -> str:
    """The first sentence of an encoding's docstring."""
    return (inspect.getdoc(CONSTRUCTORS[name]) or "").split("\n")[0]
