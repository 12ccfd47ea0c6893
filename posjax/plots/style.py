"""What all figures share: how an encoding looks, an empty figure, and ``save``.

An encoding has one colour, line and marker in every figure, told apart by colour-blind readers too (Okabe and Ito's palette).
Figures belong to no window and no global state: nothing needs a display, and what is not referred to any more is gone.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY, BLACK, ORANGE, SKY = "#7f7f7f", "#000000", "#e69f00", "#56b4e9"
GREEN, BLUE, RED, PURPLE = "#009e73", "#0072b2", "#d55e00", "#cc79a7"


@dataclasses.dataclass(frozen=True)
class Style:
    """How an encoding is drawn: matplotlib's colour, line style and marker."""

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


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", Any]:
    """A figure of that size in inches and its axes. Not made by pyplot, which would hold it open and look for a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, **options)
    for axes in np.atleast_1d(panels).flat:
        axes.grid(True, color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
