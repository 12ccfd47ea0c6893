"""Imports go down: a module knows the layers below its own, and neither its own layer's other packages nor what is above.

The test reads every import of the package, those within functions too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import posjax

PACKAGE = Path(posjax.__file__).parent
LAYERS = (
    ("typing", "checks", "hardware"),
    ("storage",),
    ("files", "progress"),
    ("core", "parallel", "data"),
    ("encodings", "attention"),
    ("models", "testing"),
    ("inference", "training"),
    ("plots",),
    ("lab",),
    ("configs",),
    ("compile",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
EXCEPTIONS = {
    ("posjax", "posjax.lab.trained"): "posjax.load opens trained runs, and imports the laboratory when it is called",
    ("posjax.plots.seeds", "posjax.lab.statistics"): "the intervals that are drawn are the laboratory's; pure functions of arrays",
}
# What the backends of attention may know: structures, and never what an encoding is.
BACKENDS = (
    "posjax.typing", "posjax.checks", "posjax.hardware", "posjax.core.structures", "posjax.core.masks", "posjax.core.linear_call",
    "posjax.core.manual_axes", "posjax.attention.call", "posjax.attention.backends",
)  # fmt: skip
MOST_MODULES = 12  # in a folder, __init__ not counted


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("posjax", *path.relative_to(PACKAGE).with_suffix("").parts))
        yield name.removesuffix(".__init__"), path


MODULES = dict(modules())


def imports(name: str, text: str) -> Iterator[str]:
    """The modules of posjax that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: imports must name posjax in full"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [one if one in MODULES else node.module for one in found]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            found = [str(first.value).rstrip(".")] if isinstance(first, ast.Constant) else []
        yield from (one for one in found if one.partition(".")[0] == "posjax")


def layer(name: str) -> str:
    return name.split(".")[1]


def wrong(name: str, text: str) -> list[str]:
    """The imports of a module that do not go down."""
    if name == "posjax":  # the public names
        goes_up = [one for one in imports(name, text) if RANKS[layer(one)] > RANKS["attention"]]
        return [one for one in goes_up if (name, one) not in EXCEPTIONS]
    own = layer(name)
    found = []
    for one in imports(name, text):
        rank = RANKS["attention" if one == "posjax" else layer(one)]  # the public names are of encodings and attention
        goes_down = rank < RANKS[own] or (one != "posjax" and layer(one) == own)
        if not goes_down and (name, one) not in EXCEPTIONS:
            found.append(one)
    return found


def test_imports_go_down():
    assert {name: found for name, path in MODULES.items() if (found := wrong(name, path.read_text()))} == {}


def test_an_import_that_goes_up_is_found_wherever_it_stands():
    assert wrong("posjax.core.structures", "from posjax.models import transformer") == ["posjax.models.transformer"]
    assert wrong("posjax.core.structures", "def f():\n    import posjax.lab.run") == ["posjax.lab.run"]
    assert wrong("posjax.core.structures", "import posjax as pj") == ["posjax"]
    assert wrong("posjax.encodings.rotary", "from posjax.attention.api import attention") == ["posjax.attention.api"]
    assert wrong("posjax.training.loop", "from posjax import plots") == ["posjax.plots"]
    assert wrong("posjax.training.loop", "importlib.import_module('posjax.lab')") == ["posjax.lab"]
    assert wrong("posjax.training.loop", "importlib.import_module(f'posjax.bench.{name}')") == ["posjax.bench"]
    assert wrong("posjax", "from posjax.models.transformer import Transformer") == ["posjax.models.transformer"]
    assert wrong("posjax.models.transformer", "from posjax import typing\nimport posjax.attention.linear") == []


def test_every_exception_is_needed():
    for name, one in EXCEPTIONS:
        assert one in imports(name, MODULES[name].read_text())


def test_every_module_has_a_layer():
    assert {layer(name) for name in MODULES if name != "posjax"} == set(RANKS)


def test_backends_know_structures_and_no_encodings():
    for name in MODULES:
        if name.startswith("posjax.attention.backends"):
            assert [one for one in imports(name, MODULES[name].read_text()) if not one.startswith(BACKENDS)] == []


def test_folders_are_small():
    for folder in {path.parent for path in MODULES.values()}:
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert count <= MOST_MODULES, f"{folder.relative_to(PACKAGE.parent)} has {count} modules"
