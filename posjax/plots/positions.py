"""Figures of how a model uses positions: CoPE's counts, attention distances, and the decay of scores."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from posjax.plots.seeds import mean_and_band
from posjax.plots.style import BLACK, BLUE, RED, SKY, new_figure, styles
from posjax.typing import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cope_over_line(text: str, gates: Array, positions: Array, titles: Sequence[str]) -> "Figure":
    """Plots CoPE over a line of text: the gate (bars) and contextual position (line) of each character, with the last as query.

    Args:
      text: S characters, up to about 80; the last is the query.
      gates: [M, S], the gates of M heads.
      positions: [M, S], sums of the gates from a character to the query.
      titles: M panel titles, such as "layer 3, head 1".

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.

    Raises:
      ValueError: the shapes do not match.
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
        position_axes = axes.twinx()
        (line,) = position_axes.plot(x, position, color=RED, linewidth=1.4, label="contextual position")
        position_axes.set_ylim(0, max(1.0, 1.08 * position.max()))
        position_axes.locator_params(axis="y", nbins=4)
        axes.set_ylabel("gate\n(0 to 1)", fontsize=8, color=BLUE)
        position_axes.set_ylabel("position\n(tokens)", fontsize=8, color=RED)
        for side, y_axes, color in (("left", axes, BLUE), ("right", position_axes, RED)):
            y_axes.tick_params(axis="y", labelsize=8, labelcolor=color)
            y_axes.spines[["top", "left" if side == "right" else "right"]].set_visible(False)
        position_axes.spines["left"].set_visible(False)
    labels = [{" ": "·", "\n": "⏎", "\r": "⏎", "\t": "→"}.get(c, c if c.isprintable() else "�") for c in text]
    axes.set_xticks(x, labels, family="monospace", fontsize=9, parse_math=False)
    axes.set_xlim(-0.8, len(text) - 0.2)
    axes.get_xticklabels()[-1].set(color=RED, fontweight="bold")
    axes.set_xlabel("text, one token per character; the last is the query")
    figure.legend(handles=[bars, line], loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def attention_distance(data: Mapping[str, Array]) -> "Figure":
    """Plots the attention distance of heads by layer: a panel per encoding, a dot per head, and a line through layer means.

    With several seeds, there is a dot per head and seed, and a bar for the 95 % interval of each layer's mean over seeds. The axis
    of distances is linear from 0 to 1 token and logarithmic beyond.

    Args:
      data: {encoding: [L, N] or [seeds, L, N] mean distance in tokens}; each layer is as
        ``posjax.lab.probes.attention_distance`` returns it.

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.
    """
    columns, rows = _grid(len(data))
    figure, panels = new_figure(1.0 + 2.0 * columns, 0.8 + 1.9 * rows, rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, style) in zip(panels.flat, styles(data).items(), strict=False):
        distances = np.asarray(data[name], float)
        distances = distances.reshape(-1, *distances.shape[-2:])
        seeds, layers, heads = distances.shape
        layer = np.arange(1, layers + 1)
        offsets = np.linspace(-0.25, 0.25, seeds * heads) if seeds * heads > 1 else np.zeros(1)
        dots = distances.transpose(1, 2, 0).reshape(layers, -1)
        axes.plot(layer[:, None] + offsets, dots, "o", markersize=4, color=style.color, alpha=0.6, mew=0, clip_on=False)
        means, band = mean_and_band(distances.mean(2))
        axes.plot(layer, means, color=style.color, linewidth=1.5)
        if band is not None:
            axes.errorbar(layer, means, np.abs(band - means), fmt="none", color=style.color, linewidth=1.2, capsize=3)
        axes.set_title(name, fontsize=10)
        axes.set_xticks(layer[:: math.ceil(layers / 8)])
    top = 1.3 * max([1.0, *(np.max(distances) for distances in data.values())])
    octaves = int(np.log2(top)) + 1
    ticks = [0, *(2**octave for octave in range(0, octaves, math.ceil(octaves / 7)))]
    axes.set_yscale("symlog", base=2, linthresh=1.0, linscale=0.6)  # a head that attends only to its own token has distance zero
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(0, top)
    for axes in panels.flat:
        axes.minorticks_off()
    _hide_rest(panels, len(data))
    figure.supxlabel("layer (dots: heads; line: their mean)", fontsize=10)
    figure.supylabel("mean attention distance (tokens)", fontsize=10)
    return figure


def decay_curves(curves: Mapping[str, tuple[Array, Array]], bounds: Mapping[str, tuple[Array, Array]] | None = None) -> "Figure":
    """Plots each encoding's effect on the score by distance: a panel per encoding and a line per head, from dark to light.

    Args:
      curves: {encoding: (distances in tokens [S], values [N, S] in nats)}, as ``posjax.lab.probes.decay_curve`` returns them.
      bounds: {encoding: (distances, values [S])}, drawn dashed, such as those of ``posjax.lab.probes.rope_bound``.

    Returns:
      A figure, which ``posjax.plots.save`` writes to a file.
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


def _grid(panels: int) -> tuple[int, int]:
    """Returns (columns, rows) of a grid for ``panels`` panels, at most four per row."""
    columns = min(4, max(1, panels))
    return columns, max(1, math.ceil(panels / columns))


def _hide_rest(panels: np.ndarray, used: int) -> None:
    """Hides the empty panels of the last row, and shows the tick labels of the panels above them."""
    for axes in panels.flat[used:]:
        axes.set_visible(False)
    for axes in panels.flat[max(0, used - panels.shape[1]) : used]:
        axes.tick_params(axis="x", labelbottom=True)
