"""What the rules of a format allow is read back as calls, and the arguments fit the tools' schemas."""

from __future__ import annotations

import json
import random
import time
from functools import partial
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from walking import accepts, walk

from llamaserve.chat.answer import AnswerReader
from llamaserve.chat.formats import functionary_v3_2, known
from llamaserve.chat.formats.format import CallFormat
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Content
from llamaserve.chat.tools import Tool
from llamaserve.engine.params import Constraint
from llamaserve.errors import InvalidRequest

_HOSTILE = [
    "a",
    "ab",
    "a<b",
    "\n",
    "x</parameter>y",
    "</arg_value>",
    'q"q',
    "null",
    "<escape>",
    '<|"|>',
    "é\\",
    "😀",
    "",
]
_HINTS = [
    *('"', "}", "]", ")", ", ", "\n", "a", "1", "true", "None", "null", '<|"|>', "<escape>", "</function>"),
    *("</parameter>", "\n</parameter>\n", "</arg_value>", "</tool_call>", "<parameter=", "[get(", ">>>get\n"),
]
_BEGIN = {"llama3": '{"name": "get", ', "llama4": "[get("}  # of calls that begin with no marker


def _tool(name: str, properties: dict[str, Any], *required: str, **more: Any) -> Tool:
    schema = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return Tool(name, 'Quotes ", tags </tool_call> and\nlines', {**schema, **more}, False, f"tools[{name}].function")


TOOLS = (
    _tool(
        "get",
        {
            "city": {"type": "string", "description": '"</parameter>\n'},
            "days": {"type": "integer", "minimum": 1},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "kind": {"$ref": "#/$defs/Kind"},
            "code": {"type": "string", "pattern": "^[a-c]{2,3}$"},
            "short": {"type": "string", "minLength": 1, "maxLength": 5},
            "on": {"type": ["boolean", "null"]},
        },
        "city",
        "kind",
        **{"$defs": {"Kind": {"type": "string", "enum": _HOSTILE}}},
    ),
    _tool("get_weather", {}),
    _tool(
        "группа/get.a:b",
        {
            "tags": {"type": "array", "items": {"type": "string"}},
            "many": {"type": "array", "items": {"$ref": "#/definitions/Item"}, "maxItems": 2},
            "item": {"$ref": "#/definitions/Item"},
            "mixed": {"enum": ["a", 1, None, True, {"a": []}]},
            "flags": {"type": "array", "items": {"type": "boolean"}},
            "два слова": {"const": 'x "y"'},
        },
        "tags",
        "item",
        definitions={
            "Item": {
                "type": "object",
                "properties": {"b": {"type": "boolean"}, "s x": {"type": "string"}, "n": {"type": "null"}},
                "required": ["b"],
                "additionalProperties": False,
            }
        },
    ),
)


def _form(calls: CallFormat, tools: tuple[Tool, ...], *, forced: bool, several: bool) -> Constraint:
    """Return the form of an answer that calls, or may."""
    rules = calls.rules(tools, several=several)
    parts = rules.parts if rules.parts is not None else _schemas(tools)
    if forced:
        start = "start: calls"
    elif calls.marker is not None:
        start = "start: TEXT | until0 rest"
    else:
        start = f"start: PLAIN | calls\nPLAIN: TEXT & ~/{rules.plain}(?s:.*)/"
    return Constraint("lark", f"{start}\n{rules.lark}", "tools", calls.shown, parts)


def _schemas(tools: tuple[Tool, ...]) -> tuple[Constraint, ...]:
    return tuple(Constraint("json_schema", json.dumps(tool.parameters), tool.place) for tool in tools)


def _read(answer: AnswerReader, text: str) -> tuple[str, list[tuple[str, Any]]]:
    """Return the text of an answer and its calls, all of which must have an end."""
    said, calls, name = "", [], None
    arguments = ""
    for part in [*answer.push(text), *answer.finish()]:
        match part:
            case Content():
                said += part.text
            case CallBegins():
                assert name is None
                name, arguments = part.name, ""
            case Arguments():
                arguments += part.text
            case CallEnds():
                calls.append((str(name), json.loads(arguments)))
                name = None
    assert name is None
    return said, calls


def _check(answer: AnswerReader, text: str, tools: tuple[Tool, ...], *, forced: bool, several: bool) -> int:
    said, calls = _read(answer, text)
    if forced:
        assert calls
        assert not said.strip()
    if not several:
        assert len(calls) <= 1
    schemas = {tool.name: tool.parameters for tool in tools}
    for name, arguments in calls:
        jsonschema.validate(arguments, schemas[name])
    return len(calls)


@pytest.mark.parametrize("name", known.names())
@pytest.mark.parametrize("forced", [True, False], ids=["forced", "free"])
@pytest.mark.parametrize("several", [True, False], ids=["several", "one"])
def test_what_the_rules_allow_is_read_back(name: str, forced: bool, several: bool) -> None:
    calls = known.by_name(name)
    assert calls is not None
    form = _form(calls, TOOLS, forced=forced, several=several)
    chance = random.Random(f"{name} {forced} {several}")
    finished = found = 0
    for number in range(12):
        begin = "" if forced or number % 3 == 0 else _BEGIN.get(name, f"Hm. {calls.marker}")
        text = walk(form, chance, [*_HINTS, *calls.shown], begin)
        if text is not None:
            answer = AnswerReader(calls=calls.for_tools(TOOLS), names=frozenset(tool.name for tool in TOOLS))
            found += _check(answer, text, TOOLS, forced=forced, several=several)
            finished += 1
    assert finished >= 9
    assert found


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "free"])
@pytest.mark.parametrize("begun", [">>>", ""])
def test_what_the_rules_of_whole_answers_allow_is_read_back(forced: bool, begun: str) -> None:
    rules = functionary_v3_2.lark(TOOLS, forced=forced, calls=True, body=False, begun=begun)
    form = Constraint("lark", rules, "tools", functionary_v3_2.SHOWN, _schemas(TOOLS))
    chance = random.Random(7)
    found = 0
    for number in range(20):
        begin = "" if forced or number % 3 == 0 else f"{'' if begun else '>>>'}all\nHm. >>>get_weather\n"
        text = walk(form, chance, _HINTS, begin)
        assert text is not None
        answer = _functionary_reader(*(tool.name for tool in TOOLS))
        found += _check(answer, begun + text, TOOLS, forced=forced, several=False)
    assert found


def _functionary_reader(*names: str) -> AnswerReader:
    return AnswerReader(read=partial(functionary_v3_2.read_answer, names=frozenset(names)))


def _functionary(*tools: Tool) -> Constraint:
    rules = functionary_v3_2.lark(tools, forced=False, calls=True, body=False, begun=">>>")
    return Constraint("lark", rules, "tools", functionary_v3_2.SHOWN, _schemas(tools))


def test_functionary_may_write_arrows_that_begin_no_call() -> None:
    form = _functionary(_tool("get", {}), _tool("show", {}))
    said = (
        ">>> print(1)",
        ">>>(x)",
        "f<<<1, 2>>>(y)",
        ">>>",
        ">>>>>>> ours",
        ">>>>get\n[]",
        "a >>>Get\n[]",
        ">>>\n>>> get\nx",
    )
    for text in said:
        assert accepts(form, f"all\n{text}")
        assert accepts(form, f"all\n{text} >>>get\n{{}}")
        assert not accepts(form, f"all\n{text} >>>get\n[]")
        answer = _functionary_reader("get", "show")
        assert _read(answer, f">>>all\n{text} >>>get\n{{}}") == (text, [("get", {})])
    assert not accepts(form, "all\n>>>>>>get\n[]")
    assert not accepts(form, "all\n>>>get {}")


@pytest.mark.parametrize("seed", range(30))
def test_arrows_do_not_hide_calls_from_the_rules_of_functionary(seed: int) -> None:
    hints = (">", ">>", ">>>", ">>>>", " ", "\n", "get\n", "get_weather\n", "{}", "{", "}", "x")
    text = walk(_functionary(*TOOLS[:2]), random.Random(seed), hints, "all\n")
    assert text is not None
    answer = _functionary_reader("get", "get_weather")
    _check(answer, f">>>{text}", TOOLS[:2], forced=False, several=False)


def test_functionary_may_have_many_tools() -> None:
    tools = [_tool(f"tool_with_a_name_{number:03}", {}) for number in range(500)]
    start = time.perf_counter()
    form = _functionary(*tools)
    assert time.perf_counter() - start < 0.1
    assert len(form.text) < 50_000
    start = time.perf_counter()
    for text in ("all\n>>> print(1)", "tool_with_a_name_123\n{}", "all\nHm.\n>>>tool_with_a_name_499\n{}"):
        assert accepts(form, text)
    assert time.perf_counter() - start < 3 * 0.5


_names = st.sampled_from(
    ["a", "name", "größe", "x y", 'q"q', "id", "back\\slash", "z=1", "x>y", "</arg_key>", "<escape>"]
)
_words = st.sampled_from(["", "red", "two words", 'a"b', "né", "\n", "\\", "/", "1", "true", "</parameter>", "null"])
_scalars = st.one_of(
    st.sampled_from([{"type": name} for name in ("string", "integer", "number", "boolean", "null")]),
    st.sampled_from([{"type": ["string", "null"]}, {"type": ["integer", "null"]}, {"type": ["string", "integer"]}, {}]),
    st.lists(_words, min_size=1, max_size=3, unique=True).map(lambda words: {"type": "string", "enum": words}),
    st.lists(_words | st.none() | st.integers(0, 9), min_size=1, max_size=3, unique=True).map(
        lambda values: {"enum": values}
    ),
    st.integers(0, 3).map(lambda low: {"type": "string", "minLength": low, "maxLength": low + 4}),
    st.sampled_from([{"type": "string", "format": "date"}, {"type": "string", "pattern": "^(</parameter>|b)+$"}]),
    _words.map(lambda word: {"const": word}),
)
_schema = st.recursive(
    _scalars,
    lambda inner: st.one_of(
        inner.map(lambda items: {"type": "array", "items": items}),
        inner.map(lambda one: {"anyOf": [one, {"type": "null"}]}),
        st.dictionaries(_names, inner, max_size=3).map(
            lambda properties: {"type": "object", "properties": properties, "required": sorted(properties)[:1]}
        ),
    ),
    max_leaves=4,
)


@st.composite
def _tools(draw: st.DrawFn) -> tuple[Tool, ...]:
    tools = []
    for name in ("f", "ff"):
        properties = draw(st.dictionaries(_names, _schema, max_size=4))
        required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
        tools.append(_tool(name, properties, *required))
    return tuple(tools)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(known.names()), _tools(), st.integers(0, 10**6))
def test_any_tools(name: str, tools: tuple[Tool, ...], seed: int) -> None:
    calls = known.by_name(name)
    assert calls is not None
    try:
        form = _form(calls, tools, forced=True, several=True)
    except InvalidRequest:  # a tool that can't be called in this format
        return
    text = walk(form, random.Random(seed), [*_HINTS, *calls.shown])
    if text is not None:
        answer = AnswerReader(calls=calls.for_tools(tools), names=frozenset(tool.name for tool in tools))
        _check(answer, text, tools, forced=True, several=True)


def _forced(name: str, tool: Tool) -> Constraint:
    calls = known.by_name(name)
    assert calls is not None
    return _form(calls, (tool,), forced=True, several=True)


def test_parameters_in_tags_are_texts_without_quotes() -> None:
    form = _forced("qwen3-coder", TOOLS[0])
    begin = "<tool_call>\n<function=get>\n<parameter=city>\n"
    end = "\n</parameter>\n<parameter=kind>\nnull\n</parameter>\n</function>\n</tool_call>"
    for city in ("Rome", "", '"Rome"', "two\nlines\n", "</function>", "{"):
        assert accepts(form, f"{begin}{city}{end}")
    assert not accepts(form, f"{begin}</parameter>{end}")
    assert not accepts(form, f"{begin}Rome\n</parameter>\n</function>\n</tool_call>"), "kind is required"


def test_lengths_of_texts_in_tags_are_kept_to() -> None:
    tool = _tool("f", {"a": {"type": "string", "minLength": 2, "maxLength": 3}}, "a")
    for name, begin, end in (
        ("qwen3-coder", "<tool_call>\n<function=f>\n<parameter=a>\n", "\n</parameter>\n</function>\n</tool_call>"),
        ("glm-4.7", "<tool_call>f<arg_key>a</arg_key><arg_value>", "</arg_value></tool_call>"),
    ):
        form = _forced(name, tool)
        assert [text for text in ("", "x", "xy", "\n\n", "é<é", "xyzz") if accepts(form, begin + text + end)] == [
            "xy",
            "\n\n",
            "é<é",
        ]


def test_python_is_written_as_python() -> None:
    form = _forced("llama4", TOOLS[2])
    assert accepts(form, '[группа/get.a:b(tags=["a", "b"], item={"b": True, "n": None}, flags=[False])]')
    assert not accepts(form, '[группа/get.a:b(tags=[], item={"b": true})]')


def test_gemma_has_texts_in_tokens() -> None:
    form = _forced("gemma4", TOOLS[2])
    assert accepts(form, '<|tool_call>call:группа/get.a:b{tags:[<|"|>a"b<|"|>,<|"|><|"|>],item:{b:true}}<tool_call|>')


def test_a_name_may_be_the_beginning_of_another_one() -> None:
    for name in known.names():
        calls = known.by_name(name)
        assert calls is not None
        tools = (_tool("get", {}), _tool("get_weather", {}))
        form = _form(calls, tools, forced=True, several=False)
        chance = random.Random(1)
        seen = set()
        for _ in range(20):
            answer = AnswerReader(calls=calls.for_tools(tools), names=frozenset({"get", "get_weather"}))
            seen |= {called for called, _ in _read(answer, walk(form, chance, []) or "")[1]}
        assert seen == {"get", "get_weather"}


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("qwen3-coder", _tool("f", {"a>b": {}}, "a>b")),
        ("qwen3-coder", _tool("f", {" a": {}}, " a")),
        ("glm-4.5", _tool("f", {"a<b": {}}, "a<b")),
        ("minimax-m2", _tool("f", {"a": {"enum": ["</parameter>"]}}, "a")),
        ("llama4", _tool("f", {"a=b": {}}, "a=b")),
        ("gemma4", _tool("f", {'<|"|>': {}}, '<|"|>')),
        ("seed-oss", _tool("f", {"a": False}, "a")),
        ("lfm2", _tool("f", {}, "missing")),
    ],
)
def test_what_can_not_be_written_is_refused(name: str, tool: Tool) -> None:
    with pytest.raises(InvalidRequest) as refused:
        _forced(name, tool)
    assert refused.value.param == "tools[f].function.parameters"


def test_what_can_not_be_written_but_need_not_be_is_left_out() -> None:
    tool = _tool("f", {"a>b": {}, "c": {"enum": ["</parameter>"]}, "d": False})
    assert accepts(_forced("qwen3-coder", tool), "<tool_call>\n<function=f>\n</function>\n</tool_call>")


def test_a_strict_tool_is_enforced_or_refused() -> None:
    for keyword, value in {"minProperties": 1, "anyOf": [{"required": ["a"]}], "patternProperties": {}}.items():
        loose = _tool("f", {"a": {}}, **{keyword: value})
        strict = Tool("f", "", loose.parameters, True, loose.place)
        assert _forced("glm-4.5", loose)
        with pytest.raises(InvalidRequest, match=keyword):
            _forced("glm-4.5", strict)


def test_schemas_that_would_become_huge_are_refused() -> None:
    definitions = {"D": {"type": "object", "properties": {f"p{i}": {"enum": [i]} for i in range(20_000)}}}
    tool = _tool("f", {f"p{i}": {"$ref": "#/$defs/D", "minProperties": i} for i in range(50)}, **{"$defs": definitions})
    with pytest.raises(InvalidRequest, match="too large"):
        _forced("minimax-m2", tool)
