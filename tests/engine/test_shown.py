"""Control tokens that are part of an answer's text, because the request names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from running_engine import Answer, RunningEngine

from llamaserve.engine.llama import Model
from llamaserve.engine.params import Generation, LoadParams, Logprobs, Sampling
from llamaserve.engine.speculation import Draft, PromptLookup
from llamaserve.errors import InvalidRequest

_SHOWN = "<repo_name>"


@pytest.fixture(scope="module")
def context(model: Model, load_params: LoadParams) -> Iterator[RunningEngine]:
    engine = RunningEngine(model, load_params)
    yield engine
    engine.close()


@pytest.fixture
def running(context: RunningEngine) -> Iterator[RunningEngine]:
    context.forget()
    yield context
    context.drafter = PromptLookup


def _favouring(running: RunningEngine, *names: str) -> Sampling:
    """Return options with which an answer is made of the tokens of some names, each about as often as the others."""
    tokens = [running.model.vocab.tokenize(name, add_bos=False, parse_special=True) for name in names]
    return Sampling(seed=1, temperature=30.0, logit_bias={token: 3000.0 for (token,) in tokens})


def _answer(running: RunningEngine, sampling: Sampling, **others: Any) -> Answer:
    (answer,) = running.alone("A list:", Generation(**{"sampling": sampling, "max_tokens": 20, **others}))
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_control_tokens_that_are_named_are_shown_and_no_others(running: RunningEngine, stream: bool) -> None:
    sampling = _favouring(running, _SHOWN, "<file_sep>", "a")
    hidden = _answer(running, sampling, stream=stream)
    shown = _answer(running, sampling, stream=stream, shown=(_SHOWN, "<no_token>", "a"))
    everything = _answer(running, sampling, stream=stream, special=True)
    assert hidden.tokens == shown.tokens == everything.tokens
    assert hidden.text.strip("a") == ""
    assert shown.text == everything.text.replace("<file_sep>", "")
    assert {_SHOWN, "a"} <= {running.model.vocab.piece(token, special=True).decode() for token in shown.tokens}
    assert _SHOWN in shown.text


def test_a_stop_string_may_be_the_name_of_one(running: RunningEngine) -> None:
    sampling = _favouring(running, "a", _SHOWN)
    before = ""
    while not before:
        sampling = msgspec.structs.replace(sampling, seed=sampling.seed + 1)
        everything = _answer(running, sampling, special=True)
        before, found, _ = everything.text.partition(_SHOWN)
        before = before if found else ""
    answer = _answer(running, sampling, stop=(_SHOWN,), shown=(_SHOWN,), stream=True)
    assert answer.text == before
    assert answer.finished is not None
    assert answer.finished.reason == "stop"
    hidden = _answer(running, sampling, stop=(_SHOWN,))
    assert hidden.finished is not None
    assert hidden.finished.reason == "length"


def test_what_ends_an_answer_is_never_shown(running: RunningEngine) -> None:
    for name in ("<|im_end|>", "<reponame>"):
        answer = _answer(running, _favouring(running, name, "a"), shown=(name,))
        assert answer.finished is not None
        assert answer.finished.reason == "stop"
        assert answer.text.strip("a") == ""


def test_log_probabilities_have_their_places(running: RunningEngine) -> None:
    answer = _answer(running, _favouring(running, _SHOWN, "a"), shown=(_SHOWN,), logprobs=Logprobs(1))
    assert [entry.chosen.token for entry in answer.logprobs] == answer.tokens
    for entry in answer.logprobs:
        assert answer.text.encode()[entry.offset :].startswith(entry.chosen.data)


def test_guessed_ones_are_shown_as_well(model: Model, load_params: LoadParams) -> None:
    running = RunningEngine(model, load_params)
    running.drafter = lambda tokens: _Same(tokens)
    try:
        answer = _answer(running, _favouring(running, _SHOWN), shown=(_SHOWN,))
        assert answer.text == _SHOWN * 20
    finally:
        running.close()


class _Same:
    """Guesses that the last token comes again."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def draft(self, limit: int) -> Draft:
        return Draft(self._tokens[-1:] * limit, [1.0] * limit)


@pytest.mark.parametrize("shown", [("x",) * 65, ("x" * 257,)])
def test_there_is_a_limit_to_names(running: RunningEngine, shown: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="at most 64 names"):
        running.engine.check(Generation(sampling=Sampling(seed=0), shown=shown))
