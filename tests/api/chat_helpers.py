"""What tests of the chat endpoint share: tools, histories with calls, and putting streams together as clients do."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
from api_helpers import CHAT, all_events
from running_server import RunningServer

Choice = dict[str, Any]
Message = dict[str, Any]

TEMPLATES = Path(__file__).resolve().parent.parent / "chat" / "templates"
PROMPT = "/v1/internal/chat-prompt"
_TODAY = date(2026, 11, 25)
MARKUP = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]")


def template(name: str) -> str:
    """Return the chat template of a family of models, with a fixed day in place of today's: what the model samples, and
    with it what the tests see, depends on every word of the prompt.
    """
    source = (TEMPLATES / f"{name}.jinja").read_text()
    return re.sub(r"strftime_now\('([^']+)'\)", lambda found: repr(_TODAY.strftime(found[1])), source)


def said(*texts: tuple[str, str]) -> list[Message]:
    """Return messages from roles and texts."""
    return [{"role": role, "content": content} for role, content in texts]


def tool(function: str, required: Sequence[str] | None = None, **properties: Any) -> dict[str, Any]:
    """Return a tool by the schemas of its arguments, all of them required if nothing else is said."""
    names = list(properties) if required is None else list(required)
    parameters = {"type": "object", "properties": properties, "required": names}
    return {"type": "function", "function": {"name": function, "parameters": parameters}}


PAINT = tool("paint", colour={"enum": ["red", "green", "blue"]})
WASH = tool("wash", car={"type": "boolean"})
WEATHER = tool("get_weather", city={"type": "string", "maxLength": 12})


def called(name: str, arguments: Any, number: int = 1) -> Message:
    """Return the assistant's message that calls a tool."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}],
    }


def result(text: str, number: int = 1) -> Message:
    """Return the message with the result of that call."""
    return {"role": "tool", "tool_call_id": f"call_{number}", "content": text}


def weather_talk() -> list[Message]:
    """Return a conversation after which even a small model likes to call ``get_weather``."""
    messages: list[Message] = []
    for number, (city, weather) in enumerate([("Rome", "sunny"), ("Oslo", "cold")]):
        messages += [
            *said(("user", f"What is the weather in {city}?")),
            called("get_weather", {"city": city}, number),
            result(weather, number),
            *said(("assistant", f"It is {weather} in {city}.")),
        ]
    return [*messages, *said(("user", "What is the weather in Paris?"))]


def whole(server: RunningServer, body: dict[str, Any]) -> list[Choice]:
    """Send a request that is not streamed and return its choices."""
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text[:500]
    return list(response.json()["choices"])


def put_together(events: Sequence[Any]) -> list[Choice]:
    """Return the choices of a stream in the form they have when they are not streamed, and check the order of it."""
    *chunks, done = events
    assert done == "[DONE]"
    choices: dict[int, Choice] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            if piece["index"] not in choices:
                assert piece["delta"]["role"] == "assistant"
                empty = {"role": "assistant", "content": "", "refusal": None}
                choices[piece["index"]] = {"message": empty, "logprobs": None, "finish_reason": None}
            _add(choices[piece["index"]], piece)
    assert all(choice["finish_reason"] for choice in choices.values())
    return [{"index": index, **choices[index]} for index in sorted(choices)]


def _add(choice: Choice, piece: Choice) -> None:
    assert choice["finish_reason"] is None, "nothing comes after the end"
    message, delta = choice["message"], piece["delta"]
    for field in ("content", "reasoning_content", "reasoning"):
        if delta.get(field):
            message[field] = message.get(field, "") + delta[field]
    for call in delta.get("tool_calls", ()):
        _add_call(message.setdefault("tool_calls", []), call)
    if "function_call" in delta:
        if "name" in delta["function_call"]:
            assert "function_call" not in message
            message["function_call"] = {"name": delta["function_call"]["name"], "arguments": ""}
        message["function_call"]["arguments"] += delta["function_call"]["arguments"]
    if piece["logprobs"] is not None:
        choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
        choice["logprobs"]["content"] += piece["logprobs"]["content"]
    choice["finish_reason"] = piece["finish_reason"]


def _add_call(calls: list[Any], piece: dict[str, Any]) -> None:
    """Add a piece of a call: name and id come once and first, and the calls one after the other."""
    if piece["index"] == len(calls):
        assert piece["id"]
        assert piece["type"] == "function"
        function = {"name": piece["function"]["name"], "arguments": ""}
        calls.append({"id": piece["id"], "type": "function", "function": function})
    else:
        assert piece["index"] == len(calls) - 1
        assert set(piece) == {"index", "function"}
        assert set(piece["function"]) == {"arguments"}
    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]


def in_pieces(server: RunningServer, body: dict[str, Any]) -> list[Choice]:
    """Send a streamed request and return its choices."""
    return put_together(all_events(server, CHAT, body))


def without_ids(choices: Sequence[Choice]) -> list[Choice]:
    """Return choices that are equal if they differ only in the ids of calls, and in how a missing content looks."""
    plain = []
    for choice in choices:
        message = {**choice["message"], "content": choice["message"]["content"] or ""}
        if "tool_calls" in message:
            message["tool_calls"] = [call["function"] for call in message["tool_calls"]]
        plain.append({**choice, "message": message})
    return plain


def both(server: RunningServer, body: dict[str, Any]) -> list[Choice]:
    """Send a request streamed and not, and return what both are answered with."""
    with ThreadPoolExecutor(1) as thread:
        streamed = thread.submit(in_pieces, server, body)
        choices = whole(server, body)
    plain, pieces = without_ids(choices), without_ids(streamed.result())
    assert plain == pieces, f"{plain} is not {pieces}"
    return choices


def calls_of(choice: Choice, *tools: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the calls of an answer that is nothing else, after checking them against the tools' schemas."""
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls", choice
    assert not message["content"]
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
    calls = []
    for call in message["tool_calls"]:
        assert call["type"] == "function"
        assert call["id"]
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, schemas[name])
        calls.append((name, arguments))
    assert len({call["id"] for call in message["tool_calls"]}) == len(calls)
    return calls


def has_markup(text: str | None) -> bool:
    """Say whether a text has something of how calls of ``get_weather`` are written."""
    text = text or ""
    return any(mark in text for mark in MARKUP) or text.lstrip().startswith('{"name": "get_weather",')
