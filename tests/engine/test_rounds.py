"""Turns that go round the shares: who is next, for any that come and go."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llamaserve.engine.rounds import Queues, Round

_NAMES = st.sampled_from(["", "a", "b", "c"])


def names(text: str) -> Round:
    turns = Round()
    for name in text:
        turns.join(name)
    return turns


def test_each_has_a_turn_after_the_other() -> None:
    turns = names("abcab")
    assert "".join(turns.turn() for _ in range(7)) == "abcabca"


def test_one_that_comes_new_is_before_the_one_that_had_the_last_turn() -> None:
    turns = names("ab")
    turns.turn()
    turns.join("c")
    assert "".join(turns) == "bca"
    turns.join("d")
    assert "".join(turns) == "bcda"


def test_one_that_comes_back_after_its_turn_is_the_last() -> None:
    turns = names("ab")
    turns.turn()
    turns.leave("a")
    turns.leave("x")
    turns.join("c")
    turns.join("a")
    assert "".join(turns) == "bca"


def test_without_any_there_is_no_turn() -> None:
    with pytest.raises(IndexError):
        _ = Round().next
    with pytest.raises(IndexError):
        Queues[int]().take()


@given(st.lists(st.integers(0, 2), max_size=40))
def test_a_single_share_is_a_queue(events: list[int]) -> None:
    queues, expected = Queues[int](), deque[int]()
    for number, event in enumerate(events):
        if event or not expected:
            queues.add(number, "a")
            expected.append(number)
        else:
            assert queues.take() == (expected.popleft(), "a")
    assert [queues.take()[0] for _ in range(len(queues))] == list(expected)


class Waiting(RuleBasedStateMachine):
    """Some wait, give up, and are taken; ``passes`` has what was taken of others since a share's last turn, or since it
    came.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queues = Queues[int]()
        self.expected: dict[str, list[int]] = {}
        self.passes: dict[str, list[str]] = {}
        self.number = 0

    @rule(share=_NAMES)
    def add(self, share: str) -> None:
        self.number += 1
        self.queues.add(self.number, share)
        self.expected.setdefault(share, []).append(self.number)
        self.passes.setdefault(share, [])

    @precondition(lambda self: self.expected)
    @rule()
    def take(self) -> None:
        coming = self.queues.next
        item, share = self.queues.take()
        assert (item, share) == coming
        assert item == self.expected[share].pop(0)
        for other in self.passes:
            self.passes[other].append(share)
        self.passes[share] = []
        self.forget_if_empty(share)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        share = data.draw(st.sampled_from(sorted(self.expected)))
        item = data.draw(st.sampled_from(self.expected[share]))
        self.queues.discard(item, share)
        self.queues.discard(item, share)
        self.expected[share].remove(item)
        self.forget_if_empty(share)

    def forget_if_empty(self, share: str) -> None:
        if not self.expected[share]:
            del self.expected[share], self.passes[share]

    @invariant()
    def none_is_passed_twice_by_the_same(self) -> None:
        assert len(self.queues) == sum(map(len, self.expected.values()))
        assert bool(self.queues) == bool(self.expected)
        assert all(len(set(passes)) == len(passes) for passes in self.passes.values())


TestWaiting = Waiting.TestCase
