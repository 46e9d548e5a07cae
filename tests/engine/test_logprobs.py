"""Log-probabilities against a softmax of llama.cpp's own logits, computed apart, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from running_engine import Answer, RunningEngine, all_logits

from llamaserve.engine.candidates import Candidates, top
from llamaserve.engine.events import Delta, TokenLogprobs
from llamaserve.engine.llama import Model, Vocab
from llamaserve.engine.logprobs import log_probabilities, of_candidates, of_token
from llamaserve.engine.params import Generation, LoadParams, Logprobs, NextToken, Sampling
from llamaserve.engine.speculation import Draft, PromptLookup
from llamaserve.errors import EngineError

_PRECISION = 1e-4
_PROMPT = "Once upon a time, once upon a"
_GREEDY = Sampling(seed=1, temperature=0.0)
_RANDOM = Sampling(seed=2, temperature=1.3, top_k=40, repetition_penalty=1.2, logit_bias={2: -100.0})


def _generation(sampling: Sampling = _GREEDY, **others: Any) -> Generation:
    return Generation(**{"sampling": sampling, "max_tokens": 12, "logprobs": Logprobs(5), **others})


@pytest.fixture(scope="module")
def context(loud: Model, loud_params: LoadParams) -> Iterator[RunningEngine]:
    engine = RunningEngine(loud, loud_params)
    yield engine
    engine.close()


@pytest.fixture
def running(context: RunningEngine) -> RunningEngine:
    context.forget()
    return context


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-probabilities in 64 bits."""
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def _check(running: RunningEngine, prompt: Sequence[int], answer: Answer, count: int = 5) -> None:
    """Check all of an answer's log-probabilities, and of the prompt's if it has some."""
    text = [*prompt, *answer.tokens]
    expected = [_softmax(row) for row in all_logits(running.model, running.params, text)]
    assert [each.chosen.token for each in answer.logprobs] == answer.tokens
    _compare(answer.logprobs, expected[len(prompt) - 1 :], running.model.vocab, count)
    if answer.prompt_logprobs:
        assert [each.chosen.token for each in answer.prompt_logprobs] == list(prompt)
        first, *others = answer.prompt_logprobs
        assert (first.chosen.logprob, first.top) == (0.0, ())
        _compare(others, expected, running.model.vocab, count)


def _compare(
    actual: Sequence[TokenLogprobs], expected: Sequence[npt.NDArray[np.float64]], vocab: Vocab, count: int
) -> None:
    for each, values in zip(actual, expected, strict=False):
        assert abs(each.chosen.logprob - values[each.chosen.token]) < _PRECISION
        best = np.sort(values)[::-1][:count]
        np.testing.assert_allclose([other.logprob for other in each.top], best, atol=_PRECISION)
        for other in (each.chosen, *each.top):
            assert abs(other.logprob - values[other.token]) < _PRECISION
        assert all(other.data == vocab.piece(other.token, special=True) for other in each.top)


@pytest.mark.parametrize("sampling", [_GREEDY, _RANDOM])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_of_a_plain_answer(running: RunningEngine, sampling: Sampling, stream: bool, count: int) -> None:
    prompt = running.engine.encode(_PROMPT)
    running.submit(0, prompt, _generation(sampling, logprobs=Logprobs(count), stream=stream))
    running.run()
    _check(running, prompt, running.answers[0, 0], count)


def test_of_a_batch_of_different_answers(running: RunningEngine) -> None:
    prompts = [running.engine.encode(text) for text in (_PROMPT, "x", "2, 4, 6,", "Once upon a time there")]
    for number, prompt in enumerate(prompts):
        generation = _generation(_RANDOM, choices=2, logprobs=Logprobs(3, prompt=number % 2 == 0))
        running.submit(number, prompt, generation)
        running.step(number)
    running.run()
    for number, prompt in enumerate(prompts):
        for choice in range(2):
            answer = running.answers[number, choice]
            assert bool(answer.prompt_logprobs) == (number % 2 == 0)
            _check(running, prompt, answer, 3)


class _Repeating:
    """Drafts a text that is half right."""

    def __init__(self, tokens: list[int], text: list[int]) -> None:
        self._tokens = tokens
        self._text = text

    def draft(self, limit: int) -> Draft:
        tokens = self._text[len(self._tokens) :][: max(0, min(limit, 5))]
        return Draft(tokens, [1.0] * len(tokens))


@pytest.mark.parametrize("sampling", [_GREEDY, _RANDOM])
def test_of_guessed_tokens(running: RunningEngine, sampling: Sampling) -> None:
    prompt = running.engine.encode(_PROMPT)
    plain = running.alone(prompt, _generation(sampling))[0]
    text = [*prompt, *plain.tokens]
    text[len(prompt) + 7] = 30  # wrong
    running.drafter = lambda tokens: _Repeating(tokens, text)
    try:
        running.forget()
        running.submit(0, prompt, _generation(sampling))
        running.run()
    finally:
        running.drafter = PromptLookup
    assert any(right for _, right in running.runner.drafts)
    answer = running.answers[0, 0]
    assert answer.tokens == plain.tokens
    _check(running, prompt, answer)


@pytest.mark.parametrize("length", [1, 2, 3, 40, 90])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_of_a_prompt(running: RunningEngine, length: int, max_tokens: int) -> None:
    prompt = [1, *np.random.default_rng(length).integers(20, 200, length - 1).tolist()]
    running.submit(0, prompt, _generation(_RANDOM, logprobs=Logprobs(2, prompt=True), max_tokens=max_tokens))
    running.run()
    answer = running.answers[0, 0]
    assert len(answer.tokens) == max_tokens
    assert len(answer.prompt_logprobs) == length
    assert answer.finished is not None
    assert answer.finished.reason == "length"
    _check(running, prompt, answer, 2)


def test_of_a_prompt_of_which_the_beginning_is_cached(running: RunningEngine) -> None:
    """What is reused has no logits: a prompt that is to be scored is evaluated, but serves others as a prefix."""
    prompt = running.engine.encode(_PROMPT)
    for number in range(3):
        running.submit(number, prompt, _generation(logprobs=Logprobs(2, prompt=True)))
        running.run()
        answer = running.answers[number, 0]
        _check(running, prompt, answer, 2)
        assert answer.finished is not None
        assert answer.finished.cached_tokens == 0
    running.submit(9, prompt, _generation())
    running.run()
    finished = running.answers[9, 0].finished
    assert finished is not None
    assert finished.cached_tokens == len(prompt) - 1


def test_of_a_prompt_longer_than_a_step_beside_others(loud: Model, loud_params: LoadParams) -> None:
    params = msgspec.structs.replace(loud_params, context=400, kv_cells=900, batch=200)
    running = RunningEngine(loud, params)
    try:
        prompts = [np.random.default_rng(seed).integers(20, 200, 150 + seed).tolist() for seed in range(2)]
        running.submit(5, "x", _generation(max_tokens=20))
        for number, prompt in enumerate(prompts):
            running.submit(number, prompt, _generation(logprobs=Logprobs(1, prompt=True), max_tokens=3))
        running.run()
        for number, prompt in enumerate(prompts):
            _check(running, prompt, running.answers[number, 0], 1)
    finally:
        running.close()


def test_of_a_prompt_that_had_to_begin_again(running: RunningEngine) -> None:
    """With too few cells for both, the later one is put off in the middle and goes on where it has to."""
    running.forget(60)
    prompts = [running.engine.encode("a" * 25), running.engine.encode("b" * 25)]
    for number, prompt in enumerate(prompts):
        running.submit(number, prompt, _generation(logprobs=Logprobs(2, prompt=True), max_tokens=20))
    running.run()
    assert running.runner.preemptions > 0
    for number, prompt in enumerate(prompts):
        _check(running, prompt, running.answers[number, 0], 2)


@pytest.mark.parametrize("cells", range(118, 132))
def test_of_a_prompt_that_had_to_begin_again_in_the_middle(loud: Model, loud_params: LoadParams, cells: int) -> None:
    """It may begin again before the tokens of which the log-probabilities are known already."""
    running = RunningEngine(loud, msgspec.structs.replace(loud_params, context=200, batch=16))
    running.forget(cells, batch=16)
    try:
        prompt = np.random.default_rng(3).integers(20, 200, 90).tolist()
        running.submit(0, "abc", _generation(Sampling(seed=1, ban_eos=True), max_tokens=60))
        running.step(3)
        running.submit(1, prompt, _generation(logprobs=Logprobs(1, prompt=True), max_tokens=3))
        running.run()
        assert len(running.answers[1, 0].prompt_logprobs) == len(prompt)
        _check(running, prompt, running.answers[1, 0], 1)
    finally:
        running.close()


def test_a_scored_prompt_is_not_evaluated_in_tiny_steps(running: RunningEngine) -> None:
    prompt = np.random.default_rng(1).integers(20, 200, 90).tolist()
    running.submit(0, prompt, _generation(logprobs=Logprobs(0, prompt=True), max_tokens=0))
    steps = 0
    while not running.engine.idle:
        running.step()
        steps += 1
    assert steps <= 5  # of 24 tokens, the batch


# With the text


def _pieces(running: RunningEngine, generation: Generation, prompt: str = _PROMPT) -> list[Delta]:
    running.submit(0, prompt, generation)
    deltas: list[Delta] = []
    while not running.engine.idle:
        events = running.engine.step()
        running.take(events)
        deltas += [event for event in events if isinstance(event, Delta)]
    return deltas


@pytest.mark.parametrize("seed", range(6))
def test_they_come_with_the_text_that_they_are_of(running: RunningEngine, seed: int) -> None:
    """The tiny model's tokens are bytes: characters arrive in parts."""
    sampling = Sampling(seed=seed, temperature=2.0, ban_eos=True, banned_tokens=(0, 1, 2))  # which have other texts
    deltas = _pieces(running, _generation(sampling, max_tokens=60, stream=True))
    answer = running.answers[0, 0]
    shown = 0
    for delta in deltas:
        end = shown + len(delta.text)
        assert all(shown <= each.offset < end for each in delta.logprobs)
        shown = end
    assert [each.chosen.token for each in answer.logprobs] == answer.tokens
    assert b"".join(each.chosen.data for each in answer.logprobs).decode("utf-8", "replace") == answer.text
    offsets = [each.offset for each in answer.logprobs]
    assert offsets == sorted(offsets)
    for each in answer.logprobs:
        if each.chosen.data.isascii():
            start = each.offset + (answer.text[each.offset] == "\ufffd")  # of a character that was not finished
            assert answer.text[start:].startswith(each.chosen.data.decode())
    assert sum(delta.tokens for delta in deltas) <= len(answer.tokens)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("place", [0, 1, 4, 9])
def test_a_stop_string_takes_its_tokens_along(running: RunningEngine, place: int, stream: bool) -> None:
    sampling = Sampling(seed=3, temperature=1.0, ban_eos=True, logit_bias=dict.fromkeys(range(130, 260), -100.0))
    whole = running.alone(_PROMPT, _generation(sampling, max_tokens=30))[0]
    stop = whole.text[place : place + 3]
    cut = whole.text.index(stop)
    running.forget()
    running.submit(0, _PROMPT, _generation(sampling, max_tokens=30, stop=(stop,), stream=stream))
    running.run()
    answer = running.answers[0, 0]
    assert answer.text == whole.text[:cut]
    assert answer.logprobs == [each for each in whole.logprobs if each.offset < cut]


def test_the_token_that_ends_an_answer_has_none(running: RunningEngine) -> None:
    sampling = Sampling(seed=5, temperature=1.0, logit_bias={2: 8.0})
    answer = running.alone(_PROMPT, _generation(sampling, max_tokens=60))[0]
    assert answer.finished is not None
    assert answer.finished.reason == "stop"
    assert len(answer.logprobs) == answer.finished.completion_tokens


def test_without_being_asked_for_there_are_none(running: RunningEngine) -> None:
    answer = running.alone(_PROMPT, _generation(logprobs=None))[0]
    assert not answer.logprobs
    assert not answer.prompt_logprobs


# The next token


def _next(running: RunningEngine, sampling: Sampling, wanted: NextToken) -> dict[int, float]:
    running.submit(0, _PROMPT, Generation(sampling=sampling, max_tokens=0, next_token=wanted))
    running.run()
    answer = running.answers.pop((0, 0))
    assert answer.finished is not None
    assert (answer.finished.text, answer.finished.completion_tokens) == ("", 0)
    return {each.token: each.logprob for each in answer.finished.next_tokens}


def test_the_next_token_before_and_after_the_samplers(running: RunningEngine) -> None:
    prompt = running.engine.encode(_PROMPT)
    expected = _softmax(all_logits(running.model, running.params, prompt)[-1])
    raw = _next(running, _RANDOM, NextToken(50))
    assert list(raw) == np.argsort(-expected)[:50].tolist()
    np.testing.assert_allclose(list(raw.values()), np.sort(expected)[::-1][:50], atol=_PRECISION)
    three = _next(running, Sampling(seed=1, top_k=3, temperature=0.5), NextToken(50, sampled=True))
    weights = np.exp(2 * np.sort(expected)[::-1][:3])
    assert list(three) == np.argsort(-expected)[:3].tolist()
    np.testing.assert_allclose(np.exp(list(three.values())), weights / weights.sum(), atol=_PRECISION)
    assert list(_next(running, _GREEDY, NextToken(50, sampled=True)).values()) == [0.0]
    everything = _next(running, _RANDOM, NextToken(10**6))
    assert len(everything) == running.model.vocab.size
    assert abs(sum(np.exp(list(everything.values()))) - 1) < 1e-5


# The arithmetic


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(value: float) -> None:
    with pytest.raises(EngineError):
        log_probabilities(np.array([1.0, value], np.float32), [0])


def test_large_and_impossible_logits() -> None:
    logits = np.array([1e30, 1e30, 0.0, -np.inf], np.float32)
    np.testing.assert_allclose(log_probabilities(logits, [0, 1]), np.log([0.5, 0.5]), rtol=1e-6)
    assert log_probabilities(logits, [3])[0] == -np.inf


@pytest.mark.parametrize("count", [0, 1, 3, 4, 10])
def test_the_most_probable_come_first(count: int) -> None:
    assert top(np.array([0.5, 3.0, -np.inf, 2.0], np.float32), count) == [1, 3, 0, 2][:count]


def test_of_candidates_and_tokens_agree(vocab: Vocab) -> None:
    logits = np.random.default_rng(1).standard_normal(vocab.size).astype(np.float32)
    one = of_candidates(Candidates(logits), 7, vocab)
    other = of_token(logits, 5, 7, vocab)
    assert one == other.top
    assert other.chosen.token == 5
