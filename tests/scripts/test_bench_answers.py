"""Figures from the times at which text came."""

from __future__ import annotations

import math

import pytest
from benchmark.answers import (
    Answer,
    Request,
    change_over,
    decode_rate,
    rate,
    rates_over_time,
    seconds,
    settled_rate,
)
from hypothesis import given, strategies as st


def steady(started: float, first: float, step: float, tokens: int) -> Answer:
    """An answer whose first token comes after ``first`` seconds, and the others ``step`` seconds apart."""
    times = [started + first + step * number for number in range(tokens)]
    return Answer(started, times, [1] * tokens, {0: "x" * tokens}, {0: times[0]}, tokens)


def test_rates_count_what_came() -> None:
    answer = steady(100, 0.5, 0.1, 11)
    assert answer.first == pytest.approx(0.5)
    assert seconds([answer]) == pytest.approx(1.5)
    assert rate([answer]) == pytest.approx(11 / 1.5)
    assert decode_rate([answer]) == pytest.approx(10)  # ten tokens in one second after the first
    assert answer.gaps(100, 200) == pytest.approx([0.1] * 10)


def test_decode_rate_is_taken_while_all_answers_flow() -> None:
    early, late = steady(0, 0.1, 0.1, 20), steady(0, 1.05, 0.1, 20)
    assert decode_rate([early, late]) == pytest.approx(20, rel=0.1)


def test_a_piece_with_several_tokens_counts_by_its_length() -> None:
    answer = Answer(0, [1, 2, 3], [1, 4, 5], {0: "abcdefghij"}, {0: 1}, tokens=5)
    assert answer.tokens_between(1, 2) == pytest.approx(2)
    assert answer.tokens_between(0, 3) == pytest.approx(5)
    assert answer.gaps(0, 2) == [1]


def test_an_answer_without_text_has_no_figures() -> None:
    nothing = Answer(5.0)
    assert math.isnan(nothing.first)
    assert math.isnan(decode_rate([nothing]))
    assert math.isnan(rate([nothing]))
    assert nothing.tokens_between(0, 10) == 0


def test_a_request_with_several_choices_waits_for_the_first_text_of_each() -> None:
    answer = Answer(0, [1, 2, 3], [1, 1, 1], {0: "ab", 1: "c"}, {0: 1.0, 1: 3.0}, 3)
    assert answer.first == 3.0


@given(st.lists(st.floats(0.001, 0.2), min_size=30, max_size=200), st.integers(0, 20))
def test_windows_lose_no_token(steps: list[float], cut: int) -> None:
    times = [sum(steps[: number + 1]) for number in range(len(steps))]
    answer = Answer(0, times, [1] * len(times), {}, {}, len(times))
    middle = times[cut]
    both = answer.tokens_between(-1, middle) + answer.tokens_between(middle, times[-1])
    assert both == pytest.approx(len(times))
    assert all(value >= 0 for _, value in rates_over_time(answer, 0, times[-1]))


def with_rates(*spans: tuple[float, float]) -> Answer:
    """An answer that flows for so many seconds at so many tokens a second, span after span."""
    times, now = [], 0.0
    for length, speed in spans:
        times += [now + number / speed for number in range(1, int(length * speed + 0.5) + 1)]
        now += length
    return Answer(0, times, [1] * len(times), {}, {0: times[0]}, len(times))


def test_the_change_over_is_the_time_to_the_new_rate() -> None:
    answer = with_rates((2, 100), (0.7, 10), (2.3, 60))
    assert settled_rate(answer, 2, 5) == pytest.approx(60, rel=0.1)
    assert change_over(answer, 2, 5) == pytest.approx(0.65, abs=0.1)


def test_a_change_over_that_is_there_at_once() -> None:
    assert change_over(with_rates((2, 100), (3, 60)), 2, 5) == pytest.approx(0, abs=0.02)


def test_a_change_over_that_does_not_come_lasts_the_whole_span() -> None:
    answer = with_rates((2, 100), (2.8, 5), (0.2, 100))
    answer_that_jumps_late = with_rates((2, 100), (1.4, 5), (1.6, 100))
    assert change_over(answer_that_jumps_late, 2, 5) == pytest.approx(1.4, abs=0.15)
    assert change_over(answer, 2, 4.8) <= 2.8


def test_a_request_asks_for_no_more_than_it_says() -> None:
    body = Request(7, "Once").body("tiny")
    assert body == {
        "prompt": "Once",
        "max_tokens": 7,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "model": "tiny",
    }
    chat = Request(7, messages=({"role": "user", "content": "Hi"},), n=4, banned=(2,), extra={"seed": 1}).body(None)
    assert "prompt" not in chat
    assert "model" not in chat
    assert (chat["n"], chat["logit_bias"], chat["seed"]) == (4, {"2": -100}, 1)
