"""Pages of the API, from docstrings.

A page of docs/reference/api holds a line ``<!-- generated api NAME -->``, which ``pages.py`` replaces by the names of a subject.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import posjax

MODULES = {  # of the public names of posjax, by subject: the start of the name of the module that defines them
    "encodings": ("posjax.encodings.", "posjax.core.chain", "posjax.core.encoding.Identity"),
    "scalings": ("posjax.encodings.frequencies",),
    "attention": ("posjax.attention.",),
    "structures": ("posjax.core.structures",),
    "new_encodings": ("posjax.core.",),
    "laboratory": ("posjax",),
}
OTHERS = {  # names of other modules; None: those that the module itself exports by __all__
    "encodings": {"posjax.encodings.spec": ("parse_encoding", "spec_of")},
    "new_encodings": {
        "posjax.core.sequence": ("prefix_sum", "short_conv"),
        "posjax.testing": ("check_encoding", "where_it_runs"),
    },
    "models": {
        "posjax.models.transformer": ("Transformer", "TransformerConfig", "functional"),
        "posjax.models.pretrained": None,
        "posjax.inference.generation": ("generate", "stream"),
        "posjax.inference.sampling": ("Sampling", "filtered_logits", "sample"),
        "posjax.inference.text": ("TextRow",),
    },
    "laboratory": {
        "posjax.lab.config": ("Config", "load_config"),
        "posjax.lab.trained": ("TrainedRun", "attention_maps", "gates_and_positions", "token_losses", "tokens_of"),
        "posjax.lab.probes": ("attention_distance", "cope_positions", "counts_by_gates", "decay_curve", "rope_bound"),
        "posjax.data": None,
    },
    "plots": {"posjax.plots": None},
}


def names_of(subject: str) -> Iterator[tuple[str, Any]]:
    """Yields (full name, value) of every public name of a subject, in the order of its page."""
    for name in posjax.__all__:
        if subject_of(getattr(posjax, name)) == subject:
            yield f"posjax.{name}", getattr(posjax, name)
    for module, names in OTHERS.get(subject, {}).items():
        loaded = importlib.import_module(module)
        for name in loaded.__all__ if names is None else names:
            yield f"{module}.{name}", getattr(loaded, name)


def subject_of(value: Any) -> str:
    """Returns the subject of a public name of posjax, that with the longest start of the name of its module."""
    where = f"{value.__module__}.{value.__qualname__}"
    return max(MODULES, key=lambda subject: max((len(start) for start in MODULES[subject] if where.startswith(start)), default=0))


def subjects() -> list[str]:
    return list(dict.fromkeys((*MODULES, *OTHERS)))


def documented() -> dict[str, Any]:
    """Returns all public names with their values."""
    return {name: value for subject in subjects() for name, value in names_of(subject)}


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of the public methods and properties of a class that its base classes in posjax do not have."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("posjax")]
    inherited = {name for base in bases for name in vars(base)}
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for name, value in vars(cls).items():
        value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        is_shown = inspect.isfunction(value) or isinstance(value, property)
        if is_shown and not name.startswith("_") and name not in inherited | fields | set(getattr(cls, "_fields", ())):
            yield name, value


# Docstrings ----------------------------------------------------------------------------------------------------------------------

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Examples")


def sections(doc: str) -> dict[str, str]:
    """Splits a docstring: "" is the text before the first section, a name the text of a section, and "after" what follows them."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in doc.splitlines():
        if line[:-1] in SECTIONS and line.endswith(":"):
            name = line[:-1]
            found[name] = []
            continue
        if name not in ("", "after") and line and not line.startswith(" "):
            name = "after"
            found.setdefault(name, [])
        found[name].append(line)
    return {name: textwrap.dedent("\n".join(lines)).strip("\n") for name, lines in found.items()}


def items(section: str) -> list[tuple[str, str]]:
    """Returns (name, text) of the entries of a section such as Args."""
    found = re.findall(r"^(\*{0,2}\w[\w, *]*?): (.*(?:\n(?:  .*)?)*)", section, re.MULTILINE)
    return [(name, " ".join(text.split())) for name, text in found]


def names_in(section: str) -> set[str]:
    """Returns the names of the arguments that a section describes."""
    return {name.strip(" *") for names, _ in items(section) for name in names.split(",")}


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return bool(re.search(r"^\s*(@|class |def |import |from |\w[\w., ]* = |\w+(\.\w+)+\()", text, re.MULTILINE))


def rst(doc: str) -> str:
    """Returns a docstring as reStructuredText: indented lines become blocks of code, arXiv numbers and public names links."""
    lines: list[str] = []
    parts = sections(doc)
    for name in (name for name in ("", *SECTIONS, "after") if name in parts):
        text = parts[name] if name in ("Example", "Examples") else _linked(_with_blocks(_escaped(parts[name])))
        if name in ("", "after"):
            lines += [text, ""]
        else:
            lines += ["Args:" if name == "Attributes" else f"{name}:", textwrap.indent(text, "    "), ""]
    from sphinx.ext.napoleon import Config, GoogleDocstring

    text = str(GoogleDocstring("\n".join(lines), Config(napoleon_use_param=False, napoleon_use_rtype=False)))
    text = text.replace(":Parameters:", ":Attributes:") if "Attributes" in parts else text
    return text.strip("\n")


def _escaped(text: str) -> str:
    """Escapes what reStructuredText would read as markup outside of ``code``."""
    parts = re.split(r"(``[^`]*``)", text)
    return "".join(
        part if index % 2 else re.sub(r"(?<!^)([|*])|(?<=\w)(_)(?!\w)", r"\\\1\2", part) for index, part in enumerate(parts)
    )


def _with_blocks(text: str) -> str:
    """Marks lines that are indented by four or more, after an empty line, as blocks of code."""

    def block(match: re.Match) -> str:
        code = re.sub(r"\\([|*_])", r"\1", textwrap.dedent(match[1]).strip("\n"))
        language = "python" if is_python(code) else "text"
        return f"\n\n.. code-block:: {language}\n   :class: no-copybutton\n\n" + textwrap.indent(code, "   ") + "\n\n"

    return re.sub(r"(?:\A|\n\n)((?:    .*(?:\n+|\Z))+)", block, text)


def _linked(text: str) -> str:
    def name(match: re.Match) -> str:
        full = match[1] if match[1].startswith("posjax.") else f"posjax.{match[1]}"
        is_clear = match[1].startswith("posjax.") or "_" in match[1] or match[1] != match[1].lower()
        return f":py:obj:`{match[1]} <{full}>`" if is_clear and full in documented() else match[0]

    text = re.sub(r"``([\w.]+)``", name, text)
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text)


# Directives ----------------------------------------------------------------------------------------------------------------------


def signature(function: Any) -> str:
    """Returns the parameters with their defaults, without annotations."""
    if inspect.isclass(function) and str(inspect.signature(function)) == "(*args, **kwargs)":
        function = function.__init__  # a metaclass hides those of a Flax module
    given = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in given.parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    text = str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)


def entry(name: str, value: Any) -> str:
    """Returns the directive of one public name, with the members of a class."""
    kind = "class" if inspect.isclass(value) else "function"
    lines = [f".. py:{kind}:: {name}{signature(value)}", "", textwrap.indent(rst(inspect.getdoc(value) or ""), "   "), ""]
    for member, attribute in members(value) if inspect.isclass(value) else ():
        is_property = isinstance(attribute, property)
        head = f"   .. py:property:: {member}" if is_property else f"   .. py:method:: {member}{signature(attribute)}"
        lines += [head, "", textwrap.indent(rst(inspect.getdoc(attribute) or ""), "      "), ""]
    return "\n".join(lines)


def page(subject: str) -> str:
    """Returns the entries of a subject as Markdown."""
    return "\n".join(["````{eval-rst}", *(entry(name, value) for name, value in names_of(subject)), "````", ""])
