"""Pages: arrays come back as they went in, pages are whole, and the k largest weights are those of a sort."""

import json
import math
import re

import numpy as np
import pytest

from posjax.lab.pages.over_text import NO_KEY, largest
from posjax.lab.pages.tables import series_of_seeds
from posjax.plots import explorer


@pytest.fixture(scope="module")
def halves():
    """All 65,536 numbers of type float16."""
    return np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_arrays_come_back_bit_by_bit_and_are_stored_once(tmp_path, halves):
    arrays = explorer.Arrays()
    numbers = [
        arrays.add(each) for each in (halves.reshape(4, -1), np.arange(60_000, dtype=np.uint16), halves.reshape(4, -1).copy())
    ]
    assert numbers == [0, 1, 0]
    data = {"text": "</script><script>alert(1)</script> {{PLOTLY}} ∅", "numbers": numbers}
    size = explorer.write_page(tmp_path / "a" / "page.html", "report", "a & b", data, arrays)
    assert size == (tmp_path / "a" / "page.html").stat().st_size
    read, (first, second) = explorer.read_page(tmp_path / "a" / "page.html")
    assert read["text"] == data["text"] and read["title"] == "a & b"
    np.testing.assert_array_equal(first.view(np.uint16), np.arange(2**16).reshape(4, -1))
    np.testing.assert_array_equal(second, np.arange(60_000))
    with pytest.raises(ValueError, match="array must be float16 or uint16, got float32"):
        arrays.add(np.zeros(2, np.float32))


def test_a_page_loads_nothing(tmp_path):
    explorer.write_page(tmp_path / "page.html", "explorer", "title", {}, None)
    page = re.sub(r'<script type="text/plain".*?</script>', "", (tmp_path / "page.html").read_text(), flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|fetch\(|XMLHttp|https?://""", page)
    assert "{{" not in page


def test_a_file_that_is_no_page_is_named(tmp_path):
    (tmp_path / "other.html").write_text("<html></html>")
    with pytest.raises(ValueError, match=r"path must be a page that posjax wrote, got .*other.html"):
        explorer.read_page(tmp_path / "other.html")


def test_the_largest_weights_are_kept_in_the_order_of_their_keys():
    rng = np.random.default_rng(0)
    weight = np.tril(rng.random((2, 30, 30)).astype(np.float32))
    pairs = {"weight": weight, "gate": rng.random((2, 30, 30)).astype(np.float32)}
    kept = largest(pairs, 7)
    for head in range(2):
        for query in range(30):
            best = sorted(np.argsort(-weight[head, query, : query + 1])[:7])
            count = len(best)
            assert kept["key"][head, query].tolist() == [*best, *[NO_KEY] * (7 - count)]
            for name in pairs:
                expected = [*pairs[name][head, query, best], *[0.0] * (7 - count)]
                np.testing.assert_array_equal(kept[name][head, query], np.float32(expected))
    again, at_once = largest(kept, 3), largest(pairs, 3)
    for name, values in at_once.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)


def test_series_of_seeds_have_students_interval():
    (one,) = series_of_seeds({"rope": {"16": [1.0, 2.0, 3.0], "32": [4.0], "64": [math.nan, 1.0], "128": []}})
    assert one["mean"] == [2.0, 4.0, 1.0, None] and one["values"][2] == [None, 1.0]
    half = 4.302652729911275 / math.sqrt(3)  # t of 0.975 with two degrees of freedom, deviation 1
    np.testing.assert_allclose([one["low"][0], one["high"][0]], [2 - half, 2 + half])
    assert one["low"][1:] == one["high"][1:] == [None] * 3


def test_figures_are_json_with_bars_and_seeds():
    series = series_of_seeds({"rope": {"16": [1.0, 2.0], "32": [2.0, 4.0]}, "alibi": {"16": [3.0], "32": [1.0]}})
    figure = explorer.loss_by_length_figure(series, 16, "loss (nats)")
    lines = {trace["name"]: trace for trace in figure["data"]}
    assert lines["rope"]["y"] == [1.5, 3.0] and lines["alibi"]["error_y"] == {"visible": False}
    np.testing.assert_allclose(lines["rope"]["error_y"]["array"], [12.706204736 * 0.5, 12.706204736 * 1.0], rtol=1e-6)
    assert lines["rope, seeds"]["x"] == [16, 16, 32, 32] and lines["rope, seeds"]["y"] == [1.0, 2.0, 2.0, 4.0]
    dots = explorer.dots_figure("32", series, "error (%)")
    assert [trace["x"] for trace in dots["data"]] == [[2.0, 4.0], [3.0], [1.0], [1.0]]
    curve = explorer.curves_figure("t", "d", {"rope": ([1, 2], [[1.0, None], [2.0, 3.0]])}, "x", "y")
    json.dumps([figure, dots, curve], allow_nan=False)
