"""Whose sequences come next, where several have a share of one model's time: the books of what each has had.

A share's sequences wait in a queue of their own. The next slot goes to the share with the fewest running ones, of
several such to that which has had the fewest tokens evaluated, and then to whoever came first; but none is passed all
too often. Knows names of shares, numbers of tokens, and whether a sequence has had a slot before; in which order those
of a share wait is the scheduler's business, and so is who it is that has a share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence as Row
from typing import Final

from llamaserve.engine.sequence import Sequence

_CREDIT: Final = 2048  # tokens: who has had still less than another comes before it for no more of them than these
_REMEMBERED: Final = 1024  # shares
_MOST_PASSES: Final = 4  # by others' sequences, for each share that waits, before a share has its turn

_RESUMED, _OVERDUE = -2, -1  # ranks before those of numbers of running sequences


class Shares:
    """What each share has had, and how often it was passed."""

    def __init__(self) -> None:
        self._had: dict[str, int] = {}  # tokens
        self._most = 0  # of these, ever
        self._passed: dict[str, int] = {}  # of those that wait: how many of others started since one of theirs did

    def had(self, share: str) -> int:
        """Return how many tokens a share has had, to be compared with those of others. One of which nothing is known
        has had as few as count.
        """
        return max(self._had.get(share, 0), self._most - _CREDIT)

    def charge(self, share: str, tokens: int) -> None:
        """Take note that so many more tokens are evaluated for a share, of prompts or of answers."""
        self._had[share] = had = self.had(share) + tokens
        self._most = max(self._most, had)
        if len(self._had) > _REMEMBERED:
            self._forget()

    def _forget(self) -> None:
        """Forget the half that has had less, which is nearest to those of which nothing is known."""
        by_tokens = sorted(self._had.items(), key=lambda item: item[1])
        self._had = dict(by_tokens[len(by_tokens) // 2 :])

    def start(self, share: str, waiting: Iterable[str]) -> None:
        """Take note that a sequence of a share gets a slot, which passes the others that wait."""
        self._passed = {each: self._passed.get(each, 0) + 1 for each in waiting if each != share}

    def interleave(self, queues: Mapping[str, Row[Sequence]], running: Mapping[str, int]) -> list[Sequence]:
        """Return the sequences of some shares' queues in the order in which they get a slot, when each has so many
        running. First come those that have lost theirs.
        """
        ranked: list[tuple[int, int, int, Sequence]] = []
        for share, queue in queues.items():
            had, before = self.had(share), running.get(share, 0)
            overdue = self._passed.get(share, 0) >= _MOST_PASSES * len(queues)
            for place, sequence in enumerate(queue):
                rank = _RESUMED if sequence.resumed else _OVERDUE if overdue and not place else before + place
                ranked.append((rank, had, sequence.arrival, sequence))
        ranked.sort()  # no two have the same arrival
        return [sequence for *_, sequence in ranked]
