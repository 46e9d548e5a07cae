"""Budgets for thinking: when an answer's thinking ends, with every way to pick its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from running_engine import Answer, RunningEngine
from simulated_clock import SimulatedClock

from llamaserve.engine.candidates import Candidates
from llamaserve.engine.events import Failed, Finished
from llamaserve.engine.llama import Model, Vocab
from llamaserve.engine.params import Constraint, Generation, LoadParams, Logprobs, Sampling, Thinking
from llamaserve.engine.speculation import Draft, PromptLookup
from llamaserve.engine.thinking import LimitedThinking, check
from llamaserve.errors import InvalidRequest

_START, _END = "<think>", "</think>"  # several tokens of the starter model each
_MESSAGE = "\nEnough"
_PROMPT = "A question about ships and the sea. Let us think: "
_GREEDY = Sampling(seed=1, temperature=0.0)
_SAMPLINGS = [
    _GREEDY,
    Sampling(seed=2, temperature=0.0, repetition_penalty=1.2),
    Sampling(seed=3, temperature=1.1, top_p=0.95, presence_penalty=0.5, dry_multiplier=0.8),
    Sampling(seed=4, mirostat_mode=2),
]


# Where it ends, told with tokens of a few bytes


class _Words:
    """A vocabulary of texts that are all tokens wanted: a token's number is its place."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []

    def number(self, text: str) -> int:
        self.texts.append(text.encode())
        return len(self.texts) - 1

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """See ``Vocab``: a token is a character."""
        assert parse_special
        assert not add_bos
        return [self.number(character) for character in text]

    def piece(self, token: int, *, special: bool) -> bytes:
        """See ``Vocab``."""
        assert special
        return self.texts[token]


class _Script:
    """Picks given tokens, and takes note of the forced ones."""

    complete = False

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)
        self.forced: list[int] = []

    def sample(self, logits: Any) -> int:
        return next(self._tokens)

    def force(self, token: int) -> None:
        self.forced.append(token)

    def candidates(self, logits: Any) -> Candidates:
        return Candidates(logits)

    def prepare(self) -> None: ...

    def possible(self, tokens: Sequence[int]) -> int:
        return len(tokens)

    def close(self) -> None: ...


def _written(pieces: Sequence[str], thinking: Thinking) -> list[str]:
    """Return the tokens of an answer whose model wants to write some texts."""
    return [token.decode() for token in _written_bytes([piece.encode() for piece in pieces], thinking)]


def _written_bytes(pieces: Sequence[bytes], thinking: Thinking) -> list[bytes]:
    words = _Words()
    words.texts += pieces
    script = _Script(range(len(pieces)))
    limited = LimitedThinking(script, thinking, words)  # type: ignore[arg-type]
    written: list[bytes] = []
    try:
        while True:
            written.append(words.texts[limited.sample(np.zeros(1))])
    except StopIteration:
        return written


WRITTEN = {
    "too much": (["<think>", "a", "b", "c"], 2, ["<think>", "a", "b", "!", "]", "c"]),
    "no budget": (["<think>", "a"], 0, ["<think>", "!", "]", "a"]),
    "just enough": (["<think>", "a", "]", "b", "c"], 2, ["<think>", "a", "]", "b", "c"]),
    "enough": (["<think>", "a", "]", "b", "c", "d", "e"], 3, ["<think>", "a", "]", "b", "c", "d", "e"]),
    "ends at once": (["<think>]", "a", "b"], 0, ["<think>]", "a", "b"]),
    "no thinking": (["Hello", " ", "you", "<think>", "a", "b"], 1, ["Hello", " ", "you", "<think>", "a", "b"]),
    "start in pieces": (["<thi", "nk>a", "b", "c"], 1, ["<thi", "nk>a", "b", "!", "]", "c"]),
    "start that is none": (["<thi", "s>", "b", "c"], 1, ["<thi", "s>", "b", "c"]),
    "white space first": (["\n", " ", "\n<think>", "a", "b"], 1, ["\n", " ", "\n<think>", "a", "!", "]", "b"]),
    "only once": (["<think>", "a", "]", "<think>", "b", "c"], 2, ["<think>", "a", "]", "<think>", "b", "c"]),
}


@pytest.mark.parametrize(("pieces", "budget", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_where_thinking_ends(pieces: list[str], budget: int, expected: list[str]) -> None:
    assert _written(pieces, Thinking("<think>", "]", budget, message="!")) == expected


END_WRITTEN = {
    "in pieces": (["a", "</", "think", ">", "b"], 2, ["a", "</", "think", ">", "b"]),
    "begun in time": (["a", "</", "think", ">", "b"], 3, ["a", "</", "think", ">", "b"]),
    "begun but something else": (["a", "</", "this", "b"], 2, ["a", "</", "this", *"</think>", "b"]),
    "begun again and again": (["<"] * 20, 1, ["<"] * 9 + [*"</think>"] + ["<"] * 11),
    "across tokens": (["a</th", "ink>b", "c", "d"], 2, ["a</th", "ink>b", "c", "d"]),
    "no budget": (["a", "b"], 0, [*"</think>", "a", "b"]),
}


@pytest.mark.parametrize(("pieces", "budget", "expected"), END_WRITTEN.values(), ids=END_WRITTEN)
def test_an_end_of_several_tokens(pieces: list[str], budget: int, expected: list[str]) -> None:
    assert _written(pieces, Thinking("", "</think>", budget, begun=True)) == expected


@pytest.mark.parametrize("character", ["é", "日", "😀"])
def test_a_character_that_has_begun_is_completed(character: str) -> None:
    letters = [bytes([byte]) for byte in character.encode()]
    wanted = [*letters, *letters, b"a"]
    for budget in range(1, 2 * len(letters) + 1):
        whole = -(-budget // len(letters)) * len(letters)
        written = _written_bytes([b"<think>", *wanted], Thinking("<think>", "]", budget))
        assert written == [b"<think>", *wanted[:whole], b"]", *wanted[whole:]]


def test_what_is_no_character_is_not_waited_for_long() -> None:
    written = _written_bytes([b"<think>", *[b"\xf0"] * 50], Thinking("<think>", "]", 2))
    assert written.index(b"]") < 12


def test_white_space_around_markers_is_not_looked_for() -> None:
    thinking = Thinking("<think>\n", "\n</think>\n\n", 2)
    assert _written(["<think>", "a", "</think>", "b", "c"], thinking) == ["<think>", "a", "</think>", "b", "c"]
    assert "".join(_written(["<think>", "a", "b", "c"], thinking)) == "<think>ab\n</think>\n\nc"


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["<", "/", "x", ">", "</", "x>", "</x>", "a</x", "é"]), max_size=15),
    st.integers(0, 8),
)
def test_however_the_end_is_cut_it_is_found(pieces: list[str], budget: int) -> None:
    written = _written(pieces, Thinking("", "</x>", budget, begun=True, message="!"))
    if "</x>" in "".join(pieces[:budget]):
        assert written == pieces
    elif len(pieces) > budget + 4:
        assert "".join(written).find("</x>") <= len("".join(pieces[: budget + 4]) + "!")
    assert [piece for piece in written if piece not in "!"] == pieces or "".join(written).count("</x>") >= 1


@pytest.mark.parametrize(
    ("thinking", "words"),
    [
        (Thinking("", "</x>", 1), "begins and ends"),
        (Thinking("<x>", " \n", 1), "begins and ends"),
        (Thinking("<x>", "x" * 257, 1), "at most 256"),
        (Thinking("<x>", "</x>", -1), "less than none"),
        (Thinking("<x>", "</x>", 1, message="x" * 4097), "4097 characters"),
        (Thinking("<x>", "</x>", 1, message="\ud800"), "surrogate"),
        (Thinking("<x\ud800>", "</x>", 1), "surrogate"),
    ],
)
def test_what_can_not_work_is_refused(vocab: Vocab, thinking: Thinking, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        check(thinking, vocab)


def test_a_start_that_was_in_the_prompt_need_not_be_known(vocab: Vocab) -> None:
    check(Thinking("", "</x>", 0, begun=True), vocab)


# The real model


@pytest.fixture(scope="module")
def context(model: Model, load_params: LoadParams) -> Iterator[RunningEngine]:
    engine = RunningEngine(model, load_params)
    yield engine
    engine.close()


@pytest.fixture
def running(context: RunningEngine) -> RunningEngine:
    context.forget()
    return context


@pytest.fixture(scope="module")
def speculating(model: Model, load_params: LoadParams) -> Iterator[RunningEngine]:
    params = msgspec.structs.replace(load_params, kv_unified=True, flash_attention="auto")
    engine = RunningEngine(model, params)
    yield engine
    engine.close()


def _generation(sampling: Sampling = _GREEDY, budget: int | None = 5, **others: Any) -> Generation:
    thinking = None if budget is None else Thinking(_START, _END, budget, begun=True, message=_MESSAGE)
    return Generation(**{"sampling": sampling, "max_tokens": 18, "thinking": thinking, **others})


def _forced(vocab: Vocab) -> list[int]:
    return vocab.tokenize(_MESSAGE + _END, add_bos=False, parse_special=True)


def _check_budget(answer: Answer, vocab: Vocab, budget: int = 5) -> None:
    """Check that the thinking of an answer that would have gone on has ended after its budget."""
    forced = _forced(vocab)
    assert answer.tokens[budget : budget + len(forced)] == forced
    assert _MESSAGE + _END in answer.text
    assert len(answer.tokens) > budget + len(forced)


@pytest.mark.parametrize(
    ("sampling", "budget"), [(_GREEDY, 0), (_SAMPLINGS[2], 0), *((sampling, 5) for sampling in _SAMPLINGS)]
)
def test_an_answer_is_the_same_up_to_its_budget(running: RunningEngine, sampling: Sampling, budget: int) -> None:
    vocab = running.model.vocab
    (plain,) = running.alone(_PROMPT, _generation(sampling, None, max_tokens=budget))
    (answer,) = running.alone(_PROMPT, _generation(sampling, budget))
    assert answer.tokens[:budget] == plain.tokens[:budget]
    _check_budget(answer, vocab, budget)
    (again,) = running.alone(_PROMPT, _generation(sampling, budget))
    assert again.tokens == answer.tokens
    if sampling == _GREEDY:  # what follows is what the model makes of the end
        goes_on = running.engine.encode(_PROMPT) + answer.tokens[: budget + len(_forced(vocab))]
        (rest,) = running.alone(goes_on, Generation(sampling=sampling, max_tokens=4))
        assert answer.tokens[budget + len(_forced(vocab)) :][:4] == rest.tokens


def test_an_answer_without_thinking_is_as_it_was(running: RunningEngine) -> None:
    thinking = Thinking(_START, _END, 0, message=_MESSAGE)
    for sampling in (_GREEDY, _SAMPLINGS[2]):
        (plain,) = running.alone(_PROMPT, _generation(sampling, None))
        (answer,) = running.alone(_PROMPT, _generation(sampling, thinking=thinking))
        assert answer.tokens == plain.tokens


def test_several_choices_have_a_budget_each(running: RunningEngine) -> None:
    answers = running.alone(_PROMPT, _generation(Sampling(seed=7, temperature=1.2), choices=2))
    for number, answer in enumerate(answers):
        _check_budget(answer, running.model.vocab)
        (alone,) = running.alone(_PROMPT, _generation(Sampling(seed=7 + number, temperature=1.2)))
        assert alone.tokens == answer.tokens
    assert len({answer.text for answer in answers}) > 1


def test_log_probabilities_of_forced_tokens_are_the_models_own(running: RunningEngine) -> None:
    (answer,) = running.alone(_PROMPT, _generation(logprobs=Logprobs(2)))
    forced = _forced(running.model.vocab)
    assert [entry.chosen.token for entry in answer.logprobs] == answer.tokens
    assert all(entry.chosen.logprob <= entry.top[0].logprob for entry in answer.logprobs)
    assert any(entry.chosen.logprob < -3 for entry in answer.logprobs[5 : 5 + len(forced)])
    assert answer.logprobs[5].offset == len(running.model.vocab.detokenize(answer.tokens[:5], special=False))


def test_a_control_token_ends_thinking(running: RunningEngine) -> None:
    vocab = running.model.vocab
    end = vocab.control("<file_sep>")
    assert end is not None
    thinking = Thinking(_START, "<file_sep>", 5, begun=True)
    (answer,) = running.alone(_PROMPT, _generation(thinking=thinking, shown=("<file_sep>",)))
    assert answer.tokens[5] == end
    assert answer.text.count("<file_sep>") == 1
    wants_it = Sampling(seed=1, temperature=0.0, logit_bias={end: 100.0})
    (answer,) = running.alone(_PROMPT, _generation(wants_it, thinking=thinking, max_tokens=8))
    assert answer.tokens == [end] * 8  # ended by itself


def test_the_end_of_the_answer_ends_thinking_too(running: RunningEngine) -> None:
    (end, *_) = running.model.vocab.ends
    (answer,) = running.alone(_PROMPT, _generation(Sampling(seed=1, temperature=0.0, logit_bias={end: 100.0})))
    assert answer.finished is not None
    assert answer.finished.reason == "stop"
    assert answer.tokens == []


# With a form


def _form(text: str) -> Constraint:
    return Constraint("lark", text, "response_format", (_START, _END))


@pytest.mark.parametrize("sampling", _SAMPLINGS)
@pytest.mark.parametrize("begun", [False, True])
def test_thinking_ends_in_a_form_that_has_it(running: RunningEngine, sampling: Sampling, begun: bool) -> None:
    constraint = _form(f'start: {"" if begun else "marker0"} through1 "\\n" /[0-9]{{3}}/')
    thinking = Thinking(_START, _END, 5, begun=begun, message=_MESSAGE)
    generation = _generation(sampling, thinking=thinking, constraint=constraint, max_tokens=40, choices=2)
    for answer in running.alone(_PROMPT, generation):
        assert answer.finished is not None
        assert answer.finished.reason == "stop"
        assert answer.text.startswith(_START) != begun
        thought, _, rest = answer.text.partition(_END)
        assert thought.endswith(_MESSAGE)
        assert rest[:1] == "\n"
        assert rest[1:].isdigit()


def test_a_form_that_does_not_let_thinking_end_fails_the_request_alone(running: RunningEngine) -> None:
    constraint = Constraint("regex", "[a-z ]{200}", "regex")
    running.engine.submit(1, [[5, 6]], _generation(constraint=constraint))
    running.engine.submit(2, [[5, 6]], Generation(sampling=_GREEDY, max_tokens=5))
    events = []
    while not running.engine.idle:
        events += running.engine.step()
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert (failed.request, failed.error.name) == (1, "InvalidRequest")
    assert "does not let its thinking end" in failed.error.message
    assert [event.completion_tokens for event in events if isinstance(event, Finished)] == [5]
    running.check_nothing_is_left()


# Drafts and preemption


class _Guesses:
    """Drafts the end of the thinking in every place, or what can't be right."""

    def __init__(self, tokens: list[int], vocab: Vocab) -> None:
        self._tokens = tokens
        self._ending = _forced(vocab)

    def draft(self, limit: int) -> Draft:
        guess = self._ending if self._tokens[-1] not in self._ending else self._ending[1:]
        return Draft(guess[: max(0, limit)], [1.0] * len(guess[: max(0, limit)]))


@pytest.mark.parametrize("constraint", [None, _form("start: through1 TEXT")], ids=["any text", "a form"])
@pytest.mark.parametrize("sampling", [_GREEDY, Sampling(seed=3, temperature=1.1)])
def test_guessed_tokens_do_not_move_the_end(
    speculating: RunningEngine, sampling: Sampling, constraint: Constraint | None
) -> None:
    vocab = speculating.model.vocab
    speculating.clock = SimulatedClock()
    right = 0
    for drafter in (PromptLookup, lambda tokens: _Guesses(tokens, vocab)):
        speculating.drafter = drafter
        prompt = f"one two three {_MESSAGE}{_END} " * 2
        for answer in speculating.alone(prompt, _generation(sampling, constraint=constraint)):
            _check_budget(answer, vocab)
        right += sum(right for _, right in speculating.runner.drafts)
    assert right
    speculating.drafter = PromptLookup


def test_an_answer_that_was_put_off_thinks_no_longer(model: Model, load_params: LoadParams) -> None:
    params = msgspec.structs.replace(load_params, kv_unified=True, context=200, kv_cells=256, flash_attention="off")
    running = RunningEngine(model, params)
    try:
        running.forget(48)
        for number in range(3):
            constraint = _form("start: through1 TEXT") if number else None
            generation = _generation(Sampling(seed=number, temperature=1.2), constraint=constraint, max_tokens=25)
            running.submit(number, _PROMPT, generation)
        running.run()
        assert running.runner.preemptions > 0
        for number in range(3):
            _check_budget(running.answers[number, 0], model.vocab)
    finally:
        running.close()
