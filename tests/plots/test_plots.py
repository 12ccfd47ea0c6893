"""Figures: what they say is there, inside the frame, and nothing lies on anything else."""

import itertools
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from posjax import plots

NAMES = ["NoPE", "sinusoidal", "learned", "RoPE", "ALiBi", "TUPE-A", "CoPE", "RoPE+CoPE"]
LENGTHS = [128, 256, 512, 1024]
LINE = "    def append(self, item: str = '$x$', *rest) -> None:  # adds one to the end\n"


def random(seed=0):
    return np.random.default_rng(seed)


def by_length(names=NAMES):
    """The third and the sixth cannot go past 256 tokens."""
    return {
        name: {length: list(2.2 + random(length).random(3)) for length in LENGTHS if length <= 256 or i not in (2, 5)}
        for i, name in enumerate(names)
    }


def by_index(names=NAMES):
    index = np.arange(8, 1024, 16)
    return {name: (index, 2 + i * 0.1 + np.exp(-index / 50)) for i, name in enumerate(names)}


def over_line(text=LINE, heads=3):
    gates = random().random((heads, len(text)))
    return text, gates, gates[:, ::-1].cumsum(1)[:, ::-1], [f"layer {i + 1}, head 1" for i in range(heads)]


def by_head(names=NAMES, layers=6):
    return {name: np.exp(random(i).normal(2, 1, (layers, 8))) for i, name in enumerate(names)}


def by_distance(names=NAMES):
    distances = np.arange(1024)
    return {name: (distances, -np.linspace(0.01, 10.0**i, 8)[:, None] * distances) for i, name in enumerate(names, start=-4)}


def by_seed(names=NAMES):
    """Three test sets, five seeds. One seed of RoPE and all of ALiBi diverged; learned positions have no result on the last."""
    rows = {
        test: {name: list(easy + random(i).random(5) * 9) for i, name in enumerate(names)}
        for test, easy in (("in distribution", 0.0), ("sparse (0.98)", 40.0), ("dense (0.1)", 3.0))
    }
    for row in rows.values():
        row["RoPE"][3] = float("nan")
        row["ALiBi"] = [float("inf")] * 5
    rows["dense (0.1)"]["learned"] = []
    return rows


def over_training(names=NAMES):
    """Five seeds; one of RoPE diverged after four values."""
    data = {name: (np.arange(1, 31), i + random(i).random((5, 30))) for i, name in enumerate(names)}
    data["RoPE"][1][2, 4:] = float("nan")
    return data


SIZES = {f"{name}, dim {dim}, 4 layers, 2 heads": name for name in ("RoPE", "CoPE", "RoPE+CoPE") for dim in (128, 256)}


FIGURES = {
    "loss_by_length": lambda: plots.loss_by_length(by_length(), 256),
    "loss_by_length, trained on the shortest": lambda: plots.loss_by_length(by_length(), 128),
    "loss_by_length, trained on the longest": lambda: plots.loss_by_length(by_length(), 1024),
    "loss_by_index": lambda: plots.loss_by_index(by_index(), 256),
    "cope_over_line": lambda: plots.cope_over_line(*over_line()),
    "cope_over_line, short": lambda: plots.cope_over_line(*over_line("x=1\n", 1)),
    "cope_over_line, wide letters": lambda: plots.cope_over_line(*over_line("WM@" * 27)),
    "attention_distance": lambda: plots.attention_distance(by_head()),
    "attention_distance, many layers": lambda: plots.attention_distance(by_head(layers=24)),
    "decay_curves": lambda: plots.decay_curves(by_distance(), {"RoPE": (np.arange(1024), -np.arange(1024.0))}),
    "decay_curves, five": lambda: plots.decay_curves(by_distance(NAMES[:5])),
    "dots": lambda: plots.dots(by_seed(), "error (%)"),
    "dots, one panel of two": lambda: plots.dots({"test": {"RoPE": [1.0, 2.0, 3.0], "CoPE": [0.0]}}, "error (%)"),
    "dots, settings": lambda: plots.dots({t: {s: [1.0, 2.0] for s in SIZES} for t in "abcd"}, "error (%)", SIZES),
    "curves": lambda: plots.curves(over_training(), "step of training (thousands)", "loss (nats)"),
    "curves, every seed": lambda: plots.curves(over_training(), "tokens seen (tokens)", "error (%)", every_seed=True, log_x=True),
}


@pytest.fixture(scope="module", params=FIGURES)
def figure(request):
    figure = FIGURES[request.param]()
    figure.set_dpi(150)
    figure.draw_without_rendering()  # settles the layout
    return figure


def texts(figure) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, with its box in pixels."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not axes.get_visible() or not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    hidden |= {tick.label1, tick.label2}
        if not axes.get_visible():
            hidden |= set(axes.findobj(Text))
    shown = [t for t in figure.findobj(Text) if t not in hidden and t.get_visible() and t.get_text().strip()]
    return [(t.get_text(), t.get_window_extent()) for t in shown]


def overlap(a: Bbox, b: Bbox) -> bool:
    both = Bbox.intersection(a, b)
    return both is not None and both.width > 1 and both.height > 1


def test_every_text_is_inside_the_picture(figure):
    for text, box in texts(figure):
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= figure.bbox.width + 1 and box.y1 <= figure.bbox.height + 1, text


def test_no_two_texts_overlap(figure):
    shown = texts(figure)
    assert len(shown) > 5
    assert [(a[0], b[0]) for a, b in itertools.combinations(shown, 2) if overlap(a[1], b[1])] == []


def test_legends_lie_on_no_panel(figure):
    for legend in figure.findobj(Legend):
        box = legend.get_window_extent()
        assert not any(overlap(box, axes.get_window_extent()) for axes in figure.axes if axes.get_visible())


def test_axes_have_titles_with_units(figure):
    unit = ("(tokens)", "(bits per byte)", "(nats)", "(0 to 1)", "(%)")
    if figure.get_supxlabel() and not figure.get_supylabel():  # names on the vertical axis, numbers on the horizontal one
        labels = [figure.get_supxlabel()]
    elif figure.get_supylabel():
        labels = [figure.get_supylabel()]
        assert figure.get_supxlabel()
    else:
        labels = [axes.get_ylabel() for axes in figure.axes]
        assert any(axes.get_xlabel() for axes in figure.axes)
    assert all(label.endswith(unit) for label in labels)


def test_text_is_not_too_small_to_read(figure):
    assert min(t.get_fontsize() for t in figure.findobj(Text) if t.get_visible() and t.get_text()) >= 8


def test_saved_pictures_are_png_at_150_dots_an_inch(tmp_path):
    path = tmp_path / "loss.png"
    figure = plots.loss_by_index(by_index(), 256)
    plots.save(figure, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    size = tuple(int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
    assert size == tuple(round(150 * inches) for inches in figure.get_size_inches())


def legend_names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_every_encoding_is_named():
    assert legend_names(plots.loss_by_length(by_length(), 256)) == [*NAMES, "maximum length"]
    assert legend_names(plots.loss_by_index(by_index(), 256)) == NAMES
    for figure in (plots.attention_distance(by_head()), plots.decay_curves(by_distance())):
        assert [axes.get_title() for axes in figure.axes] == NAMES


def test_an_encoding_that_stops_ends_in_a_cross_where_it_stops():
    figure = plots.loss_by_length({"rope": {128: [2.0, 2.2], 256: [3.0]}, "learned": {128: [2.5, 2.7], 256: []}}, 128)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == 1
    np.testing.assert_allclose(crosses[0].get_xydata(), [[128, 2.6]])
    assert "maximum length" not in legend_names(plots.loss_by_length({"rope": {128: [2.0], 256: [3.0]}}, 128))


def test_seeds_are_dots_and_their_mean_is_labelled():
    axes = plots.loss_by_length({"rope": {128: [2.0, 2.2], 256: [3.0, 3.4]}}, 128).axes[0]
    (mean,) = [line for line in axes.lines if line.get_label() == "rope"]
    np.testing.assert_allclose(mean.get_ydata(), [2.1, 3.2])
    assert [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "."] == [[2.0, 2.2], [3.0, 3.4]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["128", "256"]
    assert axes.get_ylim()[0] > 1.5 and axes.get_ylim()[1] < 4  # whatever the width of the intervals


def test_intervals_over_seeds_are_students():
    """Three seeds of 1, 2, 3: the deviation is 1, and t at 97.5 % with two degrees of freedom 4.30265."""
    half = 4.30265 / np.sqrt(3)
    bars = plots.loss_by_length({"rope": {128: [1.0, 2.0, 3.0]}}, 128).axes[0].collections
    np.testing.assert_allclose(bars[0].get_segments()[0][:, 1], [2 - half, 2 + half], rtol=1e-5)
    curves = {"rope": ([0, 8], [[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])}
    (band,) = plots.loss_by_index(curves, 128).axes[0].collections
    ends = band.get_paths()[0].vertices
    np.testing.assert_allclose([ends[:, 1].min(), ends[:, 1].max()], [2 - half, 5], rtol=1e-5)
    gap = plots.loss_by_index({"rope": ([0, 8, 16], [[1.0, np.nan, 2.0], [3.0, 4.0, 2.0]])}, 128).axes[0].lines[0]
    np.testing.assert_array_equal(gap.get_ydata(), [2.0, np.nan, 2.0])
    heads = np.stack([np.full((1, 4), value) for value in (1.0, 2.0, 3.0)])
    (bars,) = plots.attention_distance({"rope": heads}).axes[0].collections
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [2 - half, 2 + half], rtol=1e-5)


@pytest.mark.parametrize(
    ("largest", "ticks"),
    [(1.5, ["0", "1"]), (5.0, ["0", "1", "2", "4"]), (60.0, ["0", "1", "2", "4", "8", "16", "32", "64"]), (9000.0, None)],
)
def test_the_axis_of_distances_has_ticks_to_read_it_by(largest, ticks):
    axes = plots.attention_distance({"rope": [[0.0, largest]]}).axes[0]
    shown = [tick.get_text() for tick in axes.get_yticklabels()]
    assert shown == ticks if ticks else 6 <= len(shown) <= 8
    values = [float(text.replace(",", "")) for text in shown]
    np.testing.assert_array_equal(axes.get_yticks(), values)
    assert axes.get_ylim()[1] < 4 * values[-1]  # the last tick is near the top


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("", b"\x89PNG")])
def test_figures_are_what_their_suffix_says(tmp_path, suffix, begin):
    path = tmp_path / ("figure." + suffix).rstrip(".")
    plots.save(plots.loss_by_index({"rope": ([0, 1], [2.0, 1.0])}, 1), path)
    assert path.read_bytes().startswith(begin)
    with pytest.raises(ValueError, match=r"path must end in one of \.png, \.svg, \.pdf, got 'figure.gif'"):
        plots.save(None, "figure.gif")


def test_an_encoding_without_results_is_still_named():
    assert "learned (no result)" in legend_names(plots.loss_by_length({"rope": {128: [2.0]}, "learned": {128: []}}, 128))


def test_an_encoding_looks_the_same_in_every_figure_and_no_two_look_alike():
    styles = plots.styles(NAMES)
    assert len({style.color for style in styles.values()}) == len(NAMES)
    assert plots.styles(reversed(NAMES)) == styles
    same = plots.styles(["identity", "Rope", "rope(theta=500000) + cope(max_position=32)", "tupe"])
    assert list(same.values()) == [styles[name] for name in ("NoPE", "RoPE", "RoPE+CoPE", "TUPE-A")]
    many = [f"cope(max_position={2**i})" for i in range(3, 10)] + list(string.ascii_lowercase[:8])
    assert len(set(plots.styles(many).values())) == len(many)
    scaled = "rope(scaling=longrope_scaling((1.0, 2.0), (1.0, 4.0), 64))"
    assert plots.styles([scaled])[scaled] == plots.styles(["rope"])["rope"]
    assert plots.styles(["a name of one's own"]) == plots.styles(["a name of one's own"])


def test_characters_stand_under_their_bars():
    text = "a \tb\x00\n"
    figure = plots.cope_over_line(*over_line(text, 2))
    bottom = figure.axes[1]
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["a", "·", "→", "b", "�", "⏎"]
    assert [label.get_family() for label in bottom.get_xticklabels()] == [["monospace"]] * 6
    np.testing.assert_allclose([bar.get_height() for bar in bottom.patches], over_line(text, 2)[1][1])


def test_gates_of_another_shape_are_refused():
    text, gates, positions, titles = over_line()
    with pytest.raises(ValueError, match=r"gates and positions must have shape \(3, \d+\)"):
        plots.cope_over_line(text, gates[:, 1:], positions, titles)


def test_heads_far_and_near_are_all_inside_their_panel():
    data = by_head()
    data["CoPE"][0, 0], data["ALiBi"][2, 3] = 900.0, 0.0
    for axes in plots.attention_distance(data).axes:
        low, high = axes.get_ylim()
        assert low == 0 and high > 900


def markers(axes, marker):
    """(x, y, colour) of every point with that marker that is drawn."""
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [(x, y, line.get_color()) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def test_dots_are_the_seeds_and_their_mean_with_students_interval():
    axes = plots.dots({"test": {"RoPE": [1.0, 2.0, 3.0], "CoPE": [7.0]}}, "error (%)").axes[0]
    looks = plots.styles(["RoPE", "CoPE"])
    seeds = markers(axes, "o")
    assert [(x, color) for x, _, color in seeds] == [(x, looks["RoPE"].color) for x in (1, 2, 3)] + [(7, looks["CoPE"].color)]
    assert len({y for _, y, _ in seeds[:3]}) == 3 and all(round(y) == int(x == 7) for x, y, _ in seeds)
    for name, mean, line in (("RoPE", 2.0, 0), ("CoPE", 7.0, 1)):
        ((x, y, color),) = markers(axes, looks[name].marker)
        assert x == mean and round(y) == line and color == looks[name].color
    (low, y, _), (high, _, _) = markers(axes, "|")  # one value has no interval
    assert round(y) == 0 and low == 0.0  # 2 - 2.48 would be negative
    assert high == pytest.approx(2 + 4.303 / np.sqrt(3), abs=1e-3)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["RoPE", "CoPE"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert axes.get_xlim()[0] <= 0 and axes.get_xlim()[1] > 7


def test_a_bar_goes_below_zero_where_values_do():
    axes = plots.dots({"test": {"RoPE": [-1.0, 1.0, 3.0]}}, "difference (nats)").axes[0]
    low, _ = sorted(x for x, _, _ in markers(axes, "|"))
    assert low == pytest.approx(1 - 4.303 * 2 / np.sqrt(3), abs=1e-3) and axes.get_xlim()[0] < low


def test_diverged_seeds_are_crosses_at_the_edge_and_stretch_nothing():
    figure = plots.dots(by_seed(), "error (%)")
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == [*NAMES[:3], "RoPE\n1 of 5 diverged", "ALiBi\nall diverged", *NAMES[5:]]
    for axes in figure.axes:
        crosses = markers(axes, "x")
        assert [round(y) for _, y, _ in crosses] == [3] + [4] * 5 and {x for x, _, _ in crosses} == {1.0}
        all_five = next(line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata()) == 5)
        assert all_five.get_transform().transform((1.0, 4.0))[0] == pytest.approx(axes.bbox.x1)
        assert axes.get_xlim()[1] < 60
    assert len([1 for _, y, _ in markers(figure.axes[0], "o") if round(y) == 3]) == 4
    assert [axes.get_title() for axes in figure.axes] == list(by_seed())
    assert [[t.get_text() for t in axes.texts] for axes in figure.axes] == [[], [], ["no result"]]
    assert legend_names(figure)[-1] == "diverged"
    assert "diverged" not in legend_names(plots.dots({"test": {"RoPE": [1.0]}}, "error (%)"))
    alone = plots.dots({"test": {"RoPE": [float("nan")]}}, "error (%)").axes[0]
    assert [tick.get_text() for tick in alone.get_yticklabels()] == ["RoPE\ndiverged"]


def test_settings_of_one_encoding_have_its_colour():
    styles = plots.styles(dict.fromkeys(SIZES.values()))
    axes = plots.dots({"test": {s: [1.0, 2.0] for s in SIZES}}, "error (%)", SIZES).axes[0]
    assert [color for _, _, color in markers(axes, "o")] == [styles[SIZES[s]].color for s in SIZES for _ in range(2)]
    data = {s: (np.arange(3), np.ones((2, 3))) for s in SIZES}
    drawn = {line.get_label(): line for line in plots.curves(data, "step", "loss (nats)", SIZES).axes[0].lines}
    assert {s: line.get_color() for s, line in drawn.items()} == {s: styles[SIZES[s]].color for s in SIZES}
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn.values()}) == len(SIZES)


def test_curves_are_means_with_students_band():
    x, values = np.array([1, 10, 100]), np.array([[1.0, 4.0, 2.0], [2.0, 4.0, 4.0], [3.0, 4.0, 6.0]])
    axes = plots.curves({"RoPE": (x, values)}, "step", "loss (nats)", log_x=True).axes[0]
    (mean,) = axes.lines
    np.testing.assert_allclose(mean.get_xydata(), np.stack([x, [2, 4, 4]], 1))
    corners = axes.collections[0].get_paths()[0].vertices
    for at, middle, deviation in zip(x, (2, 4, 4), (1, 0, 2), strict=True):
        ends = corners[corners[:, 0] == at, 1]
        reach = 4.3027 * deviation / np.sqrt(3)
        assert (ends.min(), ends.max()) == pytest.approx((middle - reach, middle + reach), abs=1e-3)
    assert axes.get_xscale() == "log"
    axes = plots.curves({"RoPE": (x, values)}, "step", "loss (nats)", every_seed=True).axes[0]
    assert not axes.collections and axes.get_xscale() == "linear"
    np.testing.assert_allclose([line.get_ydata() for line in axes.lines if line.get_linewidth() < 1], values)
    axes = plots.curves({"RoPE": (x, values[0])}, "step", "loss (nats)").axes[0]  # one seed: a line and nothing around it
    np.testing.assert_allclose(axes.lines[0].get_ydata(), values[0])
    assert not axes.collections


def test_a_diverged_seed_ends_in_a_cross_and_counts_in_no_mean():
    x, values = np.arange(4), np.array([[1.0, 2.0, 3.0, 4.0], [3.0, 4.0, 5.0, 6.0], [9.0, 8.0, np.nan, 7.0]])
    figure = plots.curves({"RoPE": (x, values), "ALiBi": (x, np.full((2, 4), np.inf))}, "step", "loss (nats)")
    axes = figure.axes[0]
    assert legend_names(figure) == ["RoPE (1 of 3 diverged)", "ALiBi (all diverged)"]
    (mean,) = [line for line in axes.lines if line.get_label().startswith("RoPE")]
    np.testing.assert_allclose(mean.get_ydata(), [2, 3, 4, 5])
    assert [(x, y) for x, y, _ in markers(axes, "x")] == [(1, 8.0)]


def test_nothing_is_held_open_and_import_loads_no_matplotlib():
    code = (
        "import sys, posjax.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.save(plots.loss_by_index({'rope': ([0, 1], [2.0, 1.0])}, 1), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, cwd=Path(__file__).parents[2])
