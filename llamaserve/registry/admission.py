"""The queue before one model: how many sequences or how much text may wait for it, and when to come again when there is
as much.

A queue that is full is full for those who fill it: of several shares, each may have its part of all places, whatever
others have. So there can be more than the bound, as many for the first share, half as many for the second, a third for
the third, and so on. Counts only. Who is served first is the scheduler's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llamaserve.errors import QueueFull

_LEAST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds
_FORGETTING = 0.2  # weight of the newest request in the mean duration


class Place:
    """A request's place at the model, from before its prompt is looked at to its end."""

    def __init__(self, admission: Admission, sequences: int, share: str, now: float) -> None:
        self._admission: Admission | None = admission
        self._sequences = sequences
        self._share = share
        self._since = now

    def grow(self, sequences: int) -> None:
        """Take up so many more, as long as the queue is not full before it for its share, or nobody else is there.
        Raises ``QueueFull``.
        """
        if self._admission is not None:
            if self._admission.open > self._sequences:
                self._admission.check(self._share)
            self._admission.count(self._share, sequences)
            self._sequences += sequences

    def shrink(self, sequences: int) -> None:
        """Give so many back; the request stays."""
        if self._admission is not None:
            self._admission.count(self._share, -sequences)
            self._sequences -= sequences

    def leave(self) -> None:
        """Give the place back; further calls do nothing."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission.left(self._sequences, self._share, self._since)


class Admission:
    """The sequences of all requests that are at one model."""

    def __init__(self, parallel: int, queue: int, clock: Callable[[], float] = time.monotonic) -> None:
        """``parallel`` of them run at once, and ``queue`` may wait."""
        self._parallel = parallel
        self._queue = queue
        self._clock = clock
        self._duration = _LEAST_WAIT  # mean seconds of a request, waiting included
        self._requests = 0
        self._held: dict[str, int] = {}  # of the shares that hold any
        self.open = 0

    def limit(self, parallel: int, queue: int) -> None:
        """Let so many run at once and so many wait from now on."""
        self._parallel = parallel
        self._queue = queue

    def enter(self, sequences: int, share: str = "") -> Place:
        """Let a request in, however many sequences it has, as long as the queue is not full before it. One that is full
        lets those in whose ``share`` holds less than its part of all places, which is as large as that of each other
        share that holds any. So n shares hold 1 + 1/2 + … + 1/n times as many as there are places at most, apart from
        what the last request of each brings at once. Raises ``QueueFull``.
        """
        self.check(share)
        self._requests += 1
        self.count(share, sequences)
        return Place(self, sequences, share, self._clock())

    def check(self, share: str = "") -> None:
        """Raise ``QueueFull`` if the queue is full for a share, with the seconds after which a place is probably free:
        if the requests that are here stay for the mean time, one of them leaves after that time divided by their
        number.
        """
        places = self._parallel + self._queue
        held = self._held.get(share, 0)
        holders = len(self._held) + (not held)
        if self.open >= places and held * holders >= places:
            wait = min(max(_LEAST_WAIT, self._duration / self._requests), _LONGEST_WAIT)
            raise QueueFull(self._refusal(), retry_after=wait)

    def count(self, share: str, sequences: int) -> None:
        """Take note that a share holds so many more, or fewer."""
        self.open += sequences
        self._held[share] = held = self._held.get(share, 0) + sequences
        if not held:
            del self._held[share]

    def left(self, sequences: int, share: str, since: float) -> None:
        """Take note that a request that came at ``since`` is over."""
        self._requests -= 1
        self.count(share, -sequences)
        self._duration += (self._clock() - since - self._duration) * _FORGETTING

    def _refusal(self) -> str:
        return (
            f"{self.open - self._parallel} answers wait for this model already, and no more may; try again later, or "
            "raise `queue` for it in models.yaml"
        )


class TextAdmission(Admission):
    """The texts of all requests for vectors or scores that are at one model, in bytes. So that there are not too many
    requests either, none counts for less than the bytes that there are for each.
    """

    def __init__(self, requests: int, size: int) -> None:
        """So many requests may be there, and so many bytes of text; the last one to come may bring more."""
        super().__init__(0, size)
        self._most = requests
        self._least = size // requests

    def enter(self, size: int, share: str = "") -> Place:
        """Let a request in with so many bytes of text. Raises ``QueueFull``."""
        return super().enter(max(self._least, size), share)

    def _refusal(self) -> str:
        return (
            "as many requests for embeddings or scores wait for this model as may "
            f"({self._most}, or {self._least * self._most // 2**20} MiB of text); try again later"
        )
