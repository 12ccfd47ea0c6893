"""The text form of encodings, for configurations and command lines.

rope                                   an encoding with its defaults
cope(max_position=64, gates="keys")    an encoding with arguments, as in Python
rope(scaling=linear_scaling(4.0))      an argument that is a scaling of frequencies
rope + cope(64)                        a chain
cope(64) / identity / identity         one encoding per layer, repeated over the layers
my_package.mine:encoding(3)            a class or a function in a module that can be imported, or an encoding value without (3)
"""

import ast
import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
import io
import numbers
import re
import tokenize
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from posjax.checks import checked, near, short
from posjax.core.chain import Chain, chain
from posjax.core.encoding import PositionalEncoding, registered
from posjax.encodings.frequencies import SCALINGS, Scaling

_MAX_LENGTH = 10_000  # of a text; Python's parser would run out of its stack for a far longer one


def traced_arguments(make: Callable[..., Any]) -> tuple[str, ...]:
    """Returns the arguments of a constructor that may be traced numbers; encodings that differ only in these share one program."""
    fields = dataclasses.fields(make) if dataclasses.is_dataclass(make) else ()
    return tuple(field.name for field in fields if field.metadata.get("traced"))


def spec_of(encoding: PositionalEncoding | Sequence[PositionalEncoding]) -> str:
    """Returns the text form of an encoding, or of one per layer, from which ``parse_encoding`` constructs an equal one.

    >>> spec_of(pj.chain(pj.rope(), pj.cope(64)))
    'rope + cope(max_position=64)'

    Args:
      encoding: an encoding, or one for each of several layers.

    Raises:
      ValueError: an encoding has no text form, because it is not registered or holds an array.
    """
    if isinstance(encoding, Sequence):
        return " / ".join(map(spec_of, encoding))
    if isinstance(encoding, Chain):
        return " + ".join(map(spec_of, encoding.encodings))
    text = repr(encoding)
    try:
        is_same = parse_encoding(text) == encoding
    except ValueError:
        is_same = False
    if not is_same:
        raise ValueError(
            f"encoding must have a text form, got {text}; give it a name by pj.register and plain arguments, "
            "or define it in a module and write package.module:name"
        )
    return text.removesuffix("()")


@checked()
def parse_encoding(spec: str, settings: Sequence[Any] = ()) -> PositionalEncoding | tuple[PositionalEncoding, ...]:
    """Parses the text form of an encoding, or of one encoding for each of several layers.

    Args:
      spec: names of posjax's encodings, joined by ``+`` (chain) and ``/`` (next layer); arguments are literals or scalings.
      settings: values of ``_0``, ``_1``, ... in the text, which ``parametrize_spec`` writes; they may be traced.

    Returns:
      One encoding, or, with ``/``, a tuple in which equal parts are the same object.

    Raises:
      ValueError: the text does not have this form, a name is unknown (the message suggests the closest one), or an encoding rejects
        its arguments.
    """
    parts = _parts(spec)
    encodings = {part: _parse(part, spec, settings) for part in parts}
    return encodings[parts[0]] if len(parts) == 1 else tuple(encodings[part] for part in parts)


def _parts(spec: str) -> list[str]:
    return [part.strip() for part in spec.split("/")]


def _parse(part: str, spec: str, settings: Sequence[Any]) -> PositionalEncoding:
    encodings = [_construct(call, spec, settings) for call in _calls(part, spec)]
    return encodings[0] if len(encodings) == 1 else chain(*encodings)


def _calls(part: str, spec: str) -> list[ast.Call]:
    """Returns the members of a chain, each as a call of a known encoding."""
    if len(spec) > _MAX_LENGTH:
        raise ValueError(f"encoding must be a text of at most {_MAX_LENGTH:,} characters, got {len(spec):,}: {short(spec)}")
    if not spec.isprintable():
        raise ValueError(f"encoding must be one line without control characters, got {short(spec)}")
    try:
        tree = ast.parse(_IMPORTED.sub(rf"\1.{_MARK}\2", part), mode="eval").body
        if any(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(part).readline)):
            raise SyntaxError("a comment is not part of an encoding")
    except SyntaxError as error:
        raise ValueError(f"encoding must look like 'rope' or 'rope + cope(64)', got {short(spec)}: {error.msg}") from None
    members: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        members.insert(0, tree.right)
        tree = tree.left
    return [_call(member, spec) for member in (tree, *members)]


def _call(node: ast.expr, spec: str) -> ast.Call:
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    name = _name(call)
    if name is None or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(f"encoding must look like 'rope' or 'rope + cope(64)', got {spec!r}")
    _check_repeated(name, call, spec)
    if ":" not in name and name not in registered():
        close = difflib.get_close_matches(name, registered(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"encoding must be made of {', '.join(registered())}, got {short(name)} in {short(spec)}; {hint}posjax list shows all"
        )
    return call


def _check_repeated(name: str | None, call: ast.Call, spec: str) -> None:
    keywords = [keyword.arg for keyword in call.keywords]
    if repeated := [keyword for keyword in keywords if keywords.count(keyword) > 1]:
        raise ValueError(
            f"encoding {name} must have each argument once, got {repeated[0]!r} {keywords.count(repeated[0])} times in {spec!r}"
        )


# While a text is a Python expression, module:name is an attribute with a mark in its name.
_IMPORTED = re.compile(r"(?<![\w.'\"])([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
_MARK = "_imported_"


def modules_of(spec: str) -> list[str]:
    """Returns the modules that a spec names: my_package.mine for "rope + my_package.mine:encoding(3)"."""
    return [match[1] for match in _IMPORTED.finditer(spec)]


def _unmarked(text: str) -> str:
    return text.replace(f".{_MARK}", ":")


def _name(call: ast.Call) -> str | None:
    """Returns the name in a call, "rope" or "module:name"; None if it has neither form."""
    is_imported = isinstance(call.func, ast.Attribute) and call.func.attr.startswith(_MARK)
    return _unmarked(ast.unparse(call.func)) if isinstance(call.func, ast.Name) or is_imported else None


def _maker(call: ast.Call) -> Any:
    """Returns the object named by a member of a chain: a registered class, or an object in a module.

    Raises:
      ValueError: the module cannot be imported or has no such object.
    """
    name = _name(call)
    assert name is not None  # _call refuses such calls
    module, _, attribute = name.rpartition(":")
    if not module:
        return registered()[attribute]
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"encoding {module}:{attribute} cannot be imported: {error}") from None


def _construct(call: ast.Call, spec: str, settings: Sequence[Any]) -> PositionalEncoding:
    name, make = _name(call), _maker(call)

    def value(node: ast.expr) -> Any:
        placeholder = _PLACEHOLDER.fullmatch(node.id) if isinstance(node, ast.Name) else None
        if placeholder and int(placeholder[1]) < len(settings):
            return settings[int(placeholder[1])]
        if isinstance(node, ast.Call | ast.Name):
            return _scaling(node, spec, name)
        return _literal(node, spec, name)

    args = [value(arg) for arg in call.args]
    keywords = {keyword.arg: value(keyword.value) for keyword in call.keywords if keyword.arg is not None}
    if isinstance(make, PositionalEncoding) and not (args or keywords):
        return make
    if not callable(make):
        raise ValueError(f"{name} must be an encoding, or a class or function that returns one, got {make!r} in {spec!r}")
    encoding = _called(name, make, args, keywords, spec)
    if not isinstance(encoding, PositionalEncoding):
        raise ValueError(f"{name} must return a PositionalEncoding, got {encoding!r} in {spec!r}")
    return encoding


def _called(name: str | None, make: Callable[..., Any], args: list[Any], keywords: dict[str, Any], spec: str) -> Any:
    """Returns make(*args, **keywords), with errors that quote the text."""
    signature = inspect.signature(make)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    usage = f"{name}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"
    try:
        signature.bind(*args, **keywords)
        return make(*args, **keywords)
    except TypeError as error:  # of bind, or such as 8 < "a"
        unknown = next((keyword for keyword in keywords if keyword not in signature.parameters), None)
        hint = near(unknown, signature.parameters) if unknown else ""
        raise ValueError(f"encoding {name} must be called as {usage}, got {spec!r}: {error}{hint}") from None
    except ValueError as error:
        raise ValueError(f"encoding {short(spec)}: {error}") from None


def _literal(node: ast.expr, spec: str, name: str | None) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(
            f"encoding {short(spec)}: arguments of {name} must be plain values such as 64 or 'keys', or scalings such as "
            f"linear_scaling(4.0), got {short(ast.unparse(node))}"
        ) from None


def _scaling(node: ast.Call | ast.Name, spec: str, owner: str | None) -> Scaling:
    """Returns the scaling that a call in an argument of ``owner`` constructs; a name alone is a call without arguments."""
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if name not in SCALINGS or any(keyword.arg is None for keyword in call.keywords):
        raise ValueError(
            f"encoding {short(spec)}: arguments of {owner} must be plain values such as 64 or 'keys', or one of "
            f"{', '.join(SCALINGS)}, got {short(ast.unparse(node))}{'' if name in SCALINGS else near(str(name), SCALINGS)}"
        )
    _check_repeated(name, call, spec)
    args = [_literal(arg, spec, name) for arg in call.args]
    keywords = {keyword.arg: _literal(keyword.value, spec, name) for keyword in call.keywords if keyword.arg is not None}
    return _called(name, SCALINGS[name], args, keywords, spec)


# Encodings that differ only in numbers -------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"_(\d+)")


def parametrize_spec(spec: str) -> tuple[str, tuple[float, ...]]:
    """Replaces the traceable numbers in a spec by ``_0``, ``_1``, ... and returns the new spec and the numbers.

    Traceable arguments at their defaults are included.

    >>> parametrize_spec("rope + cope(64)")
    ('rope(theta=_0) + cope(64, gate_bias=_1)', (10000.0, 0.0))
    """
    settings: list[float] = []

    def parametrize(call: ast.Call) -> ast.Call:
        make = _maker(call)
        if isinstance(make, PositionalEncoding):  # a value in a user's module: its arguments are not in the text
            return call
        for argument in traced_arguments(make):
            given = _argument(call, argument)
            default = inspect.signature(make).parameters[argument].default
            value = default if given is None else ast.literal_eval(given)
            if isinstance(value, numbers.Real) and not isinstance(value, bool):
                call = _with(call, argument, ast.Name(f"_{len(settings)}"))
                settings.append(float(value))
        return call

    return _rewritten(spec, parametrize), tuple(settings)


def substitute(spec: str, settings: dict[int, float]) -> str:
    """Replaces some placeholders of a spec by numbers and renumbers the others from ``_0``.

    >>> substitute("rope(theta=_0) + cope(64, gate_bias=_1)", {0: 500.0})
    'rope(theta=500.0) + cope(64, gate_bias=_0)'
    """
    remaining: list[int] = []

    def replace(match: re.Match) -> str:
        index = int(match[1])
        if index in settings:
            return repr(settings[index])
        if index not in remaining:
            remaining.append(index)
        return f"_{remaining.index(index)}"

    return re.sub(rf"\b{_PLACEHOLDER.pattern}\b", replace, spec)


def parse_scaling(text: str) -> Scaling | None:
    """Parses the text form of a scaling, such as "linear_scaling(4.0)"; returns None if the text does not begin with its name.

    Raises:
      ValueError: the scaling rejects its arguments.
    """
    if text.partition("(")[0].strip() not in SCALINGS:
        return None
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"a scaling must look like linear_scaling(4.0), got {short(text)}: {error.msg}") from None
    if not isinstance(node, ast.Call | ast.Name):
        raise ValueError(f"a scaling must look like linear_scaling(4.0), got {short(text)}")
    return _scaling(node, text, None)


def with_argument(spec: str, name: str, argument: str, value: Any) -> str:
    """Sets an argument of every member with the given name in a spec; a value may be a scaling.

    >>> with_argument("rope + cope(64)", "cope", "gate_bias", -2.0)
    'rope + cope(64, gate_bias=-2.0)'

    Raises:
      ValueError: the encoding is unknown (the message suggests the closest one), or it has no such argument.
    """
    if name not in registered():
        raise ValueError(f"{name!r} is not an encoding{near(name, registered())}")
    known = list(inspect.signature(registered()[name]).parameters)
    if argument not in known:
        takes = f"takes {', '.join(known)}" if known else "takes no arguments"
        raise ValueError(f"{name} has no argument {argument!r}; it {takes}")

    def change(call: ast.Call) -> ast.Call:
        node = ast.parse(repr(value), mode="eval").body if isinstance(value, Scaling) else ast.Constant(value)
        return _with(call, argument, node) if _name(call) == name else call

    return _rewritten(spec, change)


def _rewritten(spec: str, change: Callable[[ast.Call], ast.Call]) -> str:
    """Applies ``change`` to every encoding in a spec; equal layers are changed only once, so that they stay equal."""

    def text(call: ast.Call) -> str:
        return _unmarked(ast.unparse(call if call.args or call.keywords else call.func))

    parts = _parts(spec)
    new_parts = {
        part: " + ".join(text(change(copy.deepcopy(call))) for call in _calls(part, spec)) for part in dict.fromkeys(parts)
    }
    return " / ".join(new_parts[part] for part in parts)


def _parameter_index(call: ast.Call, argument: str) -> int:
    return list(inspect.signature(_maker(call)).parameters).index(argument)


def _argument(call: ast.Call, argument: str) -> ast.expr | None:
    index = _parameter_index(call, argument)
    if index < len(call.args):
        return call.args[index]
    return next((keyword.value for keyword in call.keywords if keyword.arg == argument), None)


def _with(call: ast.Call, argument: str, value: ast.expr) -> ast.Call:
    index = _parameter_index(call, argument)
    if index < len(call.args):
        return ast.Call(call.func, [*call.args[:index], value, *call.args[index + 1 :]], call.keywords)
    keywords = {keyword.arg: keyword.value for keyword in call.keywords} | {argument: value}
    return ast.Call(call.func, call.args, [ast.keyword(name, given) for name, given in keywords.items()])


def slug(spec: str) -> str:
    """Returns a file or folder name for an encoding: "cope(64) / identity" becomes cope-64-then-identity.

    The end of a name that would be long is a sum of the whole text, because file systems limit names to 255 bytes.
    """
    name = re.sub(r"[^a-z0-9_]+", "-", spec.lower().replace("/", " then ")).strip("-")
    return name if len(name) <= 150 else f"{name[:140].rstrip('-')}-{zlib.crc32(spec.encode()):08x}"


@functools.cache
def one_line(name: str) -> str:
    """Returns the first line of an encoding's docstring."""
    return (inspect.getdoc(registered()[name]) or "").split("\n")[0]
