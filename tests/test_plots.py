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
    unit = ("(tokens)", "(bits per byte)", "(nats)", "(0 to 1)")
    if figure.get_supylabel():
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
    assert legend_names(plots.loss_by_length(by_length(), 256)) == [*NAMES, "cannot go longer"]
    assert legend_names(plots.loss_by_index(by_index(), 256)) == NAMES
    for figure in (plots.attention_distance(by_head()), plots.decay_curves(by_distance())):
        assert [axes.get_title() for axes in figure.axes] == NAMES


def test_an_encoding_that_stops_ends_in_a_cross_where_it_stops():
    figure = plots.loss_by_length({"rope": {128: [2.0, 2.2], 256: [3.0]}, "learned": {128: [2.5, 2.7], 256: []}}, 128)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert len(crosses) == 1
    np.testing.assert_allclose(crosses[0].get_xydata(), [[128, 2.6]])
    assert "cannot go longer" not in legend_names(plots.loss_by_length({"rope": {128: [2.0], 256: [3.0]}}, 128))


def test_seeds_are_thin_and_their_mean_is_labelled():
    axes = plots.loss_by_length({"rope": {128: [2.0, 2.2], 256: [3.0, 3.4]}}, 128).axes[0]
    (mean,) = [line for line in axes.lines if line.get_label() == "rope"]
    np.testing.assert_allclose(mean.get_ydata(), [2.1, 3.2])
    seeds = [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() < 1 and len(line.get_xdata()) == 2]
    assert seeds[:2] == [[2.0, 3.0], [2.2, 3.4]]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["128", "256"]


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


def test_nothing_is_held_open_and_import_loads_no_matplotlib():
    code = (
        "import sys, posjax.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.save(plots.loss_by_index({'rope': ([0, 1], [2.0, 1.0])}, 1), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, "/dev/null"], check=True, cwd=Path(__file__).parents[1])
