"""From the messages of a request to the plain dicts that a chat template reads, checked first.

Accepted is what OpenAI's chat API documents, with text only: each content becomes one string, and each call of a tool
is tied to the message that answers it. Every refusal names the place in the request. This module knows nothing of HTTP,
templates or models, nor of which tools a request offers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llamaserve.chat.values import function_name, mapping, object_of, shown, text
from llamaserve.errors import InvalidRequest, UnsupportedParameter

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
CANONICAL_ROLES = {"developer": "system", "function": "tool"}
REASONING = ("reasoning_content", "reasoning")
TEXT_PARTS = ("text", "input_text", "output_text")
MAX_MESSAGES = 10_000
MAX_PARTS = 100_000  # of the contents of all messages
MAX_ALL_CALLS = 10_000
MAX_CALLS = 1_000  # of one message

# What messages call their call of a tool, and what a call of a tool is called in an answer that has only one.
_CALLING = ("tool_calls", "function_call")


def normalise(messages: object) -> list[dict[str, Any]]:
    """Return the messages as dicts with ``role`` (system, user, assistant or tool) and a string ``content``.

    A system, user or assistant message has its ``name`` if one is given. An assistant message may have a string
    ``reasoning_content``, which ``reasoning`` is another name for, and ``tool_calls``, a list of ``{"id", "type":
    "function", "function": {"name", "arguments"}}`` where the arguments are a dict. A call without an id gets one that
    depends only on the messages up to it. A tool message has the ``tool_call_id`` of the call that it answers and the
    ``name`` of the function that was called, whatever name it gives itself.

    ``developer`` becomes ``system``; the system messages at the start are joined with newlines into one, later ones
    keep their place. The text parts of a content are joined with a single space, as text-generation-webui does. Unlike
    it, no white space is stripped from a text: the model reads what the client wrote. Keys that the chat API does not
    have for a role are left out, as are keys whose value is null. ``function_call`` and the role ``function`` of before
    there were tools become a call of a tool and its answer.

    A tool message stands after the assistant message whose call it answers, with only other tool messages between. One
    without an id answers the oldest call that has no answer yet, and of that name when it has a name. A call may stay
    without an answer: users interrupt.

    Raises ``InvalidRequest`` for what can't be right and ``UnsupportedParameter`` for what is not offered: images,
    audio, files, and calls of what is no function.
    """
    if not isinstance(messages, list | tuple):
        raise InvalidRequest("messages must be a list", param="messages")
    if not messages:
        raise InvalidRequest("messages is empty; at least one message is needed", param="messages")
    _refuse_too_many(len(messages), MAX_MESSAGES, "messages")
    _refuse_too_many(_count(messages, "content"), MAX_PARTS, "parts of contents")
    _refuse_too_many(_count(messages, "tool_calls"), MAX_ALL_CALLS, "tool calls")
    calls = _Calls()
    plain = [_normalised(message, f"messages[{i}]", calls) for i, message in enumerate(messages)]
    return _join_leading_system(plain)


def _count(messages: Sequence[object], key: str) -> int:
    lists = (message.get(key) for message in messages if isinstance(message, dict))
    return sum(len(each) for each in lists if isinstance(each, list))


def _refuse_too_many(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise InvalidRequest(f"messages has {count} {what}; at most {limit} are taken", param="messages")


def _normalised(value: object, place: str, calls: _Calls) -> dict[str, Any]:
    message = mapping(value, place)
    role = _role(message, place)
    _refuse_what_is_not_offered(message, role, place)
    asked = calls.of(message, place)
    plain = {"role": CANONICAL_ROLES.get(role, role), "content": _content(message, role, place)}
    if role in ("tool", "function"):
        return plain | calls.answered_by(message, role, place)
    calls.ask(asked, place)
    if message.get("name") is not None:
        plain["name"] = text(message["name"], f"{place}.name")
    if role == "assistant" and (reasoning := _reasoning(message, place)) is not None:
        plain["reasoning_content"] = reasoning
    return plain | ({"tool_calls": asked} if asked else {})


def _role(message: Mapping[str, Any], place: str) -> str:
    place = f"{place}.role"
    role = message.get("role")
    if role is None:
        raise InvalidRequest(f"{place} is missing; it is one of {', '.join(ROLES)}", param=place)
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(f"{place} is {shown(role)}, but must be one of {', '.join(ROLES)}", param=place)
    return role


def _refuse_what_is_not_offered(message: Mapping[str, Any], role: str, place: str) -> None:
    if message.get("audio"):  # clients send null when an answer of theirs had none
        raise UnsupportedParameter(f"{place}.audio: models here take text only", param=f"{place}.audio")
    for key in _CALLING if role != "assistant" else ():
        if _given(message, key):
            raise InvalidRequest(f"{place}.{key}: only assistant messages can call", param=f"{place}.{key}")


def _given(message: Mapping[str, Any], key: str) -> bool:
    """Say whether a key has a value. Clients send null or [] when an answer of theirs had none."""
    return message.get(key) not in (None, [])


def _content(message: Mapping[str, Any], role: str, place: str) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(_part(part, role, f"{place}.content[{j}]") for j, part in enumerate(content))
    if content is not None:
        return text(content, f"{place}.content", expected="a string or a list of parts")
    if role == "assistant" and message.get("refusal") is not None:  # what it wrote instead of a content
        return text(message["refusal"], f"{place}.refusal")
    if "content" in message:  # clients write null for none
        return ""
    if role == "assistant" and any(message.get(key) for key in (*_CALLING, *REASONING)):
        return ""
    raise InvalidRequest(f"{place}.content is missing", param=f"{place}.content")


def _part(part: object, role: str, place: str) -> str:
    if not isinstance(part, Mapping):
        return text(part, place, expected="a string or a part with a type")
    kind = part.get("type")
    if not isinstance(kind, str):
        raise InvalidRequest(f"{place}.type is {'missing' if kind is None else 'no string'}", param=f"{place}.type")
    if kind in TEXT_PARTS:
        return text(part.get("text"), f"{place}.text")
    if kind == "refusal" and role == "assistant":
        return text(part.get("refusal"), f"{place}.refusal")
    raise UnsupportedParameter(
        f"{place}: parts of type {shown(kind)} are not offered in a message of role {role!r}; models here take text "
        "only",
        param=place,
    )


def _reasoning(message: Mapping[str, Any], place: str) -> str | None:
    """Return the reasoning that came before an answer, under either of its names."""
    keys = [key for key in REASONING if message.get(key) is not None]
    texts = [text(message[key], f"{place}.{key}") for key in keys]
    if len(set(filter(None, texts))) > 1:
        raise InvalidRequest(
            f"{place}.reasoning is another name of reasoning_content, but has another text", param=f"{place}.reasoning"
        )
    return max(texts, default=None)  # the one that is not empty


class _Calls:
    """The calls of the latest assistant message, which the tool messages right after it answer."""

    def __init__(self) -> None:
        self._made_up = 0  # ids in the whole request
        self._place = ""  # of the assistant message; empty when the latest message is neither it nor an answer to it
        self._names: dict[str, str] = {}  # of the functions, by the calls' ids
        self._answers: dict[str, str] = {}  # the places of the answers, by the calls' ids

    def of(self, message: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
        """Return the calls that a message makes."""
        calls, legacy = (_given(message, key) for key in _CALLING)
        if calls and legacy:
            raise InvalidRequest(
                f"{place}.function_call is the old name of tool_calls, and both are given",
                param=f"{place}.function_call",
            )
        if legacy:
            function = _function(message["function_call"], f"{place}.function_call")
            return [_call(next(self._new_ids(set())), function)]
        return self._several(message["tool_calls"], f"{place}.tool_calls") if calls else []

    def ask(self, calls: Sequence[Mapping[str, Any]], place: str) -> None:
        """Take the calls of a message, from now on the only ones that can be answered."""
        self._place = place if calls else ""
        self._names = {call["id"]: call["function"]["name"] for call in calls}
        self._answers = {}

    def answered_by(self, message: Mapping[str, Any], role: str, place: str) -> dict[str, str]:
        """Return which call a message answers, as its ``tool_call_id`` and ``name``, and note that it is answered."""
        key = "name" if role == "function" else "tool_call_id"
        if not self._place:
            raise InvalidRequest(
                f"{place}.{key}: there is no call that this message could answer; it must follow the assistant message "
                "with the call, with only other tool messages between",
                param=f"{place}.{key}",
            )
        given = None if role == "function" else message.get("tool_call_id")
        answered = self._unanswered(message, role, place) if given in (None, "") else self._given_id(given, place)
        self._answers[answered] = place
        return {"tool_call_id": answered, "name": self._names[answered]}

    def _given_id(self, value: object, place: str) -> str:
        param = f"{place}.tool_call_id"
        given = text(value, param)
        if given not in self._names:
            raise InvalidRequest(f"{param}: no call in {self._place} has the id {shown(given)}", param=param)
        if given in self._answers:
            raise InvalidRequest(f"{param}: {self._answers[given]} answers the call {shown(given)}", param=param)
        return given

    def _unanswered(self, message: Mapping[str, Any], role: str, place: str) -> str:
        """Return the oldest call that has no answer yet, and of the name that the message gives, if it gives one."""
        wanted = message.get("name")
        if role == "function" or wanted is not None:
            wanted = text(wanted, f"{place}.name")
        for call, name in self._names.items():
            if call not in self._answers and wanted in (None, name):
                return call
        if wanted is None:
            param = f"{place}.tool_call_id"
            raise InvalidRequest(f"{param} is missing, and all calls in {self._place} have an answer", param=param)
        param = f"{place}.name"
        raise InvalidRequest(f"{param}: no call of {shown(wanted)} in {self._place} lacks an answer", param=param)

    def _several(self, values: object, place: str) -> list[dict[str, Any]]:
        if not isinstance(values, list):
            raise InvalidRequest(f"{place} must be a list", param=place)
        if len(values) > MAX_CALLS:
            raise InvalidRequest(f"{place} has {len(values)} calls; at most {MAX_CALLS} are taken", param=place)
        calls = [mapping(value, f"{place}[{j}]") for j, value in enumerate(values)]
        functions = [_called(call, f"{place}[{j}]") for j, call in enumerate(calls)]
        given = [_id(call, f"{place}[{j}].id") for j, call in enumerate(calls)]
        _refuse_repetition(given, place)
        new = self._new_ids(set(given))
        return [_call(each or next(new), function) for each, function in zip(given, functions, strict=True)]

    def _new_ids(self, taken: set[str]) -> Iterator[str]:
        """Make up ids. They have nine letters and digits, which Mistral's templates insist on."""
        while True:
            made_up = f"call{self._made_up:05}"
            self._made_up += 1
            if made_up not in taken:
                yield made_up


def _called(call: Mapping[str, Any], place: str) -> dict[str, Any]:
    kind = call.get("type")
    if kind is not None and kind != "function":
        text(kind, f"{place}.type")
        raise UnsupportedParameter(
            f"{place}.type: only calls of type 'function' are offered, not {shown(kind)}", param=f"{place}.type"
        )
    return _function(call.get("function"), f"{place}.function")


def _function(value: object, place: str) -> dict[str, Any]:
    function = mapping(value, place)
    name = function_name(function.get("name"), f"{place}.name")
    return {"name": name, "arguments": object_of(function.get("arguments"), f"{place}.arguments")}


def _id(call: Mapping[str, Any], place: str) -> str:
    """Return a call's id, which is empty when it has none."""
    return "" if call.get("id") is None else text(call["id"], place)


def _refuse_repetition(ids: Sequence[str], place: str) -> None:
    first: dict[str, int] = {}
    for j, each in enumerate(ids):
        if each and first.setdefault(each, j) != j:
            param = f"{place}[{j}].id"
            raise InvalidRequest(f"{param}: {place}[{first[each]}] has the id {shown(each)} already", param=param)


def _call(call_id: str, function: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": function}


def _join_leading_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return messages
    content = "\n".join(message["content"] for message in messages[:count])
    return [{**messages[0], "content": content}, *messages[count:]]
