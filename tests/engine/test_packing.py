"""Which texts share a step: what holds for any requests, with texts that can be divided and with such that can't."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, strategies as st

from llamaserve.engine.packing import Packer, Part

Spans = dict[tuple[int, int], list[tuple[int, int]]]  # by request and text: from where to where, in order


@dataclass
class Desk:
    """A packer, and what it was given and has planned. ``events`` are requests to add (their lengths), or to remove
    (their numbers), each at a step; None where a step comes. The requests count for so many ``shares``, one after the
    other, or as is said in ``named``.
    """

    tokens: int
    sequences: int
    cells: int | None
    events: list[list[int] | int | None]
    shares: int = 1
    named: dict[int, str] = field(default_factory=dict)  # by request
    lengths: dict[int, list[int]] = field(default_factory=dict)
    removed: set[int] = field(default_factory=set)
    spans: Spans = field(default_factory=lambda: defaultdict(list))
    steps: int = 0
    came: dict[int, int] = field(default_factory=dict)  # by request: how many steps were before it
    served: dict[int, int] = field(default_factory=dict)  # likewise, with its first part

    def run(self) -> Desk:
        """Let everything come and be planned, and check each step."""
        self.packer = Packer(tokens=self.tokens, sequences=self.sequences, cells=self.cells)
        for event in self.events:
            match event:
                case None:
                    if not self.packer.idle:
                        self._step()
                case int():
                    self.packer.remove(event)
                    self.removed.add(event)
                case list():
                    number = len(self.lengths)
                    self.lengths[number] = event
                    self.came[number] = self.steps
                    self.packer.add(number, list(event), self.named.get(number, str(number % self.shares)))
        while not self.packer.idle:
            self._step()
        return self

    def _step(self) -> None:
        parts = self.packer.plan()
        self.steps += 1
        assert parts
        assert len({(part.request, part.text) for part in parts}) == len(parts) <= self.sequences
        total = sum(part.end - part.start for part in parts)
        assert total <= self.tokens or (self.cells is None and len(parts) == 1)
        open_before = set(self._begun())
        for part in parts:
            assert part.request not in self.removed
            assert 0 <= part.start < part.end <= self.lengths[part.request][part.text]
            self.spans[part.request, part.text].append((part.start, part.end))
            self.served.setdefault(part.request, self.steps)
        held = open_before | {(part.request, part.text) for part in parts}  # until the step is over
        assert len(held) <= self.sequences
        if self.cells is not None:
            assert sum(self.lengths[request][text] for request, text in held) <= self.cells

    def _begun(self) -> Iterator[tuple[int, int]]:
        """Yield the texts of which a part is planned, and not all."""
        for (request, text), spans in self.spans.items():
            if request not in self.removed and spans[-1][1] < self.lengths[request][text]:
                yield request, text

    def check_all_is_planned_once(self) -> None:
        """Every token of every text that was not removed is in one step, in order."""
        for request, lengths in self.lengths.items():
            if request in self.removed:
                continue
            for text, length in enumerate(lengths):
                spans = self.spans[request, text]
                assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
                assert spans[-1][1] == length


@st.composite
def desks(draw: st.DrawFn, *, divided: bool) -> Desk:
    """Steps small and large, texts short and long, requests that come and go."""
    tokens = draw(st.integers(1, 20))
    cells = draw(st.integers(tokens, 80)) if divided else None
    longest = cells or 50
    lengths = st.integers(1, longest) | st.integers(1, min(3, longest))
    requests = st.lists(lengths, min_size=1, max_size=12)
    event = requests | st.integers(0, 8) | st.none()
    events: list[list[int] | int | None] = draw(st.lists(event, max_size=25))
    return Desk(tokens, draw(st.integers(1, 6)), cells, _possible(events), draw(st.integers(1, 3)))


def _possible(events: list[list[int] | int | None]) -> list[list[int] | int | None]:
    """Leave out the removal of requests that never came."""
    count = 0
    kept: list[list[int] | int | None] = []
    for event in events:
        count += isinstance(event, list)
        if not isinstance(event, int) or event < count:
            kept.append(event)
    return kept


any_desks = desks(divided=False) | desks(divided=True)


@given(any_desks)
def test_every_token_is_planned_once_and_in_order_within_the_limits(desk: Desk) -> None:
    desk.run().check_all_is_planned_once()
    assert desk.packer.idle


@given(any_desks)
def test_where_a_text_is_divided_depends_on_no_other(desk: Desk) -> None:
    desk.run()
    for (request, text), spans in desk.spans.items():
        length = desk.lengths[request][text]
        step = length if desk.cells is None else desk.tokens
        bounds = [(start, min(length, start + step)) for start in range(0, length, step)]
        assert spans == bounds[: len(spans)]


@given(any_desks)
def test_it_plans_the_same_each_time(desk: Desk) -> None:
    again = replace(desk, lengths={}, removed=set(), spans=defaultdict(list), steps=0, came={}, served={})
    assert desk.run().spans == again.run().spans


# Fairness

_others = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=40), max_size=8)


@given(_others, st.integers(0, 10), _others, st.integers(1, 20), st.integers(1, 6))
def test_a_short_text_waits_a_step_for_each_request_before_it(
    before: list[list[int]], steps: int, behind: list[list[int]], tokens: int, sequences: int
) -> None:
    """However many texts those have, and however long ones."""
    desk = Desk(tokens, sequences, None, [*before, *[None] * steps, [1], *behind]).run()
    number = len(before)
    assert desk.served[number] - desk.came[number] <= len(before) + 1


@given(_others, st.integers(0, 10), _others, st.integers(1, 20), st.integers(1, 6), st.integers(50, 120))
def test_with_texts_that_are_divided_it_waits_at_most_for_one_text_of_each(
    before: list[list[int]], steps: int, behind: list[list[int]], tokens: int, sequences: int, cells: int
) -> None:
    """While a long text has the cells that it needs, there may be none for others. What came behind it can't make it
    wait longer: each request before it makes at most a long text go first, and those that are begun come to their end.
    """
    desk = Desk(tokens, sequences, cells, [*before, *[None] * steps, [1], *behind]).run()
    number = len(before)
    steps_of_one = -(-max((length for lengths in before for length in lengths), default=1) // tokens)
    assert desk.served[number] - desk.came[number] <= 2 * len(before) * steps_of_one + 1


@given(_others, st.integers(0, 10), _others, st.integers(1, 20), st.integers(1, 6), st.integers(1, 3))
def test_a_short_text_of_another_share_waits_a_step_for_each_share(
    before: list[list[int]], steps: int, behind: list[list[int]], tokens: int, sequences: int, shares: int
) -> None:
    """However many requests those have."""
    number = len(before)
    desk = Desk(tokens, sequences, None, [*before, *[None] * steps, [1], *behind], shares, {number: "other"}).run()
    assert desk.served[number] - desk.came[number] <= min(shares, len(before)) + 1


@given(st.integers(1, 20), st.integers(1, 60), st.integers(1, 6), st.integers(1, 60), st.integers(1, 3))
def test_a_text_that_needs_all_cells_is_not_passed_over_for_ever(
    tokens: int, more: int, sequences: int, length: int, shares: int
) -> None:
    """Others come in every step, each with texts that have room."""
    cells = tokens + more
    packer = Packer(tokens=tokens, sequences=sequences, cells=cells)
    packer.add(-1, [min(length, cells)] * 3)
    packer.plan()
    packer.add(0, [cells], "0")
    limit = 4 * shares * (cells // tokens + 2)
    for number in range(1, limit):
        packer.add(number, [min(length, cells)] * 2, str(number % shares))
        if any(part.request == 0 for part in packer.plan()):
            return
    pytest.fail(f"not begun in {limit} steps")


def test_nobody_takes_the_cells_that_a_text_waits_for() -> None:
    packer = Packer(tokens=10, sequences=8, cells=100)
    packer.add(1, [50])
    packer.plan()
    packer.add(2, [100])
    for request in range(3, 20):
        packer.add(request, [40])
    steps = [packer.plan() for _ in range(5)]
    assert [part.request for parts in steps for part in parts] == [1, 1, 1, 1, 2]


def test_a_request_takes_turns_with_another_of_thousands_of_texts() -> None:
    packer = Packer(tokens=63, sequences=64)
    packer.add(1, [10] * 2000)
    packer.plan()
    packer.add(2, [20])
    assert [part.request for part in packer.plan()] == [1, 2, 1, 1, 1]


def test_a_share_with_one_request_takes_turns_with_another_of_many() -> None:
    packer = Packer(tokens=40, sequences=64)
    for request in range(100):
        packer.add(request, [10] * 5, "a")
    packer.plan()
    packer.add(100, [10] * 5, "b")
    steps = [[part.request for part in packer.plan()] for _ in range(3)]
    assert steps == [[100, 1, 100, 2], [1, 100, 2, 100], [100, 2, 3, 4]]


def test_a_step_is_filled_although_the_next_text_of_the_first_request_has_no_room() -> None:
    for cells in (None, 1000):
        packer = Packer(tokens=63, sequences=64, cells=cells)
        packer.add(1, [40, 40])
        packer.add(2, [3] * 20)
        parts = packer.plan()
        assert sum(part.end - part.start for part in parts) > 60
        assert {part.request for part in parts} == {1, 2}


def test_the_rest_of_a_divided_text_shares_its_step() -> None:
    packer = Packer(tokens=10, sequences=4, cells=40)
    packer.add(1, [25])
    packer.add(2, [2, 3])
    steps = []
    while not packer.idle:
        steps.append(packer.plan())
    assert steps == [
        [Part(1, 0, 0, 10)],
        [Part(2, 1, 0, 3), Part(2, 0, 0, 2)],
        [Part(1, 0, 10, 20)],
        [Part(1, 0, 20, 25)],
    ]


def test_a_text_that_no_step_has_room_for_is_planned_alone() -> None:
    packer = Packer(tokens=63, sequences=64)
    packer.add(1, [64, 1])
    packer.add(2, [1])
    assert packer.plan() == [Part(1, 0, 0, 64)]
    assert packer.plan() == [Part(2, 0, 0, 1), Part(1, 1, 0, 1)]
    assert packer.idle


def test_what_was_removed_gives_its_cells_and_sequence_back() -> None:
    packer = Packer(tokens=10, sequences=1, cells=30)
    packer.add(1, [30])
    packer.plan()
    packer.add(2, [30])
    packer.remove(1)
    packer.remove(7)  # nobody knows it
    assert packer.plan() == [Part(2, 0, 0, 10)]
    packer.remove(2)
    assert packer.idle
