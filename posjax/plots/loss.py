"""Figures of the loss against the evaluation length, and against the index of a token."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from posjax.plots.seeds import mean_and_band
from posjax.plots.style import BLACK, new_figure, styles
from posjax.typing import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_by_length(
    rows: Mapping[str, Mapping[int, Sequence[float]]], train_length: int, label: str = "loss (bits per byte)"
) -> "Figure":
    """Plots loss against evaluation length: the mean over seeds, with a bar for its 95 % interval and a dot per seed.

    Intervals are Student's, for two seeds or more, and may reach beyond the axis. A cross marks the maximum length of an encoding
    that does not support all lengths.

    Args:
      rows: {encoding: {length in tokens: loss of each seed}}; lengths that the encoding does not support are absent or empty.
      train_length: training length in tokens, marked by a vertical line.
      label: axis label of the loss, with its unit.

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.
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
        for length, values in row.items():
            if len(values) > 1:
                axes.plot([length] * len(values), values, ".", color=style.color, alpha=0.4, markersize=5, mew=0)
                low, high = mean_and_band(values[:, None])[1]
                mean = values.mean()
                axes.errorbar(length, mean, [mean - low, high - mean], color=style.color, linewidth=1.2, capsize=3)
        axes.plot(x, means, color=style.color, linestyle=style.line, marker=style.marker, linewidth=1.8, markersize=5, label=name)
        if x[-1] < lengths[-1]:
            (stopped,) = axes.plot(x[-1], means[-1], "x", color=style.color, markersize=11, markeredgewidth=2.2, zorder=4)
    if stopped is not None:
        axes.plot([], [], "x", color=BLACK, markersize=9, markeredgewidth=2.2, label="maximum length")
    shown = np.concatenate([np.zeros(0), *(np.asarray(values, float) for row in rows.values() for values in row.values())])
    shown = shown[np.isfinite(shown)]
    if shown.size:  # intervals of two seeds, which are wide, must not hide the differences
        margin = 0.08 * (np.ptp(shown) or abs(shown[0]) or 1.0)
        axes.set_ylim(shown.min() - margin, shown.max() + margin)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("evaluation length (tokens)")
    axes.set_ylabel(label)
    _mark_training(axes, train_length)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def loss_by_index(curves: Mapping[str, tuple[Array, Array]], train_length: int, label: str = "loss (bits per byte)") -> "Figure":
    """Plots loss against the index of a token in its text, with a band for the 95 % interval if there are several seeds.

    Args:
      curves: {encoding: (index in tokens [S], loss [S] or [seeds, S])}, as ``posjax.lab.probes.loss_by_index`` returns them.
      train_length: training length in tokens, marked by a vertical line.
      label: axis label of the loss, with its unit.

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.
    """
    figure, axes = new_figure(8.0, 4.6)
    for name, style in styles(curves).items():
        index = np.asarray(curves[name][0])
        bits, band = mean_and_band(curves[name][1])
        if band is not None:
            axes.fill_between(index, *band, color=style.color, alpha=0.18, linewidth=0)
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
    # The label is above the frame, where no curve can cross it.
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
