"""Figures: arrays in, a matplotlib figure out, and ``save`` to write it.

An encoding has one colour, line and marker in every figure, told apart by colour-blind readers too (Okabe and Ito's palette).
Figures belong to no window and no global state: nothing needs a display, and what is not referred to any more is gone.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posjax.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY, _BLACK, _ORANGE, _SKY = "#7f7f7f", "#000000", "#e69f00", "#56b4e9"
_GREEN, _BLUE, _RED, _PURPLE = "#009e73", "#0072b2", "#d55e00", "#cc79a7"


@dataclasses.dataclass(frozen=True)
class Style:
    """How an encoding is drawn: matplotlib's colour, line style and marker."""

    color: str
    line: str
    marker: str


_STYLES = {
    "identity": Style(_GREY, "-", "o"),
    "sinusoidal": Style(_ORANGE, "-", "s"),
    "learned": Style(_SKY, "-", "D"),
    "rope": Style(_BLUE, "-", "^"),
    "alibi": Style(_GREEN, "-", "v"),
    "tupe": Style(_PURPLE, "-", "P"),
    "cope": Style(_RED, "-", "p"),
    "rope+cope": Style(_BLACK, "--", "*"),
    "t5": Style(_GREEN, "--", "<"),
    "tupe-r": Style(_PURPLE, "--", "h"),
    "cope_alibi": Style(_RED, ":", ">"),
    "cope_mlp": Style(_RED, "-.", "H"),
}
_ALIASES = {"nope": "identity", "none": "identity", "tupe-a": "tupe"}
_SPARE = [
    Style(color, line, marker)
    for line, marker in (("--", "d"), (":", "8"), ("-.", "H"))
    for color in (_ORANGE, _SKY, _BLUE, _GREEN, _PURPLE, _RED, _GREY, _BLACK)
]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """The style of each encoding by its name, arguments and case aside: "RoPE", "rope" and "rope(theta=500000)" are one.

    A name that is not known, or whose style an earlier name of the same figure has, gets one that depends on the name alone, or
    the next free one where two such names fall together.
    """
    made: dict[str, Style] = {}
    for name in names:
        base = re.sub(r"\([^()]*\)", "", name).replace(" ", "").lower()
        known = _STYLES.get(_ALIASES.get(base, base))
        first = zlib.crc32(name.encode())
        spare = (_SPARE[(first + step) % len(_SPARE)] for step in range(len(_SPARE)))
        free = (style for style in (known, *spare) if style is not None and style not in made.values())
        made[name] = next(free, _SPARE[first % len(_SPARE)])
    return made


def save(figure: "Figure", path: str | Path) -> None:
    """Writes a PNG at 150 dots an inch. There is nothing to close: the figures made here are in no list of open ones."""
    figure.savefig(path, format="png", dpi=150)


# Loss -----------------------------------------------------------------------------------------------------------------


def loss_by_length(
    rows: Mapping[str, Mapping[int, Sequence[float]]], train_length: int, label: str = "loss (bits per byte)"
) -> "Figure":
    """Loss against evaluation length: each seed thin, their mean thick. A curve that ends before the others ends in a cross.

    Args:
      rows: {encoding: {length in tokens: loss of each seed}}; those that it cannot take are absent or empty.
      train_length: tokens.
      label: what the loss is, in words, with its unit.
    """
    lengths = sorted({length for row in rows.values() for length in row})
    figure, axes = _figure(8.0, 4.6)
    stopped = None
    for name, style in styles(rows).items():
        row = {length: np.asarray(rows[name][length], float) for length in sorted(rows[name]) if len(rows[name][length])}
        if not row:
            axes.plot([], [], color=style.color, linestyle=style.line, marker=style.marker, label=f"{name} (no result)")
            continue
        x, means = list(row), [values.mean() for values in row.values()]
        for seed in range(max(map(len, row.values()))):
            points = [(length, values[seed]) for length, values in row.items() if seed < len(values)]
            axes.plot(*zip(*points, strict=True), color=style.color, linewidth=0.7, alpha=0.35, marker=".", markersize=4)
        axes.plot(x, means, color=style.color, linestyle=style.line, marker=style.marker, linewidth=1.8, markersize=5, label=name)
        if x[-1] < lengths[-1]:
            (stopped,) = axes.plot(x[-1], means[-1], "x", color=style.color, markersize=11, markeredgewidth=2.2, zorder=4)
    if stopped is not None:
        axes.plot([], [], "x", color=_BLACK, markersize=9, markeredgewidth=2.2, label="cannot go longer")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel(label)
    _mark_training(axes, train_length)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def loss_by_index(curves: Mapping[str, tuple[Array, Array]], train_length: int, label: str = "loss (bits per byte)") -> "Figure":
    """Loss against where in the text a token stands.

    Args:
      curves: {encoding: (index in tokens [S], loss [S])}, as ``posjax.probes.loss_by_index`` gives them.
      train_length: tokens; marked where the curves go past it.
      label: what the loss is, in words, with its unit.
    """
    figure, axes = _figure(8.0, 4.6)
    for name, style in styles(curves).items():
        index, bits = map(np.asarray, curves[name])
        every = max(1, math.ceil(len(index) / 8))
        axes.plot(
            index, bits, color=style.color, linestyle=style.line, marker=style.marker, markevery=every, markersize=5, label=name
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("index of the token in its text (tokens)")
    axes.set_ylabel(label)
    _mark_training(axes, train_length)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _mark_training(axes: "Axes", length: int) -> None:
    axes.axvline(length, color="0.4", linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
    # Above the frame, where no curve can run through it.
    axes.annotate(
        f"trained on {length:,} tokens",
        (length, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color="0.3",
        fontsize=9,
    )


# Attention ------------------------------------------------------------------------------------------------------------


def cope_over_line(text: str, gates: Array, positions: Array, titles: Sequence[str]) -> "Figure":
    """What CoPE counts over a line: each character's gate (bars) and contextual position (line), as the last character sees them.

    Args:
      text: S characters, up to about 80; the last is the query.
      gates: [M, S] of M heads.
      positions: [M, S], sums of the gates from a character to the query.
      titles: M, such as "layer 3, head 1".

    Raises:
      ValueError: shapes that do not agree.
    """
    gates, positions = np.asarray(gates), np.asarray(positions)
    expected = (len(titles), len(text))
    if gates.shape != expected or positions.shape != expected:
        raise ValueError(
            f"gates and positions must have shape {expected} (titles, characters of text), got {gates.shape} and {positions.shape}"
        )
    figure, panels = _figure(max(6.0, 1.8 + 0.135 * len(text)), 0.9 + 1.45 * len(titles), len(titles), 1, sharex=True)
    panels = np.atleast_1d(panels)
    x = np.arange(len(text))
    for axes, title, gate, position in zip(panels, titles, gates, positions, strict=True):
        bars = axes.bar(x, gate, width=0.8, color=_SKY, label="gate")
        axes.set_ylim(0, 1.05)
        axes.set_yticks([0, 0.5, 1])
        axes.set_title(title, fontsize=9, loc="left", pad=3)
        axes.grid(False)
        axes.tick_params(axis="x", length=0, pad=3)
        counted = axes.twinx()
        (line,) = counted.plot(x, position, color=_RED, linewidth=1.4, label="contextual position")
        counted.set_ylim(0, max(1.0, 1.08 * position.max()))
        counted.locator_params(axis="y", nbins=4)
        axes.set_ylabel("gate\n(0 to 1)", fontsize=8, color=_BLUE)
        counted.set_ylabel("position\n(tokens)", fontsize=8, color=_RED)
        for side, own, color in (("left", axes, _BLUE), ("right", counted, _RED)):
            own.tick_params(axis="y", labelsize=8, labelcolor=color)
            own.spines[["top", "left" if side == "right" else "right"]].set_visible(False)
        counted.spines["left"].set_visible(False)
    labels = [{" ": "·", "\n": "⏎", "\r": "⏎", "\t": "→"}.get(c, c if c.isprintable() else "�") for c in text]
    axes.set_xticks(x, labels, family="monospace", fontsize=9, parse_math=False)
    axes.set_xlim(-0.8, len(text) - 0.2)
    axes.get_xticklabels()[-1].set(color=_RED, fontweight="bold")
    axes.set_xlabel("the text, a character a token; the query is the last")
    figure.legend(handles=[bars, line], loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def attention_distance(data: Mapping[str, Array]) -> "Figure":
    """How far heads look, by layer: a panel for each encoding, a dot for each head, a line through each layer's mean.

    Args:
      data: {encoding: [L, N] mean distance in tokens}, as ``posjax.probes.attention_distance`` gives a layer's.
    """
    columns, rows = _grid(len(data))
    figure, panels = _figure(1.0 + 2.0 * columns, 0.8 + 1.9 * rows, rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, style) in zip(panels.flat, styles(data).items(), strict=False):
        distances = np.asarray(data[name], float)
        layers, heads = distances.shape
        layer = np.arange(1, layers + 1)
        aside = np.linspace(-0.25, 0.25, heads) if heads > 1 else np.zeros(1)
        axes.plot(layer[:, None] + aside, distances, "o", markersize=4, color=style.color, alpha=0.6, mew=0, clip_on=False)
        axes.plot(layer, distances.mean(1), color=style.color, linewidth=1.5)
        axes.set_title(name, fontsize=10)
        axes.set_yscale("symlog", linthresh=1.0, linscale=0.4)  # a head that looks at its own token only has distance zero
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(layer[:: math.ceil(layers / 8)])
    axes.set_ylim(0, 1.3 * max([1.0, *(np.max(distances) for distances in data.values())]))
    _hide_rest(panels, len(data))
    figure.supxlabel("layer (a dot is a head, the line their mean)", fontsize=10)
    figure.supylabel("mean attention distance (tokens)", fontsize=10)
    return figure


def decay_curves(curves: Mapping[str, tuple[Array, Array]], bounds: Mapping[str, tuple[Array, Array]] | None = None) -> "Figure":
    """What each encoding does to a score by distance: a panel for each, a line for each head, the first dark and the last light.

    Args:
      curves: {encoding: (distances in tokens [S], values [N, S] in nats)}, as ``posjax.probes.decay_curve`` gives them.
      bounds: {encoding: (distances, values [S])} to draw dashed, such as ``posjax.probes.rope_bound``.
    """
    columns, rows = _grid(len(curves))
    bound = None
    figure, panels = _figure(1.0 + 2.3 * columns, 0.8 + 1.9 * rows, rows, columns, sharex=True, squeeze=False)
    for axes, (name, style) in zip(panels.flat, styles(curves).items(), strict=False):
        distances, values = map(np.asarray, curves[name])
        for head, line in enumerate(values):
            axes.plot(distances, line, color=style.color, alpha=1.0 - 0.75 * head / len(values), linewidth=1.2)
        if bounds and name in bounds:
            (bound,) = axes.plot(*bounds[name], color=_BLACK, linestyle="--", linewidth=1.0)
        if np.ptp(values) == 0:
            axes.set_ylim(-1, 1)
        axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        axes.set_title(name, fontsize=10)
        axes.locator_params(nbins=4)
    _hide_rest(panels, len(curves))
    if bound is not None:
        figure.legend([bound], ["shape of the bound"], loc="outside upper right", frameon=False, fontsize=9)
    figure.supxlabel("distance from key to query, i - j (tokens)", fontsize=10)
    figure.supylabel("score relative to distance 0 (nats)", fontsize=10)
    return figure


# Cost -----------------------------------------------------------------------------------------------------------------


_COST_LINES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 4)), (0, (1, 3)))
_COST_MARKERS = "o^sDvP"


def cost_by_length(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]], looks: Mapping[str, tuple[str, str, str]]
) -> "Figure":
    """What attention costs against length, both logarithmic: a row for each pass, a panel for each measure, a line a contestant.

    Args:
      panels: {pass: {measure with its unit: {contestant: {length in tokens: value}}}}; values are positive.
      looks: {contestant: (encoding, implementation, gates)}, which give colour, line and marker; the legend has this order.
    """
    columns = list(dict.fromkeys(label for row in panels.values() for label in row))
    lengths = sorted({n for row in panels.values() for curves in row.values() for curve in curves.values() for n in curve})
    encodings, implementations, gates = (list(dict.fromkeys(look[part] for look in looks.values())) for part in range(3))
    colors = styles(encodings)
    height = max(0.8 + 3.0 * len(panels), 0.6 + 0.21 * len(looks))
    figure, grid = _figure(3.4 + 3.6 * len(columns), height, len(panels), len(columns), squeeze=False, sharex=True)
    drawn: dict[str, Any] = {}
    for axes_row, (title, row) in zip(grid, panels.items(), strict=True):
        for axes, label in zip(axes_row, columns, strict=True):
            for name, curve in row.get(label, {}).items():
                encoding, implementation, gate = looks[name]
                (drawn[name],) = axes.plot(
                    sorted(curve),
                    [curve[n] for n in sorted(curve)],
                    _COST_MARKERS[gates.index(gate) % len(_COST_MARKERS)],
                    color=colors[encoding].color,
                    linestyle=_COST_LINES[implementations.index(implementation) % len(_COST_LINES)],
                    linewidth=1.3,
                    markersize=4,
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axes.minorticks_off()
            axes.set_title(title, fontsize=10)
            axes.set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("length (tokens)")
    shown = [name for name in looks if name in drawn]
    figure.legend([drawn[n] for n in shown], shown, loc="outside right upper", frameon=False, fontsize=8, handlelength=3.5)
    return figure


def bars(panels: Mapping[str, tuple[str, Mapping[str, float]]], looks: Mapping[str, str]) -> "Figure":
    """Numbers side by side: a panel for each measure, a bar for each contestant, the first on top.

    Args:
      panels: {title: (what the numbers are, with the unit, {contestant: number})}.
      looks: {contestant: encoding}, which gives the colour.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(len(numbers) for _, numbers in panels.values())
    figure, grid = _figure(5.2 * columns, (1.0 + 0.28 * most) * rows, rows, columns, squeeze=False)
    colors = styles(dict.fromkeys(looks.values()))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, (label, numbers)) in zip(grid.flat, panels.items(), strict=False):
        drawn = axes.barh(list(numbers), list(numbers.values()), color=[colors[looks[name]].color for name in numbers], height=0.7)
        axes.bar_label(drawn, [f"{number:,.3g}" if number < 1000 else f"{number:,.0f}" for number in numbers.values()], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.tick_params(labelsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label)
    return figure


# Shared ---------------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", Any]:
    """A figure of that size in inches and its axes. Not made by pyplot, which would hold it open and look for a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, **options)
    for axes in np.atleast_1d(panels).flat:
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _grid(panels: int) -> tuple[int, int]:
    """(columns, rows) for so many panels, four a row at most."""
    columns = min(4, max(1, panels))
    return columns, max(1, math.ceil(panels / columns))


def _hide_rest(panels: np.ndarray, used: int) -> None:
    """Takes away the empty panels of the last row; those above them then show the ticks of their column."""
    for axes in panels.flat[used:]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, used - panels.shape[1]) : used]:
        axes.tick_params(axis="x", labelbottom=True)
