"""Tools on the wire: the starter model, whose template knows none, and templates of families that have some."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from api_helpers import CHAT, MODEL, all_events, assert_error, length_of, tokens_of
from chat_helpers import (
    PAINT,
    PROMPT,
    WASH,
    WEATHER,
    Choice,
    both,
    called,
    calls_of,
    has_markup,
    in_pieces,
    put_together,
    result,
    said,
    template,
    tool,
    weather_talk,
    whole,
)
from running_server import RunningServer

ROOM = said(("user", "Paint my room."))
FAMILIES: dict[str, dict[str, Any]] = {
    "starter": {},
    "hermes": {"chat_template": template("hermes3")},
    "llama": {"chat_template": template("llama3.1")},
}
NAMED = {"type": "function", "function": {"name": "wash"}}
IGNORED = "x-llamaserve-ignored"


# One call that must be


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_must_be_is_one_and_valid_whatever_the_seed(server: RunningServer, family: str) -> None:
    seeds = 8 if family == "starter" else 2  # of each kind
    body = {"messages": ROOM, "tools": [PAINT, WASH], "max_tokens": 100, "temperature": 1.5, "n": seeds}
    body |= FAMILIES[family]
    for kind, read in enumerate((whole, in_pieces)):
        required = read(server, {**body, "tool_choice": "required", "seed": kind * seeds})
        assert [len(calls_of(choice, PAINT, WASH)) for choice in required] == [1] * seeds
        named = read(server, {**body, "tool_choice": NAMED, "seed": kind * seeds})
        assert [[name for name, _ in calls_of(choice, WASH)] for choice in named] == [["wash"]] * seeds


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_of_calls_has_the_same_as_the_whole(server: RunningServer, family: str) -> None:
    body = {"messages": ROOM, "tools": [PAINT, WASH], "max_tokens": 40, "seed": 1, **FAMILIES[family]}
    for choice in ("required", "auto"):
        both(server, {**body, "tool_choice": choice})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_free_choice_never_shows_markup(server: RunningServer, family: str) -> None:
    """The conversation has calls already, so that the model makes some by itself."""
    body = {"messages": weather_talk(), "tools": [WEATHER], "max_tokens": 40, "n": 4, "seed": 3, **FAMILIES[family]}
    choices = in_pieces(server, body)
    for choice in choices:
        assert not has_markup(choice["message"]["content"])
        if choice["finish_reason"] == "tool_calls":
            assert calls_of(choice, WEATHER)
    if family != "llama":  # of which this model understands too little
        assert any(choice["finish_reason"] == "tool_calls" for choice in choices)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_choice_never_calls(server: RunningServer, family: str) -> None:
    body = {"messages": weather_talk(), "tools": [WEATHER], "tool_choice": "none", "max_tokens": 12, "seed": 3}
    for choice in both(server, body | FAMILIES[family]):
        assert "tool_calls" not in choice["message"]
        assert choice["finish_reason"] in ("stop", "length")
        assert choice["message"]["content"]


def test_the_tools_are_shown_where_the_template_has_no_place_for_them(server: RunningServer) -> None:
    body = {"messages": [*said(("system", "Be brief.")), *weather_talk()], "tools": [WEATHER, PAINT]}
    prompt = server.post(PROMPT, body).json()["prompt"]
    system, *turns = prompt.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe brief.\n\n")
    assert '"name": "get_weather"' in system
    assert '"colour": {"enum": ["red", "green", "blue"]}' in system
    assert turns[1] == (
        'assistant\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
    )
    assert turns[2].startswith("user\n<tool_response>\n")
    assert "sunny" in turns[2]
    none = server.post(PROMPT, {**body, "tool_choice": "none"}).json()["prompt"]
    assert "<tools>" not in none


def test_a_choice_among_some_of_the_tools(server: RunningServer) -> None:
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    body = {"messages": ROOM, "tools": [PAINT, WASH], "tool_choice": allowed, "max_tokens": 60, "n": 4, "seed": 1}
    for choice in whole(server, body):
        assert [name for name, _ in calls_of(choice, WASH)] == ["wash"]


def test_names_that_begin_alike(server: RunningServer) -> None:
    tools = [tool("get"), tool("get_it", it={"type": "boolean"}), tool("get_it_all")]
    for name in ("get", "get_it", "get_it_all"):
        choice = {"type": "function", "function": {"name": name}}
        body = {"messages": ROOM, "tools": tools, "tool_choice": choice, "max_tokens": 60, "seed": 1}
        ((found, _),) = calls_of(both(server, body)[0], *tools)
        assert found == name


# Several calls


def test_an_answer_may_have_several_calls_if_that_is_wanted(server: RunningServer) -> None:
    body = {"messages": ROOM, "tools": [PAINT, WASH], "tool_choice": "required", "max_tokens": 90, "temperature": 1.5}
    body |= {"n": 3, "seed": 1}
    several = in_pieces(server, {**body, "parallel_tool_calls": True})
    assert max(len(choice["message"]["tool_calls"]) for choice in several) > 1
    for choice in several:
        if choice["finish_reason"] == "tool_calls":
            calls_of(choice, PAINT, WASH)
    for choice in whole(server, {**body, "parallel_tool_calls": False}):
        assert len(calls_of(choice, PAINT, WASH)) == 1


def test_two_choices_have_calls_of_their_own(server: RunningServer) -> None:
    body = {"messages": ROOM, "tools": [PAINT], "tool_choice": "required", "max_tokens": 60, "seed": 4, "n": 2}
    one, two = both(server, body)
    assert one["message"]["tool_calls"][0]["id"] != two["message"]["tool_calls"][0]["id"]


# What else a stream of calls has


def test_every_token_s_logprob_comes_once(server: RunningServer) -> None:
    body = {"messages": ROOM, "tools": [PAINT], "tool_choice": "required", "max_tokens": 60, "seed": 1}
    body |= {"logprobs": True, "top_logprobs": 1}
    streamed, plain = in_pieces(server, body), whole(server, body)
    entries = plain[0]["logprobs"]["content"]
    assert streamed[0]["logprobs"]["content"] == entries
    text = b"".join(bytes(entry["bytes"]) for entry in entries).decode()
    arguments = plain[0]["message"]["tool_calls"][0]["function"]["arguments"]
    assert text == f'<tool_call>\n{{"name": "paint", "arguments": {arguments}}}\n</tool_call>'
    assert all(len(entry["top_logprobs"]) == 1 for entry in entries)


def test_usage_counts_all_of_the_answer(server: RunningServer) -> None:
    body = {"messages": ROOM, "tools": [PAINT], "tool_choice": "required", "max_tokens": 60, "seed": 1}
    usage = server.post(CHAT, body).json()["usage"]
    *chunks, last, done = all_events(server, CHAT, {**body, "stream_options": {"include_usage": True}})
    assert done == "[DONE]"
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][count] for count in counts] == [usage[count] for count in counts]
    assert usage["prompt_tokens"] == length_of(server, server.post(PROMPT, body).json()["prompt"])
    arguments = put_together([*chunks, done])[0]["message"]["tool_calls"][0]["function"]["arguments"]
    text = f'<tool_call>\n{{"name": "paint", "arguments": {arguments}}}\n</tool_call>'
    assert abs(usage["completion_tokens"] - len(tokens_of(server, text))) <= 3  # it need not cut its text as we do


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_is_cut_shows_no_markup(server: RunningServer, family: str) -> None:
    body = {"messages": ROOM, "tools": [PAINT], "tool_choice": "required", "temperature": 0, **FAMILIES[family]}
    response = server.post(CHAT, {**body, "max_tokens": 60}).json()
    arguments = response["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    lengths = set()
    for limit in range(1, response["usage"]["completion_tokens"], 5):
        (choice,) = both(server, {**body, "max_tokens": limit})
        assert choice["finish_reason"] == "length"
        assert not choice["message"]["content"]
        for call in choice["message"].get("tool_calls", []):
            assert arguments.startswith(call["function"]["arguments"])
            lengths.add(len(call["function"]["arguments"]))
    assert len(lengths) > 1


def test_a_stop_text_within_a_call_ends_no_call(server: RunningServer) -> None:
    body = {"messages": ROOM, "tools": [PAINT], "tool_choice": "required", "temperature": 0, "max_tokens": 60}
    (choice,) = both(server, {**body, "stop": ["olour"]})
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].endswith('"c')


# The older form


def test_functions_are_answered_in_their_own_form(server: RunningServer) -> None:
    functions = [PAINT["function"], WASH["function"]]
    body = {"messages": ROOM, "functions": functions, "function_call": {"name": "paint"}, "max_tokens": 60, "seed": 1}
    (choice,) = both(server, body)
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["content"] is None
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["function_call"]["name"] == "paint"
    assert set(json.loads(choice["message"]["function_call"]["arguments"])) == {"colour"}
    messages = [
        *ROOM,
        {"role": "assistant", "content": None, "function_call": choice["message"]["function_call"]},
        {"role": "function", "name": "paint", "content": "done"},
    ]
    free = {"messages": messages, "functions": functions, "max_tokens": 10, "seed": 1}
    assert whole(server, {**free, "function_call": "none"})[0]["message"]["content"]
    assert whole(server, {**free, "function_call": "auto"})


# Schemas


def _nested(**others: Any) -> dict[str, Any]:
    function = {
        "name": "plan",
        "parameters": {
            "type": "object",
            "properties": {
                "first": {"$ref": "#/$defs/step"},
                "sizes": {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 2},
                    "minItems": 1,
                    "maxItems": 2,
                },
                "mode": {"enum": ["fast", "slow", None, 3]},
                "note": {"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]},
            },
            "required": ["first", "sizes", "mode", "note"],
            "$defs": {
                "step": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "maxLength": 6}, "done": {"type": "boolean"}},
                    "required": ["name", "done"],
                    "additionalProperties": False,
                }
            },
        },
        **others,
    }
    return {"type": "function", "function": function}


@pytest.mark.parametrize("strict", [False, True])
def test_arguments_fit_schemas_with_all_that_is_usual(server: RunningServer, strict: bool) -> None:
    plan = _nested(strict=strict)
    body = {"messages": said(("user", "Plan it.")), "tools": [plan], "tool_choice": "required", "max_tokens": 250}
    for choice in whole(server, {**body, "temperature": 1, "seed": 5, "n": 2}):
        ((_, arguments),) = calls_of(choice, plan)
        assert set(arguments) == {"first", "sizes", "mode", "note"}


def test_arguments_have_nothing_that_the_schema_does_not_know(server: RunningServer) -> None:
    tools = [tool("paint", [], colour={"enum": ["red"]}), {"type": "function", "function": {"name": "wash"}}]
    body = {"messages": ROOM, "tools": tools, "tool_choice": "required", "max_tokens": 60, "temperature": 1.5}
    for choice in whole(server, {**body, "seed": 1, "n": 3}):
        for call in choice["message"]["tool_calls"]:
            assert set(json.loads(call["function"]["arguments"])) <= {"colour"}


UNUSUAL = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 2}


def test_what_a_schema_has_that_can_not_be_enforced_is_named(server: RunningServer) -> None:
    tools = [WASH, tool("paint", walls=UNUSUAL)]
    body = {"messages": ROOM, "tools": tools, "tool_choice": "required", "max_tokens": 60, "seed": 1}
    response = server.post(CHAT, {**body, "zzz": 1})
    assert response.headers[IGNORED] == "zzz, tools[1].function.parameters.uniqueItems"
    assert calls_of(response.json()["choices"][0], WASH, tool("paint", walls={"type": "array"}))
    assert server.post(CHAT, {**body, "stream": True}).headers[IGNORED].endswith(".uniqueItems")
    not_zero = tool("paint", walls={"not": {"const": 0}})
    headers = server.post(CHAT, {**body, "tools": [not_zero]}).headers
    assert headers[IGNORED] == "tools[0].function.parameters.not"
    message = assert_error(
        server.post(CHAT, {**body, "strict": True}),
        400,
        "unsupported_parameter",
        "tools[1].function.parameters.uniqueItems",
    )
    assert "uniqueItems" in message


@pytest.mark.parametrize("schema", [UNUSUAL, {"not": {"const": 0}}], ids=["uniqueItems", "not"])
def test_a_strict_tool_is_refused_for_what_can_not_be_enforced(server: RunningServer, schema: dict[str, Any]) -> None:
    strict = tool("paint", walls=schema)
    strict["function"]["strict"] = True
    for extra in ({}, {"stream": True}):
        response = server.post(CHAT, {"messages": ROOM, "tools": [WASH, strict], **extra})
        assert_error(response, 400, None, "tools[1].function.parameters")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no list": ({"tools": {}}, "tools"),
    "no function": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "no name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "twice": ({"tools": [PAINT, PAINT]}, "tools[1].function.name"),
    "a schema of lists": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "tools[0].function.parameters.type",
    ),
    "nowhere": ({"tools": [tool("f", a={"$ref": "#/nowhere"})]}, "tools[0].function.parameters"),
    "a bad pattern": ({"tools": [tool("f", a={"type": "string", "pattern": "(("})]}, "tools[0].function.parameters"),
    "unknown": ({"tools": [PAINT], "tool_choice": NAMED}, "tool_choice"),
    "a choice of nothing": ({"tool_choice": "required"}, "tool_choice"),
    "an odd choice": ({"tools": [PAINT], "tool_choice": "maybe"}, "tool_choice"),
    "old and new": ({"tools": [PAINT], "functions": [PAINT["function"]]}, "functions"),
    "several of the old": ({"functions": [PAINT["function"]], "parallel_tool_calls": True}, "parallel_tool_calls"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED)
def test_tools_that_can_not_be_are_refused(server: RunningServer, body: dict[str, Any], param: str) -> None:
    for path in (CHAT, PROMPT):
        response = server.post(path, {"messages": ROOM, "max_tokens": 1, **body})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param


def test_many_tools_with_long_schemas(server: RunningServer) -> None:
    """As many as agents have; the model is told of them only so far as its context has room."""
    tools = [tool(f"tool_{n}", **{f"p{k}": {"type": "boolean"} for k in range(3)}) for n in range(128)]
    body = {"messages": ROOM, "tools": tools, "max_tokens": 5}
    assert_error(server.post(CHAT, body), 400, "context_length_exceeded", "messages")
    few = {**body, "tools": tools[:4], "tool_choice": "required", "max_tokens": 90, "seed": 1}
    assert whole(server, few)[0]["message"]["tool_calls"]


# Together with other forms of the answer


def test_a_form_and_tools_give_one_or_the_other(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    body = {"messages": weather_talk(), "tools": [WEATHER], "max_tokens": 60, "seed": 1, "n": 2, "temperature": 1}
    for choice in both(server, {**body, "response_format": {"type": "json_schema", "schema": schema}}):
        if choice["finish_reason"] == "tool_calls":
            calls_of(choice, WEATHER)
        else:
            assert set(json.loads(choice["message"]["content"])) == {"a"}


# Histories


WRONG_HISTORIES: dict[str, tuple[list[Any], str]] = {
    "no messages": ([], "messages"),
    "an orphan": ([*ROOM, result("x")], "messages[1].tool_call_id"),
    "the wrong id": ([*ROOM, called("paint", {}), result("x", 9)], "messages[2].tool_call_id"),
    "a result between": (
        [*ROOM, called("paint", {}), *ROOM, result("x")],
        "messages[3].tool_call_id",
    ),
    "twice answered": ([*ROOM, called("paint", {}), result("x"), result("y")], "messages[3].tool_call_id"),
    "no function": (
        [*ROOM, {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function"}]}],
        "messages[1].tool_calls[0].function",
    ),
    "a user who calls": ([{**called("paint", {}), "role": "user"}], "messages[0].tool_calls"),
    "nothing in a message": ([*ROOM, {"role": "assistant"}], "messages[1].content"),
    "no content": ([{"role": "user"}], "messages[0].content"),
    "an unknown function": ([*ROOM, {"role": "function", "name": "f", "content": "x"}], "messages[1].name"),
}


@pytest.mark.parametrize(("messages", "param"), WRONG_HISTORIES.values(), ids=WRONG_HISTORIES)
def test_a_wrong_history_is_refused_and_the_next_request_works(
    server: RunningServer, messages: list[Any], param: str
) -> None:
    body = {"messages": messages, "tools": [PAINT], "max_tokens": 2}
    for stream in (False, True):
        assert_error(server.post(CHAT, {**body, "stream": stream}), 400, None, param)
    assert whole(server, {**body, "messages": ROOM})


@pytest.mark.parametrize("arguments", ["{", "[]", "5", "null", '{"a": NaN}', '"x"', "{'a': 1}", 5, ["x"], None])
def test_malformed_arguments_are_refused(server: RunningServer, arguments: object) -> None:
    call = called("paint", {})
    call["tool_calls"][0]["function"]["arguments"] = arguments
    response = server.post(CHAT, {"messages": [*ROOM, call, result("x")], "tools": [PAINT], "max_tokens": 2})
    assert_error(response, 400, None, "messages[1].tool_calls[0].function.arguments")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("arguments", ["", "{}", {"colour": "red"}])
def test_arguments_as_clients_write_them(server: RunningServer, family: str, arguments: object) -> None:
    call = called("paint", {})
    call["tool_calls"][0]["function"]["arguments"] = arguments
    body = {"messages": [*ROOM, call, result("done")], "tools": [PAINT], **FAMILIES[family]}
    response = server.post(PROMPT, body)
    assert response.status_code == 200, response.text
    assert "done" in response.json()["prompt"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_history_without_tools_in_the_request(server: RunningServer, family: str) -> None:
    """Clients that summarise a conversation send its calls, but offer none."""
    body = {"messages": weather_talk(), **FAMILIES[family]}
    prompt = server.post(PROMPT, body).json()["prompt"]
    assert "Rome" in prompt
    assert "sunny" in prompt
    assert whole(server, {**body, "max_tokens": 2})


def test_the_sdk_s_tool_loop(client: openai.OpenAI) -> None:
    messages: list[Any] = said(("user", "What is the weather in Paris?"))
    request: dict[str, Any] = {"model": MODEL, "tools": [WEATHER], "seed": 1}
    answer = client.chat.completions.create(messages=messages, tool_choice="required", max_tokens=60, **request)
    message = answer.choices[0].message
    assert message.tool_calls is not None
    messages.append(message)
    for call in message.tool_calls:
        assert call.type == "function"
        city = json.loads(call.function.arguments)["city"]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": f"Sunny in {city}."})
    last = client.chat.completions.create(messages=messages, tool_choice="none", max_tokens=20, **request)
    assert last.choices[0].message.content
    assert last.choices[0].message.tool_calls is None
    assert last.choices[0].finish_reason in ("stop", "length")


def _arguments(choice: Choice) -> Any:
    return json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


@pytest.mark.parametrize("name", ["qwen3-coder", "mistral-small-3.2", "deepseek-v3", "glm4.5"])
def test_other_families_give_valid_calls_too(server: RunningServer, name: str) -> None:
    body = {"messages": ROOM, "tools": [PAINT, WASH], "tool_choice": NAMED, "max_tokens": 200, "seed": 2}
    (choice,) = both(server, {**body, "chat_template": template(name)})
    assert choice["finish_reason"] == "tool_calls"
    assert isinstance(_arguments(choice)["car"], bool)


@pytest.mark.parametrize("name", ["qwen3-coder", "glm4.5", "minimax-m2"])
def test_texts_of_a_bounded_length_come_without_quotes(server: RunningServer, name: str) -> None:
    note = tool("note", text={"type": "string", "maxLength": 60})
    body = {"messages": ROOM, "tools": [note], "tool_choice": "required", "n": 4, "seed": 7, "reasoning_budget": 5}
    choices = both(server, {**body, "chat_template": template(name), "max_tokens": 200})
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls"] * 4
    assert all(len(_arguments(choice)["text"]) <= 60 for choice in choices)
