"""Turns that go round the shares: each has one after the other, however much of each there is. Knows names only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Round:
    """The shares that take turns, the next one first. One that comes new is before the one that had the last turn, and
    behind all others.
    """

    def __init__(self) -> None:
        self._order: deque[str] = deque()
        self._last: str | None = None  # that had a turn

    def __iter__(self) -> Iterator[str]:
        """Yield them from the next one on."""
        return iter(self._order)

    @property
    def next(self) -> str:
        """The one whose turn it is. Raises ``IndexError`` when there is none."""
        return self._order[0]

    def join(self, share: str) -> None:
        """Let a share take turns from now on, if it does not yet."""
        if share in self._order:
            return
        self._order.append(share)
        if (last := self._last) is not None and last != share and last in self._order:
            self._order.remove(last)
            self._order.append(last)

    def leave(self, share: str) -> None:
        """Let a share take no more turns, if it does."""
        if share in self._order:
            self._order.remove(share)

    def turn(self) -> str:
        """Return the share whose turn it is, and pass on to the next."""
        self._last = self._order[0]
        self._order.rotate(-1)
        return self._last


class Queues(Generic[T]):
    """What waits for its turn, by share; within a share what came first is first."""

    def __init__(self) -> None:
        self._round = Round()
        self._queues: dict[str, deque[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, item: T, share: str) -> None:
        """Put something behind what waits of its share."""
        self._round.join(share)
        self._queues.setdefault(share, deque()).append(item)

    @property
    def next(self) -> tuple[T, str]:
        """What would be taken now, and its share. Raises ``IndexError`` when nothing waits."""
        share = self._round.next
        return self._queues[share][0], share

    def take(self) -> tuple[T, str]:
        """Take out what has its turn, and return it and its share. Raises ``IndexError`` when nothing waits."""
        item, share = self.next
        self._round.turn()
        self.discard(item, share)
        return item, share

    def discard(self, item: T, share: str) -> None:
        """Take out what gives up waiting, if it still waits; its share's turn is the next one's of that share."""
        queue = self._queues.get(share, ())
        if item not in queue:
            return
        self._queues[share].remove(item)
        if not queue:
            del self._queues[share]
            self._round.leave(share)
