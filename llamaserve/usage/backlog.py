"""The records that are on their way to the file, oldest first, and who waits for them. For several threads.

There is an end to the memory that they may take: past it the oldest are lost, and counted. When a problem keeps records
from being written, when it is over, and when records are lost, the log says so once. This module knows nothing of files
and threads, and of those who wait only that somebody has to be told.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from threading import Condition
from typing import Final, Generic, TypeVar

from llamaserve.usage.record import UsageRecord

log = logging.getLogger(__name__)

MOST: Final = 100_000  # records in memory, about 60 MB

_Waiter = TypeVar("_Waiter")


class Backlog(Generic[_Waiter]):
    """Records that wait. While there is a ``problem``, nobody waits with them."""

    def __init__(self, most: int = MOST) -> None:
        self.changed = Condition()  # notified when there is something to do; its lock may be held around several calls
        self.problem: str | None = None
        self.closed = False
        self.lost = 0
        self._most = most
        self._waiting: deque[tuple[UsageRecord, _Waiter | None]] = deque()
        self._taken: list[tuple[UsageRecord, _Waiter | None]] = []
        self._overflowing = False

    def __len__(self) -> int:
        """Return how many records are not written yet."""
        with self.changed:
            return len(self._waiting) + len(self._taken)

    def add(self, record: UsageRecord, waiter: _Waiter) -> bool:
        """Add a record, and return whether its waiter will be told, which it is not where that could take long. What
        comes when all is over is lost.
        """
        with self.changed:
            if self.closed:
                log.error("usage of the request %s is lost: the ledger is closed", record.request_id)
                self.lost += 1
                return False
            heard = self.problem is None
            self._waiting.append((record, waiter if heard else None))
            if len(self) > self._most and self._waiting:
                self._lose_oldest()
            self.changed.notify()
            return heard

    def take(self, most: int) -> list[UsageRecord]:
        """Return the oldest records, for an attempt to write them, which ``written`` or ``failed`` ends."""
        with self.changed:
            self._taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            return [record for record, _ in self._taken]

    def written(self, unstorable: int) -> list[_Waiter]:
        """Take note that what was taken is written, but for some that can't ever be. Returns who waited for it."""
        with self.changed:
            self.lost += unstorable
            told = _waiters(self._taken)
            self._taken = []
            return told

    def failed(self, problem: str) -> list[_Waiter]:
        """Take back what was taken and not written, because of a problem. Returns all who wait."""
        with self.changed:
            told = self.hold_up(problem)
            self._waiting.extendleft(reversed(self._taken))
            self._taken = []
            return told

    def hold_up(self, problem: str) -> list[_Waiter]:
        """Take note of a problem; an attempt may still be under way. Returns all who wait."""
        with self.changed:
            told: list[_Waiter] = []
            if self.problem is None:
                log.error("usage is not recorded, but kept in memory, for the time being: %s", problem)
                told = _waiters([*self._taken, *self._waiting])
                self._taken = [(record, None) for record, _ in self._taken]
                self._waiting = deque((record, None) for record, _ in self._waiting)
            self.problem = problem
            return told

    def go_on(self) -> None:
        """Take note that there is no problem any more."""
        with self.changed:
            if self.problem is not None:
                log.info("usage is recorded again; requests of which it was lost since the start: %d", self.lost)
            self.problem = None
            self._overflowing = False

    def close(self) -> None:
        """Take no more records."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def abandon(self) -> list[_Waiter]:
        """Give up what is left. Returns all who wait."""
        with self.changed:
            told = _waiters([*self._taken, *self._waiting])
            if left := len(self):
                log.error("usage of %d requests is lost: %s", left, self.problem or "it could not be written in time")
            self.lost += left
            self._waiting.clear()
            self._taken = []
            return told

    def _lose_oldest(self) -> None:
        if not self._overflowing:
            log.error("usage is lost, the oldest first: %d requests wait in memory: %s", self._most, self.problem)
        self._overflowing = True
        self._waiting.popleft()
        self.lost += 1


def _waiters(entries: Iterable[tuple[object, _Waiter | None]]) -> list[_Waiter]:
    return [waiter for _, waiter in entries if waiter is not None]
