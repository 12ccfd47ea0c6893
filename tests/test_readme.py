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


def test_every_path_in_the_map_exists():
    code_map = README.split("## A map of the code")[1].split("```")[0].split("Data goes one way")[0]
    root = Path(__file__).resolve().parents[1]
    names = re.findall(r"[\w/]+\.py|\b\w+/", code_map)
    missing = [name for name in names if not any((root / part / name).exists() for part in ("", "posjax", "tests"))]
    assert len(names) > 25 and not missing
