"""Tokens as text while they come."""

import codecs
from collections.abc import Callable, Sequence


class TextRow:
    """The text of one row of tokens while they come. Held back: half a character, and what may be the beginning of a stop text.

    Args:
      bytes_of: of a token.
      stops: texts that end the row; the first to come ends it, and is left out.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], stops: Sequence[str] = ()):
        self.ended = False
        self._bytes_of, self._stops = bytes_of, tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """What can be shown now that this token has come."""
        return self._show(self._decoder.decode(self._bytes_of(token)), last=False)

    def end(self) -> str:
        """What was still held back."""
        return self._show(self._decoder.decode(b"", True), last=True)

    def _show(self, new: str, last: bool) -> str:
        if self.ended:
            return ""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.ended = last or bool(found)
        begun = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        cut = min(found) if found else len(text) if last else len(text) - begun
        self._held = text[cut:]
        return text[:cut]
