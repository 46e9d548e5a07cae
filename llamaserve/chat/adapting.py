"""Fits a conversation with tools to what its chat template can show.

What a template has no place for is written into the texts that it shows: the tools into the system message, calls into
the answers they were part of, results into messages of the user. Knows no family of models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from llamaserve.chat.formats.json_calls import JsonCalls
from llamaserve.chat.tools import Toolbox
from llamaserve.chat.traits import Traits

Message = dict[str, Any]

_INSTRUCTIONS = """\
You can call these functions, which are described as JSON, one on each line:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments like this:
{example}
The result then comes in <tool_response> tags. Answer in plain text when no function helps."""


def adapted(
    messages: Sequence[Message], traits: Traits, tools: Toolbox | None, written: JsonCalls
) -> tuple[list[Message], list[Any] | None]:
    """Return the messages as the template wants them, and what it gets as ``tools``. ``written`` is how a call is
    written into a text.
    """
    offered = [tool.for_template() for tool in tools.tools] if tools is not None else None
    in_text = not (traits.tools and traits.calls)
    shown = list(messages)
    if not in_text:
        shown = [each for message in shown for each in _told_apart(message, traits)]
    if written.lone if in_text else not traits.several:
        shown = _one_by_one(shown)
    if offered and not traits.tools:
        shown = _with_instructions(shown, _instructions(offered, written))
        offered = None
    shown = _with_ids(shown, traits)
    shown = [_answer(_with_thoughts(message, traits), traits, written if in_text else None) for message in shown]
    if not (traits.tools and traits.results):
        shown = _results_from_user(shown)
    return shown, offered


def _instructions(tools: Sequence[Any], written: JsonCalls) -> str:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = written.write([("the_name", '{"a_parameter": "its value"}')])
    return _INSTRUCTIONS.format(tools=lines, example=example)


def _with_instructions(messages: list[Message], instructions: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        text = first["content"]
        return [{**first, "content": f"{text}\n\n{instructions}" if text else instructions}, *rest]
    return [{"role": "system", "content": instructions}, *messages]


def _told_apart(message: Message, traits: Traits) -> list[Message]:
    """Return a message with calls and text as two, if the template can't show both in one."""
    apart = traits.null_content or traits.text_apart
    if not (apart and message.get("tool_calls")):
        return [message]
    calls = {**message, "content": None if traits.null_content else ""}
    text = {key: value for key, value in message.items() if key not in ("tool_calls", "reasoning_content")}
    return [text, calls] if message["content"] else [calls]


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Part answers with several calls into one for each call, with its result right behind it. The text and the
    thoughts stay with the first.
    """
    shown: list[Message] = []
    places: dict[str, int] = {}  # behind which of the messages shown the result of a call belongs
    results: dict[int, Message] = {}
    for message in messages:
        if calls := message.get("tool_calls"):
            places = {call["id"]: len(shown) + n for n, call in enumerate(calls)}
            bare = {key: value for key, value in message.items() if key != "reasoning_content"}
            bare["content"] = None if message["content"] is None else ""
            shown += [{**(bare if n else message), "tool_calls": [call]} for n, call in enumerate(calls)]
        elif message["role"] == "tool":
            results[places[message["tool_call_id"]]] = message
        else:
            shown.append(message)
    behind = ([message, results[n]] if n in results else [message] for n, message in enumerate(shown))
    return [each for group in behind for each in group]


def _with_thoughts(message: Message, traits: Traits) -> Message:
    """Return a message with its thoughts under the name that the template looks for."""
    thoughts = message.get("reasoning_content")
    if thoughts is None or traits.thoughts in (None, "reasoning_content"):
        return message
    return {**message, traits.thoughts: thoughts}


def _with_ids(messages: Sequence[Message], traits: Traits) -> list[Message]:
    """Return the messages with ids of calls as the template wants them."""
    if not (traits.id_length or traits.ids_name):
        return list(messages)
    given: dict[str, str] = {}
    renamed: list[Message] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            given |= {call["id"]: _id(call, len(given) + n, traits) for n, call in enumerate(calls)}
            renamed.append({**message, "tool_calls": [{**call, "id": given[call["id"]]} for call in calls]})
        elif message["role"] == "tool":
            renamed.append({**message, "tool_call_id": given[message["tool_call_id"]]})
        else:
            renamed.append(message)
    return renamed


def _id(call: Message, number: int, traits: Traits) -> str:
    """Return the id of a call: one that says which function is called, or one of so many letters and digits, the same
    for the same id.
    """
    if not traits.id_length:
        return f"functions.{call['function']['name']}:{number}"
    known: str = call["id"]
    if len(known) == traits.id_length and known.isascii() and known.isalnum():
        return known
    return hashlib.sha256(known.encode()).hexdigest()[: traits.id_length]


def _answer(message: Message, traits: Traits, written: JsonCalls | None) -> Message:
    """Return a message with its calls as the template wants them, or in its text if they are ``written`` there."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    if written is not None:
        named = [(call["function"]["name"], _json(call["function"]["arguments"])) for call in calls]
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**kept, "content": "\n".join(filter(None, [message["content"], written.write(named)]))}
    return {**message, "tool_calls": [_call(call, traits) for call in calls]}


def _call(call: Message, traits: Traits) -> Message:
    function = call["function"]
    if traits.arguments == "text":
        function = {**function, "arguments": _json(function["arguments"])}
    return {**call, "function": function}


def _results_from_user(messages: Sequence[Message]) -> list[Message]:
    """Put neighbouring results into one message of the user's."""
    shown: list[Message] = []
    for is_result, group in groupby(messages, lambda message: message["role"] == "tool"):
        if is_result:
            texts = [f"<tool_response>\n{_result(message)}\n</tool_response>" for message in group]
            shown.append({"role": "user", "content": "\n".join(texts)})
        else:
            shown += group
    return shown


def _result(message: Message) -> str:
    return _json({"name": message.get("name", ""), "content": message["content"]})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
