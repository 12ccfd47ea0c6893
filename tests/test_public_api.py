"""The public API changes on purpose only, and the change shows in ``tests/public_api.txt``."""

import difflib
from pathlib import Path

import public_api

SNAPSHOT = Path(public_api.__file__).with_suffix(".txt")


def test_the_public_api_is_that_of_the_snapshot():
    want, got = SNAPSHOT.read_text().splitlines(), public_api.lines()
    changes = "\n".join(difflib.unified_diff(want, got, "tests/public_api.txt", "now", lineterm="", n=0))
    hint = "If this is meant: python tests/public_api.py > tests/public_api.txt, and a line in CHANGELOG.md"
    assert not changes, f"{changes}\n{hint}"
