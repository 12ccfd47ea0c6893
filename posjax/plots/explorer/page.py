"""Writes and reads pages: one HTML file with a template, data as JSON, arrays, and plotly.js.

An array is stored as text, in a script element of its own that browsers do not run:

    float16 or uint16 -> bytes, all low bytes before all high bytes -> gzip -> base64

Low and high bytes are separated because gzip finds repetitions among high bytes (signs, exponents) only where they are neighbors.
The page decompresses an array when it is first shown, with the browser's DecompressionStream.
"""

import base64
import functools
import gzip
import hashlib
import html
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from posjax.checks import require
from posjax.files import write_atomically

DTYPES = ("float16", "uint16")


class Arrays:
    """Collects the arrays of a page; equal arrays are stored once."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.texts: list[str] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def add(self, array: np.ndarray) -> int:
        """Adds an array and returns its number, by which the data of the page refer to it.

        Raises:
          ValueError: the dtype is neither float16 nor uint16.
        """
        if array.dtype.name not in DTYPES:
            raise ValueError(f"array must be {' or '.join(DTYPES)}, got {array.dtype}")
        content = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        key = (array.dtype.name, array.shape, hashlib.sha256(content).digest())
        if key not in self._numbers:
            self._numbers[key] = len(self.entries)
            self.entries.append({"dtype": array.dtype.name, "shape": list(array.shape)})
            self.texts.append(_packed(content[0::2] + content[1::2]))
        return self._numbers[key]

    @property
    def size(self) -> int:
        """Returns the bytes that the arrays take in the page."""
        return sum(map(len, self.texts))


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode("ascii")


@functools.cache
def _plotly() -> str:
    """Returns plotly.js, packed like an array."""
    require("a page of figures", "plotly")
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs().encode())


def fixed_size(kind: str) -> int:
    """Returns the bytes of a page without data and arrays."""
    return len(_page(kind, "", {}, Arrays()))


def write_page(path: Path, kind: str, title: str, data: dict[str, Any], arrays: Arrays | None = None) -> int:
    """Writes a page and returns its size in bytes.

    Args:
      path: the file.
      kind: "explorer" or "report".
      title: title of the page.
      data: JSON values, in the form that the script of this kind of page takes.
      arrays: the arrays that the data refer to by number.
    """
    content = _page(kind, title, data, arrays or Arrays()).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return len(content)


def _page(kind: str, title: str, data: dict[str, Any], arrays: Arrays) -> str:
    folder = resources.files("posjax.plots.explorer")

    def template(name: str) -> str:
        return folder.joinpath(name).read_text(encoding="utf-8")

    # "<" is escaped, so that no text of the data can end the element.
    content = json.dumps({"title": title, **data, "arrays": arrays.entries}, allow_nan=False).replace("<", "\\u003c")
    scripts = [f'<script type="text/plain" id="array-{number}">{text}</script>' for number, text in enumerate(arrays.texts)]
    parts = {
        "TITLE": html.escape(title),
        "STYLE": template("page.css"),
        "BODY": template(f"{kind}.html"),
        "DATA": content,
        "ARRAYS": "\n".join(scripts),
        "PLOTLY": _plotly(),
        "SCRIPT": template("page.js") + template(f"{kind}.js"),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: parts[match[1]], template("page.html"))


def read_page(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Reads the data and the arrays out of a page.

    Raises:
      ValueError: the file is not such a page.
    """
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    if found is None:
        raise ValueError(f"path must be a page that posjax wrote, got {str(path)!r}")
    data = json.loads(found[1])
    texts = re.findall(r'<script type="text/plain" id="array-\d+">(.*?)</script>', text)
    return data, [_unpacked(packed, **entry) for packed, entry in zip(texts, data["arrays"], strict=True)]


def _unpacked(text: str, dtype: str, shape: list[int]) -> np.ndarray:
    content = np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8)
    pairs = content.reshape(2, -1).T.copy()
    return pairs.view(np.dtype(dtype).newbyteorder("<")).reshape(shape).astype(dtype)
