"""Which rows are too old, and when they are looked for, whatever happens to the wall clock."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, strategies as st

from llamaserve.usage.retention import BATCH, DAY, SETTLING, Retention

NOW = 1_800_000_000.0


@dataclass
class Clocks:
    """Two clocks, of which the one on the wall can be set."""

    wall: float = NOW
    monotonic: float = 5.0

    def retention(self, days: int) -> Retention:
        return Retention(days, lambda: self.wall, lambda: self.monotonic)

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def test_rows_are_looked_through_an_hour_after_the_start_in_batches_and_then_once_a_day() -> None:
    clocks = Clocks()
    retention = clocks.retention(10)
    assert retention.pause == SETTLING
    clocks.wait(SETTLING)
    assert retention.pause <= 0
    retention.deleted(BATCH)
    assert 0 < retention.pause < 1
    clocks.wait(1)
    retention.deleted(BATCH - 1)
    assert retention.pause == DAY
    clocks.wait(DAY)
    assert retention.pause <= 0
    assert retention.cutoff == clocks.wall - 10 * DAY


@pytest.mark.parametrize("jump", [-400 * DAY, 400 * DAY])
def test_a_wall_clock_that_jumps_does_not_change_when_rows_are_looked_through(jump: float) -> None:
    clocks = Clocks()
    retention = clocks.retention(10)
    retention.deleted(0)
    clocks.wall += jump
    assert retention.pause == DAY


def test_a_clock_that_is_ahead_at_the_start_and_put_right_deletes_nothing_new() -> None:
    clocks = Clocks(wall=NOW + 500 * DAY)
    retention = clocks.retention(400)
    clocks.wait(60)
    clocks.wall -= 500 * DAY
    clocks.wait(SETTLING)
    assert retention.pause <= 0
    assert retention.cutoff == NOW + 60 + SETTLING - 400 * DAY


@given(st.lists(st.tuples(st.floats(0, 40 * DAY), st.floats(-1e9, 1e9)), max_size=20))
def test_nothing_is_too_old_that_would_not_be_without_the_jumps(steps: list[tuple[float, float]]) -> None:
    clocks = Clocks()
    retention = clocks.retention(400)
    for seconds, jump in steps:
        clocks.wait(seconds)
        clocks.wall += jump
    true_now = NOW + clocks.monotonic - 5.0
    assert retention.cutoff <= true_now - 400 * DAY + 1e-3


def test_rows_are_kept_for_a_day_at_least() -> None:
    with pytest.raises(ValueError, match="a day at least"):
        Clocks().retention(0)
