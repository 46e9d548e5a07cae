"""Which texts are evaluated together in the next step. Knows lengths, and nothing of models or vectors.

A step takes texts of all requests in turn, short and long together, as many as it has tokens and sequences for, so that
a request with one text is not held up by one with thousands. Where requests count for several shares of the model's
time, turns go round the shares, and in each round its requests. A text that is longer than a step is evaluated in parts
as long as a step, where that is possible, and what is left of it shares a step with others: where it is divided never
depends on them. Where it is not possible, it has a step for itself.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from llamaserve.engine.rounds import Round

_ENDLESS = 1 << 62


class Part(msgspec.Struct, frozen=True):
    """The tokens of a request's text from ``start`` to ``end``: all of them, unless it is divided."""

    request: int
    text: int
    start: int
    end: int


class _Request:
    """The texts of one request: those of which nothing is planned, and those that are begun, with what is planned of
    them and their lengths.
    """

    def __init__(self, number: int, lengths: list[int]) -> None:
        self.number = number
        self.begun: dict[int, tuple[int, int]] = {}
        self._texts = sorted(range(len(lengths)), key=lengths.__getitem__)
        self._lengths = sorted(lengths)  # in the same order

    @property
    def done(self) -> bool:
        return not self._texts and not self.begun

    def length_of(self, part: Part) -> int:
        """Return the length of the text of its first part."""
        return self.begun[part.text][1] if part.text in self.begun else part.end

    def go_on(self, room: int, step: int) -> Part | None:
        """Plan the next part of a text that is begun and has room, at most a ``step``."""
        for text, (start, length) in self.begun.items():
            end = min(length, start + step)
            if end - start <= room:
                if end == length:
                    del self.begun[text]
                else:
                    self.begun[text] = end, length
                return Part(self.number, text, start, end)
        return None

    def begin(self, room: int, step: int) -> Part | None:
        """Plan the first part, at most a ``step``, of the longest text that has room as a whole."""
        place = bisect_right(self._lengths, room) - 1
        if place < 0:
            return None
        text, length = self._texts.pop(place), self._lengths.pop(place)
        end = min(length, step)
        if end < length:
            self.begun[text] = end, length
        return Part(self.number, text, 0, end)


class Packer:
    """Plans steps of at most ``tokens`` tokens and ``sequences`` texts.

    With ``cells`` texts can be divided: so many tokens can be remembered of all that are begun, and none may have more.
    """

    def __init__(self, *, tokens: int, sequences: int, cells: int | None = None) -> None:
        self._tokens = tokens
        self._sequences = sequences
        self._cells = cells
        self._round = Round()
        self._shares: dict[str, deque[_Request]] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to plan."""
        return not self._shares

    def add(self, request: int, lengths: list[int], share: str = "") -> None:
        """Take a request with texts of so many tokens each, none of them empty."""
        self._round.join(share)
        self._shares.setdefault(share, deque()).append(_Request(request, lengths))

    def remove(self, request: int) -> None:
        """Forget a request."""
        self._keep(lambda each: each.number != request)

    def plan(self) -> list[Part]:
        """Return the parts of the next step, at least one; they count as evaluated. The request whose turn it is comes
        first; while there are no cells for any of its texts, others begin none, so that there will be.
        """
        first = self._shares[self._round.next][0]
        room, cells = self._tokens, self._free_cells
        free = self._sequences - sum(len(request.begun) for request in self._requests)
        parts: list[Part] = []
        candidates = deque(deque(self._shares[share]) for share in self._round)
        while candidates and room > 0:
            requests = candidates[0]
            request = requests.popleft()
            part = request.go_on(room, self._tokens)
            if part is None and free and (part := request.begin(min(cells, room) if parts else cells, self._longest)):
                free -= 1
                cells -= request.length_of(part)
            if part is not None:
                parts.append(part)
                room -= part.end - part.start
                requests.append(request)
                candidates.rotate(-1)
            elif not parts:
                cells = 0
            if not requests:
                candidates.popleft()
        if parts[0].request == first.number:
            self._shares[self._round.turn()].rotate(-1)
        self._keep(lambda each: not each.done)
        return parts

    @property
    def _requests(self) -> Iterator[_Request]:
        return itertools.chain.from_iterable(self._shares.values())

    def _keep(self, wanted: Callable[[_Request], bool]) -> None:
        """Forget all requests but some, and the shares that have none then."""
        for share, requests in list(self._shares.items()):
            if kept := deque(filter(wanted, requests)):
                self._shares[share] = kept
            else:
                del self._shares[share]
                self._round.leave(share)

    @property
    def _longest(self) -> int:
        """The tokens of the longest part."""
        return _ENDLESS if self._cells is None else self._tokens

    @property
    def _free_cells(self) -> int:
        if self._cells is None:
            return _ENDLESS
        return self._cells - sum(length for request in self._requests for _, length in request.begun.values())
