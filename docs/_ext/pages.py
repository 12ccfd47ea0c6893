"""Pages that are generated when the site is built, from docstrings, dataclasses, the registry and experiments/results.

A line ``<!-- generated api NAME -->``, ``table NAME`` or ``gallery`` of a page is replaced by what the code has. In the
gallery, every encoding has a file.
"""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import api
import gallery
import tables


def _generated(app: Any, name: str, source: list[str]) -> None:
    def text(match: re.Match) -> str:
        if match[1] == "gallery":
            return gallery.cards()
        return api.page(match[3]) if match[1] == "api" else getattr(tables, match[3])()

    source[0] = re.sub(r"^<!-- generated (gallery|api|table)( (\w+))? -->$", text, source[0], flags=re.MULTILINE)


def setup(app: Any) -> dict[str, bool]:
    """Registers the hooks with Sphinx."""
    app.connect("builder-inited", lambda app: gallery.write(Path(app.srcdir) / "gallery"))
    app.connect("source-read", _generated)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
