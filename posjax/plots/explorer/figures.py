"""Figures of pages, as JSON values that plotly.js takes: {"title", "description", "data", "layout"}.

They show what the figures of ``posjax.plots`` of the same name show, in the same colors. A series is the summary of a row of a
table, as ``posjax.lab.pages.tables.series_of_seeds`` returns it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from posjax.plots.style import styles

_DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
_AXIS = {"gridcolor": "#e5e5e5", "linecolor": "#666666", "zeroline": False, "automargin": True}


def loss_by_length_figure(series: Sequence[Mapping[str, Any]], train_length: int | None, label: str) -> dict[str, Any]:
    """Returns a figure of the loss against the evaluation length, with error bars and a point for every seed.

    Args:
      series: ``series_of_seeds``, whose columns are lengths in tokens.
      train_length: training length in tokens, marked by a vertical line; None: not marked.
      label: label of the loss, with its unit.
    """
    traces: list[dict[str, Any]] = []
    for one, style in zip(series, styles(one["name"] for one in series).values(), strict=True):
        x = [int(column) for column in one["columns"]]
        color = {"color": style.color}
        reach = [
            None if low is None else (mean - low, high - mean)
            for mean, low, high in zip(one["mean"], one["low"], one["high"], strict=True)
        ]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [r and r[1] for r in reach],
            "arrayminus": [r and r[0] for r in reach],
            "thickness": 1.2,
        }
        traces.append(
            {
                "name": one["name"],
                "x": x,
                "y": one["mean"],
                "mode": "lines+markers",
                "line": color | {"dash": _DASHES[style.line]},
                "error_y": bars if any(reach) else {"visible": False},
            }
        )
        points = [(n, value) for n, values in zip(x, one["values"], strict=True) for value in values if len(values) > 1]
        if points:
            dots = {"name": f"{one['name']}, seeds", "x": [n for n, _ in points], "y": [value for _, value in points]}
            traces.append(dots | {"mode": "markers", "marker": color | {"size": 5, "opacity": 0.45}, "showlegend": False})
    ticks = sorted({int(column) for one in series for column in one["columns"]})
    axis = {
        "type": "log",
        "title": {"text": "evaluation length (tokens)"},
        "tickvals": ticks,
        "ticktext": [f"{n:,}" for n in ticks],
    }
    shapes, notes = [], []
    if train_length is not None:
        line = {"color": "#666666", "width": 1, "dash": "dash"}
        shapes.append({"type": "line", "x0": train_length, "x1": train_length, "yref": "paper", "y0": 0, "y1": 1, "line": line})
        place = {"x": math.log10(train_length), "xanchor": "left", "yref": "paper", "y": 1, "yanchor": "top", "showarrow": False}
        notes.append(place | {"text": f"trained on {train_length:,}"})
    layout = {"xaxis": _AXIS | axis, "yaxis": _AXIS | {"title": {"text": label}}, "shapes": shapes, "annotations": notes}
    words = "Mean over seeds; bars are 95 % intervals of the mean, small points are seeds."
    return {"title": "Loss by evaluation length", "description": words, "data": traces, "layout": layout}


def curves_figure(
    title: str, description: str, curves: Mapping[str, tuple[Sequence[Any], Sequence[Sequence[Any]]]], x: str, y: str
) -> dict[str, Any]:
    """Returns a figure of one line for every seed.

    Args:
      title, description: heading of the figure and the sentence below it.
      curves: {name: (x [S], y of each seed [seeds, S])}.
      x, y: labels of the axes.
    """
    traces = []
    for (name, (places, lines)), style in zip(curves.items(), styles(curves).values(), strict=True):
        for seed, line in enumerate(lines):
            look = {"color": style.color, "width": 1.4, "dash": _DASHES[style.line]}
            one = {"name": name, "x": list(places), "y": list(line), "mode": "lines", "line": look, "opacity": 0.8}
            traces.append(one | {"legendgroup": name, "showlegend": seed == 0})
    layout = {"xaxis": _AXIS | {"title": {"text": x}}, "yaxis": _AXIS | {"title": {"text": y}}}
    return {"title": title, "description": description, "data": traces, "layout": layout}


def dots_figure(column: str, series: Sequence[Mapping[str, Any]], label: str) -> dict[str, Any]:
    """Returns a figure of one column of a table: the mean with its interval, and a point for every seed.

    Args:
      column: the column.
      series: ``series_of_seeds``.
      label: label of the values, with their unit.
    """
    traces: list[dict[str, Any]] = []
    for one, style in zip(series, styles(one["name"] for one in series).values(), strict=True):
        place = one["columns"].index(column)
        mean, low, high = one["mean"][place], one["low"][place], one["high"][place]
        values = [value for value in one["values"][place] if value is not None]
        look = {"color": style.color}
        traces.append({"x": values, "y": [one["name"]] * len(values), "mode": "markers", "marker": look | {"opacity": 0.45}})
        if mean is not None:
            bars = (
                {"type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low]} if low is not None else {}
            )
            point = {"x": [mean], "y": [one["name"]], "mode": "markers", "marker": look | {"size": 11, "symbol": "diamond"}}
            traces.append(point | {"error_x": bars or {"visible": False}})
    layout = {
        "xaxis": _AXIS | {"title": {"text": label}},
        "yaxis": _AXIS | {"autorange": "reversed", "type": "category"},
        "showlegend": False,
        "height": 160 + 34 * len(series),
    }
    words = "Diamonds are means over seeds, bars their 95 % intervals, small points seeds."
    return {"title": f"By setting: {column}", "description": words, "data": traces, "layout": layout}
