"""The explorer and the report as people meet them: opened from a file, clicked, moved in with keys, and read by axe-core."""

import dataclasses

import numpy as np
import pytest

import posjax as pj
from posjax import cli
from posjax.lab.trained import attention_maps, gates_and_positions
from tests.browser.conftest import WIDTHS, overflow, serious_violations

TEXT = "return a b\n  ( range )\nprint return a = b"
CONFIG = """
from posjax.lab.config import Config

def get_config():
    return Config(
        data="text", encodings=("rope", "cope(8)", "alibi"), seeds=(0, 1), num_layers=2, embed_dim=16, num_heads=2, seq_length=16,
        batch_size=8, steps=20, warmup_steps=3, log_every=1, eval_lengths=(1, 2), eval_tokens=512,
    )
"""


@dataclasses.dataclass(frozen=True)
class Pages:
    workdir: str
    one: str
    two: str
    report: str


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (home / "tiny.py").write_text(CONFIG)
    (home / "text").mkdir()
    words = np.random.default_rng(0).choice([*"abcdefgh=()", "return", "range", "print"], size=(6, 100, 12))
    for number, lines in enumerate(words):
        (home / "text" / f"{number}.txt").write_text("\n".join(" ".join(line) for line in lines) + "\n")
    (home / "example.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("POSJAX_DATA_DIR", str(home / "data"))
        cli.main(["compare", "tiny.py", "--workdir", "runs"])
        cli.main(["explore", "runs", "--encodings", "rope", "cope(8)", "--text", "example.txt", "--out", "two.html"])
        cli.main(["explore", "runs", "--encoding", "alibi", "--text", "example.txt", "--out", "one.html"])
        cli.main(["report", "runs", "--out", "report.html"])
    addresses = ((home / f"{name}.html").as_uri() for name in ("one", "two", "report"))
    return Pages(str(home / "runs"), *addresses)


def started(page):
    page.evaluate("started")
    page.wait_for_selector("#figures .main-svg")
    return page


def status(page):
    return page.locator("#status").text_content()


def selected(page):
    return page.locator('[role="option"][aria-selected="true"]').evaluate_all("all => all.map((one) => Number(one.dataset.token))")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["one", "two", "report"])
def test_a_page_opens_from_a_file_without_errors(pages, open_page, name, width):
    page = open_page(getattr(pages, name), width)
    page.wait_for_selector("#figures .main-svg")
    page.wait_for_function("document.querySelectorAll('.figure:not(.js-plotly-plot)').length <= 4")
    assert page.errors == [] and overflow(page) <= 0
    assert all(request.startswith(("file:", "data:", "blob:")) for request in page.requests)
    assert serious_violations(page) == []


def test_a_click_changes_what_is_shown(pages, open_page):
    page = started(open_page(pages.one))
    before, colors = (
        status(page),
        page.locator('[role="option"]').evaluate_all("all => all.map((one) => one.style.backgroundColor)"),
    )
    page.locator('[data-token="7"]').click()
    page.wait_for_function("document.getElementById('status').textContent.startsWith('Token 7,')")
    assert status(page) != before and selected(page) == [7]
    assert page.locator('[role="option"]').evaluate_all("all => all.map((one) => one.style.backgroundColor)") != colors
    assert page.locator('[data-token="9"]').get_attribute("aria-label").endswith("token 9, after the query")
    layers = page.get_by_label("Layer", exact=True).first
    text = status(page)
    layers.select_option(index=0)
    page.wait_for_function("document.getElementById('status').textContent.includes('layer 1,')")
    assert status(page) != text


def test_keys_move_along_the_text(pages, open_page):
    page = started(open_page(pages.one))
    page.locator('[data-token="5"]').click()
    assert page.locator('[role="option"][tabindex="0"]').count() == 1
    for key, token in (("ArrowRight", 6), ("ArrowRight", 7), ("ArrowLeft", 6), ("Home", 0), ("ArrowLeft", 0), ("End", len(TEXT))):
        page.keyboard.press(key)
        assert selected(page) == [token] or page.wait_for_function(f"state.query === {token}")
        assert page.evaluate("Number(document.activeElement.dataset.token)") == token
        assert page.locator('[role="option"][tabindex="0"]').count() == 1
    page.keyboard.press("ArrowUp")  # from the last line to the one before
    line = page.evaluate("document.activeElement.dataset.token")
    assert TEXT[: int(line) - 1].count("\n") == 1  # after <bos>
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") != "option"


def test_two_encodings_are_compared_on_one_text(pages, open_page):
    page = started(open_page(pages.two))
    assert page.locator("#sides section h2").all_text_contents() == ["rope", "cope(8)"]
    page.locator("#sides section").nth(1).locator('[data-token="12"]').click()
    page.wait_for_function("document.getElementById('status').textContent.startsWith('Token 12,')")
    assert selected(page) == [12, 12] and "rope: layer 2, head 1" in status(page) and "cope(8): layer 2, head 1" in status(page)
    page.get_by_label("Head", exact=True).first.select_option(index=1)
    page.wait_for_function("document.getElementById('status').textContent.split('head 2').length === 3")
    page.get_by_label("Same layer and head").uncheck()
    page.get_by_label("Layer", exact=True).first.select_option(index=0)
    page.wait_for_function("document.getElementById('status').textContent.includes('rope: layer 1,')")
    assert "cope(8): layer 2" in status(page)
    page.get_by_label("Colors show").select_option("gate")
    page.wait_for_function("document.body.textContent.includes('encoding has no gate')")
    page.get_by_label("Colors show").select_option("loss")
    page.wait_for_function("/loss \\d/.test(document.getElementById('status').textContent)")
    assert page.errors == []


def test_the_numbers_in_the_browser_are_those_of_the_loaded_run(pages, open_page):
    page = started(open_page(pages.two))
    rope, cope = (pj.load(pages.workdir, encoding=encoding, seed=0) for encoding in ("rope", "cope(8)"))
    counts = dict(zip(("gate", "position"), gates_and_positions(cope, TEXT)[1:], strict=True))
    for side, numbers in enumerate(({"weight": attention_maps(rope, TEXT)}, {"weight": attention_maps(cope, TEXT)} | counts)):
        for layer, head, query in ((0, 0, 3), (1, 1, len(TEXT)), (1, 0, 20)):
            row = page.evaluate(f"rowOf(DATA.runs[{side}], {layer}, {head}, {query})")
            assert row["keys"] == list(range(query + 1))
            for name, expected in numbers.items():
                np.testing.assert_allclose(row[name], expected[layer, head, query, : query + 1], rtol=2**-11, atol=2**-24)


def test_a_report_sorts_by_any_column(pages, open_page):
    page = open_page(pages.report)
    table = page.locator("table").nth(1)
    head, heads = table.get_by_role("button", name="32"), table.locator("th[aria-sort]")
    place = table.get_by_role("button").all_text_contents().index("32")

    def column():
        return [float(text) for text in table.locator(f"tbody tr td:nth-child({place + 1})").all_text_contents()]

    values = column()
    assert len(values) == 6 and values != sorted(values)
    head.press("Enter")
    assert column() == sorted(values) and heads.nth(place).get_attribute("aria-sort") == "ascending"
    head.click()
    assert column() == sorted(values, reverse=True) and heads.nth(place).get_attribute("aria-sort") == "descending"
    assert heads.evaluate_all("all => all.filter((one) => one.ariaSort !== 'none').length") == 1
    assert "sorted by 32, descending" in status(page)
