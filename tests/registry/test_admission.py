from __future__ import annotations

import pytest

from llamaserve.errors import QueueFull
from llamaserve.registry.admission import Admission, TextAdmission


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
