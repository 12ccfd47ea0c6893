"""Figures: functions from arrays to matplotlib figures, and ``save`` to write a figure to a file."""

from posjax.plots.cost import bars, cost_by_length
from posjax.plots.loss import loss_by_index, loss_by_length
from posjax.plots.positions import attention_distance, cope_over_line, decay_curves
from posjax.plots.seeds import curves, dots
from posjax.plots.style import Style, save, styles

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
