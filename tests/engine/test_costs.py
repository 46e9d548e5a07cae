from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, strategies as st

from llamaserve.engine.costs import LARGE, StepCosts

_STEEP = {1: 7.3e-3, 2: 14.5e-3, 4: 20.5e-3, 8: 36e-3, 16: 68e-3, 32: 130e-3}  # seconds by rows


def _measured(curve: dict[int, float], times: int = 20, noise: float = 0.0) -> StepCosts:
    rng = random.Random(0)
    costs = StepCosts()
    for _ in range(times):
        for rows, seconds in curve.items():
            costs.record(rows, 0, seconds * rng.uniform(1 - noise, 1 + noise))
    return costs


def test_further_rows_seem_dear_before_anything_is_measured() -> None:
    costs = StepCosts()
    assert costs.decode(8) / costs.decode(1) == pytest.approx(1 + 0.6 * 7)
    assert costs.prompt_token() == pytest.approx(0.4 * costs.decode(1))
    assert costs.decode(0) == 0


def test_one_step_tells_what_all_cost_at_least_roughly() -> None:
    costs = StepCosts()
    costs.record(4, 0, 0.28)
    assert costs.decode(4) == pytest.approx(0.28)
    assert costs.decode(1) == pytest.approx(0.1)
    assert costs.decode(8) == pytest.approx(0.52)


@pytest.mark.parametrize(("token", "eight"), [(0.001, 1.105), (0.1, 8.0)])
def test_a_prompt_tells_what_further_rows_cost(token: float, eight: float) -> None:
    costs = StepCosts()
    costs.record(0, 101, 100 * token)
    for _ in range(5):
        costs.record(1, 0, 0.1)
    assert costs.decode(8) / costs.decode(1) == pytest.approx(eight, rel=0.01)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_curve_of_any_shape_is_learnt(noise: float) -> None:
    costs = _measured(_STEEP, noise=noise)
    for rows, seconds in _STEEP.items():
        assert costs.decode(rows) == pytest.approx(seconds, rel=0.03 + noise)
    assert costs.decode(3) == pytest.approx(17.5e-3, rel=0.03 + noise)
    assert costs.decode(64) > 0.2


def test_what_is_cheaper_than_guessed_is_believed_at_once() -> None:
    costs = _measured({1: 0.01}, 5)
    costs.record(16, 0, 0.012)
    assert costs.decode(16) == pytest.approx(0.012)
    assert costs.decode(8) == pytest.approx(0.0109, rel=0.01)


@pytest.mark.parametrize("factor", [0.4, 3.0])
def test_all_numbers_of_rows_follow_one_that_drifts(factor: float) -> None:
    costs = _measured(_STEEP)
    for _ in range(40):
        costs.record(1, 0, _STEEP[1] * factor)
    assert costs.decode(8) == pytest.approx(_STEEP[8] * factor, rel=0.04)


def test_one_number_of_rows_may_change_by_itself() -> None:
    costs = _measured(_STEEP, 500)
    for _ in range(300):
        costs.record(1, 0, _STEEP[1])
        costs.record(8, 0, _STEEP[8] * 1.4)
    assert costs.decode(8) == pytest.approx(_STEEP[8] * 1.4, rel=0.05)
    assert costs.decode(1) == pytest.approx(_STEEP[1], rel=0.1)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_pause_spoils_nothing(rows: int) -> None:
    costs = _measured(_STEEP)
    costs.record(rows, 0, 50 * _STEEP[rows])
    assert costs.decode(1) == pytest.approx(_STEEP[1], rel=0.12)
    assert costs.decode(8) == pytest.approx(_STEEP[8], rel=0.12)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_pause_in_the_very_first_step_is_forgotten_at_the_next(rows: int) -> None:
    costs = StepCosts()
    costs.record(rows, 0, 5.0)
    costs.record(rows, 0, 0.1)
    assert costs.decode(rows) == pytest.approx(0.1)


def test_a_pause_in_the_first_step_of_so_many_rows_is_forgotten_soon() -> None:
    costs = _measured({1: 0.01}, 5)
    costs.record(8, 0, 5.0)
    for _ in range(10):
        costs.record(8, 0, 0.03)
    assert costs.decode(8) == pytest.approx(0.03, rel=0.15)


def test_what_a_prompt_adds_to_a_step_is_learnt() -> None:
    costs = _measured(_STEEP)
    for _ in range(10):
        costs.record(8, 128, _STEEP[8] + 128 * 0.003)
        costs.record(0, 257, _STEEP[1] + 256 * 0.003)
    assert costs.prompt_token() == pytest.approx(0.003, rel=0.01)
    costs.record(8, 128, 20.0)
    assert costs.prompt_token() == pytest.approx(0.003, rel=0.15)
    assert costs.decode(8) == pytest.approx(_STEEP[8], rel=0.01)


def test_what_prompts_cost_may_change() -> None:
    costs = _measured(_STEEP)
    for seconds in (0.003, 0.004):
        for _ in range(20):
            costs.record(1, 256, _STEEP[1] + 256 * seconds)
    assert costs.prompt_token() == pytest.approx(0.004, rel=0.01)


def test_a_prompt_that_seemed_free_is_soon_known_not_to_be() -> None:
    costs = _measured(_STEEP)
    costs.record(8, 4, _STEEP[8] / 2)
    assert 0 < costs.prompt_token() < 1e-4
    for _ in range(20):
        costs.record(1, 16, _STEEP[1] + 16 * 0.003)
    assert costs.prompt_token() > 0.002


def test_a_prompt_may_cost_less_in_large_steps() -> None:
    costs = _measured(_STEEP)
    costs.record(1, LARGE - 1, _STEEP[1] + (LARGE - 1) * 0.004)
    assert costs.prompt_token() == costs.prompt_token(large=True) == pytest.approx(0.004, rel=0.01)
    for _ in range(20):
        costs.record(1, LARGE - 2, _STEEP[1] + (LARGE - 2) * 0.01)
    assert costs.prompt_token() == pytest.approx(0.01, rel=0.01)
    assert costs.prompt_token(large=True) == pytest.approx(0.004, rel=0.01)


def test_a_prompt_of_one_token_is_a_step_of_one_row() -> None:
    costs = StepCosts()
    costs.record(0, 1, 0.2)
    assert costs.decode(1) == pytest.approx(0.2)


@given(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 300), st.floats(1e-5, 100))), st.integers(1, 200))
def test_a_cost_is_always_a_positive_number_of_seconds(steps: list[tuple[int, int, float]], rows: int) -> None:
    costs = StepCosts()
    for step in steps:
        costs.record(*step)
    assert 0 < costs.decode(rows) < math.inf
    assert 0 < costs.prompt_token() < math.inf
    assert 0 < costs.prompt_token(large=True) < math.inf
