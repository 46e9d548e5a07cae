"""The form that an answer must have, put together from what it may consist of: thoughts, text, tool calls, a body.

While text flows nothing is asked of it. From the moment a call begins, it is kept to the way the model writes calls and
to the tool's schema. Knows no family of models, and nothing of vocabularies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from llamaserve.chat.answer import ThinkingTags
from llamaserve.chat.formats.format import CallFormat, Rules
from llamaserve.chat.tools import Tool
from llamaserve.engine.params import Constraint

_LOOKING_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_SPACE = "SPACE: /[ \\n]{0,4}/"
# Keywords by which a schema says something of properties that it does not list
_OPEN = frozenset(
    ("additionalProperties", "patternProperties", "unevaluatedProperties", "minProperties", "propertyNames")
)
# Keywords that put objects together, and those of objects
_COMBINING = frozenset(("allOf", "not", "if", "dependentSchemas", "$dynamicRef", "$recursiveRef"))
_OF_OBJECTS = frozenset(("properties", "required"))


@dataclass(frozen=True)
class Thoughts:
    """What an answer may think first, or must, if the prompt has ``begun`` it."""

    tags: ThinkingTags
    begun: bool


@dataclass(frozen=True)
class Calls:
    """How calls are written, of what ``parts`` its rules are, and whether one must come."""

    format: CallFormat
    rules: Rules
    parts: Sequence[Constraint]
    forced: bool


def schema_of(tool: Tool) -> Constraint:
    """Return what the arguments of a tool must be."""
    return Constraint("json_schema", json.dumps(tool.parameters, ensure_ascii=False), f"{tool.place}.parameters")


def without_look_around(schema: Constraint) -> Constraint | None:
    """Return a schema without the patterns that look around, which no grammar can do; None if it has none of them."""
    if schema.kind != "json_schema":
        return None
    given = json.loads(schema.text)
    kept = _without_look_around(given)
    return None if kept == given else msgspec.structs.replace(schema, text=json.dumps(kept, ensure_ascii=False))


def _without_look_around(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_look_around(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_look_around(each)
        for key, each in value.items()
        if not (key == "pattern" and isinstance(each, str) and any(group in each for group in _LOOKING_AROUND))
    }


def closed(tool: Tool) -> Tool:
    """Return a tool that takes no other arguments than it lists, at any depth: a function would not know what to do
    with them. It stays as it is where its schema puts objects together from several schemas.
    """
    if _combines(tool.parameters):
        return tool
    return replace(tool, parameters=_closed(tool.parameters))


def _combines(value: Any) -> bool:
    """Say whether what one place of a schema lists may be what another one requires."""
    if isinstance(value, list):
        return any(map(_combines, value))
    if not isinstance(value, Mapping):
        return False
    several = any(keyword in value for keyword in ("anyOf", "oneOf", "$ref")) and _OF_OBJECTS & value.keys()
    return bool(several) or not _COMBINING.isdisjoint(value) or any(map(_combines, value.values()))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(inner := closed.get(keyword), Mapping):
            closed[keyword] = {name: _closed(each) for name, each in inner.items()}
    for keyword in ("anyOf", "oneOf", "prefixItems"):
        if isinstance(several := closed.get(keyword), list):
            closed[keyword] = [_closed(each) for each in several]
    if "items" in closed:
        closed["items"] = _closed(closed["items"])
    listed = closed.get("properties")
    if isinstance(listed, Mapping) and not _OPEN & closed.keys() and listed.keys() >= set(closed.get("required", ())):
        closed["additionalProperties"] = False
    return closed


def answer_form(thoughts: Thoughts | None, calls: Calls | None, body: Constraint | None) -> Constraint | None:
    """Return the form of an answer whose text, if it has any, must be a ``body``; None if it may be anything."""
    if calls is None and (body is None or thoughts is None):
        return body
    return _Form(thoughts, calls, body).constraint()


class _Form:
    def __init__(self, thoughts: Thoughts | None, calls: Calls | None, body: Constraint | None) -> None:
        self._thoughts = thoughts
        self._calls = calls
        self._body = body
        self._rules = calls.rules if calls is not None else Rules("")
        shown = calls.format.shown if calls is not None else ()
        tags = thoughts.tags if thoughts is not None else None
        own = (tags.end, tags.start, tags.answer) if tags is not None else ()
        self._markers = tuple(dict.fromkeys(filter(None, (*shown, *own))))

    def constraint(self) -> Constraint:
        """Put it together."""
        lines = ["start: " + " ".join([*self._thinking(), "answer"]), _SPACE, *self._answer(), self._rules.lark]
        parts = tuple(self._calls.parts) if self._calls is not None else ()
        if self._body is not None:
            parts = (*parts, self._body)
        param = self._body.param if self._body is not None else "tools"
        return Constraint("lark", "\n".join(lines), param, self._markers, parts)

    def _thinking(self) -> Iterator[str]:
        """Yield the rules of thoughts, and of what may be before the answer after them."""
        if self._thoughts is None:
            return
        tags = self._thoughts.tags
        rules = f"through{self._markers.index(tags.end)} SPACE"
        if tags.answer:
            rules = f"{rules} marker{self._markers.index(tags.answer)}?"
        yield rules if self._thoughts.begun else f"(marker{self._markers.index(tags.start)} {rules})?"

    def _answer(self) -> Iterator[str]:
        calls, body = self._calls, f"part{len(self._calls.parts) if self._calls is not None else 0}"
        if calls is None:
            yield f"answer: {body}"
        elif calls.forced:
            yield "answer: calls"
        elif self._body is not None:
            yield f"answer: {body} | calls"
        elif calls.format.marker is not None:
            yield "answer: TEXT | until0 rest"
        else:
            yield "answer: PLAIN | calls"
            yield f"PLAIN: TEXT & ~/{self._rules.plain}(?s:.*)/"
