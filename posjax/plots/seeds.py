"""Figures over several seeds: a dot plot of an ablation, and training curves."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from posjax.plots.style import GREY, Style, new_figure, styles
from posjax.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def dots(panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, encodings: Mapping[str, str] | None = None) -> "Figure":
    """Plots an ablation: for each setting a marker for the mean, a bar for its 95 % interval, and a dot per seed.

    Seeds are stacked vertically, in the same order in every panel. Diverged seeds are crosses at the right edge and are excluded
    from the mean; their number is below the setting's name. Intervals are Student's, for two seeds or more, and are clipped at zero
    if no value is negative.

    Args:
      panels: {test set: {setting: value of each seed}}, which sets the order of columns and lines. A value that is not finite marks
        a seed whose training diverged; a setting without values in a panel is labeled "no result" there.
      label: axis label of the values, with the unit.
      encodings: {setting: encoding}, which determines color and marker; None: settings are encodings.

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.
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
                placement = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "center"}
                axes.annotate("no result", (0.5, line), **placement, color="0.4", fontsize=8)
                continue
            y = line + (np.linspace(0.0, 0.36, values.size) if values.size > 1 else np.full(1, 0.18))
            lost = ~np.isfinite(values)
            if not lost.all():  # an empty, unclipped line would break the layout
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
    legend = {"one seed": seed, "mean, 95 % interval": mean}
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
    """Plots training curves: for each setting the mean over seeds, with a band for its 95 % interval or a thin line per seed.

    Diverged seeds are excluded from the mean: each is a thin line that ends in a cross at its last finite value, and the legend
    gives their number. Intervals are Student's, for two seeds or more.

    Args:
      data: {setting: (x [S], values [seeds, S])}; values that are not finite mark a seed whose training diverged.
      x_label, label: axis labels of x and of the values, with the unit.
      encodings: {setting: encoding}, which determines the color; settings with the same encoding have different line styles. None:
        settings are encodings.
      every_seed: draws a thin line per seed in place of the band.
      log_x: uses a logarithmic x axis; x must be positive.

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.
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


def mean_and_band(values: Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the means [S] over seeds of [seeds, S], and the ends [2, S] of their 95 % intervals, None for a single seed.

    Both are NaN, which matplotlib leaves out, where a value is not finite.
    """
    from posjax.lab.statistics import summary

    values = np.atleast_2d(np.asarray(values, float))
    found = [summary(column) if np.isfinite(column).all() else None for column in values.T]
    means = np.array([np.nan if one is None else one.mean for one in found])
    if len(values) < 2:
        return means, None
    return means, np.transpose([(np.nan, np.nan) if one is None else one.interval for one in found])


def _mean_and_interval(axes: "Axes", values: np.ndarray, y: float, style: Style) -> tuple[float, ...]:
    """Draws the mean and its interval and returns the ends of the bar; without values, draws nothing and returns ()."""
    from posjax.lab.statistics import summary  # scipy.stats takes a second to import

    statistics = summary(values)
    if statistics.mean is None:
        return ()
    low, high = statistics.interval or (statistics.mean, statistics.mean)
    low = max(low, 0.0) if values.min() >= 0 else low
    if statistics.interval:
        axes.plot([low, high], [y, y], color=style.color, linewidth=2.0, marker="|", markersize=7)
    axes.plot(statistics.mean, y, style.marker, color=style.color, markersize=8, mec="white", mew=0.8, zorder=4, clip_on=False)
    return low, high


def _diverged(some: int, of: int) -> str:
    return f"{some} of {of} diverged" if some < of else "all diverged" if of > 1 else "diverged"


def _looks(settings: Iterable[str], encodings: Mapping[str, str] | None) -> dict[str, Style]:
    """Returns the style of each setting; settings with the same encoding share its color and differ in line style."""
    if encodings is None:
        return styles(settings)
    style_of, uses, looks = styles(dict.fromkeys(encodings.values())), Counter(), {}
    for setting in settings:
        style = style_of[encodings[setting]]
        lines = [style.line, *(line for line in ("-", "--", ":", "-.") if line != style.line)]
        looks[setting] = dataclasses.replace(style, line=lines[uses[style] % len(lines)])
        uses[style] += 1
    return looks
