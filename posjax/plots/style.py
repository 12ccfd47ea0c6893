"""Code that all figures share: the style of each encoding, an empty figure, and ``save``.

An encoding has the same color, line and marker in every figure, from a palette for color-blind readers (Okabe and Ito's).
Figures have no window and no global state: they need no display, and are freed once they are no longer referenced.
"""

import dataclasses
import io
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posjax.checks import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")
GREY, BLACK, ORANGE, SKY = "#7f7f7f", "#000000", "#e69f00", "#56b4e9"
GREEN, BLUE, RED, PURPLE = "#009e73", "#0072b2", "#d55e00", "#cc79a7"


@dataclasses.dataclass(frozen=True)
class Style:
    """Holds the look of an encoding in all figures.

    Attributes:
      color, line, marker: as matplotlib takes them.
    """

    color: str
    line: str
    marker: str


_STYLES = {
    "identity": Style(GREY, "-", "o"),
    "sinusoidal": Style(ORANGE, "-", "s"),
    "learned": Style(SKY, "-", "D"),
    "rope": Style(BLUE, "-", "^"),
    "alibi": Style(GREEN, "-", "v"),
    "tupe": Style(PURPLE, "-", "P"),
    "cope": Style(RED, "-", "p"),
    "rope+cope": Style(BLACK, "--", "*"),
    "t5": Style(GREEN, "--", "<"),
    "tupe-r": Style(PURPLE, "--", "h"),
    "cope_alibi": Style(RED, ":", ">"),
    "cope_mlp": Style(RED, "-.", "H"),
}
_ALIASES = {"nope": "identity", "none": "identity", "tupe-a": "tupe"}
_SPARE = [
    Style(color, line, marker)
    for line, marker in (("--", "d"), (":", "8"), ("-.", "H"))
    for color in (ORANGE, SKY, BLUE, GREEN, PURPLE, RED, GREY, BLACK)
]


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Returns the style of each encoding by name, ignoring arguments and case: "RoPE" and "rope(theta=500000)" match "rope".

    An unknown name, or one whose style an earlier name of the same figure already has, gets a spare style that depends on the name
    alone, or the next free one if two such names collide.

    Args:
      names: encodings, or labels that begin with one.

    Example:
      >>> from posjax.plots import styles
      >>> styles(["RoPE", "rope(theta=500000)"])["RoPE"].marker
      '^'
    """
    by_name: dict[str, Style] = {}
    for name in names:
        base, nested = name, 1
        while nested:  # an argument may be a call: rope(scaling=linear_scaling(4.0))
            base, nested = re.subn(r"\([^()]*\)", "", base)
        base = base.replace(" ", "").lower()
        known = _STYLES.get(_ALIASES.get(base, base))
        first = zlib.crc32(name.encode())
        spare = (_SPARE[(first + step) % len(_SPARE)] for step in range(len(_SPARE)))
        free = (style for style in (known, *spare) if style is not None and style not in by_name.values())
        by_name[name] = next(free, _SPARE[first % len(_SPARE)])
    return by_name


def save(figure: "Figure", path: str | Path) -> None:
    """Writes a figure as the suffix of the path says: .png (150 dots per inch; also without a suffix), .svg or .pdf.

    The figure need not be closed, because it is not registered with pyplot.

    Args:
      figure: the figure.
      path: the file.

    Raises:
      ValueError: the suffix is another one.
    """
    suffix = Path(path).suffix.removeprefix(".") or "png"
    if suffix not in FORMATS:
        raise ValueError(f"path must end in one of {', '.join(f'.{name}' for name in FORMATS)}, got {str(path)!r}")
    contents = io.BytesIO()
    figure.savefig(contents, format=suffix, dpi=150)
    (Path(path) if isinstance(path, str) else path).write_bytes(contents.getvalue())


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", Any]:
    """Creates a figure with a size in inches, and its axes, without pyplot, which would keep it open and need a display."""
    require("a figure", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, **options)
    for axes in np.atleast_1d(panels).flat:
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
