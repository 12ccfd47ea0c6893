"""The figures of docs/learn can be drawn, and the gates that are stored for them add up to the positions."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

LEARN = Path(__file__).resolve().parents[1] / "docs" / "learn"


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", LEARN / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.thorough
def test_every_figure_is_drawn_and_stands_in_a_page(figures, tmp_path):
    text = "".join(page.read_text() for page in LEARN.glob("*.md"))
    for name, draw in figures.FIGURES.items():
        figures.save(draw(), tmp_path / f"{name}.png")
        assert f"_static/learn/{name}.png" in text
    assert {path.name for path in figures.FOLDER.iterdir()} == {path.name for path in tmp_path.iterdir()}


def test_stored_positions_are_sums_of_the_stored_gates():
    stored = json.loads((LEARN / "cope_line.json").read_text())
    for head in stored["heads"].values():
        assert len(head["gates"]) == len(stored["text"])
        np.testing.assert_allclose(np.cumsum(head["gates"][::-1])[::-1], head["positions"], atol=5e-3)
