"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_library_example_is_short():
    assert len(EXAMPLES[0].strip().splitlines()) <= 10


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "example"})


def test_the_map_has_every_module_in_its_folder():
    """A line that begins with a folder names what is in it, and so do the lines below it; what is indented deeper lies deeper."""
    root = Path(__file__).resolve().parents[1]
    code_map = README.split("## A map of the code")[1].split("Data flows one way")[0]
    folders: dict[int, Path] = {-1: root}  # by how far they are indented
    listed = set()
    for line in filter(str.strip, code_map.splitlines()):
        indent = len(line) - len(line.lstrip())
        if own := re.match(r" *(\w+)/", line):
            folders = {at: folder for at, folder in folders.items() if at < indent}
            folders[indent] = folders[max(folders)] / own[1]
            assert folders[indent].is_dir(), line
        listed |= {folders[max(folders)] / name for name in re.findall(r"\w+\.py", line)}
    assert [str(path) for path in listed if not path.exists()] == []
    unlisted = ("bench", "cli", "stdlib_source")  # folders that the map does not go into
    modules = {path for path in (root / "posjax").rglob("[!_]*.py") if path.parent.name not in unlisted}
    assert sorted(map(str, modules - listed)) == []
