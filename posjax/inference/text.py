"""Incremental decoding of tokens to text."""

import codecs
from collections.abc import Callable, Sequence


class TextRow:
    """Decodes one row of tokens to text incrementally.

    Incomplete UTF-8 characters, and text that may be the beginning of a stop text, are held back.

    Args:
      bytes_of: returns the bytes of a token.
      stops: texts that end the row. The text ends before the earliest occurrence of any of them.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], stops: Sequence[str] = ()):
        self.ended = False
        self._bytes_of, self._stops = bytes_of, tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, token: int) -> str:
        """Adds a token and returns the text that can now be shown.

        Args:
          token: id of the token.

        Returns:
          The text, which may be empty.
        """
        return self._show(self._decoder.decode(self._bytes_of(token)), last=False)

    def end(self) -> str:
        """Ends the row and returns the text that was still held back.

        Returns:
          The text, which may be empty.
        """
        return self._show(self._decoder.decode(b"", True), last=True)

    def _show(self, new: str, last: bool) -> str:
        if self.ended:
            return ""
        text = self._held + new
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.ended = last or bool(places)
        begun = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        cut = min(places) if places else len(text) if last else len(text) - begun
        self._held = text[cut:]
        return text[:cut]
