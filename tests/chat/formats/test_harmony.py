"""gpt-oss's answers: what they are read as, however they arrive, and that what the rules allow is read as it is meant.

The golden answers are as openai/harmony's docs/format.md and the chat template of openai/gpt-oss-20b write them, or as
users of other servers have reported them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings, strategies as st
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from llamaserve.chat.formats import harmony
from llamaserve.chat.formats.harmony import CHANNEL, CONSTRAIN, END, MESSAGE, SHOWN, START
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Content, Incoming, Part, Reasoning
from llamaserve.chat.tools import Tool
from llamaserve.engine.grammar import compiled
from llamaserve.engine.params import Constraint
from llamaserve.errors import ChatTemplateError

_NAMES = frozenset({"get_weather", "get_weather.v2", "run"})
_NEXT = f"{END}{START}assistant"
_THOUGHT = harmony.THOUGHTS[0]
_FINAL = f"{CHANNEL}final{MESSAGE}"
_CALL = f"{CHANNEL}commentary to=functions.get_weather {CONSTRAIN}json{MESSAGE}"


def _read(*pieces: str, names: frozenset[str] = _NAMES, raw_thoughts: bool = False) -> list[Part]:
    """Return the parts of an answer that comes in pieces, those of a text joined."""
    text = Incoming()
    reading = harmony.read_answer(text, names, raw_thoughts)
    parts: list[Part] = []

    def step() -> None:
        for part in reading:
            if part is None:
                return
            parts.append(part)

    for piece in pieces:
        text.push(piece)
        step()
    text.end()
    step()
    return _joined(parts)


def _joined(parts: Sequence[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        match last, part:
            case (Content(a), Content(b)):
                joined[-1] = Content(a + b)
            case (Reasoning(a), Reasoning(b)):
                joined[-1] = Reasoning(a + b)
            case (Arguments(a), Arguments(b)):
                joined[-1] = Arguments(a + b)
            case _:
                joined.append(part)
    return joined


def _call(name: str, arguments: str) -> list[Part]:
    return [CallBegins(name), Arguments(arguments), CallEnds()]


_OSLO = '{"city": "Oslo"}'
_WEATHER = _call("get_weather", _OSLO)

GOLDEN: dict[str, tuple[str, list[Part]]] = {
    "thoughts and an answer": (
        f"{_THOUGHT}Simple arithmetic.{_NEXT}{_FINAL}2 + 2 = 4.",
        [Reasoning("Simple arithmetic."), Content("2 + 2 = 4.")],
    ),
    "an answer only": (f"{_FINAL}4.", [Content("4.")]),
    "several thoughts": (
        f"{_THOUGHT}First.{_NEXT}{_THOUGHT}Second.{_NEXT}{_FINAL}4.",
        [Reasoning("First.\n\nSecond."), Content("4.")],
    ),
    "white space around": (
        f" \n{_THOUGHT}\n Hm. \n{END}\n{START}assistant{_FINAL}\n\n4. \n",
        [Reasoning("Hm."), Content("4. \n")],
    ),
    "empty thoughts": (f"{_THOUGHT}{_NEXT}{_FINAL}4.", [Content("4.")]),
    "nothing": ("", []),
    "a call, as documented": (f"{_THOUGHT}Need it.{_NEXT}{_CALL}{_OSLO}", [Reasoning("Need it."), *_WEATHER]),
    "no space before the type": (
        f"{CHANNEL}commentary to=functions.get_weather{CONSTRAIN}json{MESSAGE}{_OSLO}",
        _WEATHER,
    ),
    "the recipient first, as in the template": (
        f" to=functions.get_weather{CHANNEL}commentary json{MESSAGE}{_OSLO}",
        _WEATHER,
    ),
    "the recipient first, and a type": (
        f"{_THOUGHT}x{_NEXT} to=functions.get_weather{CHANNEL}commentary {CONSTRAIN}json{MESSAGE}{_OSLO}",
        [Reasoning("x"), *_WEATHER],
    ),
    "no type": (f"{CHANNEL}commentary to=functions.get_weather{MESSAGE}{_OSLO}", _WEATHER),
    "another type": (f"{CHANNEL}commentary to=functions.get_weather code{MESSAGE}{_OSLO}", _WEATHER),
    "no namespace": (f"{CHANNEL}commentary to=get_weather {CONSTRAIN}json{MESSAGE}{_OSLO}", _WEATHER),
    "a call in the analysis channel": (f"{CHANNEL}analysis to=functions.get_weather json{MESSAGE}{_OSLO}", _WEATHER),
    "no channel": (f" to=functions.get_weather{MESSAGE}{_OSLO}", _WEATHER),
    "two recipients": (
        f"{CHANNEL}commentary to=assistant{CHANNEL}commentary to=functions.get_weather json{MESSAGE}{_OSLO}",
        _WEATHER,
    ),
    "a name with a dot": (
        f"{CHANNEL}commentary to=functions.get_weather.v2 json{MESSAGE}{{}}",
        _call("get_weather.v2", "{}"),
    ),
    "brackets and quotes in arguments": (
        f'{_CALL}{{"city": "}}{{\\"", "list": [{{}}]}}',
        _call("get_weather", '{"city": "}{\\"", "list": [{}]}'),
    ),
    "a preamble and a call": (
        f"{_THOUGHT}Long.{_NEXT}{CHANNEL}commentary{MESSAGE}**Plan**:\n1. Look.{_NEXT}{_CALL}{_OSLO}",
        [Reasoning("Long."), Content("**Plan**:\n1. Look."), *_WEATHER],
    ),
    "a preamble and an answer": (
        f"{CHANNEL}commentary{MESSAGE}I look.{_NEXT}{_FINAL}Here.",
        [Content("I look.\n\nHere.")],
    ),
    "several calls, where all tokens are shown": (
        f"{_CALL}{_OSLO}<|call|>{START}assistant{_CALL}{{}}<|call|>",
        [*_WEATHER, *_call("get_weather", "{}")],
    ),
    "all tokens shown": (f"{_THOUGHT}x{_NEXT}{_FINAL}4.<|return|>", [Reasoning("x"), Content("4.")]),
    "an unknown tool": (
        f"{_THOUGHT}x{_NEXT}{CHANNEL}commentary to=functions.other json{MESSAGE}{_OSLO}",
        [Reasoning("x"), Content(f"{CHANNEL}commentary to=functions.other json{MESSAGE}{_OSLO}")],
    ),
    "a tool that models are trained with": (
        f"{CHANNEL}analysis to=browser.search code{MESSAGE}{_OSLO}",
        [Reasoning(f"{CHANNEL}analysis to=browser.search code{MESSAGE}{_OSLO}")],
    ),
    "another one": (
        f"{_THOUGHT}x{_NEXT} to=python{CHANNEL}analysis code{MESSAGE}print(1)",
        [Reasoning(f"x\n\nto=python{CHANNEL}analysis code{MESSAGE}print(1)")],
    ),
    "a call with arguments that are no object": (
        f"{CHANNEL}commentary to=functions.run code{MESSAGE} print(1)",
        [Content(f"{CHANNEL}commentary to=functions.run code{MESSAGE} print(1)")],
    ),
    "text after arguments": (f"{_CALL}{_OSLO} Done.", [*_WEATHER, Content("Done.")]),
    "an empty call": (_CALL, [CallBegins("get_weather")]),
    "a cut call": (f'{_CALL}{{"city": "Os', [CallBegins("get_weather"), Arguments('{"city": "Os')]),
    "a cut recipient": (" to=functions.get_w", []),
    "a cut channel": (f"{_THOUGHT}x{_NEXT}{CHANNEL}comm", [Reasoning("x")]),
    "a cut header": (f"{CHANNEL}commentary to=functions.get_w", []),
    "a cut role": (f"{_THOUGHT}x{END}{START}assis", [Reasoning("x")]),
    "the role again": (f"{START}assistant{_FINAL}4.", [Content("4.")]),
    "no start between": (f"{_THOUGHT}x{END}{_FINAL}4.", [Reasoning("x"), Content("4.")]),
    "no end between": (f"{_THOUGHT}x{_FINAL}4.", [Reasoning("x"), Content("4.")]),
    "no channel's name": (f"{MESSAGE}4.", [Content("4.")]),
    "a channel that is not known": (f"{CHANNEL}comment{MESSAGE}4.", [Content("4.")]),
    "garbage after a channel's name": (f"{CHANNEL}commentary 2?{MESSAGE}4.", [Content("4.")]),
    "prose for a channel": (
        f"{CHANNEL}We greet them back.{MESSAGE}Hi",
        [Content(f"{CHANNEL}We greet them back.{MESSAGE}Hi")],
    ),
    "garbage for a message": (f"{CHANNEL}??{_NEXT}{_FINAL}4.", [Content("??\n\n4.")]),
    "no mark of the message": (f"{CHANNEL}analysisWe think.{_NEXT}{_FINAL}4.", [Reasoning("We think."), Content("4.")]),
    "a word like a channel": (f"{CHANNEL}finally done", [Content("finally done")]),
    "nothing in a header": (f"{CHANNEL}{END}{START}{END}{CHANNEL}final{_NEXT}{_FINAL}4.", [Content("4.")]),
    "text between messages": (
        f"{_THOUGHT}x{END} So: {START}assistant{_FINAL}4.",
        [Reasoning("x"), Content("So: \n\n4.")],
    ),
    "a message of another role": (
        f"{_FINAL}4.{END}{START}user{MESSAGE}And 3?",
        [Content(f"4.\n\n{START}user{MESSAGE}And 3?")],
    ),
    "a made up result": (
        f"{_CALL}{_OSLO}{END}{START}functions.get_weather to=assistant{CHANNEL}commentary{MESSAGE}1",
        [*_WEATHER, Content(f"{START}functions.get_weather to=assistant{CHANNEL}commentary{MESSAGE}1")],
    ),
    "a long header": (f"{CHANNEL}{'long ' * 300}{MESSAGE}4.", [Content(f"{'long ' * 300}{MESSAGE}4.")]),
    "text": (" \nHello, <b>you</b>! <|end", [Content(" \nHello, <b>you</b>! <|end")]),
    "text, and then messages": (f"Sorry, no.{_NEXT}{_FINAL}I can't.", [Content("Sorry, no.\n\nI can't.")]),
    "text like a recipient": (" to=5, she said", [Content(" to=5, she said")]),
    "more text like a recipient": (f" to=5 {'and so on ' * 200}", [Content(f" to=5 {'and so on ' * 200}")]),
    "white space": (" \n ", [Content(" \n ")]),
}


@pytest.mark.parametrize(("answer", "parts"), GOLDEN.values(), ids=GOLDEN)
def test_answers_are_read_however_they_arrive(answer: str, parts: list[Part]) -> None:
    assert _read(answer) == parts
    assert _read(*answer) == parts
    for at in range(len(answer)):
        assert _read(answer[:at], answer[at:]) == parts, at


RAW: dict[str, tuple[str, list[Part]]] = {
    "thoughts and an answer": (f"{_THOUGHT} Hm.\n{_NEXT}{_FINAL}4.", [Content(f"{_THOUGHT} Hm.\n{END}4.")]),
    "several thoughts": (
        f"{_THOUGHT}a{_NEXT}{_THOUGHT}b{_NEXT}{_FINAL}4.",
        [Content(f"{_THOUGHT}a{END}{_THOUGHT}b{END}4.")],
    ),
    "a call": (f"{_THOUGHT}x{_NEXT}{_CALL}{_OSLO}", [Content(f"{_THOUGHT}x{END}"), *_WEATHER]),
    "a preamble first": (
        f"{CHANNEL}commentary{MESSAGE}I look.{_NEXT}{_THOUGHT}x{_NEXT}{_FINAL}4.",
        [Content(f"I look.\n\n{_THOUGHT}x{END}\n\n4.")],
    ),
    "thoughts that are cut": (f"{_THOUGHT}x", [Content(f"{_THOUGHT}x")]),
    "no end": (f"{_THOUGHT}x{_FINAL}4.", [Content(f"{_THOUGHT}x4.")]),
    "a tool that models are trained with": (
        f"{CHANNEL}analysis to=browser.search code{MESSAGE}{_OSLO}{_NEXT}{_FINAL}4.",
        [Content(f"{CHANNEL}analysis to=browser.search code{MESSAGE}{_OSLO}{END}4.")],
    ),
    "no mark of the message": (
        f"{CHANNEL}analysisWe think.{_NEXT}{_FINAL}4.",
        [Content(f"{CHANNEL}analysisWe think.{END}4.")],
    ),
    "no thoughts": (f"{_FINAL}4.", [Content("4.")]),
}


@pytest.mark.parametrize(("answer", "parts"), RAW.values(), ids=RAW)
def test_thoughts_can_be_left_in_the_text(answer: str, parts: list[Part]) -> None:
    assert _read(answer, raw_thoughts=True) == parts
    assert _read(*answer, raw_thoughts=True) == parts


@settings(max_examples=200)
@given(st.deferred(lambda: st.lists(_scraps, max_size=12).map("".join)))
def test_thoughts_in_the_text_are_read_the_same_however_they_arrive(answer: str) -> None:
    whole = _read(answer, raw_thoughts=True)
    assert _read(*answer, raw_thoughts=True) == whole
    assert not any(isinstance(part, Reasoning) for part in whole)


_WELL_FORMED = [
    answer
    for name, (answer, _) in GOLDEN.items()
    if re.match("thoughts|several|white|a call, as|the recipient first, and|no (space|type)|a preamble|an answer", name)
]


@pytest.mark.parametrize("answer", _WELL_FORMED)
def test_an_answer_that_is_cut_shows_no_markup(answer: str) -> None:
    whole = _texts(_read(answer))
    inside = {at for found in re.finditer(r"<\|\w+\|>", answer) for at in range(found.start() + 1, found.end())}
    for at in range(len(answer)):
        if at not in inside:  # control tokens come as a whole
            texts = _texts(_read(answer[:at]))
            assert all(whole[kind].startswith(text.rstrip()) for kind, text in texts.items()), answer[:at]


def _texts(parts: Sequence[Part]) -> dict[type[Part], str]:
    texts = {Content: "", Reasoning: "", Arguments: ""}
    for part in parts:
        if isinstance(part, Content | Reasoning | Arguments):
            texts[type(part)] += part.text
    return texts


@given(st.text(st.sampled_from("ab<|>to= \n{}.") | st.characters(exclude_categories=["Cs"])))
def test_text_without_markup_is_content(text: str) -> None:
    assert _read(text) == ([Content(text)] if text else [])


_MARKUP = [*SHOWN, "<|call|>", _NEXT, _THOUGHT, _FINAL, _CALL, " to=functions.get_weather", " to=functions.", "to="]
_WORDS = [
    "assistant",
    "user",
    "analysis",
    "commentary",
    "final",
    "json",
    "Some words",
    _OSLO,
    " ",
    "\n",
    "<|",
    "|>",
    '"',
]
_scraps = st.sampled_from(_MARKUP) | st.sampled_from(_WORDS) | st.text("aB1\n{}", max_size=3)


@settings(max_examples=500)
@given(st.lists(_scraps, max_size=12).map("".join), st.data())
def test_whatever_comes_is_read_the_same_however_it_arrives(answer: str, data: st.DataObject) -> None:
    whole = _read(answer)
    places = data.draw(st.lists(st.integers(0, len(answer)), max_size=6).map(sorted))
    assert _read(*(answer[a:b] for a, b in zip([0, *places], [*places, len(answer)], strict=True))) == whole
    assert _read(*answer) == whole
    # Nothing is made up, or moved.
    letters = iter(answer)
    said = "".join(part.text for part in whole if isinstance(part, Content | Reasoning))  # arguments become JSON
    assert all(letter in letters for letter in said if not letter.isspace())


@st.composite
def _messages(draw: st.DrawFn) -> list[tuple[str, list[Part]]]:
    words = st.text("ab <|>{}\n", min_size=1, max_size=12).map(lambda text: f"x{text}x")
    thought = words.map(lambda text: (f"{CHANNEL}analysis{MESSAGE}{text}", [Reasoning(text)]))
    preamble = words.map(lambda text: (f"{CHANNEL}commentary{MESSAGE}{text}", [Content(text)]))
    final = words.map(lambda text: (f"{_FINAL}{text}", [Content(text)]))
    heads = [
        head + kind
        for head in harmony._heads(Tool("run", "", {}, strict=False, place="tools[0]"))
        for kind in harmony._KINDS
    ]
    arguments = st.dictionaries(words, st.recursive(words | st.integers(), st.lists, max_leaves=3), max_size=2)
    calls = st.tuples(st.sampled_from(heads), arguments.map(json.dumps))
    call = calls.map(lambda found: (f"{found[0]}{MESSAGE}{found[1]}", _call("run", found[1])))
    return [*draw(st.lists(thought | preamble, max_size=3)), draw(final | call)]


@given(_messages())
def test_nothing_of_any_message_is_lost(messages: list[tuple[str, list[Part]]]) -> None:
    wanted: list[Part] = []
    for _, parts in messages:
        first = parts[0]
        if isinstance(first, Content | Reasoning) and any(isinstance(part, type(first)) for part in wanted):
            wanted.append(type(first)("\n\n"))
        wanted += parts
    assert _read(_NEXT.join(text for text, _ in messages)) == _joined(wanted)


@pytest.mark.parametrize(
    ("prompt", "header"),
    [
        (f"{START}user{MESSAGE}Hi{END}{START}assistant", ""),
        (f"{START}user{MESSAGE}Hi{END}{START}assistant\n", ""),
        (f"{START}user{MESSAGE}Hi{END}", ""),
        (f"{START}assistant{_FINAL}Hi{END}{START}user{MESSAGE}Hi{END}", ""),
        (f"{START}assistant{_FINAL}Hi<|return|>", ""),
        (f"{START}user{MESSAGE}Hi{END}{START}assistant{_FINAL}", _FINAL),
        (f"{START}user{MESSAGE}Hi{END}{START}assistant{_FINAL}Once upon", _FINAL),
        (f"{START}user{MESSAGE}Hi{END}{START}assistant{_THOUGHT}", _THOUGHT),
        (f"{START}assistant{CHANNEL}", CHANNEL),
        (f"{START}assistant to=functions.run", " to=functions.run"),
        ("Hi", ""),
    ],
)
def test_what_a_prompt_has_begun(prompt: str, header: str) -> None:
    assert harmony.begun(prompt) == header


def test_an_answer_goes_on_where_the_prompt_ends() -> None:
    assert _read(_FINAL, " a time.") == [Content(" a time.")]
    assert _read(_THOUGHT, f"Hm.{_NEXT}{_FINAL}4.") == [Reasoning("Hm."), Content("4.")]
    assert _read(CHANNEL, f"analysis{MESSAGE}Hm.{_NEXT}{_FINAL}4.") == [Reasoning("Hm."), Content("4.")]
    assert _read(f" to=functions.run{CHANNEL}", f"commentary json{MESSAGE}{{}}") == _call("run", "{}")


def test_which_templates_it_is_for() -> None:
    assert harmony.matches("{{ '<|start|>assistant<|channel|>final<|message|>' + message.content }}<|end|>")
    assert not harmony.matches("{{ '<|im_start|>assistant' }}{{ message.content }}<|im_end|>")
    assert not harmony.matches("<|channel>thought<channel|><|message|>")


# Rules

_TOOLS = [
    Tool(
        "get_weather",
        "",
        {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2, 7]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        strict=True,
        place="tools[0]",
    ),
    Tool("get_weather.v2", "", {"type": "object", "additionalProperties": False}, strict=True, place="tools[1]"),
    Tool(
        "run",
        "",
        {"type": "object", "properties": {"code": {"maxLength": 3, "type": "string"}}, "required": ["code"]}
        | {"additionalProperties": False},
        strict=True,
        place="tools[2]",
    ),
]
_BODY = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
_FIRST_CONTROL = 256
_STOP = _FIRST_CONTROL + len(SHOWN)
_CONTROLS = {marker: _FIRST_CONTROL + number for number, marker in enumerate(SHOWN)}
_STEPS = 400


class _Vocabulary:
    """Single bytes and the control tokens."""

    eos_token_id = _STOP
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), *(b"\xff" + name.encode() for name in SHOWN), b"<stop>")
    special_token_ids = tuple(range(_FIRST_CONTROL, _STOP + 1))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Vocabulary()))

FORMS: dict[str, dict[str, bool]] = {
    "text": {"forced": False, "calls": False, "body": False},
    "a body": {"forced": False, "calls": False, "body": True},
    "text or a call": {"forced": False, "calls": True, "body": False},
    "a body or a call": {"forced": False, "calls": True, "body": True},
    "a call": {"forced": True, "calls": True, "body": False},
}


def _constraint(
    form: Mapping[str, bool], begun: str = "", tools: Sequence[Tool] = _TOOLS, *, limited: bool = False
) -> Constraint:
    rules = harmony.lark(tools, begun=begun, limited=limited, **form)
    parts = [Constraint("json_schema", json.dumps(tool.parameters), tool.place) for tool in tools]
    parts += [Constraint("json_schema", json.dumps(_BODY), "response_format")] if form["body"] else []
    return Constraint("lark", rules, "tools", SHOWN, tuple(parts))


def _matcher(constraint: Constraint, *, controls: bool) -> LLMatcher:
    return compiled(constraint, _TOKENIZER, _CONTROLS.get if controls else lambda name: None)


def _tokens(text: str, *, controls: bool) -> list[int]:
    if not controls:
        return list(text.encode())
    pieces = re.split("(" + "|".join(map(re.escape, SHOWN)) + ")", text)
    return [token for piece in pieces for token in ([_CONTROLS[piece]] if piece in _CONTROLS else piece.encode())]


def _text(tokens: Sequence[int]) -> str:
    pieces = (SHOWN[token - 256].encode() if token >= _FIRST_CONTROL else bytes([token]) for token in tokens)
    return b"".join(pieces).decode(errors="replace")


def _walk(matcher: LLMatcher, chance: random.Random, *, controls: bool) -> tuple[str, bool]:
    """Return some answer that the rules allow, and whether it is at its end. Markup comes more often than it would."""
    markup = [_tokens(marker, controls=controls) for marker in SHOWN]
    tokens: list[int] = []
    while len(tokens) < _STEPS:
        allowed = list(_allowed(matcher))
        if _STOP in allowed and (len(allowed) == 1 or chance.random() < 0.2):
            return _text(tokens), True
        possible = [marker for marker in markup if matcher.validate_tokens(marker) == len(marker)]
        inside = len(allowed) > 200
        if possible and chance.random() < (0.2 if inside else 0.5):
            step = chance.choice(possible)
        else:
            step = [chance.choice([token for token in allowed if token != _STOP])]
        matcher.consume_tokens(step)
        assert not matcher.is_error(), matcher.get_error()
        tokens += step
    return _text(tokens), False


def _allowed(matcher: LLMatcher) -> Iterator[int]:
    mask = matcher.compute_bitmask()
    return (token for token in range(_STOP + 1) if mask[token // 8] >> token % 8 & 1)


_MESSAGE = re.compile(
    r"(?s)(?: to=functions\.(?P<before>\S+))?<\|channel\|>(?P<channel>\w+)(?: to=functions\.(?P<after>[^\s<]+))?"
    r"(?: ?<\|constrain\|>json| json)?<\|message\|>(?P<text>.*)"
)


def _meant(answer: str) -> Iterator[tuple[str, str, str]]:
    """Yield the channel, the function and the text of each message of an answer that is as it should be."""
    for message in answer.split(_NEXT):
        found = _MESSAGE.fullmatch(message)
        assert found is not None, message
        yield found["channel"], found["before"] or found["after"] or "", found["text"]


@pytest.mark.parametrize("controls", [True, False])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_the_rules_allow_is_read_as_it_is_meant(form: dict[str, bool], controls: bool) -> None:
    whole = _matcher(_constraint(form), controls=controls)
    schemas = {tool.name: tool.parameters for tool in _TOOLS}
    seen: set[str] = set()
    for seed in range(60):
        answer, complete = _walk(whole.deep_copy(), random.Random(seed), controls=controls)
        parts = _read(answer)
        assert parts == _read(*answer)
        if not complete:
            continue
        *before, (channel, name, text) = list(_meant(answer))
        assert not any(name for _, name, _ in before)
        texts = _texts(parts)
        reasoning = [text.strip() for channel, _, text in before if channel == "analysis"]
        assert texts[Reasoning] == "\n\n".join(filter(None, reasoning))
        content = [text for each, name, text in (*before, (channel, name, text)) if each != "analysis" and not name]
        assert re.sub(r"\s", "", texts[Content]) == re.sub(r"\s", "", "".join(content))
        calls = [part.name for part in parts if isinstance(part, CallBegins)]
        if name:
            assert parts[-3:] == _call(name, text)
            assert calls == [name]
            jsonschema.validate(json.loads(text), schemas[name])
        else:
            assert not calls
            assert channel == "final"
            if form["body"]:
                jsonschema.validate(json.loads(texts[Content]), _BODY)
        seen |= {name or channel, *(channel for channel, *_ in before)}
    wanted = {"analysis"}
    wanted |= set() if form["forced"] else {"final"}
    wanted |= set(schemas) if form["calls"] else set()
    wanted |= {"commentary"} if form == FORMS["text or a call"] else set()
    assert seen == wanted


def _fits(
    answer: str, form: Mapping[str, bool], begun: str = "", *, controls: bool = True, limited: bool = False
) -> bool:
    matcher = _matcher(_constraint(form, begun, limited=limited), controls=controls)
    tokens = [*_tokens(answer, controls=controls), _STOP]
    return bool(matcher.validate_tokens(tokens) == len(tokens))


_HEADS = [head + kind + MESSAGE for head in harmony._heads(_TOOLS[0]) for kind in harmony._KINDS]
_THINKS = f"{_THOUGHT}Hm, hm.{_NEXT}"


@pytest.mark.parametrize("controls", [True, False])
@pytest.mark.parametrize("head", _HEADS)
def test_calls_are_written_in_every_published_way(head: str, controls: bool) -> None:
    for form in ("text or a call", "a body or a call", "a call"):
        for before in ("", _THINKS, 2 * _THINKS):
            assert _fits(f"{before}{head}{_OSLO}", FORMS[form], controls=controls)
        assert not _fits(f"{head}{{}}", FORMS[form], controls=controls)
        assert not _fits(f"{head}{_OSLO}{_NEXT}{head}{_OSLO}", FORMS[form], controls=controls)
    assert not _fits(f"{head}{_OSLO}", FORMS["text"], controls=controls)
    assert not _fits(f"{head}{_OSLO}", FORMS["a body"], controls=controls)


@pytest.mark.parametrize("controls", [True, False])
def test_which_messages_an_answer_may_have(controls: bool) -> None:
    preamble = f"{CHANNEL}commentary{MESSAGE}I look.{_NEXT}"
    body = '{"ok": true}'
    wanted = {
        f"{_FINAL}Hello": {"text", "text or a call"},
        f"{_THINKS}{_FINAL}": {"text", "text or a call"},
        f"{_FINAL}{body}": {"text", "text or a call", "a body", "a body or a call"},
        f"{_THINKS}{preamble}{_FINAL}Hello": {"text or a call"},
        f"{preamble}{_THINKS}{_CALL}{_OSLO}": {"text or a call"},
        f"{preamble}{_FINAL}{body}": {"text or a call"},
        f"{_THOUGHT}Hm": set(),
        _THINKS: set(),
        f"{_FINAL}Hello{END}": set(),
        f"{CHANNEL}commentary to=functions.other json{MESSAGE}{{}}": set(),
        "Hello": set(),
    }
    for answer, forms in wanted.items():
        fitting = {name for name, form in FORMS.items() if _fits(answer, form, controls=controls)}
        assert fitting == forms, answer


@pytest.mark.parametrize("controls", [True, False])
def test_the_rules_go_on_from_where_the_prompt_ends(controls: bool) -> None:
    answers = [f"{_FINAL}Hello", f"{_THINKS}{_FINAL}Hello", f"{CHANNEL}commentary{MESSAGE}I look.{_NEXT}{_FINAL}Hello"]
    answers += [f"{head}{_OSLO}" for head in _HEADS]
    begun = [CHANNEL, _FINAL, _THOUGHT, f"{CHANNEL}comment", f"{CHANNEL}commentary{MESSAGE}", " to=", _CALL, *_HEADS]
    for start in begun:
        for answer in answers:
            if answer.startswith(start):
                assert _fits(answer.removeprefix(start), FORMS["text or a call"], start, controls=controls)
        assert not _fits(f"{CHANNEL}unknown", FORMS["text or a call"], start, controls=controls) or start == _FINAL
    assert _fits('{"ok": true}', FORMS["a body"], _FINAL, controls=controls)
    assert not _fits("Hello", FORMS["a body or a call"], _FINAL, controls=controls)


_PREAMBLE = f"{CHANNEL}commentary{MESSAGE}I look.{_NEXT}"
_ENDINGS = {
    "text": [f"{_FINAL}Hello"],
    "a body": [f'{_FINAL}{{"ok": true}}'],
    "text or a call": [f"{_FINAL}Hello", f"{_CALL}{_OSLO}", f"{_PREAMBLE}{_FINAL}Hello", f"{_PREAMBLE}{_CALL}{_OSLO}"],
    "a body or a call": [f'{_FINAL}{{"ok": true}}', f"{_CALL}{_OSLO}"],
    "a call": [f"{_CALL}{_OSLO}"],
}


@pytest.mark.parametrize("controls", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_thinking_can_be_limited_to_the_first_message(name: str, controls: bool) -> None:
    form = FORMS[name]
    for ending in _ENDINGS[name]:
        for limited, most in ((False, 3), (True, 1)):
            for count in range(4):
                fits = _fits(count * _THINKS + ending, form, controls=controls, limited=limited)
                assert fits == (count <= most), (ending, limited, count)
            if ending.startswith(_PREAMBLE):
                later = _PREAMBLE + _THINKS + ending.removeprefix(_PREAMBLE)
                assert _fits(later, form, controls=controls, limited=limited) == (not limited)


@pytest.mark.parametrize("name", FORMS)
def test_thoughts_that_the_prompt_has_begun_may_be_all_there_are(name: str) -> None:
    for ending in _ENDINGS[name]:
        for start in (_THOUGHT, f"{CHANNEL}analysis", CHANNEL):
            thinks = _THINKS.removeprefix(start)
            assert _fits(thinks + ending, FORMS[name], start, limited=True)
            assert not _fits(thinks + _THINKS + ending, FORMS[name], start, limited=True)
            assert _fits(thinks + _THINKS + ending, FORMS[name], start)
        if ending.startswith(CHANNEL):
            assert _fits(ending.removeprefix(CHANNEL), FORMS[name], CHANNEL, limited=True)


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_that_may_think_once_does_so_first(name: str) -> None:
    whole = _matcher(_constraint(FORMS[name], limited=True), controls=True)
    thought = set()
    for seed in range(40):
        answer, complete = _walk(whole.deep_copy(), random.Random(seed), controls=True)
        if complete:
            channels = [channel for channel, *_ in _meant(answer)]
            thought.add("analysis" in channels)
            assert "analysis" not in channels[1:]
    assert thought == {False, True}


def test_without_tools_there_are_rules_too() -> None:
    rules = harmony.lark([], forced=False, calls=False, body=False, limited=True)
    matcher = _matcher(Constraint("lark", rules, "thinking", SHOWN), controls=True)
    for answer, fits in ((f"{_THINKS}{_FINAL}Hi", True), (f"{_FINAL}Hi", True), (f"{_THINKS}{_THINKS}{_FINAL}", False)):
        tokens = [*_tokens(answer, controls=True), _STOP]
        assert (matcher.validate_tokens(tokens) == len(tokens)) == fits


@pytest.mark.parametrize(("form", "start"), [("a call", _FINAL), ("text", _CALL), ("text", f"{CHANNEL}other{MESSAGE}")])
def test_a_prompt_that_no_answer_can_go_on_from_is_refused(form: str, start: str) -> None:
    with pytest.raises(ChatTemplateError, match="begins a message of the answer") as caught:
        _constraint(FORMS[form], start)
    assert caught.value.param == "messages"


def test_an_agents_many_tools() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tools = [Tool(f"tool{number}", "", schema, strict=False, place="") for number in range(200)]
    constraint = _constraint(FORMS["text or a call"], tools=tools)
    matcher = _matcher(constraint, controls=True)
    answer = f'{CHANNEL}commentary to=functions.tool199 {CONSTRAIN}json{MESSAGE}{{"x": 1}}'
    tokens = [*_tokens(answer, controls=True), _STOP]
    assert matcher.validate_tokens(tokens) == len(tokens)
