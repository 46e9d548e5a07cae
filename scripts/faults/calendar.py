"""When which fault was at work, and what it excuses. Knows nothing of how faults are made."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_REMEMBERED = 1000  # faults in the history
_KEPT = 600.0  # seconds, which is longer than a request may take


@dataclass(frozen=True)
class Excuses:
    """What may happen to a request without being wrong: errors with these codes; ``down``, a connection that breaks at
    any moment, since the server was killed; ``ending``, an answer that ends early or a connection without one, since
    the server was told to end.
    """

    codes: frozenset[str | None] = frozenset()
    down: bool = False
    ending: bool = False

    def __or__(self, other: Excuses) -> Excuses:
        return Excuses(self.codes | other.codes, self.down or other.down, self.ending or other.ending)

    @property
    def away(self) -> bool:
        """Whether the server need not be there."""
        return self.down or self.ending


NOTHING = Excuses()


@dataclass
class _Period:
    fault: str
    excuses: Excuses
    began: float
    ended: float = math.inf


class Calendar:
    """All faults of a run, and until when each may be felt. Moments are those of the monotonic clock."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.history: list[tuple[float, str]] = []  # when each began, of the last ones
        self.skipped: dict[str, str] = {}  # faults that this machine can't have, and why
        self._periods: list[_Period] = []

    @contextlib.contextmanager
    def at_work(self, fault: str, excuses: Excuses = NOTHING) -> Iterator[None]:
        """Have a fault at work within a ``with`` block. Its codes excuse until the next ``settled``, since a model may
        be in quarantine until then; what else it excuses ends with the block.
        """
        self.counts[fault] += 1
        now = time.monotonic()
        self.history = [*self.history[1 - _REMEMBERED :], (now, fault)]
        brief = _Period(fault, Excuses(down=excuses.down, ending=excuses.ending), now)
        self._periods += [brief, _Period(fault, Excuses(excuses.codes), now)]
        try:
            yield
        finally:
            brief.ended = time.monotonic()

    def settled(self) -> None:
        """Take note that nothing is felt any more of what was."""
        now = time.monotonic()
        for period in self._periods:
            period.ended = min(period.ended, now)
        self._periods = [period for period in self._periods if now - period.ended < _KEPT]

    def excuses(self, began: float, ended: float) -> Excuses:
        """Return what is excused of a request that ran from one moment to another."""
        found = NOTHING
        for period in self._periods:
            if period.began <= ended and period.ended >= began:
                found |= period.excuses
        return found

    def at_work_between(self, began: float, ended: float) -> list[str]:
        """Return the faults that were at work meanwhile, for messages."""
        return sorted({each.fault for each in self._periods if each.began <= ended and each.ended >= began})
