from __future__ import annotations

from collections import Counter
from math import ceil

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llamaserve.errors import QueueFull
from llamaserve.registry.admission import Admission, Place, TextAdmission


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_as_many_as_run_and_may_wait_are_let_in() -> None:
    admission = Admission(parallel=2, queue=3)
    places = [admission.enter(1) for _ in range(5)]
    with pytest.raises(QueueFull, match="3 answers wait"):
        admission.enter(1)
    places[0].leave()
    places[0].leave()
    admission.enter(1)
    with pytest.raises(QueueFull):
        admission.enter(1)


def test_a_large_request_is_let_in_where_a_small_one_would_be() -> None:
    admission = Admission(parallel=2, queue=0)
    place = admission.enter(50)
    with pytest.raises(QueueFull):
        admission.enter(1)
    place.leave()
    assert admission.open == 0
    admission.enter(1)


def test_the_time_to_wait_follows_from_how_long_requests_take() -> None:
    clock = _Clock()
    admission = Admission(parallel=2, queue=1, clock=clock)

    def refused() -> float:
        with pytest.raises(QueueFull) as caught:
            admission.enter(1)
        assert caught.value.retry_after is not None
        return caught.value.retry_after

    places = [admission.enter(1) for _ in range(3)]
    assert refused() == 1.0
    for _ in range(60):
        clock.now += 8.0
        places.pop(0).leave()
        places.append(admission.enter(1))
    assert refused() == pytest.approx(8.0, rel=0.01)  # each of three stays for 24 s
    for _ in range(60):
        clock.now += 1000.0
        places.pop(0).leave()
        places.append(admission.enter(1))
    assert refused() == 60.0


def test_many_sequences_of_one_request_leave_together() -> None:
    clock = _Clock()
    admission = Admission(parallel=1, queue=0, clock=clock)
    for _ in range(60):
        place = admission.enter(50)
        clock.now += 8.0
        place.leave()
    admission.enter(50)
    with pytest.raises(QueueFull) as caught:
        admission.enter(1)
    assert caught.value.retry_after == pytest.approx(8.0, rel=0.01)


def test_small_texts_are_let_in_up_to_a_number_of_requests() -> None:
    admission = TextAdmission(4, 4 * 2**20)
    places = [admission.enter(size) for size in (0, 1, 2**20, 5)]
    with pytest.raises(QueueFull, match=r"requests for embeddings or scores .* \(4, or 4 MiB of text\)") as caught:
        admission.enter(1)
    assert "answers" not in caught.value.message
    assert "queue" not in caught.value.message
    assert caught.value.retry_after == 1.0
    places.pop().leave()
    admission.enter(1)


def test_large_texts_are_let_in_up_to_a_size() -> None:
    admission = TextAdmission(4, 4 * 2**20)
    first, last = admission.enter(2**20 + 1), admission.enter(3 * 2**20)
    with pytest.raises(QueueFull):
        admission.enter(1)
    first.leave()
    admission.enter(100 * 2**20).leave()  # one may always bring more
    last.leave()
    assert admission.open == 0


# Shares


def test_a_share_that_fills_the_queue_does_not_keep_others_out() -> None:
    admission = Admission(parallel=2, queue=4)
    places = [admission.enter(1, "a") for _ in range(6)]
    with pytest.raises(QueueFull, match="4 answers wait"):
        admission.enter(1, "a")
    places += [admission.enter(1, "b") for _ in range(3)]
    with pytest.raises(QueueFull):
        admission.enter(1, "b")
    places += [admission.enter(1) for _ in range(2)]
    with pytest.raises(QueueFull):
        admission.enter(1)
    for place in places:
        place.leave()
    assert admission.open == 0
    assert not admission._held


def test_a_share_that_has_had_more_waits_until_there_is_room_for_it() -> None:
    admission = Admission(parallel=1, queue=3)
    first = [admission.enter(1, "a") for _ in range(4)]
    others = [admission.enter(1, "b") for _ in range(2)]
    first.pop().leave()
    first.pop().leave()
    with pytest.raises(QueueFull):
        admission.enter(1, "a")
    first.pop().leave()
    admission.enter(1, "a")
    assert admission.open == 4
    for place in others:
        place.leave()
    assert admission.open == 2


def test_what_grows_counts_for_its_share() -> None:
    admission = Admission(parallel=1, queue=5)
    large = admission.enter(6, "a")
    small = admission.enter(1, "b")
    with pytest.raises(QueueFull):
        large.grow(1)
    small.grow(1)
    small.grow(1)
    with pytest.raises(QueueFull):
        small.grow(1)
    small.shrink(2)
    assert admission.open == 7
    small.grow(2)
    large.leave()
    small.grow(100)
    small.leave()
    small.grow(1)
    assert admission.open == 0


def test_texts_of_one_share_do_not_keep_others_out() -> None:
    admission = TextAdmission(4, 4 * 2**20)
    admission.enter(5 * 2**20, "a")
    with pytest.raises(QueueFull):
        admission.enter(1, "a")
    admission.enter(1, "b")
    admission.enter(1, "b")
    with pytest.raises(QueueFull, match="requests for embeddings or scores"):
        admission.enter(1, "b")


class Entering(RuleBasedStateMachine):
    """Requests of some shares that come, grow, shrink and go, beside a model of the books."""

    largest = 1

    @initialize(parallel=st.integers(1, 4), queue=st.integers(0, 12))
    def start(self, parallel: int, queue: int) -> None:
        self.places = parallel + queue
        self.admission = Admission(parallel, queue)
        self.inside: list[tuple[Place, str, int]] = []

    def held(self) -> Counter[str]:
        held: Counter[str] = Counter()
        for _, share, sequences in self.inside:
            held[share] += sequences
        return +held

    def may(self, share: str) -> bool:
        """Whether the queue is not full for a share."""
        held = self.held()
        fair = self.places / len(held | Counter({share: 1}))
        return held.total() < self.places or held[share] < fair

    @rule(share=st.sampled_from(["", "a", "b", "c", "d"]), size=st.integers(1, 5))
    def enter(self, share: str, size: int) -> None:
        size = min(size, self.largest)
        if not self.may(share):
            with pytest.raises(QueueFull):
                self.admission.enter(size, share)
            return
        self.inside.append((self.admission.enter(size, share), share, size))

    @precondition(lambda self: getattr(self, "inside", None))
    @rule(data=st.data(), size=st.integers(1, 5))
    def grow(self, data: st.DataObject, size: int) -> None:
        number = data.draw(st.integers(0, len(self.inside) - 1))
        place, share, sequences = self.inside[number]
        size = min(size, self.largest)
        if self.may(share):
            place.grow(size)
            self.inside[number] = place, share, sequences + size
        elif self.held().total() > sequences:  # one that is alone may grow without a bound
            with pytest.raises(QueueFull):
                place.grow(size)

    @precondition(lambda self: getattr(self, "inside", None))
    @rule(data=st.data(), size=st.integers(1, 5))
    def shrink(self, data: st.DataObject, size: int) -> None:
        number = data.draw(st.integers(0, len(self.inside) - 1))
        place, share, sequences = self.inside[number]
        size = min(size, sequences)
        place.shrink(size)
        self.inside[number] = place, share, sequences - size

    @precondition(lambda self: getattr(self, "inside", None))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        place, _, _ = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        place.leave()
        place.leave()

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "admission"):
            return
        held = self.held()
        assert self.admission._held == held
        assert self.admission.open == held.total() >= 0
        assert self.admission._requests == len(self.inside)

    @invariant()
    def there_are_no_more_than_a_harmonic_number_of_queues(self) -> None:
        if hasattr(self, "admission"):
            for number, held in enumerate(sorted(self.held().values(), reverse=True), start=1):
                assert held <= ceil(self.places / number) + self.largest - 1


class EnteringWithMany(Entering):
    largest = 5


TestEntering = Entering.TestCase
TestEnteringWithMany = EnteringWithMany.TestCase
TestEntering.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestEnteringWithMany.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


@given(st.integers(1, 4), st.integers(0, 6), st.lists(st.integers(1, 4) | st.none(), max_size=40), st.text(max_size=2))
def test_with_one_share_there_is_one_bound(parallel: int, queue: int, events: list[int | None], share: str) -> None:
    admission = Admission(parallel, queue)
    inside: list[tuple[Place, int]] = []
    for event in events:
        count = sum(sequences for _, sequences in inside)
        if event is None and inside:
            inside.pop(0)[0].leave()
        elif event is not None and count < parallel + queue:
            inside.append((admission.enter(event, share), event))
        elif event is not None:
            with pytest.raises(QueueFull):
                admission.enter(event, share)
    assert admission.open == sum(sequences for _, sequences in inside)
