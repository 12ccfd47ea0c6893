"""Pages of HTML that need no server and no network: the explorer of a text, and the report of a comparison.

    page = write_page(path, "explorer", "cope(64)", data, arrays)

Figures are drawn in the browser by plotly.js, which the page contains.
"""

from posjax.plots.explorer.figures import curves_figure, dots_figure, loss_by_length_figure
from posjax.plots.explorer.page import Arrays, fixed_size, read_page, write_page

__all__ = [
    "Arrays",
    "curves_figure",
    "dots_figure",
    "fixed_size",
    "loss_by_length_figure",
    "read_page",
    "write_page",
]
