"""Answers that must have a form: schemas, grammars, patterns, choices, on the real starter model."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from llguidance import LLParserLimits
from running_engine import Answer, RunningEngine
from simulated_clock import SimulatedClock

from llamaserve.engine import constraint as constraint_module, grammar
from llamaserve.engine.candidates import Candidates
from llamaserve.engine.constraint import Form, Grammars
from llamaserve.engine.events import Failed, Finished
from llamaserve.engine.llama import Model, Vocab
from llamaserve.engine.params import Constraint, Generation, LoadParams, Logprobs, Sampling
from llamaserve.engine.sampling import SamplerFactory
from llamaserve.engine.speculation import Draft, PromptLookup
from llamaserve.errors import InvalidRequest

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "colour": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
_GREEDY = Sampling(seed=1, temperature=0.0)
_RANDOM = Sampling(seed=1, temperature=1.2, top_p=0.9)
_PROMPT = "Here is a person as JSON: "


def _schema(schema: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(schema), "response_format")


def _generation(constraint: Constraint, sampling: Sampling = _GREEDY, **others: Any) -> Generation:
    return Generation(**{"sampling": sampling, "constraint": constraint, "max_tokens": 100, **others})


@pytest.fixture(scope="module")
def grammars(vocab: Vocab) -> Grammars:
    return Grammars(vocab)


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


@pytest.fixture(scope="module")
def speculating(model: Model, load_params: LoadParams) -> Iterator[RunningEngine]:
    params = msgspec.structs.replace(load_params, kv_unified=True, flash_attention="auto")
    engine = RunningEngine(model, params)
    yield engine
    engine.close()


def _answer(running: RunningEngine, generation: Generation, prompt: str = _PROMPT) -> Answer:
    (answer,) = running.alone(prompt, generation)
    return answer


# Every kind, on the wire of the engine


@pytest.mark.parametrize("sampling", [_GREEDY, _RANDOM, Sampling(seed=5), Sampling(seed=2, mirostat_mode=2)])
@pytest.mark.parametrize("stream", [False, True])
def test_json_fits_its_schema(running: RunningEngine, sampling: Sampling, stream: bool) -> None:
    answer = _answer(running, _generation(_schema(_PERSON), sampling, stream=stream))
    assert answer.finished is not None
    assert answer.finished.reason == "stop"
    jsonschema.validate(json.loads(answer.text), _PERSON)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        (Constraint("regex", r"[0-9]{3}-[a-f]+!", "regex"), r"[0-9]{3}-[a-f]+!"),
        (Constraint("regex", r"^(yes|no)$", "regex"), r"yes|no"),
        (Constraint("choice", '["yes", "no", "no way", "q\\"q", "日本"]', "guided_choice"), 'yes|no|no way|q"q|日本'),
        (Constraint("grammar", 'root ::= "<" [a-c]+ ">" [0-9]{2}', "grammar"), r"<[a-c]+>[0-9]{2}"),
    ],
)
def test_text_has_its_form(running: RunningEngine, constraint: Constraint, pattern: str) -> None:
    texts = set()
    for seed in range(8):
        answer = _answer(running, _generation(constraint, Sampling(seed=seed, temperature=1.5)))
        assert answer.finished is not None
        if answer.finished.reason == "stop":
            assert re.fullmatch(pattern, answer.text), answer.text
            texts.add(answer.text)
    assert len(texts) > 1


def test_an_answer_that_is_cut_says_so(running: RunningEngine) -> None:
    answer = _answer(running, _generation(_schema({"type": "string", "minLength": 100}), max_tokens=8))
    assert answer.finished is not None
    assert answer.finished.reason == "length"
    assert len(answer.tokens) == 8
    assert answer.text.startswith('"')


def test_an_answer_that_is_whole_at_its_last_token_is_not_cut(running: RunningEngine) -> None:
    whole = _answer(running, _generation(_schema({"enum": ["red", "green"]})))
    assert whole.finished is not None
    again = _answer(running, _generation(_schema({"enum": ["red", "green"]}), max_tokens=len(whole.tokens)))
    assert again.finished is not None
    assert (again.text, again.finished.reason) == (whole.text, "stop")


def test_a_stop_string_ends_it_before(running: RunningEngine) -> None:
    answer = _answer(running, _generation(_schema(_PERSON), stop=('"age"',)))
    assert answer.finished is not None
    assert answer.finished.reason == "stop"
    assert '"name"' in answer.text
    assert '"age"' not in answer.text


def test_it_ends_without_asking_the_model_for_the_end(running: RunningEngine) -> None:
    """After the last brace nothing but the end could come: no step is spent on it, and a ban of it does not matter."""
    for sampling in (_GREEDY, Sampling(seed=1, temperature=0.0, ban_eos=True, min_tokens=1000)):
        answer = _answer(running, _generation(_schema({"const": 5}), sampling))
        assert answer.text == "5"
        assert answer.tokens == running.model.vocab.tokenize("5", add_bos=False, parse_special=False)


# With everything else


def test_several_choices_have_the_form_each_for_itself(running: RunningEngine) -> None:
    generation = _generation(_schema(_PERSON), Sampling(seed=20, temperature=1.3), choices=4)
    answers = running.alone(_PROMPT, generation)
    for answer in answers:
        jsonschema.validate(json.loads(answer.text), _PERSON)
    assert len({answer.text for answer in answers}) > 1
    for number, answer in enumerate(answers):  # the exact level: alone each is the same
        alone = _answer(running, _generation(_schema(_PERSON), Sampling(seed=20 + number, temperature=1.3)))
        assert alone.text == answer.text


def test_a_batch_of_different_forms(running: RunningEngine) -> None:
    generations = [
        _generation(_schema(_PERSON), _RANDOM),
        _generation(Constraint("regex", "[a-z]{5}", "regex"), _RANDOM),
        Generation(sampling=_RANDOM, max_tokens=10),
        _generation(Constraint("choice", '["left", "right"]', "guided_choice"), _RANDOM),
        _generation(_schema({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3})),
    ]
    alone = [_answer(running, generation).text for generation in generations]
    running.forget()
    for number, generation in enumerate(generations):
        running.submit(number, _PROMPT, generation)
        running.step(number)
    running.run()
    assert [running.answers[number, 0].text for number in range(len(generations))] == alone


class _Wrong:
    """Drafts what mostly can't come: the prompt's tokens, and sometimes what can."""

    def __init__(self, tokens: list[int], vocab: Vocab) -> None:
        self._texts = [vocab.tokenize(text, add_bos=False, parse_special=False) for text in ('"name": "', "hello {")]
        self._tokens = tokens

    def draft(self, limit: int) -> Draft:
        tokens = self._texts[len(self._tokens) % 2][: max(0, limit)]
        return Draft(tokens, [1.0] * len(tokens))


@pytest.mark.parametrize("sampling", [_GREEDY, _RANDOM])
def test_guessed_tokens_must_have_the_form_too(speculating: RunningEngine, sampling: Sampling) -> None:
    right = 0
    speculating.clock = SimulatedClock()
    for drafter in (PromptLookup, lambda tokens: _Wrong(tokens, speculating.model.vocab)):
        speculating.drafter = drafter
        prompt = (
            'One: {"name": "Ada", "age": 36, "colour": "red"} Two: {"name": "Ada", "age": 36, "colour": "red"} Three: '
        )
        answers = speculating.alone(prompt, _generation(_schema(_PERSON), sampling, choices=3))
        for answer in answers:
            jsonschema.validate(json.loads(answer.text), _PERSON)
        right += sum(right for _, right in speculating.runner.drafts)
    assert right


def test_drafts_are_cut_where_the_form_does_not_allow_them(speculating: RunningEngine) -> None:
    speculating.clock = SimulatedClock()
    speculating.drafter = lambda tokens: _Wrong(tokens, speculating.model.vocab)
    answer = _answer(speculating, _generation(Constraint("regex", "[0-9]{20}", "regex")))
    assert re.fullmatch("[0-9]{20}", answer.text)
    assert not speculating.runner.drafts


@pytest.mark.parametrize("sampling", [_GREEDY, _RANDOM])
def test_masks_that_are_computed_meanwhile_are_the_same(
    running: RunningEngine, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    plain = [answer.text for answer in running.alone(_PROMPT, _generation(_schema(_PERSON), sampling, choices=4))]
    monkeypatch.setattr(constraint_module, "_WORTH_HIDING", -1.0)
    threads: set[str] = set()
    original = Form._compute
    monkeypatch.setattr(
        Form, "_compute", lambda self: (threads.add(threading.current_thread().name), original(self))[1]
    )
    hidden = [answer.text for answer in running.alone(_PROMPT, _generation(_schema(_PERSON), sampling, choices=4))]
    assert hidden == plain
    assert any(name.startswith("masks") for name in threads)


def test_masks_computed_meanwhile_and_drafts(speculating: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_module, "_WORTH_HIDING", -1.0)
    speculating.clock = SimulatedClock()
    for drafter in (PromptLookup, lambda tokens: _Wrong(tokens, speculating.model.vocab)):
        speculating.drafter = drafter
        for answer in speculating.alone(_PROMPT, _generation(_schema(_PERSON), _RANDOM, choices=3)):
            jsonschema.validate(json.loads(answer.text), _PERSON)


def test_log_probabilities_are_the_models_own(running: RunningEngine) -> None:
    answer = _answer(running, _generation(_schema({"const": 5}), logprobs=Logprobs(3)))
    (only,) = answer.logprobs
    assert only.chosen.logprob < -0.5  # it would have said something else
    assert only.chosen.token not in [each.token for each in only.top]


def test_an_answer_that_was_put_off_goes_on_in_its_form(model: Model, load_params: LoadParams) -> None:
    params = msgspec.structs.replace(load_params, kv_unified=True, context=200, kv_cells=256, flash_attention="off")
    running = RunningEngine(model, params)
    try:
        running.forget(60)
        for number in range(3):
            running.submit(number, _PROMPT * 3, _generation(_schema(_PERSON), Sampling(seed=number, temperature=1.2)))
        running.run()
        assert running.runner.preemptions > 0
        for number in range(3):
            jsonschema.validate(json.loads(running.answers[number, 0].text), _PERSON)
    finally:
        running.close()


def test_bans_that_leave_nothing_end_the_request_alone(running: RunningEngine) -> None:
    vocab = running.model.vocab
    digits = tuple(token for token in range(vocab.size) if vocab.piece(token).isdigit())
    banned = Sampling(seed=1, banned_tokens=digits)
    running.engine.submit(1, [[5, 6]], _generation(Constraint("regex", "[0-9]+", "regex"), banned, choices=2))
    running.engine.submit(2, [[5, 6]], Generation(sampling=_GREEDY, max_tokens=5))
    events = []
    while not running.engine.idle:
        events += running.engine.step()
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert (failed.request, failed.error.name) == (1, "InvalidRequest")
    assert "all are banned" in failed.error.message
    (finished,) = (event for event in events if isinstance(event, Finished))
    assert finished.completion_tokens == 5
    running.check_nothing_is_left()


# Compiling


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "string", "not": {"const": "x"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if"),
        ({"type": "array", "contains": {"type": "string"}}, "contains"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"type": "string", "format": "telephone"}, "telephone"),
        ({"type": "text"}, "text"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "http://example.com/schema.json"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "Unsatisfiable"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "response_format: "),
        ({"type": "string", "pattern": "(("}, "unclosed"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        (False, "response_format: "),
    ],
)
def test_schemas_that_are_wrong_or_not_to_be_had(grammars: Grammars, schema: Any, word: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(word)) as caught:
        grammars.compile(_schema(schema))
    assert caught.value.param == "response_format"
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 400


def test_a_schema_can_not_loosen_its_own_check(grammars: Grammars) -> None:
    for options in ({"lenient": True}, {"coerce_one_of": True}):
        with pytest.raises(InvalidRequest):
            grammars.compile(
                _schema({"x-guidance": options, "oneOf": [{"type": "integer"}, {"type": "number"}], "not": {}})
            )


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", "((", "regex"),
        Constraint("regex", "(?=a)b", "regex"),
        Constraint("grammar", "root ::= missing", "grammar"),
        Constraint("grammar", "nothing like it", "grammar"),
        Constraint("json_schema", '{"type": 5}', "json_schema"),
    ],
)
def test_what_can_not_be_read_is_refused(grammars: Grammars, constraint: Constraint) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammars.compile(constraint)
    assert caught.value.param == constraint.param


def test_an_engine_refuses_before_it_starts(running: RunningEngine) -> None:
    with pytest.raises(InvalidRequest):
        running.engine.check(_generation(Constraint("regex", "((", "regex")))


def test_what_was_compiled_is_kept_and_threads_share_it(vocab: Vocab, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(vocab)
    made: list[int] = []
    original = Grammars._make_tokenizer
    monkeypatch.setattr(Grammars, "_make_tokenizer", lambda self: (made.append(1), original(self))[1])
    threads = [threading.Thread(target=grammars.compile, args=(_schema(_PERSON),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]
    matcher = grammars._matcher(_schema(_PERSON))
    assert grammars._matcher(_schema(_PERSON)) is matcher
    for number in range(80):
        grammars.compile(_schema({"const": number}))
    assert len(grammars._compiled) == 32
    assert grammars._matcher(_schema(_PERSON)) is not matcher


def test_answers_of_one_form_do_not_disturb_each_other(grammars: Grammars, vocab: Vocab) -> None:
    constraint = Constraint("regex", "ab", "regex")
    one, other = grammars.start(constraint), grammars.start(constraint)
    (a,) = vocab.tokenize("a", add_bos=False, parse_special=False)
    one.accept(a)
    assert one.possible([a]) == 0
    assert other.possible([a]) == 1


# Masks


def _allowed(candidates: Candidates) -> set[int]:
    return set(candidates.tokens[candidates.logits > -np.inf].tolist())


@pytest.mark.parametrize(
    ("pattern", "allowed"),
    [("[0-9]", lambda text: len(text) == 1 and text in b"0123456789"), ("(?s:.)*", lambda text: True)],
    ids=["few", "nearly all"],
)
def test_a_mask_leaves_what_may_come(grammars: Grammars, vocab: Vocab, pattern: str, allowed: Any) -> None:
    form = grammars.start(Constraint("regex", pattern, "regex"))
    logits = np.random.default_rng(1).standard_normal(vocab.size).astype(np.float32)
    whole = Candidates(logits.copy())
    form(whole)
    left = _allowed(whole)
    expected = {token for token in range(vocab.size) if (text := vocab.piece(token)) and allowed(text)}
    if pattern != "[0-9]":
        expected = {token for token in expected if not _is_cut(vocab.piece(token))} | vocab.ends | (left - vocab.ends)
    assert left == expected
    kept = {
        int(token): float(value) for token, value in zip(whole.tokens, whole.logits, strict=True) if value > -np.inf
    }
    assert all(value == float(logits[token]) for token, value in kept.items())


def _is_cut(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False


@pytest.mark.parametrize("banned", [(), range(0, 49152, 2)])
def test_the_best_of_what_may_come_is_found(grammars: Grammars, vocab: Vocab, banned: Sequence[int]) -> None:
    factory = SamplerFactory(vocab, 256)
    constraint = Constraint("regex", "[a-m]+", "regex")
    for seed in range(5):
        logits = np.random.default_rng(seed).standard_normal(vocab.size).astype(np.float32)
        logits[list(banned)] = -50.0
        everything = Candidates(logits.copy())
        grammars.start(constraint)(everything)
        sampler = factory.build(_GREEDY, [], form=grammars.start(constraint))
        assert sampler.sample(logits) == everything.token(everything.best())


def test_a_step_that_takes_too_much_fails_the_request(running: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is over llguidance's limits for one token is an error, and never an unchecked token."""
    monkeypatch.setattr(grammar, "limits", lambda kind: LLParserLimits(step_max_items=300, verbose_errors=False))
    inner = {
        "type": "object",
        "properties": {f"property{number}": {} for number in range(150)},
        "required": ["property149"],
    }
    wide = _schema({"type": "object", "properties": {"a": inner}, "required": ["a"], "additionalProperties": False})
    running.engine.check(_generation(wide))
    running.engine.submit(1, [[5, 6]], _generation(wide))
    running.engine.submit(2, [[5, 6]], Generation(sampling=_GREEDY, max_tokens=5))
    events = []
    while not running.engine.idle:
        events += running.engine.step()
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert (failed.request, failed.error.name) == (1, "InvalidRequest")
    assert "Too many items" in failed.error.message
    assert [event.completion_tokens for event in events if isinstance(event, Finished)] == [5]
