"""Finding stop strings in text that arrives in pieces.

The result does not depend on how the text was cut: the stop string that is complete first wins (of several that end at
the same character, the longest), the text before it is released, and nothing after it. Text that may still become a
stop string is held back. Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Watches one text for stop strings."""

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty")
        self._stops = tuple(stops)
        self._first_characters = frozenset(stop[0] for stop in stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take more text and return what is certain to come before any stop string."""
        if not self._stops or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        start = self._find(text)
        if start is None:
            start = self._first_possible_start(text)
            self._held = text[start:]
        else:
            self._held = ""
        return text[:start]

    def finish(self) -> str:
        """Return the text that was held back, when the end has come without a stop string."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str) -> int | None:
        """Return where the stop string that is complete first begins, or None."""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, self.matched = min(found)
        return start

    def _first_possible_start(self, text: str) -> int:
        """Return the first place from which the rest of the text is the beginning of a stop string."""
        for start, character in enumerate(text):
            if character in self._first_characters:
                rest = text[start:]
                if any(stop.startswith(rest) for stop in self._stops):
                    return start
        return len(text)
