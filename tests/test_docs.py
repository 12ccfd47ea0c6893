"""The docstrings of all public names are complete, their examples run, and every name has a place on the site."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs" / "_ext"), str(ROOT / "tests")]

import api  # noqa: E402
import public_api  # noqa: E402
import tables  # noqa: E402

import examples  # noqa: E402
import posjax as pj  # noqa: E402

DOCUMENTED = api.documented()
MEMBERS = {f"{n}.{m}": value for n, cls in DOCUMENTED.items() if inspect.isclass(cls) for m, value in api.members(cls)}
SLOW = {  # examples that compile a program
    "posjax.attend", "posjax.attention", "posjax.attention_weights", "posjax.cache_layout", "posjax.lab.probes.decay_curve",
    "posjax.core.sequence.prefix_sum", "posjax.linear_attention", "posjax.models.transformer.functional", "posjax.rope_mixed",
}  # fmt: skip


def faults(name, value):
    """What a docstring lacks."""
    doc = inspect.getdoc(value) or ""
    parts = api.sections(doc)
    if not doc:
        return [f"{name} has no docstring"]
    if isinstance(value, property):
        return []
    described = api.names_in(parts.get("Args", "")) | api.names_in(parts.get("Attributes", ""))
    called = value.__init__ if "*args" in str(inspect.signature(value)) and inspect.isclass(value) else value
    takes = set(inspect.signature(called).parameters) - {"self", "cls"}
    found = [f"{name} does not describe {argument}" for argument in sorted(takes - described)]
    if inspect.isclass(value):
        return found
    found += [f"{name} describes {argument}, which it does not take" for argument in sorted(described - takes)]
    first = doc.split()[0]
    if not re.fullmatch(r"[A-Z]\w+s", first):
        found.append(f"{name} must begin with a verb such as Returns, got {first}")
    returns = inspect.signature(value).return_annotation not in (None, "None")
    if returns and first not in ("Returns", "Yields") and not {"Returns", "Yields"} & set(parts):
        found.append(f"{name} does not say what it returns")
    tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    if any(isinstance(node, ast.Raise) for node in ast.walk(tree)) and "Raises" not in parts:
        found.append(f"{name} does not say what it raises")
    return found


def test_docstrings_of_public_names_are_complete():
    assert [fault for name, value in (DOCUMENTED | MEMBERS).items() for fault in faults(name, value)] == []


def test_a_fault_is_found():
    def scaled(x, factor):
        """Scales x.

        Args:
          x: an array.
        """
        if factor < 0:
            raise ValueError
        return x * factor

    assert faults("scaled", scaled) == [
        "scaled does not describe factor", "scaled does not say what it returns", "scaled does not say what it raises"
    ]  # fmt: skip


def test_every_public_name_is_on_one_page():
    names = [name for subject in api.subjects() for name, _ in api.names_of(subject)]
    assert len(names) == len(set(names))
    public = {f"posjax.{name}" for name in pj.__all__}
    public |= {f"{module}.{name}" for module, given in public_api.MODULES.items() for name in given}
    assert public - set(names) == set()
    pages = {path.stem for path in (ROOT / "docs" / "reference" / "api").glob("*.md")} - {"index"}
    assert pages == set(api.subjects())


WITH_EXAMPLES = [name for name, value in DOCUMENTED.items() if ">>>" in (value.__doc__ or "")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.thorough] * (n in SLOW)) for n in WITH_EXAMPLES])
def test_examples_in_docstrings_run(name):
    value = DOCUMENTED[name]
    names = vars(sys.modules[value.__module__]) | examples.GLOBALS
    (test,) = doctest.DocTestFinder(recurse=False).find(value, name, globs=names)
    said = []
    assert not doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed, "".join(said)


def test_examples_construct_every_encoding():
    """The gallery takes the code, the picture and the support of an encoding from the example in its docstring."""
    for name in examples.names():
        first, *_ = examples.of(name).encodings
        assert first.registered_name == name


def test_the_page_of_the_command_line_has_every_flag(capsys):
    for verb in ("generate", "plan"):
        with pytest.raises(SystemExit):
            from posjax import cli

            cli.main([verb, "quickstart", "--help"])
        printed = {
            flag.replace("-", "_") for flag in re.findall(r"^[ │]*--([a-z][a-z0-9-]*)", capsys.readouterr().out, re.MULTILINE)
        }
        from posjax.lab.config import Config

        shown = {flag.name for flag in (*tables.commands()[verb], *tables.flags_of(Config))}
        assert shown == printed, shown ^ printed


# The site -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx", reason='needs sphinx: pip install -e ".[docs]"')
    pytest.importorskip("sphinx_book_theme", reason='needs sphinx_book_theme: pip install -e ".[docs]"')
    out = tmp_path_factory.mktemp("site")
    # Notebooks are executed when the site itself is built.
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-D",
        "nb_execution_mode=off",
        "-b",
        "html",
        "docs",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.docs
def test_every_public_name_has_an_anchor(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    anchors = {name for kind, items in inventory.data.items() if kind.startswith("py:") for name in items}
    assert set(DOCUMENTED) | set(MEMBERS) <= anchors
    for kind, items in inventory.data.items():
        for name, item in items.items():
            if kind.startswith("py:"):
                path, _, anchor = item.uri.partition("#")
                assert f'id="{anchor or name}"' in (site / path).read_text(), name


@pytest.mark.docs
def test_every_encoding_has_a_page_with_a_picture(site):
    for name in examples.names():
        page = (site / "gallery" / f"{name}.html").read_text()
        assert "arxiv.org" in page or "Llama" in page, name
        assert f"{name}.png" in page, name


@pytest.mark.docs
def test_a_new_encoding_gets_a_page_by_registration():
    pytest.importorskip("sphinx", reason='needs sphinx: pip install -e ".[docs]"')
    import gallery

    from posjax.core.encoding import _REGISTRY

    @pj.register("constant_of_a_test")
    class Constant(pj.PositionalEncoding):
        """Adds a constant to the embeddings.

        Args:
          value: what is added.
        """

        value: float = 1.0

        def embed(self, params, x, tokens):
            return x + self.value

    try:
        Constant.__module__ = "posjax.encodings.constant"
        assert "constant_of_a_test" in examples.names()
        text = gallery.page("constant_of_a_test", [Path("constant_of_a_test.png")])
        assert "Adds a constant to the embeddings." in text and "`constant_of_a_test`" in text
        assert gallery.picture("constant_of_a_test").axes
    finally:
        del _REGISTRY["constant_of_a_test"]
