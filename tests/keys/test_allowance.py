"""What a key may use: buckets that fill again, turns in order, and books that balance."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, strategies as st
from simulated_clock import SimulatedClock

from llamaserve.errors import RateLimitExceeded
from llamaserve.keys.allowance import QUEUE, Allowance, Allowances, Bucket
from llamaserve.keys.keyring import Key, Limits


def key(**limits: int) -> Key:
    return Key("laptop", b"", limits=Limits(**limits))


@given(st.integers(1, 10_000), st.lists(st.tuples(st.floats(0, 300), st.integers(0, 20_000)), max_size=20))
def test_a_bucket_never_gives_more_than_a_minute_is_worth_at_once(
    size: int, events: Sequence[tuple[float, int]]
) -> None:
    clock = SimulatedClock()
    bucket = Bucket(size, clock)
    taken = 0
    for seconds, amount in events:
        clock.now += seconds
        assert bucket.level <= size
        bucket.take(amount)
        taken += amount
        assert taken <= size - bucket.level + size * clock.now / 60 + 1e-6
    wait = bucket.seconds_until(size)
    clock.now += wait
    assert bucket.level == pytest.approx(size)


def test_what_was_taken_stays_taken_when_the_limit_changes() -> None:
    clock = SimulatedClock()
    bucket = Bucket(100, clock)
    bucket.take(80)
    bucket.resize(50)
    assert bucket.level == -30
    bucket.resize(100)
    assert bucket.level == 20


def test_a_clock_that_goes_back_gives_nothing() -> None:
    clock = SimulatedClock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    clock.now -= 1000
    assert bucket.level == 0


def test_tokens_are_spent_afterwards_and_come_back() -> None:
    clock = SimulatedClock()
    allowance = Allowance(key(tokens_per_minute=600), clock)
    allowance.enter()
    allowance.spend(900)
    with pytest.raises(RateLimitExceeded) as caught:
        allowance.enter()
    assert "laptop" in caught.value.message
    assert "600 tokens a minute" in caught.value.message
    assert caught.value.retry_after == 31
    clock.now += 31
    allowance.enter()


def test_requests_a_minute() -> None:
    clock = SimulatedClock()
    allowance = Allowance(key(requests_per_minute=3), clock)
    for _ in range(3):
        allowance.enter()
    with pytest.raises(RateLimitExceeded) as caught:
        allowance.enter()
    assert caught.value.retry_after == 20
    clock.now += 20
    allowance.enter()


def test_a_refused_request_costs_nothing() -> None:
    clock = SimulatedClock()
    allowance = Allowance(key(requests_per_minute=10, concurrent=1, queue=0), clock)
    allowance.enter()
    for _ in range(20):
        with pytest.raises(RateLimitExceeded):
            allowance.enter()
    assert allowance.requests is not None
    assert allowance.requests.level == 9
    allowance.leave()
    allowance.enter()


def test_a_queue_has_an_end_where_nothing_is_said_of_it() -> None:
    allowance = Allowance(key(concurrent=2))
    for _ in range(2 + QUEUE):
        allowance.enter()
    with pytest.raises(RateLimitExceeded, match="66 requests under way or waiting"):
        allowance.enter()


def test_refusals_are_recorded_up_to_a_number_a_minute() -> None:
    clock = SimulatedClock()
    allowance = Allowance(key(requests_per_minute=1), clock)
    assert [allowance.records_refusal() for _ in range(1000)].count(True) == 60
    clock.now += 1
    assert [allowance.records_refusal() for _ in range(1000)].count(True) == 1


def test_turns_are_in_order_and_as_many_as_may_at_once() -> None:
    asyncio.run(take_turns())


async def take_turns() -> None:
    allowance = Allowance(key(concurrent=2))
    begun: list[int] = []
    ends = [asyncio.Event() for _ in range(6)]

    async def work(number: int) -> None:
        await allowance.turn()
        begun.append(number)
        try:
            await ends[number].wait()
        finally:
            allowance.end_turn()

    tasks = [asyncio.create_task(work(number)) for number in range(6)]
    await settled()
    assert begun == [0, 1]
    tasks[2].cancel()  # while it waits
    ends[1].set()
    await settled()
    assert begun == [0, 1, 3]
    tasks[0].cancel()  # while it works
    await settled()
    assert begun == [0, 1, 3, 4]
    allowance.limit(Limits())
    await settled()
    assert begun == [0, 1, 3, 4, 5]
    for end in ends:
        end.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert allowance.idle
    allowance.limit(Limits(concurrent=1))
    await asyncio.wait_for(allowance.turn(), 1)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_who_is_cancelled_just_when_let_in_gives_the_turn_on() -> None:
    async def scene() -> None:
        allowance = Allowance(key(concurrent=1))
        await allowance.turn()
        first, second = (asyncio.create_task(allowance.turn()) for _ in range(2))
        await settled()
        allowance.end_turn()
        first.cancel()
        await asyncio.wait_for(second, 1)
        assert first.cancelled()

    asyncio.run(scene())


def test_each_name_has_its_own_and_idle_ones_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Allowances, "_MOST", 3)
    clock = SimulatedClock()
    allowances = Allowances(clock)
    busy = allowances.of(Key("busy", b"", limits=Limits(tokens_per_minute=5)))
    busy.spend(3)
    for number in range(20):
        allowances.of(Key(f"key{number}", b""))
    assert allowances.of(Key("busy", b"", limits=Limits(tokens_per_minute=9))) is busy
    assert busy.tokens is not None
    assert busy.tokens.level == 6
