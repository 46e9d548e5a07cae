"""JSON schemas of a chat request's fields that other modules check by hand, for the OpenAPI document.

``chat/messages.py``, ``chat/tools.py`` and ``constraints.py`` say what is taken; these say it to programs. They leave
out what a schema can't say, such as that a call must come before its answer.
"""

from __future__ import annotations

from typing import Any, Final

from llamaserve.chat.messages import MAX_CALLS, MAX_MESSAGES, ROLES, TEXT_PARTS
from llamaserve.chat.tools import MAX_DESCRIPTION, MAX_TOOLS
from llamaserve.chat.values import MAX_NAME

Schema = dict[str, Any]

_NULL: Final[Schema] = {"type": "null"}
_TEXT: Final[Schema] = {"type": "string"}
_ANY_OBJECT: Final[Schema] = {"type": "object"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _object(required: tuple[str, ...], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


_NAME: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": MAX_NAME, "pattern": "^[A-Za-z0-9_.:/-]+$"}
_FUNCTION_NAME: Final = _NAME | {
    "description": "Letters of any language may be in it, too, but neither white space nor quotes nor brackets."
}
_ARGUMENTS: Final[Schema] = {"anyOf": [_TEXT, _ANY_OBJECT], "description": "A JSON object, or its text."}
_CALLED: Final = _object(("name", "arguments"), name=_FUNCTION_NAME, arguments=_ARGUMENTS)
_CALL: Final = _object(("function",), id=_or_null(_TEXT), type={"const": "function"}, function=_CALLED)
_TEXT_PART: Final = _object(("type", "text"), type={"enum": [*TEXT_PARTS]}, text=_TEXT)
_REFUSAL_PART: Final = _object(("type", "refusal"), type={"const": "refusal"}, refusal=_TEXT)
_CONTENT: Final[Schema] = {"anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT_PART, _TEXT]}}, _NULL]}
_SAID: Final[Schema] = {
    "anyOf": [_TEXT, {"type": "array", "items": {"anyOf": [_TEXT_PART, _REFUSAL_PART, _TEXT]}}, _NULL]
}
_OTHERS: Final = _object(
    ("role", "content"),
    role={"enum": [role for role in ROLES if role not in ("assistant", "tool", "function")]},
    content=_CONTENT,
    name=_or_null(_TEXT),
)
_ASSISTANT: Final = _object(
    ("role", "content"),
    role={"const": "assistant"},
    content=_SAID | {"description": "It may be left out beside calls, thoughts and a refusal."},
    name=_or_null(_TEXT),
    refusal=_or_null(_TEXT),
    reasoning_content=_or_null(_TEXT | {"description": "Its thoughts; also called reasoning."}),
    tool_calls=_or_null({"type": "array", "items": _CALL, "maxItems": MAX_CALLS}),
    function_call=_or_null(_CALLED | {"description": "Older form of a single call."}),
)
_ANSWERING: Final = _object(
    ("role", "content"),
    role={"enum": ["tool", "function"]},
    content=_CONTENT,
    tool_call_id=_or_null(_TEXT | {"description": "Which call of the assistant's message before it this answers."}),
    name=_or_null(_TEXT),
)
MESSAGES: Final[Schema] = {
    "type": "array",
    "items": {"anyOf": [_OTHERS, _ASSISTANT, _ANSWERING]},
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
}

_FUNCTION: Final = _object(
    ("name",),
    name=_FUNCTION_NAME,
    description=_or_null(_TEXT | {"maxLength": MAX_DESCRIPTION}),
    parameters=_or_null(_object((), type={"const": "object"}) | {"description": "A JSON schema of the arguments."}),
    strict=_or_null({"type": "boolean"}),
)
_TOOL: Final = _object(("type", "function"), type={"const": "function"}, function=_FUNCTION)
TOOLS: Final = _or_null({"type": "array", "items": _TOOL, "maxItems": MAX_TOOLS})
FUNCTIONS: Final = _or_null({"type": "array", "items": _FUNCTION, "maxItems": MAX_TOOLS})

_CHOSEN: Final = _object(
    ("type", "function"), type={"const": "function"}, function=_object(("name",), name=_FUNCTION_NAME)
)
_ALLOWED: Final = _object(
    ("type", "allowed_tools"),
    type={"const": "allowed_tools"},
    allowed_tools=_object(
        ("mode", "tools"),
        mode={"enum": ["auto", "required"]},
        tools={"type": "array", "items": _CHOSEN, "minItems": 1, "maxItems": MAX_TOOLS},
    ),
)
TOOL_CHOICE: Final[Schema] = {
    "anyOf": [{"enum": ["auto", "none", "required", "any"]}, _CHOSEN, _ALLOWED, _NULL],
}
FUNCTION_CALL: Final[Schema] = {
    "anyOf": [{"enum": ["auto", "none"]}, _object(("name",), name=_FUNCTION_NAME), _NULL],
}

_SCHEMA: Final[Schema] = {"anyOf": [_ANY_OBJECT, {"type": "boolean"}, _TEXT, _NULL]}
RESPONSE_FORMAT: Final[Schema] = {
    "anyOf": [
        _object(("type",), type={"const": "text"}),
        _object(("type",), type={"const": "json_object"}, schema=_SCHEMA),
        _object(("type", "json_schema"), type={"const": "json_schema"}, json_schema=_object((), schema=_SCHEMA)),
        _object(("type", "schema"), type={"const": "json_schema"}, schema=_SCHEMA),
        _object(("type", "grammar"), type={"const": "grammar"}, grammar=_TEXT | {"minLength": 1}),
        _object(("type", "pattern"), type={"const": "regex"}, pattern=_TEXT | {"minLength": 1}),
        _NULL,
    ]
}
