"""The pages on which encoding to choose, and on how they work, have the numbers of the results, in tables and in text."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "choose.md"
ALLOWED = ("0.02",)  # the mean of gates of which most are closed, an argument of the measurement
NUMBER = re.compile(r"(?<![\w.:/])\d+\.\d+(?![\w.]*\d)")


def load_choose():
    spec = importlib.util.spec_from_file_location("choose", PAGE.with_suffix(".py"))
    choose = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(choose)
    return choose


def test_the_tables_are_those_of_the_results():
    text = PAGE.read_text()
    assert load_choose().filled(text) == text, (
        "a result has changed: run `python docs/choose.py`, and check the text around the tables"
    )


def check_numbers(text, tables, where):
    """Checks that every decimal number in the text is one of the tables' numbers, rounded to the digits of the text."""
    measured = [float(number) for number in NUMBER.findall(tables)]
    for number in NUMBER.findall(re.sub(r"`[^`]*`|\]\(\S*\)", "", text)):
        digits = len(number.partition(".")[2])
        found = any(abs(float(number) - value) <= 0.5 * 10**-digits + 1e-9 for value in measured)
        assert found or number in ALLOWED, f"{number} is in no table of {where}"


def test_every_number_of_the_text_is_in_a_table_of_its_section():
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        rows = [[], []]
        for line in section.splitlines():
            rows[line.startswith("|")].append(line)
        check_numbers(*map("\n".join, rows), section.splitlines()[0])


@pytest.mark.parametrize("path", sorted(DOCS.glob("learn/*.md")), ids=lambda path: path.stem)
def test_paragraphs_that_cite_an_experiment_have_its_numbers(path):
    sections = re.split(r"^# ", (DOCS.parent / "experiments" / "README.md").read_text(), flags=re.MULTILINE)
    by_anchor = {re.sub(r"[^\w\- ]", "", text.splitlines()[0].lower()).replace(" ", "-"): text for text in sections[1:]}
    for paragraph in re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL).split("\n\n"):
        cited = re.findall(r"experiments\.md#([\w-]+)\)", paragraph)
        if cited:
            check_numbers(paragraph, "\n".join(by_anchor[anchor] for anchor in cited), " and ".join(cited))
