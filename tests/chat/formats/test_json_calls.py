"""Calls in JSON with any texts around them: as long as an answer could be text it is; then it is kept to the schema."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from walking import accepts

from llamaserve.chat.form import Calls, answer_form, schema_of
from llamaserve.chat.formats.json_calls import JsonCalls
from llamaserve.chat.tools import Tool
from llamaserve.engine.grammar import compiled
from llamaserve.engine.params import Constraint

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS = tuple(Tool(name, "", SCHEMA, False, f"tools[{name}].function") for name in ("f", "get_it"))
CORRECT = [[("f", '{"a": 1}')], [("f", '{"a": 1}'), ("get_it", '{"a": 22}')]]
WRONG = [[("f", '{"b": 1}')], [("f", "nothing")], [("f", '{"a": "1"}')]]
PIECES = [
    "Action",
    "call",
    "x",
    ":",
    "{",
    "(",
    '"',
    '{"name": "',
    "->",
    "\n",
    " ",
    "\t",
    "[x",
    "#",
    "\\",
    "é",
    "/",
    ".",
]


def form(calls: JsonCalls) -> Constraint:
    """Return the form of an answer that may call."""
    rules = calls.rules(TOOLS, several=True)
    found = answer_form(None, Calls(calls, rules, [schema_of(tool) for tool in TOOLS], False), None)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("before", "between"),
    [
        ("Action: ", "\nAction Input: "),
        ("call ", ": "),
        (": ", "("),
        ("\n- ", "\n"),
        ("call\t\n", " : "),
        ('{"name": "', '", "parameters": '),
    ],
)
def test_calls_that_begin_as_text_could_are_kept_to_the_schema(before: str, between: str) -> None:
    calls = JsonCalls("made up", before=before, between=between, after="", separator="\n")
    allowed = form(calls)
    for correct in CORRECT:
        assert accepts(allowed, calls.write(correct))
    for wrong in WRONG:
        assert not accepts(allowed, calls.write(wrong))
    for text in ("Hello.", before, f"{before}other{between}", f"So: {calls.write(WRONG[0])}", "f", ""):
        assert accepts(allowed, text)
    assert not accepts(allowed, f"{before}  f{between}{{}}"), "it would be read as a call"


text = st.lists(st.sampled_from(PIECES), max_size=3).map("".join)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.builds(
        JsonCalls,
        name=st.just("made up"),
        before=text,
        between=text,
        after=text | st.sampled_from(["</call>", "[END]"]),
        begin=text,
        separator=text | st.just("<next>"),
        end=text | st.just("</calls>"),
    )
)
def test_calls_in_any_texts_are_kept_to_the_schema(calls: JsonCalls) -> None:
    assume((calls.begin + calls.before).strip() and calls.between.strip())
    allowed = form(calls)
    for correct in CORRECT:
        assert accepts(allowed, calls.write(correct))
    assert not accepts(allowed, calls.write(WRONG[0]))


END = 258


class Vocabulary:
    """Single bytes and two tokens of a format."""

    eos_token_id = END
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"\xff</call>", b"\xff<next>", b"<end>")
    special_token_ids = (256, 257, END)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def test_what_follows_the_arguments_may_be_tokens() -> None:
    calls = JsonCalls("made up", before="call ", between=": ", after="</call>", separator="<next>")
    controls = {"</call>": 256, "<next>": 257}
    matcher = compiled(form(calls), LLTokenizer(TokenizerWrapper(Vocabulary())), controls.get)
    for named in CORRECT:
        assert reads(matcher, calls.write(named), controls)
    assert not reads(matcher, calls.write(WRONG[0]), controls)


def reads(matcher: LLMatcher, answer: str, controls: dict[str, int]) -> bool:
    """Say whether an answer with tokens is allowed."""
    tokens: list[int] = []
    while answer:
        found = next((name for name in controls if answer.startswith(name)), None)
        tokens += [controls[found]] if found is not None else answer[0].encode()
        answer = answer[len(found or answer[0]) :]
    tokens.append(END)
    return matcher.validate_tokens(tokens) == len(tokens)


def test_the_arguments_are_json() -> None:
    for arguments in ([], "", {"a": 1, "b": 2}, {}):
        calls = JsonCalls("made up", before="call ", between=": ", after="")
        assert not accepts(form(calls), calls.write([("f", json.dumps(arguments))]))
