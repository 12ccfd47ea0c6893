"""Figures of the cost of attention, also exported by ``posjax.plots``."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from posjax.plots.style import new_figure, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COST_LINES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 4)), (0, (1, 3)))
_COST_MARKERS = "o^sDvP"


def cost_by_length(
    panels: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]], looks: Mapping[str, tuple[str, str, str]]
) -> "Figure":
    """Plots the cost of attention against length on logarithmic axes.

    The figure has one row per pass, one panel per measure and one line per contestant.

    Args:
      panels: {pass: {measure with its unit: {contestant: {length in tokens: value}}}}; values are positive.
      looks: {contestant: (encoding, implementation, gates)}, which determine color, line and marker, and the order of the legend.

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.
    """
    columns = list(dict.fromkeys(label for row in panels.values() for label in row))
    lengths = sorted({n for row in panels.values() for curves in row.values() for curve in curves.values() for n in curve})
    encodings, implementations, gates = (list(dict.fromkeys(look[part] for look in looks.values())) for part in range(3))
    colors = styles(encodings)
    height = max(0.8 + 3.0 * len(panels), 0.6 + 0.21 * len(looks))
    figure, grid = new_figure(3.4 + 3.6 * len(columns), height, len(panels), len(columns), squeeze=False, sharex=True)
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
    """Plots bar charts of several measures: one panel per measure, one bar per contestant, the first on top.

    Args:
      panels: {title: (axis label with the unit, {contestant: number})}.
      looks: {contestant: encoding}, which determines the color.

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.
    """
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    most = max(len(numbers) for _, numbers in panels.values())
    figure, grid = new_figure(5.2 * columns, (1.0 + 0.28 * most) * rows, rows, columns, squeeze=False)
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
