"""The examples of README.md and of docs/ run as they stand, their links lead somewhere, and the table of encodings is true.

A block of Python may begin with a comment that names what it needs:

    # pip install equinox         a package that the extra [test] lacks: skipped where it is not installed
    # needs runs/mine             a run, or models/SmolLM2-135M-Instruct, a checkpoint: tiny ones are made here; thorough
    # takes a minute              thorough

Commands in blocks of sh are parsed by the command line, and go no further.
"""

import importlib.metadata
import itertools
import re
import shlex
import sys
import textwrap
from pathlib import Path

import pytest
import tyro

from posjax import cli
from posjax.cli import common
from posjax.core import encoding
from posjax.encodings.spec import parse_encoding
from posjax.lab import config, named_configs, workdir
from posjax.testing import where_it_runs

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "models"))
import checkpoints  # noqa: E402

PAGES = [
    path
    for path in sorted(ROOT.glob("docs/**/*.md"))
    if path.relative_to(ROOT).parts[1] not in ("_build", "jupyter_execute")
    and (path.parent.name != "gallery" or path.stem == "index")  # the build of the site writes the others, and runs their code
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES)}
README = TEXTS["README.md"]
FENCED = re.compile(r"^ *```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
BLOCKS = {
    f"{name} {number}": (language, textwrap.dedent(code))
    for name, text in TEXTS.items()
    for number, (language, code) in enumerate(FENCED.findall(text))
}
EXAMPLES = {name: code for name, (language, code) in BLOCKS.items() if language == "python"}
PIP_INSTALL, NEEDS, TAKES = (re.compile(rf"# {words}\n") for words in (r"pip install (\S+)", r"needs \S+", r"takes .+"))


def commands(text):
    """The words of each posjax command in a text of sh, also of those that another command starts."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for inner in words:
            if inner.startswith("posjax "):
                yield from commands(inner)
        while "posjax" in words:
            words = words[words.index("posjax") + 1 :]
            yield list(itertools.takewhile(lambda word: word not in ("&&", "||", "|", ">", ";"), words))


COMMANDS = {
    shlex.join(words): f"{name}: posjax {shlex.join(words)}"
    for name, (language, code) in BLOCKS.items()
    if language == "sh"
    for words in commands(code)
}


def test_the_readme_is_two_screens_and_its_first_example_ten_lines():
    assert len(README.splitlines()) <= 150
    assert len(EXAMPLES["README.md 0"].strip().splitlines()) <= 10


def test_blocks_are_in_languages_that_are_tested():
    """A block in another language may say anything; text is for output and equations."""
    assert {language for language, _ in BLOCKS.values()} <= {"python", "sh", "text"}


def ours():
    return {name: cls for name, cls in encoding.registered().items() if cls.__module__.startswith("posjax.")}


def examples():
    thorough = [name for name, code in EXAMPLES.items() if NEEDS.match(code) or TAKES.match(code)]
    return [pytest.param(name, marks=[pytest.mark.thorough] if name in thorough else [], id=name) for name in EXAMPLES]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with a run, runs/mine, and a checkpoint, models/SmolLM2-135M-Instruct."""
    folder = tmp_path_factory.mktemp("prepared")
    checkpoints.write_tokenizer(checkpoints.write_folder(folder / "models/SmolLM2-135M-Instruct"))
    (folder / "text").mkdir()
    (folder / "text/train.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    sizes = "--num_layers 1 --embed_dim 16 --num_heads 2 --seq_length 16 --batch_size 8 --steps 2 --eval_tokens 64 --eval_lengths 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("POSJAX_DATA_DIR", str(folder / "data"))
        cli.main(shlex.split(f"train quickstart --encoding 'rope + cope(8)' --data text --workdir runs/mine {sizes}"))
    return folder


@pytest.mark.parametrize("name", examples())
def test_examples_run(name, request, monkeypatch):
    code = EXAMPLES[name]
    monkeypatch.setattr(encoding, "_REGISTRY", ours())  # blocks may use the names of each other's encodings
    monkeypatch.syspath_prepend(ROOT / "examples")  # the page says that the file is in the current folder
    if package := PIP_INSTALL.match(code):
        try:
            importlib.metadata.distribution(package[1])
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"needs the package {package[1]}")
    if NEEDS.match(code):
        monkeypatch.chdir(request.getfixturevalue("prepared"))
    exec(compile(code, name, "exec"), {"__name__": "example"})


class Parsed(Exception):
    """Raised in place of what a command does: its flags and their values are right."""


@pytest.mark.parametrize("command", COMMANDS, ids=COMMANDS.values())
def test_commands_are_right(command, monkeypatch):
    def parse(*args, **kwargs):
        parsed(*args, **kwargs)
        raise Parsed

    def load(path):
        return loaded(path if path in named_configs() else "quickstart")  # a run, or a file of the reader's

    parsed, loaded = tyro.cli, config.load_config
    monkeypatch.setattr(tyro, "cli", parse)
    monkeypatch.setattr(config, "load_config", load)
    monkeypatch.setattr(workdir, "is_workdir", lambda path: str(path).startswith(("runs/", "/shared/")))
    monkeypatch.setattr(common, "_warmup_steps", lambda config, flags: 0)  # reads a run
    if command == "list":
        return
    with pytest.raises(Parsed):
        cli.main(shlex.split(command))


def test_the_page_on_encodings_has_the_example():
    """They differ in the docstring and in comments."""
    page, file = EXAMPLES["docs/how_to/your_encoding.md 0"], (ROOT / "examples/forgetting_gate.py").read_text()

    def lines(text):
        code = re.sub(r'    """Adds.*?"""|  # [^\n]*', "", text, flags=re.DOTALL)
        return [line for line in code[code.index("def log_gate") :].splitlines() if line]

    assert lines(page.partition("encoding = ")[0]) == lines(file)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them; those of a page that includes another are the other's."""
    text = page.read_text()
    if included := re.match(r"```\{include\} (\S+)", text):
        text = (page.parent / included[1]).read_text()
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", [*TEXTS, "experiments/README.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def columns(spec):
    """The columns XLA, TPU kernel, GPU kernel, ring and decoding of the table, for a causal call in bfloat16."""
    reasons = where_it_runs(parse_encoding(spec))
    xla = (reasons.pop("xla"), reasons.pop("xla_chunked"))
    return ["yes" if reason is None else "no" for reason in (xla[0] or xla[1], *reasons.values())]


ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("| `")]
ARGUMENTS = {"cope": "cope(64)", 'cope(gates="keys")': "cope(64, gates='keys')"}


def test_the_table_has_every_encoding_and_where_it_runs():
    specs = [row[0].strip("`") for row in ROWS]
    assert {spec.partition("(")[0] for spec in specs} == set(ours())
    assert [row[3:] for row in ROWS] == [columns(ARGUMENTS.get(spec, spec)) for spec in specs]


def test_the_map_has_every_module_in_its_folder():
    """A line that begins with a folder names what is in it, and so do the lines below it; what is indented deeper lies deeper."""
    code_map = TEXTS["docs/contribute/layout.md"].split("# A map of the code")[1].split("Data flows one way")[0]
    folders: dict[int, Path] = {-1: ROOT}  # by how far they are indented
    listed = set()
    for line in filter(str.strip, code_map.splitlines()):
        indent = len(line) - len(line.lstrip())
        if own := re.match(r" *(\w+)/", line):
            folders = {at: folder for at, folder in folders.items() if at < indent}
            folders[indent] = folders[max(folders)] / own[1]
            assert folders[indent].is_dir(), line
        listed |= {folders[max(folders)] / name for name in re.findall(r"\w+\.py", line)}
    assert [str(path) for path in listed if not path.exists()] == []
    assert sorted(map(str, set((ROOT / "posjax").rglob("[!_]*.py")) - listed)) == []
