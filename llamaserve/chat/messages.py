"""From the messages of a request to the plain dicts that a chat template reads, checked first.

Accepted is what OpenAI's chat API documents, with text only: each content becomes one string. Every refusal names the
place in the request. This module knows nothing of HTTP, templates or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamaserve.errors import InvalidRequest, UnsupportedParameter

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
PASSED_ON = ("name", "tool_call_id", "reasoning_content")  # optional strings that templates may read
NOT_OFFERED = {
    "tool_calls": "tool calling is not offered yet",
    "function_call": "tool calling is not offered yet",
    "audio": "audio is not offered",
}


def normalise(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as dicts with ``role``, a string ``content``, and the keys of ``PASSED_ON`` that are given.

    ``developer`` becomes ``system``; the system messages at the start are joined with newlines into one, later ones
    keep their place. The text parts of a content are joined with a single space, as text-generation-webui does. Unlike
    it, no white space is stripped from a text: the model reads what the client wrote. Keys that the chat API does not
    have are left out, as are keys whose value is null.

    Raises ``InvalidRequest`` for what can't be right and ``UnsupportedParameter`` for what is not offered: images,
    audio, files, tools, and the ``function`` role.
    """
    if not messages:
        raise InvalidRequest("messages is empty; at least one message is needed", param="messages")
    return _join_leading_system([_normalised(message, f"messages[{i}]") for i, message in enumerate(messages)])


def _normalised(message: Mapping[str, Any], place: str) -> dict[str, Any]:
    role = _role(message, place)
    for key, why in NOT_OFFERED.items():
        if message.get(key):  # clients send null or [] when an answer of theirs had none
            raise UnsupportedParameter(f"{place}.{key}: {why}", param=f"{place}.{key}")
    kept = {key: _text(message[key], f"{place}.{key}") for key in PASSED_ON if message.get(key) is not None}
    return {"role": role, "content": _content(message, role, place), **kept}


def _role(message: Mapping[str, Any], place: str) -> str:
    place = f"{place}.role"
    role = message.get("role")
    if role is None:
        raise InvalidRequest(f"{place} is missing; it is one of {', '.join(ROLES)}", param=place)
    if role == "function":
        raise UnsupportedParameter(f"{place}: the role 'function' is not offered", param=place)
    if role not in ROLES:
        raise InvalidRequest(f"{place} is {_shown(role)}, but must be one of {', '.join(ROLES)}", param=place)
    if role == "tool":
        raise UnsupportedParameter(f"{place}: tool calling is not offered yet", param=place)
    return "system" if role == "developer" else str(role)


def _content(message: Mapping[str, Any], role: str, place: str) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(_part(part, role, f"{place}.content[{j}]") for j, part in enumerate(content))
    if content is not None:
        return _text(content, f"{place}.content", expected="a string or a list of parts")
    if role == "assistant" and message.get("refusal") is not None:  # what it wrote instead of a content
        return _text(message["refusal"], f"{place}.refusal")
    if role == "assistant" and "content" in message:
        return ""
    raise InvalidRequest(f"{place}.content is missing", param=f"{place}.content")


def _part(part: object, role: str, place: str) -> str:
    if not isinstance(part, Mapping):
        return _text(part, place, expected="a string or a part with a type")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{place}.type is {'missing' if kind is None else 'no string'}", param=f"{place}.type")
    if kind in TEXT_PARTS:
        return _text(part.get("text"), f"{place}.text")
    if kind == "refusal" and role == "assistant":
        return _text(part.get("refusal"), f"{place}.refusal")
    raise UnsupportedParameter(
        f"{place}: parts of type {_shown(kind)} are not offered in a message of role {role!r}, only text", param=place
    )


def _text(value: object, place: str, *, expected: str = "a string") -> str:
    if value is None:
        raise InvalidRequest(f"{place} is missing", param=place)
    if not isinstance(value, str):
        raise InvalidRequest(f"{place} must be {expected}", param=place)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON's "\ud800" alone
        raise InvalidRequest(f"{place} holds half a surrogate pair at position {error.start}", param=place) from None
    return value


def _shown(value: object) -> str:
    """Return a value from the request as it may stand in a message: short and in ASCII."""
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."


def _join_leading_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return messages
    content = "\n".join(message["content"] for message in messages[:count])
    return [{**messages[0], "content": content}, *messages[count:]]
