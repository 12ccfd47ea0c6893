"""The examples of README.md and of docs/ run as they stand, their links lead somewhere, and the table of encodings is true."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import posjax as pj
from posjax.attention.backends import reference
from posjax.attention.backends.gpu import attention as gpu
from posjax.attention.backends.ring import attention as ring
from posjax.attention.backends.tpu import attention as tpu
from posjax.attention.backends.xla_chunked import attention as xla_chunked
from posjax.attention.call import prepare
from posjax.attention.prefix_sums import with_prefix_sums
from posjax.core.encoding import registered
from posjax.encodings.spec import parse_encoding

ROOT = Path(__file__).resolve().parents[1]
PAGES = [path for path in sorted(ROOT.glob("docs/**/*.md")) if path.relative_to(ROOT).parts[1] not in ("_build", "jupyter_execute")]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *PAGES)}
README = TEXTS["README.md"]
FENCED = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = {f"{name} {number}": code for name, text in TEXTS.items() for number, code in enumerate(FENCED.findall(text))}


def test_the_readme_is_two_screens_and_its_first_example_ten_lines():
    assert len(README.splitlines()) <= 150
    assert len(EXAMPLES["README.md 0"].strip().splitlines()) <= 10


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "example"})


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them; those of a page that includes another are the other's."""
    text = page.read_text()
    if included := re.match(r"```\{include\} (\S+)", text):
        text = (page.parent / included[1]).read_text()
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", [*TEXTS, "CONTRIBUTING.md", "experiments/README.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def where_it_runs(spec):
    """The columns XLA, TPU kernel, GPU kernel, ring and decoding of the table, for a causal call in bfloat16."""
    encoding, dims = parse_encoding(spec), pj.Dims(num_heads=4, head_dim=64, max_length=1024)
    shape = jax.ShapeDtypeStruct((1, 1024, 4, 64), jnp.bfloat16)
    found = []

    def ask(query, hidden):
        params = encoding.init(jax.random.key(0), dims)
        options = dict(is_causal=True, hidden=hidden if encoding.needs_hidden else None)
        call = with_prefix_sums(prepare(query, query, query, encoding, params, **options))
        runs = [kernel.unsupported_reason(call) is None for kernel in (reference, xla_chunked, tpu, gpu)]
        cache = pj.init_cache(encoding, dims, batch_size=1, max_length=8)
        token = query[:, :1].astype(cache.key.dtype)
        hidden = hidden[:, :1].astype(token.dtype) if encoding.needs_hidden else None
        out, _ = pj.attend(token, token, token, encoding, params, cache, hidden=hidden)
        decodes = out.shape == token.shape
        found.extend([all(runs[:2]), *runs[2:], ring.unsupported_reason(call, SimpleNamespace(parts=4)) is None, decodes])
        return query

    jax.eval_shape(ask, shape, jax.ShapeDtypeStruct((1, 1024, 256), jnp.bfloat16))
    return ["yes" if runs else "no" for runs in found]


ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in README.splitlines() if line.startswith("| `")]
ARGUMENTS = {"cope": "cope(64)", 'cope(gates="keys")': "cope(64, gates='keys')"}


def test_the_table_has_every_encoding_and_where_it_runs():
    specs = [row[0].strip("`") for row in ROWS]
    ours = {name for name, cls in registered().items() if cls.__module__.startswith("posjax.")}
    assert {spec.partition("(")[0] for spec in specs} == ours
    assert [row[3:] for row in ROWS] == [where_it_runs(ARGUMENTS.get(spec, spec)) for spec in specs]


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
