"""Constrained output on the wire: every field that asks for it, the openai SDK's helpers, and what is refused."""

from __future__ import annotations

import json
import re
import threading
import time
from enum import Enum
from typing import Any

import jsonschema
import openai
import pytest
from api_helpers import CHAT, COMPLETIONS, MODEL, all_events, assert_alive, assert_error
from pydantic import BaseModel, Field
from running_server import RunningServer

from llamaserve.api.constraints import ConstraintOptions
from llamaserve.engine.params import Constraint
from llamaserve.errors import InvalidRequest

_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 15}, "people": {"type": "integer", "minimum": 1}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
_ASK = [{"role": "user", "content": "Name a city and its population as JSON."}]


def _constraint(**body: Any) -> Constraint | None:
    return ConstraintOptions.model_validate(body).constraint()


def _nested(schema: Any, **others: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, **others}}


# Which field means what


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": _nested(_SCHEMA)},
        {"response_format": _nested(_SCHEMA, strict=True, description="x")},
        {"response_format": {"type": "json_schema", "schema": _SCHEMA, "name": "city", "strict": True}},
        {"response_format": {"type": "json_object", "schema": _SCHEMA}},
        {"json_schema": _SCHEMA},
        {"json_schema": json.dumps(_SCHEMA)},
        {"guided_json": _SCHEMA},
        {"structured_outputs": {"json": _SCHEMA}},
        {"json_schema": _SCHEMA, "response_format": {"type": "text"}, "grammar": "", "regex": None},
    ],
    ids=str,
)
def test_all_forms_of_a_schema_are_one(body: dict[str, Any]) -> None:
    constraint = _constraint(**body)
    assert constraint is not None
    assert constraint.kind == "json_schema"
    assert json.loads(constraint.text) == _SCHEMA
    assert constraint.param == next(iter(body))


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "json_schema",
            '{"type": "object"}',
        ),
        ({"response_format": _nested({})}, "json_schema", "{}"),
        ({"response_format": _nested(None)}, "json_schema", '{"type": "object"}'),
        ({"response_format": _nested("")}, "json_schema", '{"type": "object"}'),
        ({"response_format": {"type": "json_object", "schema": None}}, "json_schema", '{"type": "object"}'),
        ({"response_format": {"type": "json_schema", "schema": None}}, "json_schema", '{"type": "object"}'),
        ({"json_schema": True}, "json_schema", "true"),
        ({"grammar": "root ::= x"}, "grammar", "root ::= x"),
        ({"grammar_string": "root ::= x"}, "grammar", "root ::= x"),
        ({"guided_grammar": "root ::= x"}, "grammar", "root ::= x"),
        ({"response_format": {"type": "grammar", "grammar": "root ::= x"}}, "grammar", "root ::= x"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "grammar", "root ::= x"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"guided_choice": ["é", "b"]}, "choice", '["é", "b"]'),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]'),
        ({"structured_outputs": {"json_object": True}}, "json_schema", '{"type": "object"}'),
    ],
    ids=str,
)
def test_each_field_is_a_constraint(body: dict[str, Any], kind: str, text: str) -> None:
    constraint = _constraint(**body)
    assert constraint is not None
    assert (constraint.kind, constraint.text) == (kind, text)


@pytest.mark.parametrize(
    "body",
    [{}, {"response_format": {"type": "text"}}, {"grammar": ""}, {"regex": ""}, {"structured_outputs": {}}],
    ids=str,
)
def test_nothing_is_asked_for(body: dict[str, Any]) -> None:
    assert _constraint(**body) is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"grammar": "root ::= x", "regex": "a"}, "regex"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "grammar", "grammar": ""}}, "response_format"),
        ({"response_format": {"type": "regex", "pattern": ""}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": "x"}}, "response_format"),
        ({"response_format": _nested("x")}, "response_format"),
        ({"response_format": _nested(5)}, "response_format"),
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "5"}, "json_schema"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"grammar": "x" * (256 * 1024 + 1)}, "grammar"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_can_not_be_meant(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        _constraint(**body)
    assert caught.value.param == param


# Answers


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_fits(server: RunningServer, path: str, stream: bool) -> None:
    prompt = {"messages": _ASK} if path == CHAT else {"prompt": "A city and its population as JSON: "}
    body = {**prompt, "response_format": _nested(_SCHEMA), "max_tokens": 100, "n": 2, "seed": 5}
    texts = ["", ""]
    if stream:
        for event in all_events(server, path, body):
            for choice in event["choices"] if event != "[DONE]" else ():
                texts[choice["index"]] += choice["text"] if path == COMPLETIONS else choice["delta"].get("content", "")
    else:
        for choice in server.post(path, body).json()["choices"]:
            assert choice["finish_reason"] == "stop"
            texts[choice["index"]] = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    for text in texts:
        jsonschema.validate(json.loads(text), _SCHEMA)


@pytest.mark.parametrize(
    ("field", "pattern"),
    [
        ({"regex": r"\d{4}-\d\d"}, r"\d{4}-\d\d"),
        ({"grammar": 'root ::= "a" root | "b"'}, "a*b"),
        ({"guided_choice": ["north", "south"]}, "north|south"),
        ({"json_schema": {"enum": [1, None, "x"]}}, '1|null|"x"'),
        ({"json_schema": True}, r'(?s)[\[{"tfn\d-].*'),
    ],
    ids=str,
)
def test_every_kind_of_form(server: RunningServer, field: dict[str, Any], pattern: str) -> None:
    for seed in range(3):
        body = {"prompt": "It is ", "seed": seed, "max_tokens": 60, "strict": True, **field}
        response = server.post(COMPLETIONS, body)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        if choice["finish_reason"] == "stop":
            assert re.fullmatch(pattern, choice["text"]), choice["text"]


def test_what_is_cut_is_called_cut(server: RunningServer) -> None:
    body = {"messages": _ASK, "response_format": _nested({"type": "string", "minLength": 200}), "max_tokens": 10}
    (choice,) = server.post(CHAT, body).json()["choices"]
    assert choice["finish_reason"] == "length"


class _Size(Enum):
    SMALL = "small"
    LARGE = "large"


class _Street(BaseModel):
    name: str = Field(max_length=10)
    houses: int = Field(ge=1, le=500)


class _City(BaseModel):
    name: str = Field(max_length=12)
    size: _Size
    mayor: str | None = Field(max_length=10)
    streets: list[_Street] = Field(min_length=1, max_length=2)


def test_the_sdks_parse_helper(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=MODEL, messages=_ASK, response_format=_City, seed=seed, max_tokens=300
        )
        city = answer.choices[0].message.parsed
        assert isinstance(city, _City)
        assert 1 <= len(city.streets) <= 2


def test_the_sdks_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=_ASK, response_format=_City, seed=1, max_tokens=300
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert kinds[-1] == "content.done" or "content.done" in kinds
    assert isinstance(final.choices[0].message.parsed, _City)


# Refusals


@pytest.mark.parametrize(
    ("field", "word"),
    [
        ({"response_format": _nested({"type": "array", "uniqueItems": True})}, "uniqueItems"),
        ({"response_format": _nested({"type": "object", "patternProperties": {"((": {}}})}, ""),
        ({"response_format": _nested({"not": {}})}, "not"),
        ({"response_format": _nested({"$ref": "#/nowhere"})}, "nowhere"),
        ({"response_format": _nested({"$ref": "file:///etc/passwd"})}, "passwd"),
        ({"json_schema": False}, ""),
        ({"regex": "(("}, "unclosed"),
        ({"grammar": "root ::= missing"}, "missing"),
        ({"grammar": "start ::= 5"}, ""),
    ],
    ids=str,
)
def test_what_can_not_be_kept_to_is_refused_with_the_reason(
    server: RunningServer, field: dict[str, Any], word: str
) -> None:
    for extra in ({}, {"stream": True}):
        response = server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 1, **field, **extra})
        assert word in assert_error(response, 400, None, next(iter(field)))


def _deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


_HOSTILE = {
    "intersections": {"allOf": [{"type": "string", "pattern": f".*a.{{{number}}}b.*"} for number in range(30)]},
    "products": {
        "allOf": [
            {"anyOf": [{"type": "object", "properties": {f"a{i}_{j}": {"type": "string"}}} for j in range(4)]}
            for i in range(12)
        ]
    },
    "deep": _deep(400),
    "divisible": {"type": "integer", "multipleOf": 999_983},
    "wide": {"type": "object", "properties": {f"property{number}": {} for number in range(9000)}},
    "itself": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "nothing": {"type": "integer", "minimum": 3, "maximum": 2},
    "long": {"type": "string", "pattern": "a" * 300_000},
}


@pytest.mark.parametrize("name", _HOSTILE)
def test_hostile_schemas_are_refused_within_a_second(server: RunningServer, name: str) -> None:
    begin = time.monotonic()
    response = server.post(CHAT, {"messages": _ASK, "response_format": _nested(_HOSTILE[name]), "max_tokens": 1})
    assert_error(response, 400, None, "response_format")
    assert time.monotonic() - begin < 5  # of which the machine may use the most for other things
    assert_alive(server)


@pytest.mark.parametrize(
    "field",
    [
        {"regex": "(a{1000}){1000}"},
        {"regex": "((a{0,100}){0,100}){0,100}"},
        {"regex": "(a|b)*a(a|b){40}"},
        {"grammar": "root ::= " + "(" * 100_000},
        {"grammar": 'root ::= "a"{1000000000}'},
        {"grammar": "root ::= root"},
        {"grammar": 'root ::= root root | "a"'},
        {"guided_choice": [f"choice {number}" for number in range(20_000)]},
        {"json_schema": {"type": "string", "maxLength": 10**9}},
        {"json_schema": {"type": "array", "minItems": 10**9}},
        {"json_schema": {"type": "integer", "multipleOf": 65521}},
        {"json_schema": {"enum": [str(number) for number in range(20_000)]}},
    ],
    ids=lambda field: str(field)[:50],
)
def test_odd_forms_are_answered_or_refused(server: RunningServer, field: dict[str, Any]) -> None:
    begin = time.monotonic()
    response = server.post(COMPLETIONS, {"prompt": "x", "max_tokens": 3, **field})
    assert response.status_code in (200, 400), response.text
    assert time.monotonic() - begin < 10
    assert_alive(server)


def test_others_are_not_held_up_by_a_bomb(server: RunningServer) -> None:
    bomb = {"messages": _ASK, "response_format": _nested(_HOSTILE["intersections"] | {"title": "another"})}
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        gaps = []
        last = time.monotonic()
        stream = client.completions.create(
            model=MODEL, prompt="Once", max_tokens=150, stream=True, extra_body={"ban_eos_token": True}
        )
        for number, _ in enumerate(stream):
            if number == 10:
                sent = time.monotonic()
                thread = threading.Thread(target=lambda: server.post(CHAT, bomb))
                thread.start()
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
        thread.join()
    assert last > sent
    assert max(gaps) < 1.0
