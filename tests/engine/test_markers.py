"""Constraints made of text, markers and parts, as answers with tool calls are: which tokens they allow, and what the
starter model makes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from running_engine import Answer, RunningEngine
from simulated_clock import SimulatedClock

from llamaserve.engine.candidates import Candidates
from llamaserve.engine.constraint import Form, Grammars
from llamaserve.engine.grammar import compiled, grammar_text
from llamaserve.engine.llama import Model, Vocab
from llamaserve.engine.markers import prelude
from llamaserve.engine.params import Constraint, Generation, LoadParams, Sampling
from llamaserve.engine.speculation import PromptLookup
from llamaserve.errors import InvalidRequest
from llamaserve.worker.grammar_check_main import _TOKENIZER

_CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 10}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
_BEGIN, _END, _THOUGHT = "<repo_name>", "<file_sep>", "</think>"  # two control tokens of the starter model, and a text
_MARKERS = (_BEGIN, _END, _THOUGHT)
_GREEDY = Sampling(seed=1, temperature=0.0)


def _part(schema: Any) -> Constraint:
    return Constraint("json_schema", json.dumps(schema), "tools[0].function.parameters")


def _lark(text: str, *parts: Constraint, markers: tuple[str, ...] = _MARKERS) -> Constraint:
    return Constraint("lark", text, "tools", markers, parts)


_CALL = 'call: "get(" part0 ")" marker1'
_AUTO = _lark(f"start: TEXT | until0 call (until0 call)*\n{_CALL}", _part(_CITY))
_FORCED = _lark(f"start: marker0 call\n{_CALL}", _part(_CITY))
_AFTER_THINKING = _lark(f"start: through2 (TEXT | until0 call)\n{_CALL}", _part(_CITY))
_ARGUMENTS = '{"city": "Oslo", "days": 3}'


@pytest.fixture(scope="module")
def grammars(vocab: Vocab) -> Grammars:
    return Grammars(vocab)


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


# Which tokens are allowed


def _tokens(vocab: Vocab, text: str, *, special: bool) -> list[int]:
    return vocab.tokenize(text, add_bos=False, parse_special=special)


def _fits(form: Form, vocab: Vocab, text: str, *, special: bool) -> bool:
    """Tell whether a text is a whole sentence."""
    tokens = [*_tokens(vocab, text, special=special), min(vocab.ends)]
    return form.possible(tokens) == len(tokens)


SENTENCES = {
    "text": (_AUTO, "Hello!"),
    "nothing": (_AUTO, ""),
    "a marker that has only begun": (_AUTO, "Hello <repo_nam"),
    "a call": (_AUTO, f"{_BEGIN}get({_ARGUMENTS}){_END}"),
    "text and a call": (_AUTO, f"Hello, Wörld <3\n{_BEGIN}get({_ARGUMENTS}){_END}"),
    "two calls": (_AUTO, f"One {_BEGIN}get({_ARGUMENTS}){_END} and {_BEGIN}get({_ARGUMENTS}){_END}"),
    "forced": (_FORCED, f"{_BEGIN}get({_ARGUMENTS}){_END}"),
    "thought": (_AFTER_THINKING, f"Hm {_THOUGHT}Hello"),
    "thought and called": (_AFTER_THINKING, f"{_THOUGHT} Hello {_BEGIN}get({_ARGUMENTS}){_END}"),
}
OTHERS = {
    "a wrong call": (_AUTO, f"Hello {_BEGIN}put({_ARGUMENTS}){_END}"),
    "wrong arguments": (_AUTO, f'{_BEGIN}get({{"city": 1, "days": 3}}){_END}'),
    "an unfinished call": (_AUTO, f"{_BEGIN}get({_ARGUMENTS})"),
    "no call": (_AUTO, f"Hello {_BEGIN}"),
    "text after a call": (_AUTO, f"{_BEGIN}get({_ARGUMENTS}){_END} that was it"),
    "another marker in the text": (_AUTO, f"Hello {_END} you"),
    "a third marker in the text": (_AUTO, f"Hello {_THOUGHT} you"),
    "another marker before the call": (_AUTO, f"Hello {_END} you {_BEGIN}get({_ARGUMENTS}){_END}"),
    "text instead of the call": (_FORCED, "Hello"),
    "text before the call": (_FORCED, f"Hello {_BEGIN}get({_ARGUMENTS}){_END}"),
    "nothing instead of the call": (_FORCED, ""),
    "thinking without an end": (_AFTER_THINKING, "Hm"),
    "an end of thinking later on": (_AFTER_THINKING, f"Hm {_THOUGHT} Hello {_THOUGHT}"),
}


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "texts"])
@pytest.mark.parametrize(("constraint", "text"), SENTENCES.values(), ids=SENTENCES)
def test_what_fits(grammars: Grammars, vocab: Vocab, constraint: Constraint, text: str, special: bool) -> None:
    assert _fits(grammars.start(constraint), vocab, text, special=special)


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "texts"])
@pytest.mark.parametrize(("constraint", "text"), OTHERS.values(), ids=OTHERS)
def test_what_does_not(grammars: Grammars, vocab: Vocab, constraint: Constraint, text: str, special: bool) -> None:
    assert not _fits(grammars.start(constraint), vocab, text, special=special)


def test_other_markers_may_be_text_in_what_goes_through_them(grammars: Grammars, vocab: Vocab) -> None:
    thought = f"I could write {_BEGIN} or {_END} {_THOUGHT}"
    assert _fits(grammars.start(_AFTER_THINKING), vocab, thought, special=False)
    assert not _fits(grammars.start(_AFTER_THINKING), vocab, thought, special=True)
    through_a_token = _lark("start: through0 TEXT")
    for special in (True, False):
        assert _fits(grammars.start(through_a_token), vocab, f"a{_BEGIN}b", special=special)
        assert not _fits(grammars.start(through_a_token), vocab, f"a{_BEGIN}b{_BEGIN}", special=special)


@pytest.mark.parametrize(
    ("constraint", "so_far", "markers", "ends"),
    [
        (_AUTO, "Some text", {_BEGIN}, True),
        (_AUTO, "Some text <repo", {_BEGIN}, True),
        (_AUTO, "Half a character \N{SNOWMAN}"[:-1], {_BEGIN}, True),
        (_AUTO, f"{_BEGIN}get(", set(), False),
        (_AUTO, f'{_BEGIN}get({{"city": "Os', set(), False),
        (_AUTO, f"{_BEGIN}get({_ARGUMENTS})", {_END}, False),
        (_AUTO, f"{_BEGIN}get({_ARGUMENTS}){_END}", {_BEGIN}, True),
        (_FORCED, "", {_BEGIN}, False),
        (_FORCED, f"{_BEGIN}get({_ARGUMENTS}){_END}", set(), True),
        (_AFTER_THINKING, "Hm", set(), False),
        (_AFTER_THINKING, f"Hm{_THOUGHT}", {_BEGIN}, True),
    ],
)
def test_control_tokens_come_where_their_markers_do_and_ends_where_it_may_end(
    grammars: Grammars, vocab: Vocab, constraint: Constraint, so_far: str, markers: set[str], ends: bool
) -> None:
    form = grammars.start(constraint)
    for token in _tokens(vocab, so_far, special=True):
        form.accept(token)
    candidates = Candidates(np.zeros(vocab.size, np.float32))
    form(candidates)
    allowed = set(candidates.tokens[candidates.logits > -np.inf].tolist())
    controls = {token for token in range(vocab.size) if vocab.is_control(token)}
    expected = {vocab.control(marker) for marker in markers} | (vocab.ends if ends else set())
    assert allowed & controls == expected
    for token in controls if not form.complete else ():
        assert bool(form.possible([token])) == (token in expected)


@pytest.mark.parametrize("marker", ["<|im_end|>", "<reponame>", "<tool>"])
def test_a_marker_that_is_no_token_or_ends_an_answer_is_a_text(grammars: Grammars, vocab: Vocab, marker: str) -> None:
    constraint = _lark('start: until0 "1"', markers=(marker,))
    assert _fits(grammars.start(constraint), vocab, f"a{marker}1", special=False)
    form = grammars.start(constraint)
    assert not any(form.possible([token]) for token in range(vocab.size) if vocab.is_control(token))


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("a[CALLS]0", True),
        ("a[CALLS0", False),
        ("aS]1", True),
        ("a[CALLS]1", False),
        ("aS][CALLS]0", False),
        ("a</x>[CALLS]0", False),
        ("a</x>2", True),
    ],
)
def test_a_marker_in_another_one(grammars: Grammars, vocab: Vocab, text: str, fits: bool) -> None:
    constraint = _lark('start: until0 "0" | until1 "1" | until2 "2"', markers=("[CALLS]", "S]", "</x>"))
    assert _fits(grammars.start(constraint), vocab, text, special=False) == fits


@settings(max_examples=150)
@given(st.lists(st.sampled_from(["<a>", "<b>", "<", "a", ">", "b", "ü", "\n", '"']), max_size=12))
def test_until_and_through_end_where_the_marker_is_complete(pieces: list[str]) -> None:
    """What the rules mean, told by a regular expression of Python's."""
    text = "".join(pieces)
    markers = ("<a>", "<b>")
    for name, pattern in {
        "TEXT": r"(?s)((?!<a>|<b>).)*",
        'until0 "!"': r"(?s)((?!<a>|<b>).)*<a>!",
        'through1 "!"': r"(?s)((?!<b>).)*<b>!",
    }.items():
        form = _byte_form(_lark(f"start: {name}", markers=markers))
        for sentence in (text, text + "!"):
            assert form(sentence) == bool(re.fullmatch(pattern, sentence)), (name, sentence)


def _byte_form(constraint: Constraint) -> Any:
    """Return what tells whether a text fits, on a vocabulary of bytes."""
    matcher = compiled(constraint, _TOKENIZER)

    def fits(text: str) -> bool:
        tokens = [*text.encode(), 256]
        return bool(matcher.deep_copy().validate_tokens(tokens) == len(tokens))

    return fits


# Parts


PARTS = {
    "json_schema": (Constraint("json_schema", '{"type": "integer"}', "x"), ["1", "-20"], ["a", "1.5", ""]),
    "any value": (Constraint("json_schema", "true", "x"), ["1", '{"a": [1, 2]}'], ["a", ""]),
    "grammar": (Constraint("grammar", 'root ::= "a"+ | "b" [0-9]', "x"), ["aaa", "b1"], ["ab", "b", ""]),
    "recursive grammar": (Constraint("grammar", 'root ::= "[" root? "]"', "x"), ["[]", "[[[]]]"], ["[", "[[]"]),
    "regex": (Constraint("regex", "[a-c]{2,3}", "x"), ["ab", "abc"], ["a", "abcd"]),
    "choice": (Constraint("choice", '["one", "one more"]', "x"), ["one", "one more"], ["on", "more"]),
}


@pytest.mark.parametrize(("part", "good", "bad"), PARTS.values(), ids=PARTS)
def test_a_part_may_be_of_any_other_kind(
    grammars: Grammars, vocab: Vocab, part: Constraint, good: list[str], bad: list[str]
) -> None:
    other = _part(_CITY)
    constraint = _lark('start: marker0 (part0 | "+" part1) marker1', other, part)
    for text in good:
        assert _fits(grammars.start(constraint), vocab, f"{_BEGIN}+{text}{_END}", special=True)
        assert _fits(grammars.start(constraint), vocab, f"{_BEGIN}{_ARGUMENTS}{_END}", special=True)
    for text in bad:
        assert not _fits(grammars.start(constraint), vocab, f"{_BEGIN}+{text}{_END}", special=True)


def test_parts_have_the_white_space_that_schemas_have(grammars: Grammars, vocab: Vocab) -> None:
    wild = _part(_CITY | {"x-guidance": {"whitespace_flexible": False, "whitespace_pattern": "x+"}})
    constraint = _lark("start: part0 | marker0 part0 marker1", wild)
    for form in ('{"city":"a","days":1}', '{\n  "city": "a",\n  "days": 1\n}'):
        for text in (form, f"{_BEGIN}{form}{_END}"):
            assert _fits(grammars.start(constraint), vocab, text, special=True)
    assert not _fits(grammars.start(constraint), vocab, '{x"city":"a","days":1}', special=True)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Constraint("json_schema", '{"type": "text"}', "tools[1].parameters"), "Invalid type: text"),
        (Constraint("grammar", "root ::= missing", "tools[1].format"), "missing"),
        (Constraint("regex", "(", "tools[1].format"), "unclosed"),
        (Constraint("json_schema", "false", "tools[1].parameters"), "no answer could meet it"),
    ],
)
def test_what_is_wrong_with_a_part_is_said_of_it(grammars: Grammars, part: Constraint, words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)) as caught:
        grammars.compile(_lark("start: part0 | part1 part2", _part(_CITY), part, _part({"type": "text"})))
    assert caught.value.param == part.param
    assert caught.value.message.startswith(f"{part.param}: ")


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (_lark("start: other"), "other"),
        (_lark("start: TEXT )"), "tools: "),
        (_lark("start: part1", _part(_CITY)), "part1"),
        (_lark("start: until3"), "until3"),
        (_lark("start: TEXT", markers=("",)), "at least one character"),
        (_lark("start: TEXT", markers=("x" * 129,)), "at most 128"),
        (_lark("start: TEXT", markers=("x", "x")), "all different"),
        (_lark("start: TEXT", markers=tuple(map(str, range(33)))), "at most 32 markers"),
        (_lark("start: TEXT", *[_part({})] * 513), "513 parts; at most 512"),
        (_lark("start: part0", _lark("start: TEXT")), "a part can't have parts"),
    ],
)
def test_what_is_wrong_with_the_whole_is_said_of_that(grammars: Grammars, constraint: Constraint, words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)) as caught:
        grammars.compile(constraint)
    assert caught.value.param == "tools"


def test_the_same_from_another_field_is_compiled_once(grammars: Grammars) -> None:
    matcher = grammars._matcher(_AUTO)
    elsewhere = msgspec.structs.replace(_part(_CITY), param="functions[0].parameters")
    assert grammars._matcher(msgspec.structs.replace(_AUTO, param="functions", parts=(elsewhere,))) is matcher
    for other in (
        msgspec.structs.replace(_AUTO, markers=(_BEGIN, _END)),
        msgspec.structs.replace(_AUTO, parts=(_part(_CITY | {"required": []}),)),
        msgspec.structs.replace(_AUTO, parts=(msgspec.structs.replace(_part(_CITY), lenient=True),)),
    ):
        assert grammars._matcher(other) is not matcher


def test_only_the_rules_that_are_used_are_written() -> None:
    lines = prelude(_MARKERS, "start: until1 | TEXT", {_BEGIN: 3, _END: 5}.get).split("\n")
    assert {line.split(":")[0] for line in lines[1:]} == {"TEXT", "until1", "until1_text[lazy]", "UNTIL1"}
    assert "until1: TEXT <[5]> | until1_text" in lines


def test_what_a_lenient_schema_can_not_enforce_is_left_out(grammars: Grammars, vocab: Vocab) -> None:
    properties = _CITY["properties"] | {"city": {"type": "string", "format": "town"}}  # type: ignore[operator]
    part = _part(_CITY | {"not": {"required": ["country"]}, "properties": properties})
    with pytest.raises(InvalidRequest, match="Unimplemented keys"):
        grammars.compile(_lark("start: part0", part))
    lenient = _lark("start: part0", msgspec.structs.replace(part, lenient=True))
    assert _fits(grammars.start(lenient), vocab, '{"city": "a", "days": 1}', special=False)
    assert not _fits(grammars.start(lenient), vocab, '{"town": "a", "days": 1}', special=False)


def test_an_agents_many_tools(grammars: Grammars, vocab: Vocab) -> None:
    tools = [_part(_large_schema(number)) for number in range(60)]
    assert sum(len(tool.text) for tool in tools) > 100_000
    calls = " | ".join(f'"tool{number}(" part{number}' for number in range(60))
    constraint = _lark(f'start: TEXT | until0 call (until0 call)*\ncall: ({calls}) ")" marker1', *tools)
    call = f'{_BEGIN}tool59({{"name59": "a", "list59": [{{"x": 1}}]}}){_END}'
    assert _fits(grammars.start(constraint), vocab, f"Now {call}, {call}", special=True)
    assert len(grammar_text(constraint)) > 100_000


def _large_schema(number: int) -> dict[str, Any]:
    properties: dict[str, Any] = {
        f"name{number}": {"type": "string", "description": "What this is for, said at some length. " * 3},
        f"list{number}": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "integer"}}}},
    }
    for index in range(14):
        properties[f"option{index}"] = {"enum": ["none", "some", "all", None], "description": "How much of it. " * 5}
    return {"type": "object", "properties": properties, "required": [f"name{number}"], "additionalProperties": False}


# What the starter model makes of them


def _generation(constraint: Constraint, sampling: Sampling, **others: Any) -> Generation:
    fields = {"sampling": sampling, "constraint": constraint, "max_tokens": 60, "shown": _MARKERS, **others}
    return Generation(**fields)


def _calls(answer: Answer) -> list[str]:
    """Return the arguments of the calls in an answer, which must be one that has its form."""
    assert answer.finished is not None
    text, *calls = answer.text.split(_BEGIN)
    assert _THOUGHT not in text
    assert _END not in text
    arguments = []
    for number, call in enumerate(calls):
        found = re.fullmatch(rf"(?s)get\((\{{.*\}})\)({_END}(.*))?", call)
        if found is None:
            assert answer.finished.reason == "length"
            assert number == len(calls) - 1
        else:
            arguments.append(found.group(1))
    return arguments


@pytest.mark.parametrize("bias", [0.0, 6.0, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_is_text_or_calls(running: RunningEngine, bias: float, seed: int) -> None:
    begin = running.model.vocab.control(_BEGIN)
    assert begin is not None
    sampling = Sampling(seed=seed, temperature=1.1, logit_bias={begin: bias} if bias else {})
    for answer in running.alone("The weather in Oslo?", _generation(_AUTO, sampling, choices=2)):
        for arguments in _calls(answer):
            jsonschema.validate(json.loads(arguments), _CITY)
        assert (_BEGIN in answer.text) == (begin in answer.tokens) or bias < 100
        assert bias < 100 or answer.text.startswith(_BEGIN)


@pytest.mark.parametrize("sampling", [_GREEDY, Sampling(seed=3, temperature=1.3), Sampling(seed=5, mirostat_mode=2)])
def test_a_forced_call(running: RunningEngine, sampling: Sampling) -> None:
    for answer in running.alone("The weather in Oslo?", _generation(_FORCED, sampling, choices=2)):
        assert answer.finished is not None
        assert answer.finished.reason == "stop"
        (arguments,) = _calls(answer)
        jsonschema.validate(json.loads(arguments), _CITY)


def test_drafts_of_calls(speculating: RunningEngine) -> None:
    speculating.clock = SimulatedClock()
    speculating.drafter = PromptLookup
    call = f"{_BEGIN}get({_ARGUMENTS}){_END}"
    prompt = f"{call}\nAnd again:\n{call}\nAnd again:\n"
    for sampling in (_GREEDY, Sampling(seed=3, temperature=0.8)):
        for answer in speculating.alone(prompt, _generation(_FORCED, sampling, choices=2)):
            (arguments,) = _calls(answer)
            jsonschema.validate(json.loads(arguments), _CITY)
    assert any(right for _, right in speculating.runner.drafts)


def test_greedily_the_best_that_may_come_is_the_same_as_with_a_mask(
    running: RunningEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = running.model.vocab.control(_BEGIN)
    assert begin is not None
    sampling = Sampling(seed=0, temperature=0.0, logit_bias={begin: 5.0})
    (quick,) = running.alone("The weather in Oslo?", _generation(_AUTO, sampling))

    def masked(self: Form, candidates: Candidates) -> None:
        self(candidates)
        candidates.keep(np.array([candidates.best()]))

    monkeypatch.setattr(Form, "keep_best", masked)
    (plain,) = running.alone("The weather in Oslo?", _generation(_AUTO, sampling))
    assert quick.tokens == plain.tokens
