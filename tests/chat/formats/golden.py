# ruff: noqa: RUF001, ISC004
"""Answers in each of the formats, written after the models' own chat templates, and what is to be read from them."""

from __future__ import annotations

from functools import partial
from typing import Any

from llamaserve.chat.answer import THINKING_TAGS, AnswerReader
from llamaserve.chat.formats import functionary_v3_2, known
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Content, Part, Reasoning
from llamaserve.chat.tools import Tool

FUNCTIONARY_32 = "functionary-v3.2"
FORMATS = (*known.names(), FUNCTIONARY_32)

PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "mixed": {"type": ["string", "number", "boolean"]},
        "any": {},
        "tags": {"type": "array", "items": {"type": "string"}},
        "code": {"type": "string", "pattern": "^[a-z]+$"},
    },
}
TOOLS = tuple(
    Tool(name, "", PARAMETERS, False, f"tools[{i}].function") for i, name in enumerate(("get", "get_weather", "a.b:c"))
)
NAMES = frozenset(tool.name for tool in TOOLS)

Event = tuple[Any, ...]


def reader(name: str, *, thinking: bool = False) -> AnswerReader:
    """Return a reader of answers in a format."""
    tags = THINKING_TAGS if thinking else ()
    if name == FUNCTIONARY_32:
        return AnswerReader(read=partial(functionary_v3_2.read_answer, names=NAMES))
    calls = known.by_name(name)
    assert calls is not None
    return AnswerReader(thinking=tags, calls=calls.for_tools(TOOLS), names=NAMES)


def merged(parts: list[Part]) -> list[Part]:
    """Return parts of which neighbouring ones that are pieces of one text are put together."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        match last, part:
            case (Content(), Content()) | (Reasoning(), Reasoning()) | (Arguments(), Arguments()):
                found[-1] = type(part)(last.text + part.text)  # type: ignore[union-attr]
            case _:
                found.append(part)
    return found


def read(name: str, *pieces: str, cut: bool = False, thinking: bool = False) -> list[Part]:
    """Return what is read from an answer in pieces."""
    answer = reader(name, thinking=thinking)
    parts = [part for piece in pieces for part in answer.push(piece)]
    return merged(parts + answer.finish(cut=cut))


C, R = Content, Reasoning


def call(name: str, arguments: str = "{}") -> list[Part]:
    """Return the parts of a call."""
    return [CallBegins(name), Arguments(arguments), CallEnds()]


def _hermes(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _qwen(name: str, *values: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def _seed(name: str, *values: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in values)
    return f"<seed:tool_call>\n<function={name}>\n{inner}</function>\n</seed:tool_call>"


def _glm(name: str, *values: tuple[str, str], line: str = "\n") -> str:
    inner = "".join(f"<arg_key>{key}</arg_key>{line}<arg_value>{value}</arg_value>{line}" for key, value in values)
    return f"<tool_call>{name}{line}{inner}</tool_call>"


def _minimax(name: str, *values: tuple[str, str]) -> str:
    inner = "".join(f'<parameter name="{key}">{value}</parameter>\n' for key, value in values)
    return f'<invoke name="{name}">\n{inner}</invoke>\n'


def _listed(begin: str, end: str, *calls: str) -> str:
    return f"{begin}[{', '.join(calls)}]{end}"


def _json(name: str, arguments: str = "{}", key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


_NESTED = '{"any": {"a": [1, {"b": "}]</tool_call>"}], "c": "\\"é\\u00e9\\\\"}, "city": "{["}'
_V3 = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
_V3_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
_V31_CALL = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_KIMI = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
_KIMI_CALL = "<|tool_call_begin|>functions.{}:{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
_COMMAND_CALL = '    {{"tool_call_id": "{}", "tool_name": "{}", "parameters": {}}}'
_MANY = (("city", "Rome"), ("days", "3"))
_MANY_JSON = '{"city": "Rome", "days": 3}'

GOLDEN: list[tuple[str, str, list[Part]]] = [
    # Hermes, with white space in other places than usual
    ("hermes", _hermes("get", _NESTED), call("get", _NESTED)),
    ("hermes", f"Let me see. \n\n{_hermes('get')}\n{_hermes('get_weather', _MANY_JSON)}\n", [
        C("Let me see."), *call("get"), *call("get_weather", _MANY_JSON)]),
    ("hermes", '<tool_call>{"name":"a.b:c","arguments":{"a" : 1 }}</tool_call>', call("a.b:c", '{"a" : 1 }')),
    ("hermes", f"{_hermes('get')} and then", [*call("get"), C(" and then")]),
    ("hermes", _hermes("nobody"), [C(_hermes("nobody"))]),
    ("hermes", f"a {_hermes('nobody')} {_hermes('get')}", [C(f"a {_hermes('nobody')}"), *call("get")]),
    ("hermes", "A <tool_call> is a tag. <tool", [C("A <tool_call> is a tag. <tool")]),
    ("hermes", '<tool_call>\n{"name": "get", "arguments": {"a": "b', [CallBegins("get"), Arguments('{"a": "b')]),
    ("hermes", '<tool_call>\n{"name": "get", "arguments": {"a" 1}}', [
        CallBegins("get"), Arguments('{"a"'), C("1}}")]),
    ("hermes", _hermes("get", "{'a': True, 'b': 'it\\'s', c: None,}"), call(
        "get", """{"a": true, "b": "it's", "c": null}""")),
    # Llama 3, and what only looks like a call
    ("llama3", f'{{"name": "get", "parameters": {_NESTED}}}', call("get", _NESTED)),
    ("llama3", ' {"name": "get", "parameters": {}}\n', call("get")),
    ("llama3", '<|python_tag|>{"name": "get_weather", "parameters": {}}', call("get_weather")),
    ("llama3", '{"name": "nobody", "parameters": {}}', [C('{"name": "nobody", "parameters": {}}')]),
    ("llama3", '{"name": "Rome"}', [C('{"name": "Rome"}')]),
    ("llama3", " Hello {}", [C(" Hello {}")]),
    # Mistral
    ("mistral", _listed("[TOOL_CALLS] ", "", '{"name": "get", "arguments": {"a": "]"}, "id": "abcdefghi"}'), call(
        "get", '{"a": "]"}')),
    ("mistral", 'Yes.[TOOL_CALLS] [{"name": "get", "arguments": {}, "id": "abcdefghi"}, {"name": "get_weather", '
        '"arguments": {}, "id": "123456789"}]', [C("Yes."), *call("get"), *call("get_weather")]),
    ("mistral", "[TOOL_CALLS] none", [C("[TOOL_CALLS] none")]),
    ("mistral-v11", f"[TOOL_CALLS]get[ARGS]{_NESTED}[TOOL_CALLS]get_weather[ARGS]{{}}", [
        *call("get", _NESTED), *call("get_weather")]),
    ("mistral-v11", "[TOOL_CALLS]nobody[ARGS]{}", [C("[TOOL_CALLS]nobody[ARGS]{}")]),
    # DeepSeek
    ("deepseek", f"Well\n\n{_V3.format(_V3_CALL.format('get', _NESTED) + chr(10) + _V3_CALL.format('a.b:c', '{}'))}", [
        C("Well"), *call("get", _NESTED), *call("a.b:c")]),
    ("deepseek-v3.1", _V3.format(_V31_CALL.format("get", _NESTED) + _V31_CALL.format("get_weather", "{}")), [
        *call("get", _NESTED), *call("get_weather")]),
    # Kimi, Command, and lists
    ("kimi-k2", "Hm" + _KIMI.format(_KIMI_CALL.format("get", 0, _NESTED) + _KIMI_CALL.format("a.b:c", 1, "{}")), [
        C("Hm"), *call("get", _NESTED), *call("a.b:c")]),
    ("kimi-k2", _KIMI.format(_KIMI_CALL.format("nobody", 0, "{}")), [
        C(_KIMI.format(_KIMI_CALL.format("nobody", 0, "{}")))]),
    ("command", "<|START_ACTION|>[\n" + _COMMAND_CALL.format(0, "get", _NESTED) + ",\n"
        + _COMMAND_CALL.format(1, "get_weather", "{}") + "\n]<|END_ACTION|>", [
        *call("get", _NESTED), *call("get_weather")]),
    ("granite", _listed("<|tool_call|>", "", _json("get", _NESTED), _json("get_weather")), [
        *call("get", _NESTED), *call("get_weather")]),
    ("phi-4-mini", _listed("<|tool_call|>", "<|/tool_call|>", _json("get")), call("get")),
    ("nemotron", _listed("<TOOLCALL>", "</TOOLCALL>", _json("get", _NESTED), _json("get")), [
        *call("get", _NESTED), *call("get")]),
    ("hunyuan", _listed("<tool_calls>", "</tool_calls>", _json("get", _NESTED)), call("get", _NESTED)),
    # Functionary
    ("functionary-v3.1", f"<function=get>{_NESTED}</function><function=get_weather>{{}}</function>", [
        *call("get", _NESTED), *call("get_weather")]),
    ("functionary-v3.1", "x <function=nobody>{}</function>", [C("x <function=nobody>{}</function>")]),
    (FUNCTIONARY_32, ">>>all\nHello >>> world", [C("Hello >>> world")]),
    (FUNCTIONARY_32, f">>>get\n{_NESTED}>>>get_weather\n{{}}", [*call("get", _NESTED), *call("get_weather")]),
    (FUNCTIONARY_32, ">>>all\nSure.\n>>>get\n{}>>>all\nDone", [C("Sure."), *call("get"), C("Done")]),
    (FUNCTIONARY_32, ">>>nobody\n{}", [C(">>>nobody\n{}")]),
    (FUNCTIONARY_32, "No recipient", [C("No recipient")]),
    # Qwen3-Coder and Seed-OSS: parameters in tags
    ("qwen3-coder", f"Sure.\n\n{_qwen('get', *_MANY)}\n{_qwen('get_weather')}\n", [
        C("Sure."), *call("get", _MANY_JSON), *call("get_weather")]),
    ("qwen3-coder", _qwen("get", ("city", 'two\n\n"lines"\\ <tag> é</function>'), ("tags", '["</parameter>"]')), call(
        "get", '{"city": "two\\n\\n\\"lines\\"\\\\ <tag> é</function>", "tags": ["</parameter>"]}')),
    ("qwen3-coder", _qwen("get", ("city", ""), ("note", "null"), ("note", "nullify"), ("unit", "C")), call(
        "get", '{"city": "", "note": null, "note": "nullify", "unit": "C"}')),
    ("qwen3-coder", _qwen("get", ("mixed", "12"), ("mixed", "twelve"), ("mixed", "[1]"), ("mixed", "true")), call(
        "get", '{"mixed": 12, "mixed": "twelve", "mixed": "[1]", "mixed": true}')),
    ("qwen3-coder", _qwen("get", ("any", "{'a': None}"), ("any", "NaN"), ("days", "many"), ("tags", "['a']")), call(
        "get", '{"any": "{\'a\': None}", "any": "NaN", "days": "many", "tags": ["a"]}')),
    ("qwen3-coder", _qwen("get", ("code", '"quoted"'), ("code", "plain"), ("unknown", "1")), call(
        "get", '{"code": "quoted", "code": "plain", "unknown": 1}')),
    ("qwen3-coder", "<tool_call><function=get><parameter=city>x</parameter></function></tool_call>", call(
        "get", '{"city": "x"}')),
    ("qwen3-coder", "<tool_call>\n<function=get>\n<parameter=city>\nx\n</parameter>\n</tool_call>", [
        *call("get", '{"city": "x"}'), C("\n</tool_call>")]),
    ("qwen3-coder", _qwen("nobody", *_MANY), [C(_qwen("nobody", *_MANY))]),
    ("qwen3-coder", _hermes("get"), [C(_hermes("get"))]),
    ("seed-oss", f"{_seed('get', ('city', ' Rome '), ('days', '3'))}\n{_seed('a.b:c')}", [
        *call("get", '{"city": " Rome ", "days": 3}'), *call("a.b:c")]),
    # GLM
    ("glm-4.5", f"Hm\n{_glm('get', *_MANY)}\n{_glm('get_weather')}", [
        C("Hm"), *call("get", _MANY_JSON), *call("get_weather")]),
    ("glm-4.5", _glm("get", ("city", "\n</arg_key>\n"), ("any", '{"a": "</arg_value>"}')), call(
        "get", '{"city": "\\n</arg_key>\\n", "any": {"a": "</arg_value>"}}')),
    ("glm-4.7", f"{_glm('get', *_MANY, line='')}{_glm('get_weather', line='')}", [
        *call("get", _MANY_JSON), *call("get_weather")]),
    ("glm-4.7", _glm("nobody", *_MANY, line=""), [C(_glm("nobody", *_MANY, line=""))]),
    # MiniMax
    ("minimax-m2", f"Hm\n<minimax:tool_call>\n{_minimax('get', *_MANY)}{_minimax('a.b:c')}</minimax:tool_call>", [
        C("Hm"), *call("get", _MANY_JSON), *call("a.b:c")]),
    ("minimax-m2", f"<minimax:tool_call>\n{_minimax('get', ('city', '</invoke>'))}</minimax:tool_call>\nDone", [
        *call("get", '{"city": "</invoke>"}'), C("\nDone")]),
    # Python
    ("llama4", '[get(city="Rome", days=3), get_weather()]', [*call("get", _MANY_JSON), *call("get_weather")]),
    ("llama4", """<|python_start|>[get(city='it\\'s "x"', any={'a': (1, None), "b": [True, 0x10, 1e3]})]"""
        "<|python_end|>", call("get", '{"city": "it\'s \\"x\\"", "any": {"a": [1, null], "b": [true, 16, 1e3]}}')),
    ("llama4", '[get(\n  city="""a "b"\nc""",\n  note=None,\n)]\n', call(
        "get", '{"city": "a \\"b\\"\\nc", "note": null}')),
    ("llama4", '[get(city="\\u00e9\\x41\\U0001F600\\d\\ud83d\\ude00\\/")]', call(
        "get", '{"city": "\\u00e9\\u0041😀\\\\d\\ud83d\\ude00\\/"}')),
    ("llama4", "[get](https://example.org?a=b)", [C("[get](https://example.org?a=b)")]),
    ("llama4", "[nobody(a=1)]", [C("[nobody(a=1)]")]),
    ("llama4", "[1, 2]", [C("[1, 2]")]),
    ("lfm2", "One moment. <|tool_call_start|>[get(city='Rome', days=3)]<|tool_call_end|>Done", [
        C("One moment."), *call("get", _MANY_JSON), C("Done")]),
    ("lfm2", "<|tool_call_start|>[get(), a.b:c(tags=['x', \"y\"])]<|tool_call_end|>", [
        *call("get"), *call("a.b:c", '{"tags": ["x", "y"]}')]),
    # Gemma
    ("functiongemma", "<start_function_call>call:get{city:<escape>{}\"\n<escape>,days:3}<end_function_call>"
        "<start_function_call>call:get_weather{}<end_function_call>", [
        *call("get", '{"city":"{}\\"\\n","days":3}'), *call("get_weather")]),
    ("gemma4", 'Hm<|tool_call>call:get{any:{a:[<|"|>x<|"|>,1.5,true,null],<|"|>b c<|"|>:{}},city:<|"|><|"|>}'
        "<tool_call|>", [
        C("Hm"), *call("get", '{"any":{"a":["x",1.5,true,null],"b c":{}},"city":""}')]),
    ("gemma4", '<|tool_call>call:nobody{a:1}<tool_call|>', [C("<|tool_call>call:nobody{a:1}<tool_call|>")]),
    ("gemma4", '<|tool_call>call:get{city: "Rome"}<tool_call|>', call("get", '{"city": "Rome"}')),
]  # fmt: skip
