"""Figures: arrays in, a matplotlib figure out, and ``save`` to write it."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from posjax.plots.cost import bars, cost_by_length
from posjax.plots.style import BLACK, BLUE, GREY, RED, SKY, Style, new_figure, save, styles
from posjax.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Style",
    "attention_distance",
    "bars",
    "cope_over_line",
    "cost_by_length",
    "curves",
    "decay_curves",
    "dots",
    "loss_by_index",
    "loss_by_length",
    "save",
    "styles",
]

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
    figure, axes = new_figure(8.0, 4.6)
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
        axes.plot([], [], "x", color=BLACK, markersize=9, markeredgewidth=2.2, label="cannot go longer")
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
      curves: {encoding: (index in tokens [S], loss [S])}, as ``posjax.lab.probes.loss_by_index`` gives them.
      train_length: tokens; marked where the curves go past it.
      label: what the loss is, in words, with its unit.
    """
    figure, axes = new_figure(8.0, 4.6)
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


# Seeds ----------------------------------------------------------------------------------------------------------------


def dots(
    panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, encodings: Mapping[str, str] | None = None
) -> "Figure":
    """An ablation: a line for each setting, the mean of its seeds as a marker, its 95 % interval as a bar, and a dot for each seed.

    Seeds stand one below the other, in the same order in every panel. Those that diverged are crosses at the right edge and count
    in no mean; the setting's name says how many they are. Intervals are Student's, of two seeds or more; where no value is
    negative they are cut off at zero.

    Args:
      panels: {test set: {setting: value of each seed}}, columns and lines in this order. A value that is not finite is of a seed
        whose training diverged; a setting without values in a panel has no result there.
      label: what the values are, in words, with the unit.
      encodings: {setting: encoding}, which gives colour and marker; None: settings are encodings.
    """
    settings = list(dict.fromkeys(setting for rows in panels.values() for setting in rows))
    looks = _looks(settings, encodings)
    figure, grid = new_figure(2.0 + 2.5 * len(panels), 1.3 + 0.36 * len(settings), 1, len(panels), sharey=True, squeeze=False)
    diverged, most = dict.fromkeys(settings, 0), dict.fromkeys(settings, 0)
    for axes, (title, rows) in zip(grid[0], panels.items(), strict=True):
        drawn = []
        for line, setting in enumerate(settings):
            values, color = np.asarray(rows.get(setting, ()), float), looks[setting].color
            if not values.size:
                where = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "center"}
                axes.annotate("no result", (0.5, line), **where, color="0.4", fontsize=8)
                continue
            y = line + (np.linspace(0.0, 0.36, values.size) if values.size > 1 else np.full(1, 0.18))
            lost = ~np.isfinite(values)
            if not lost.all():  # nothing, if not clipped, would upset the layout
                axes.plot(values[~lost], y[~lost], "o", color=color, markersize=4, alpha=0.5, mew=0, clip_on=False)
            if lost.any():
                at_edge = axes.get_yaxis_transform()  # x from 0 to 1 across the panel
                axes.plot(np.ones(lost.sum()), y[lost], "x", color=color, markersize=5, transform=at_edge, clip_on=False)
            drawn += [*values[~lost], *_mean_and_interval(axes, values[~lost], line - 0.2, looks[setting])]
            diverged[setting], most[setting] = max(diverged[setting], lost.sum()), max(most[setting], values.size)
        low, high = (min(drawn), max(drawn)) if drawn else (0.0, 1.0)
        margin = 0.06 * (high - low or abs(high) or 1.0)
        axes.set_xlim(0.0 if low >= 0 and low <= margin else low - margin, high + margin)
        axes.set_title(title, fontsize=10)
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="y", length=0)
        axes.grid(False, axis="y")
        for line in range(1, len(settings)):
            axes.axhline(line - 0.5, color="0.9", linewidth=0.6, zorder=0)
    names = [f"{s}\n{_diverged(diverged[s], most[s])}" if diverged[s] else s for s in settings]
    grid[0, 0].set_yticks(range(len(settings)), names, fontsize=9)
    grid[0, 0].set_ylim(len(settings) - 0.5, -0.5)
    (seed,) = grid[0, 0].plot([], [], "o", color=GREY, markersize=4)
    (mean,) = grid[0, 0].plot([], [], "D-", color=GREY, markersize=6, linewidth=2.0)
    legend = {"a seed": seed, "mean, 95 % interval": mean}
    if any(diverged.values()):
        (legend["diverged"],) = grid[0, 0].plot([], [], "x", color=GREY, markersize=5)
    figure.legend(legend.values(), legend, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    figure.supxlabel(label, fontsize=10)
    return figure


def curves(
    data: Mapping[str, tuple[Array, Array]],
    x_label: str,
    label: str,
    encodings: Mapping[str, str] | None = None,
    *,
    every_seed: bool = False,
    log_x: bool = False,
) -> "Figure":
    """Training curves: a line for each setting, the mean over seeds, with a band of its 95 % interval or with every seed thin.

    A seed that diverged counts in no mean: it is drawn thin, up to a cross where it was finite last, and the legend says how many
    they are. Intervals are Student's, of two seeds or more.

    Args:
      data: {setting: (x [S], values [seeds, S])}; values that are not finite are of a seed whose training diverged.
      x_label, label: what x and the values are, in words, with the unit.
      encodings: {setting: encoding}, which gives the colour; settings of one encoding differ in their lines. None: settings are
        encodings.
      every_seed: seeds in place of the band.
      log_x: x is positive and drawn logarithmically.
    """
    from posjax.lab.statistics import summary

    figure, axes = new_figure(8.0, 4.6)
    for setting, style in _looks(data, encodings).items():
        x, values = np.asarray(data[setting][0], float), np.atleast_2d(np.asarray(data[setting][1], float))
        lost = ~np.isfinite(values).all(1)
        thin = {"color": style.color, "linewidth": 0.7, "alpha": 0.4}
        for seed, diverged in zip(values, lost, strict=True):
            if diverged:
                alive = np.cumprod(np.isfinite(seed)).astype(bool)
                axes.plot(x[alive], seed[alive], **thin)
                axes.plot(x[alive][-1:], seed[alive][-1:], "x", color=style.color, markersize=8, markeredgewidth=1.8)
            elif every_seed:
                axes.plot(x, seed, **thin)
        name = f"{setting} ({_diverged(lost.sum(), len(lost))})" if lost.any() else setting
        kept = [summary(column) for column in values[~lost].T] if not lost.all() else []
        axes.plot(x[: len(kept)], [k.mean for k in kept], color=style.color, linestyle=style.line, linewidth=1.8, label=name)
        if kept and kept[0].interval and not every_seed:
            low, high = np.transpose([k.interval for k in kept])
            axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)
    if log_x:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(label)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _mean_and_interval(axes: "Axes", values: np.ndarray, y: float, style: Style) -> tuple[float, ...]:
    """Draws them and returns the ends of the bar."""
    from posjax.lab.statistics import summary  # scipy.stats takes a second to import

    found = summary(values)
    if found.mean is None:
        return ()
    low, high = found.interval or (found.mean, found.mean)
    low = max(low, 0.0) if values.min() >= 0 else low
    if found.interval:
        axes.plot([low, high], [y, y], color=style.color, linewidth=2.0, marker="|", markersize=7)
    axes.plot(found.mean, y, style.marker, color=style.color, markersize=8, mec="white", mew=0.8, zorder=4, clip_on=False)
    return low, high


def _diverged(some: int, of: int) -> str:
    return f"{some} of {of} diverged" if some < of else "all diverged" if of > 1 else "diverged"


def _looks(settings: Iterable[str], encodings: Mapping[str, str] | None) -> dict[str, Style]:
    """The style of each setting; of several with one encoding, those after the first have other lines in its colour."""
    if encodings is None:
        return styles(settings)
    of_encoding, seen, looks = styles(dict.fromkeys(encodings.values())), Counter(), {}
    for setting in settings:
        own = of_encoding[encodings[setting]]
        lines = [own.line, *(line for line in ("-", "--", ":", "-.") if line != own.line)]
        looks[setting] = dataclasses.replace(own, line=lines[seen[own] % len(lines)])
        seen[own] += 1
    return looks


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
    figure, panels = new_figure(max(6.0, 1.8 + 0.135 * len(text)), 0.9 + 1.45 * len(titles), len(titles), 1, sharex=True)
    panels = np.atleast_1d(panels)
    x = np.arange(len(text))
    for axes, title, gate, position in zip(panels, titles, gates, positions, strict=True):
        bars = axes.bar(x, gate, width=0.8, color=SKY, label="gate")
        axes.set_ylim(0, 1.05)
        axes.set_yticks([0, 0.5, 1])
        axes.set_title(title, fontsize=9, loc="left", pad=3)
        axes.grid(False)
        axes.tick_params(axis="x", length=0, pad=3)
        counted = axes.twinx()
        (line,) = counted.plot(x, position, color=RED, linewidth=1.4, label="contextual position")
        counted.set_ylim(0, max(1.0, 1.08 * position.max()))
        counted.locator_params(axis="y", nbins=4)
        axes.set_ylabel("gate\n(0 to 1)", fontsize=8, color=BLUE)
        counted.set_ylabel("position\n(tokens)", fontsize=8, color=RED)
        for side, own, color in (("left", axes, BLUE), ("right", counted, RED)):
            own.tick_params(axis="y", labelsize=8, labelcolor=color)
            own.spines[["top", "left" if side == "right" else "right"]].set_visible(False)
        counted.spines["left"].set_visible(False)
    labels = [{" ": "·", "\n": "⏎", "\r": "⏎", "\t": "→"}.get(c, c if c.isprintable() else "�") for c in text]
    axes.set_xticks(x, labels, family="monospace", fontsize=9, parse_math=False)
    axes.set_xlim(-0.8, len(text) - 0.2)
    axes.get_xticklabels()[-1].set(color=RED, fontweight="bold")
    axes.set_xlabel("the text, a character a token; the query is the last")
    figure.legend(handles=[bars, line], loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def attention_distance(data: Mapping[str, Array]) -> "Figure":
    """How far heads look, by layer: a panel for each encoding, a dot for each head, a line through each layer's mean.

    Args:
      data: {encoding: [L, N] mean distance in tokens}, as ``posjax.lab.probes.attention_distance`` gives a layer's.
    """
    columns, rows = _grid(len(data))
    figure, panels = new_figure(1.0 + 2.0 * columns, 0.8 + 1.9 * rows, rows, columns, sharex=True, sharey=True, squeeze=False)
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
      curves: {encoding: (distances in tokens [S], values [N, S] in nats)}, as ``posjax.lab.probes.decay_curve`` gives them.
      bounds: {encoding: (distances, values [S])} to draw dashed, such as ``posjax.lab.probes.rope_bound``.
    """
    columns, rows = _grid(len(curves))
    bound = None
    figure, panels = new_figure(1.0 + 2.3 * columns, 0.8 + 1.9 * rows, rows, columns, sharex=True, squeeze=False)
    for axes, (name, style) in zip(panels.flat, styles(curves).items(), strict=False):
        distances, values = map(np.asarray, curves[name])
        for head, line in enumerate(values):
            axes.plot(distances, line, color=style.color, alpha=1.0 - 0.75 * head / len(values), linewidth=1.2)
        if bounds and name in bounds:
            (bound,) = axes.plot(*bounds[name], color=BLACK, linestyle="--", linewidth=1.0)
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


# Shared ---------------------------------------------------------------------------------------------------------------


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
