"""Ending a text, which arrives in pieces, where its indentation falls back.

The result does not depend on how the text was cut. Knows nothing of tokens and of requests.
"""

from __future__ import annotations

import re

_LINE_BREAK = re.compile(r"\r?\n|\r\Z")
_BLANKS = " \t\r\n"


class IndentLimit:
    """Ends a text before the first line, after the one that it begins in, with something in it that is indented by less
    than ``least`` blanks or tabs. Line breaks and blanks are held back until it is clear what they precede.
    """

    def __init__(self, least: int) -> None:
        self._least = least
        self._held = ""  # white space from a line break on
        self.ended = False

    def push(self, text: str) -> str:
        """Take more text and return what is certain to be part of the answer."""
        if not self._least or self.ended:
            return "" if self.ended else text
        text, self._held = self._held + text, ""
        end = 0
        while (found := _LINE_BREAK.search(text, end)) is not None:
            start = found.start()
            end = len(text) - len(text[start:].lstrip(_BLANKS))
            if end == len(text):
                self._held = text[start:]
                return text[:start]
            if end - text.rindex("\n", start, end) - 1 < self._least:
                self.ended = True
                return text[:start]
        return text

    def finish(self) -> str:
        """Return what was held back, when the text has ended by itself."""
        held, self._held = self._held, ""
        return held
