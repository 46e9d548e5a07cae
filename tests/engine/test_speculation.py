from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain, product

import pytest
from hypothesis import given, strategies as st

from llamaserve.engine.costs import StepCosts
from llamaserve.engine.speculation import GAIN, MAX_MATCH, MIN_MATCH, NO_DRAFT, Draft, PromptLookup, choose_rows

_texts = st.lists(st.integers(0, 3), max_size=80)


def _match(tokens: list[int], end: int) -> int:
    """How many tokens before ``end`` are the last ones of ``tokens`` too."""
    length = 0
    while length < min(end, MAX_MATCH) and tokens[end - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


def _continuation(tokens: list[int], end: int, limit: int) -> list[int]:
    """What follows ``end``, round and round if need be."""
    extended = list(tokens)
    for position in range(end, end + limit):
        extended.append(extended[position])
    return extended[end : end + limit]


def _learnt(prompt: list[int], answer: list[int]) -> PromptLookup:
    """A drafter that has seen an answer token by token."""
    tokens = list(prompt)
    drafter = PromptLookup(tokens)
    for token in answer:
        drafter.draft(0)
        tokens.append(token)
    return drafter


@given(_texts, _texts, st.integers(1, 20))
def test_a_draft_is_what_followed_an_earlier_occurrence_of_the_last_tokens(
    prompt: list[int], answer: list[int], limit: int
) -> None:
    draft = _learnt(prompt, answer).draft(limit)
    tokens = prompt + answer
    matches = [end for end in range(len(tokens)) if _match(tokens, end) >= MIN_MATCH]
    assert bool(draft.tokens) == bool(matches)
    if matches:
        assert draft.tokens in [_continuation(tokens, end, limit) for end in matches]


@given(st.lists(st.integers(0, 2), max_size=10), st.integers(0, 10))
def test_the_longest_match_is_taken_and_the_latest_of_those(tokens: list[int], prompt: int) -> None:
    draft = _learnt(tokens[:prompt], tokens[prompt:]).draft(4)
    end = max(range(len(tokens)), key=lambda end: (_match(tokens, end), end), default=0)
    assert draft.tokens == (_continuation(tokens, end, 4) if _match(tokens, end) >= MIN_MATCH else ())


@given(_texts, st.lists(_texts, max_size=8), st.integers(0, 20))
def test_how_many_tokens_come_at_once_makes_no_difference(
    prompt: list[int], steps: list[list[int]], limit: int
) -> None:
    tokens = list(prompt)
    drafter = PromptLookup(tokens)
    for step in steps:
        drafter.draft(limit)
        tokens += step
    if prompt and steps:
        assert drafter.draft(limit) == _learnt(prompt, list(chain(*steps))).draft(limit)


@given(_texts, _texts, st.integers(0, 50))
def test_each_token_has_its_chance_and_chances_never_increase(prompt: list[int], answer: list[int], limit: int) -> None:
    draft = _learnt(prompt, answer).draft(limit)
    assert len(draft.tokens) == len(draft.chances) <= limit
    assert all(0 <= after <= before <= 1 for before, after in zip([1.0, *draft.chances], draft.chances, strict=False))


def test_a_sequence_without_tokens_has_no_draft() -> None:
    assert PromptLookup([]).draft(4) == NO_DRAFT


def test_longer_matches_are_trusted_more() -> None:
    chances = [PromptLookup([*range(length), 99, *range(length)]).draft(1).chances[0] for length in (2, 3, 8, 40)]
    assert chances == sorted(chances)
    assert chances[0] < 0.3
    assert chances[-1] > 0.8


def test_confidence_goes_when_matches_fail_and_comes_back_without_drafts() -> None:
    clock = iter(range(1000, 10_000))
    tokens = [1, 2, 3]
    drafter = PromptLookup(tokens)

    def repeat(failing: bool, times: int) -> float:
        for _ in range(times):
            tokens.extend([1, 2, 3, next(clock) if failing else 4, next(clock)])
            drafter.draft(0)
        tokens.extend([1, 2, 3])
        return drafter.draft(1).chances[0]

    assert repeat(True, 60) < 0.1
    assert repeat(False, 60) > 0.4  # each time one token is right and the next one is not
    assert repeat(True, 60) < 0.1


# What to evaluate.

_chances = st.lists(st.floats(0, 1), max_size=3).map(lambda chances: sorted(chances, reverse=True))
_drafts = st.lists(_chances.map(lambda chances: Draft([0] * len(chances), chances)), min_size=1, max_size=3)


@given(_drafts, st.lists(st.floats(0.1, 10), min_size=13, max_size=13), st.integers(0, 12))
def test_no_other_choice_is_expected_to_be_faster(drafts: list[Draft], costs: list[float], limit: int) -> None:
    def rate(rows: tuple[int, ...]) -> float:
        tokens = len(drafts) + sum(sum(draft.chances[:taken]) for draft, taken in zip(drafts, rows, strict=True))
        return tokens / costs[len(drafts) + sum(rows)]

    none = (0,) * len(drafts)
    choices = product(*(range(len(draft.tokens) + 1) for draft in drafts))
    best = max(rate(rows) for rows in choices if rows == none or len(drafts) + sum(rows) <= limit)
    chosen = tuple(choose_rows(drafts, costs.__getitem__, limit))
    if chosen == none:
        assert best <= GAIN * rate(none) * (1 + 1e-9)
    else:
        assert len(drafts) + sum(chosen) <= limit
        assert rate(chosen) == pytest.approx(best)
        assert rate(chosen) > GAIN * rate(none) * (1 - 1e-9)


def test_no_sequences_and_no_drafts_are_no_rows() -> None:
    costs = StepCosts()
    assert choose_rows([], costs.decode, 8) == []
    assert choose_rows([NO_DRAFT, NO_DRAFT], costs.decode, 8) == [0, 0]


def test_the_likeliest_tokens_of_all_drafts_are_taken() -> None:
    drafts = [Draft([1, 2], [0.9, 0.8]), Draft([1, 2], [0.3, 0.1]), NO_DRAFT, Draft([1], [0.85])]
    assert choose_rows(drafts, lambda rows: 1.0 + 0.02 * rows, 16) == [2, 1, 0, 1]
    assert choose_rows(drafts, lambda rows: 1.0 + 0.02 * rows, 6) == [1, 0, 0, 1]


def test_a_costly_number_of_rows_is_stepped_over() -> None:
    draft = Draft([0] * 8, [0.95**row for row in range(1, 9)])
    assert choose_rows([draft], lambda rows: 1.0 if rows == 1 else 4.0, 16) == [8]
    assert choose_rows([draft], lambda rows: 1.0 if rows == 1 else 4.0, 4) == [0]


def test_certain_drafts_are_tried_before_anything_is_measured() -> None:
    assert choose_rows([Draft([0] * 7, [0.99**row for row in range(1, 8)])], StepCosts().decode, 8) == [7]
    assert choose_rows([Draft([0] * 7, [0.7**row for row in range(1, 8)])], StepCosts().decode, 8) == [0]


# Whole answers: a fixed text stands for what a model generates.

Text = tuple[list[int], list[int]]  # prompt and answer
_STEEP = {1: 7.3e-3, 2: 14.5e-3, 4: 20.5e-3, 8: 36e-3, 16: 68e-3, 32: 130e-3}  # seconds: SmolLM2-135M Q4_1, two cores
_LENGTH = 600
_HICCUP = 0.005  # of the steps take 50 times as long


def _steep(rows: int) -> float:
    low = max(known for known in _STEEP if known <= rows)
    high = min((known for known in _STEEP if known > rows), default=low)
    return _STEEP[low] + (_STEEP[high] - _STEEP[low]) * (rows - low) / max(1, high - low)


def _flat(rows: int) -> float:
    return 10e-3 * (1 + 0.012 * (rows - 1))


def _linear(rows: int) -> float:
    return 10e-3 * rows


def _words(rng: random.Random, count: int) -> list[int]:
    """Tokens of which some are frequent, as in any language."""
    return [int(20_000 * rng.random() ** 3) for _ in range(count)]


def _random(rng: random.Random) -> Text:
    return _words(rng, 500), _words(rng, _LENGTH)


def _edited(rng: random.Random) -> Text:
    """The prompt again, where after every 40 tokens or so some are added, left out or replaced."""
    prompt, answer = _words(rng, _LENGTH), []
    position = 0
    while position < _LENGTH:
        end = position + 1 + int(rng.expovariate(1 / 40))
        answer += prompt[position:end] + _words(rng, rng.randrange(4))
        position = end + rng.randrange(4)
    return prompt, answer


def _quoting(rng: random.Random) -> Text:
    """60 tokens of the prompt, 60 of its own, and so on."""
    prompt, answer = _words(rng, _LENGTH), []
    while len(answer) < _LENGTH:
        start = rng.randrange(_LENGTH - 60)
        answer += prompt[start : start + 60] + _words(rng, 60)
    return prompt, answer


def _idioms(rng: random.Random) -> Text:
    """Stock phrases, each followed by something else every time."""
    phrases = [_words(rng, rng.randrange(3, 7)) for _ in range(12)]
    text: list[int] = []
    while len(text) < 400 + _LENGTH:
        text += rng.choice(phrases) + _words(rng, rng.randrange(1, 5))
    return text[:400], text[400:]


def _records(rng: random.Random) -> Text:
    """Objects of the same keys and other values: long matches that fail at their ends."""
    keys = [_words(rng, rng.randrange(2, 8)) for _ in range(5)]
    text: list[int] = []
    while len(text) < 100 + _LENGTH:
        for key in keys:
            text += key + _words(rng, rng.randrange(1, 4))
    return text[:100], text[100:]


class _Answering:
    def __init__(self, text: Text) -> None:
        prompt, self._answer = text
        self._tokens = [*prompt, self._answer[0]]
        self._generated = 1
        self._drafter = PromptLookup(self._tokens)

    @property
    def left(self) -> int:
        return len(self._answer) - self._generated

    def draft(self) -> Draft:
        return self._drafter.draft(min(16, self.left - 1))

    def take(self, drafted: list[int]) -> int:
        """Generate up to the first token that was not drafted, and return how many these are."""
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == self._answer[self._generated + accepted]:
            accepted += 1
        self._tokens += self._answer[self._generated : self._generated + accepted + 1]
        self._generated += accepted + 1
        return accepted + 1


def _speed_up(text: Callable[[random.Random], Text], cost: Callable[[int], float], parallel: int = 1) -> float:
    """How many times faster answers come than without drafts, with so many of them at any time."""
    rng = random.Random(parallel)
    costs = StepCosts()
    costs.record(0, 100, cost(1) + 99 * (cost(32) - cost(1)) / 31 / 1.5)
    sequences = [_Answering(text(rng)) for _ in range(parallel)]
    generated, seconds = 0, 0.0
    while generated < 3 * _LENGTH * parallel:
        drafts = [sequence.draft() for sequence in sequences]
        rows = choose_rows(drafts, costs.decode, 32)
        taken = cost(parallel + sum(rows))
        costs.record(parallel + sum(rows), 0, taken * rng.uniform(0.95, 1.05) * (50 if rng.random() < _HICCUP else 1))
        seconds += taken
        for index, sequence in enumerate(sequences):
            generated += sequence.take(list(drafts[index].tokens[: rows[index]]))
            if sequence.left < 1:
                sequences[index] = _Answering(text(rng))
    return generated / parallel * cost(parallel) / seconds


@pytest.mark.parametrize("parallel", [1, 4, 8])
@pytest.mark.parametrize("cost", [_steep, _flat, _linear])
@pytest.mark.parametrize("text", [_random, _edited, _quoting, _idioms, _records])
def test_nothing_gets_slower(
    text: Callable[[random.Random], Text], cost: Callable[[int], float], parallel: int
) -> None:
    assert _speed_up(text, cost, parallel) > 0.99


@pytest.mark.parametrize(
    ("text", "cost", "parallel", "least"),
    [
        (_edited, _steep, 1, 1.3),
        (_edited, _steep, 4, 1.05),
        (_edited, _flat, 1, 4.5),
        (_edited, _flat, 8, 2.6),
        (_quoting, _steep, 1, 1.1),
        (_quoting, _flat, 1, 1.6),
        (_records, _flat, 1, 1.2),
    ],
)
def test_what_repeats_gets_faster(
    text: Callable[[random.Random], Text], cost: Callable[[int], float], parallel: int, least: float
) -> None:
    assert _speed_up(text, cost, parallel) > least
