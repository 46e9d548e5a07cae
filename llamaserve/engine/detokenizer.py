"""From the bytes of tokens to text that can be shown: whole characters only, and nothing of a stop string.

What ``push`` and ``finish`` return, joined, is the same text however the tokens arrived. Knows nothing of the
vocabulary or of requests.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llamaserve.engine.stopping import StopMatcher

_utf8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Assembles the text of one sequence. Bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._decoder = _utf8("replace")
        self._matcher = StopMatcher(stops)
        self.decoded = 0  # characters, stop strings included
        self.shown = 0  # characters that were returned

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._matcher.matched is not None

    def push(self, piece: bytes) -> str:
        """Take the bytes of one token and return the text that can be shown now."""
        text = self._decoder.decode(piece)
        self.decoded += len(text)
        text = self._matcher.push(text)
        self.shown += len(text)
        return text

    def finish(self) -> str:
        """Return all that was held back: an unfinished character, and the beginning of a stop string."""
        if self.stopped:
            return ""
        return self._matcher.push(self._decoder.decode(b"", final=True)) + self._matcher.finish()
