"""Prompts beside running streams, on a clock that goes on by what is evaluated."""

from __future__ import annotations

from itertools import pairwise
from statistics import median

import pytest
from fake_model import FakeModel
from simulated_clock import SimulatedClock

from llamaserve.engine.costs import StepCosts
from llamaserve.engine.events import Delta
from llamaserve.engine.pacing import TimeShare

_LONG = 4000  # tokens
_BATCH = 512
_SAVINGS = 0.25  # seconds that prompts may take at once
# Seconds of a step and of each of its rows: a small model on two cores, a large one on a slow machine, a GPU
_MACHINES = [(7e-3, 2.8e-3), (0.1, 0.05), (20e-3, 0.1e-3)]

pytestmark = pytest.mark.parametrize(("step", "row"), _MACHINES)


class Streams:
    """Some endless streams, and when each token of theirs came."""

    def __init__(self, step: float, row: float, count: int = 1, *, small: float = 1.0, batch: int = _BATCH) -> None:
        self.clock = SimulatedClock(step, row, small)
        self.model = FakeModel(slots=8, cells=40_000, batch=batch, context=8000, clock=self.clock)
        self.count = count
        self.times: list[float] = []  # of the steps in which the streams got a token
        self.prompt_tokens: list[int] = []  # of each step
        for number in range(count):
            self.model.submit(number, f"{number}", stream=True)
        self.run(40)

    def run(self, steps: int) -> None:
        """Take some steps."""
        for _ in range(steps):
            seen, evaluated = len(self.model.events), self.model.memory.evaluated
            self.model.step()
            new = [event.request for event in self.model.events[seen:] if isinstance(event, Delta)]
            streaming = sum(request < self.count for request in new)
            if streaming:
                self.times.append(self.clock.now)
            self.prompt_tokens.append(self.model.memory.evaluated - evaluated - streaming)

    def answer(self, prompt: str, number: int = 100) -> float:
        """Submit a request for one token, and return the seconds until it is there."""
        start = self.clock.now
        self.model.submit(number, prompt, max_tokens=1)
        for _ in range(20_000):
            if self.model.of(number):
                return self.clock.now - start
            self.run(1)
        raise AssertionError("the prompt starves")


def _gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize("count", [1, 4])
def test_a_long_prompt_leaves_a_stream_half_of_its_rate_and_no_long_gap(step: float, row: float, count: int) -> None:
    streams = Streams(step, row, count)
    usual = median(_gaps(streams.times))
    start = len(streams.times)
    streams.answer("p" * _LONG)
    times = streams.times[start - 1 :]
    chunk = max(streams.prompt_tokens) * row
    assert len(times) > 0.5 * (times[-1] - times[0] - _SAVINGS) / usual
    assert max(_gaps(times)) <= 4 * usual + chunk
    assert chunk <= max(0.05, usual, 8 * row) * 1.5


@pytest.mark.parametrize("count", [1, 4])
def test_a_long_prompt_is_answered_in_little_more_than_twice_its_time(step: float, row: float, count: int) -> None:
    """It gets a little less than half of the time, and the rest of the batch where rows are nearly free."""
    streams = Streams(step, row, count)
    assert streams.answer("p" * _LONG) < 2.5 * _LONG * row + 20 * (step + row * count)


def test_steps_beside_a_stream_stay_short_where_large_ones_are_cheaper(step: float, row: float) -> None:
    """What a token costs in the large steps of a prompt alone says nothing about small ones."""
    streams = Streams(step, row, small=3.0)
    streams.model.engine.cancel(0)
    streams.answer("a" * _LONG)
    streams.model.submit(0, "0", stream=True)
    streams.run(40)
    streams.times.clear()
    streams.prompt_tokens.clear()
    streams.answer("p" * _LONG, number=101)
    chunks = [tokens for tokens in streams.prompt_tokens if tokens]
    gaps = [tokens * row * (3 if tokens < 63 else 1) for tokens in chunks]
    assert max(gaps) < max(0.2, 8 * 3 * row * 1.5)
    assert max(gaps[3:]) <= max(0.05, step + 3 * row, 8 * 3 * row) * 1.5


def test_a_prompt_alone_never_takes_steps_that_are_dear_for_being_small(step: float, row: float) -> None:
    streams = Streams(step, row, small=3.0)
    streams.model.engine.cancel(0)
    streams.prompt_tokens.clear()
    streams.answer("p" * _LONG)
    assert all(tokens >= 63 for tokens in streams.prompt_tokens[:-1])


def test_a_prompt_alone_takes_large_steps(step: float, row: float) -> None:
    streams = Streams(step, row)
    streams.model.engine.cancel(0)
    assert streams.answer("p" * _LONG) < _LONG * row + step * (_LONG * row / 0.4 + _LONG / 400 + 10)


def test_a_short_prompt_is_answered_in_a_few_steps(step: float, row: float) -> None:
    streams = Streams(step, row)
    streams.run(1)
    streams.prompt_tokens.clear()
    streams.answer("p" * 8)
    assert streams.prompt_tokens == [8 - 1 + 1]


def test_short_prompts_one_after_another_leave_the_stream_its_share(step: float, row: float) -> None:
    streams = Streams(step, row)
    usual = median(_gaps(streams.times))
    start = len(streams.times)
    for number in range(200):
        streams.answer(f"{number}-" + chr(60 + number % 60) * 40, number=1000 + number)
    times = streams.times[start - 1 :]
    assert len(times) > 0.5 * (times[-1] - times[0] - _SAVINGS) / usual


def test_after_a_pause_of_the_machine_prompts_do_not_wait_it_out(step: float, row: float) -> None:
    """A step that took a minute, as when its memory was swapped out, is no debt of the prompt in it."""
    streams = Streams(step, row)
    streams.answer("q" * _LONG)
    streams.model.submit(50, "p" * _LONG, max_tokens=1)
    streams.run(2)
    streams.model.runner.during = lambda: setattr(streams.clock, "now", streams.clock.now + 60)
    streams.run(1)
    streams.model.runner.during = lambda: None
    start = streams.clock.now
    for _ in range(20_000):
        if streams.model.of(50):
            break
        streams.run(1)
    assert streams.clock.now - start < 2.5 * _LONG * row + 20 * (step + row) + 3


def test_a_share_is_taken_only_while_there_are_savings(step: float, row: float) -> None:
    costs = StepCosts()
    share = TimeShare(costs)
    for _ in range(20):
        costs.record(1, 0, step + row)
    costs.record(1, 100, step + 101 * row)
    assert share.prompt_tokens(1, 1, 500) >= 8
    share.record(1, 1000, step + 1001 * row + 1)
    assert share.prompt_tokens(1, 1, 500) == 0
    assert share.prompt_tokens(0, 1, 500) > 0, "nobody is disturbed"
    while not share.prompt_tokens(1, 1, 500):
        share.record(1, 0, step + row)


def test_many_prompts_beside_one_stream_take_most_of_the_time(step: float, row: float) -> None:
    streams = Streams(step, row)
    start, tokens = streams.clock.now, len(streams.times)
    for number in range(7):
        streams.model.submit(100 + number, chr(65 + number) * 400, max_tokens=1)
    while not all(streams.model.of(100 + number) for number in range(7)):
        streams.run(1)
    seconds, steps = streams.clock.now - start, len(streams.times) - tokens
    assert seconds - steps * (step + row) > 0.6 * seconds or steps <= 12
