"""The page on which encoding to choose has the numbers of the results, in its tables and in its text."""

import importlib.util
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "choose.md"
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


def test_every_number_of_the_text_is_in_a_table_of_its_section():
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        tables = "\n".join(line for line in section.splitlines() if line.startswith("|"))
        measured = [float(number) for number in NUMBER.findall(tables)]
        prose = "\n".join(line for line in section.splitlines() if not line.startswith("|"))
        prose = re.sub(r"`[^`]*`", "", prose)
        for number in NUMBER.findall(prose):
            digits = len(number.partition(".")[2])
            found = any(abs(float(number) - value) <= 0.5 * 10**-digits + 1e-9 for value in measured)
            assert found or number in ALLOWED, f"{number} is in no table of the section {section.splitlines()[0]!r}"
