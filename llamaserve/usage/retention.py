"""When rows of the ledger are looked through for old ones, and which are old. Knows no database.

A clock that is set forward, by mistake or by hand, must not delete what is new: while a server runs, its day is as late
as the wall clock says, but no later than the time since its start allows. The clock of a small machine is often wrong
until the network has told it the time, so nothing is deleted soon after the start.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

DAY: Final = 86400.0
BATCH: Final = 500  # rows deleted at once, which takes a few milliseconds
SETTLING: Final = 3600.0  # seconds after the start in which nothing is deleted
_PAUSE: Final = 0.02  # seconds between two batches, in which others write


class Retention:
    """Keeps rows for some days. The clocks are in seconds; ``monotonic`` is never set."""

    def __init__(self, days: int, wall: Callable[[], float], monotonic: Callable[[], float]) -> None:
        if days < 1:
            raise ValueError("rows are kept for a day at least")
        self._days = days
        self._wall = wall
        self._monotonic = monotonic
        self._start = wall(), monotonic()
        self._next = self._start[1] + SETTLING

    @property
    def pause(self) -> float:
        """Seconds until old rows are to be deleted; 0 or less: now."""
        return self._next - self._monotonic()

    @property
    def cutoff(self) -> float:
        """The Unix time before which rows are old."""
        wall, monotonic = self._start
        return min(self._wall(), wall + self._monotonic() - monotonic) - self._days * DAY

    def deleted(self, rows: int) -> None:
        """Take note of a batch that was deleted: where it was a whole one, there may be more."""
        self._next = self._monotonic() + (_PAUSE if rows >= BATCH else DAY)
