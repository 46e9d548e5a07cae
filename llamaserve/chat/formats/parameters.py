"""What values the parameters of a tool may have, for formats that write each of them in a way of its own.

A format that writes texts without quotes has to know which parameters are texts, and which texts they may be. Where
that does not show at a glance, what a schema allows is left to llguidance, which knows it from JSON only. This module
knows nothing of any format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from llamaserve.chat.tools import Tool
from llamaserve.chat.values import shown
from llamaserve.engine.params import Constraint
from llamaserve.errors import InvalidRequest

_MAX_DEPTH = 8  # references inside what is referred to
_MAX_PARTS = 512
_MAX_TEXT = 4 * 1024 * 1024  # characters of all parts: definitions are in each one that refers to them

_ANY = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_TYPES = {**{name: frozenset({name}) for name in _ANY}, "number": frozenset({"number", "integer"})}
_DEFINITIONS = ("$defs", "definitions")
_NOTES = (
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    *_DEFINITIONS,
)
_SAY_MORE_OF_TEXTS = ("pattern", "format", "not", "if", "then", "else", "$dynamicRef", "$recursiveRef")

# What a schema of arguments may say of all of them. A format that writes one after the other can't keep to it.
_OF_ALL = (
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "$ref", "$dynamicRef", "$recursiveRef", "enum", "const"),
    *("minProperties", "maxProperties", "propertyNames", "patternProperties"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedProperties"),
)


@dataclass(frozen=True)
class Texts:
    """Which texts a value may be: those ``listed``; any, of ``shortest`` to ``longest`` characters; or, with
    ``hidden``, what only the schema knows.
    """

    listed: tuple[str, ...] | None = None
    shortest: int = 0
    longest: int | None = None
    hidden: bool = False


@dataclass(frozen=True)
class Values:
    """Of which JSON types a value may be, and which texts."""

    types: frozenset[str] = _ANY
    texts: Texts = field(default_factory=Texts)

    @property
    def plain(self) -> bool:
        """Whether it is a text, or null, and shows which: it can be written without quotes."""
        return "string" in self.types and self.types <= {"string", "null"} and not self.texts.hidden


@dataclass(frozen=True)
class Parameter:
    """One parameter of a tool. ``schema`` is all that its values must fit."""

    name: str
    schema: Mapping[str, Any]
    required: bool
    values: Values
    place: str


class Parameters:
    """The parameters of a tool."""

    def __init__(self, tool: Tool) -> None:
        self._tool = tool
        self._place = f"{tool.place}.parameters"
        self._schemas = Schemas(tool.parameters)
        self._properties: Mapping[str, Any] = tool.parameters.get("properties", {})
        self._others = tool.parameters.get("additionalProperties", True)

    def values(self, name: str) -> Values:
        """Return what values a parameter may have, even one that the schema does not name."""
        return self._schemas.values(self._properties.get(name, self._others))

    def listed(self, writable: Callable[[Parameter], bool]) -> list[Parameter]:
        """Return those that the schema names and that are ``writable`` in a format, in the schema's order. Raises
        ``InvalidRequest`` if one is not that must be, or if the tool is strict and the schema says more of them.
        """
        more = [key for key in _OF_ALL if key in self._tool.parameters]
        if more and self._tool.strict:
            raise InvalidRequest(
                f"{self._place}: {shown(more[0])} can't be enforced in the way this model writes calls",
                param=self._place,
            )
        found = []
        for parameter in self._all():
            if writable(parameter):
                found.append(parameter)
            elif parameter.required:
                raise InvalidRequest(
                    f"{self._place}: {shown(parameter.name)} is required, but this model's way to write calls has no "
                    "form for its name or for any of its values",
                    param=self._place,
                )
        return found

    def _all(self) -> Iterator[Parameter]:
        required = dict.fromkeys(self._tool.parameters.get("required", ()))
        for name in dict.fromkeys([*self._properties, *required]):
            schema = self._properties.get(name, self._others)
            values = self._schemas.values(schema)
            if schema is not False:
                whole = self._schemas.whole(schema)
                yield Parameter(name, whole, name in required, values, self._place)
            elif name in required:
                raise InvalidRequest(
                    f"{self._place}: {shown(name)} is required, but nothing may be its value", param=self._place
                )


class Schemas:
    """Looks at the schemas inside one schema."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: dict[str, Values | None] = {}  # what is referred to; None while it is looked at, or if too deep
        self._depth = 0

    def whole(self, schema: object) -> dict[str, Any]:
        """Return a schema by itself: with the definitions that it refers to."""
        if not isinstance(schema, Mapping):
            return {} if schema is not False else {"not": {}}
        found = dict(schema)
        if '"$ref"' in json.dumps(schema):
            found |= {key: self._root[key] for key in _DEFINITIONS if key in self._root}
        return found

    def resolved(self, schema: object) -> object:
        """Return what a schema refers to, if that is all it does."""
        for _ in range(len(_ANY)):
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                return schema
            if any(key not in _NOTES for key in schema if key != "$ref"):
                return schema
            schema = self._target(schema["$ref"])
        return schema

    def values(self, schema: object) -> Values:
        """Return what values fit a schema. What is not clear is not left out."""
        if not isinstance(schema, Mapping):
            return Values(frozenset() if schema is False else _ANY)
        found = [Values(_types(schema.get("type")), _texts(schema))]
        if isinstance(schema.get("enum"), list):
            found.append(_of(schema["enum"]))
        if "const" in schema:
            found.append(_of([schema["const"]]))
        if isinstance(schema.get("$ref"), str):
            found.append(self._referred(schema["$ref"]))
        if isinstance(schema.get("allOf"), list):
            found += map(self.values, schema["allOf"])
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                each = [self.values(one) for one in schema[key]]
                found.append(reduce(_either if key == "anyOf" else _exclusive, each))
        return reduce(_both, found)

    def _referred(self, pointer: str) -> Values:
        if pointer not in self._known:
            self._known[pointer] = None
            self._depth += 1
            if self._depth <= _MAX_DEPTH:
                self._known[pointer] = self.values(self._target(pointer))
            self._depth -= 1
        return self._known[pointer] or Values(texts=Texts(hidden=True))

    def _target(self, pointer: str) -> object:
        """Return the schema that a reference is to; true if it is not in here."""
        found: object = self._root
        if not pointer.startswith("#"):
            return True
        for key in filter(None, pointer[1:].split("/")):
            plain = key.replace("~1", "/").replace("~0", "~")
            found = found.get(plain, True) if isinstance(found, Mapping) else True
        return found


class Parts:
    """Collects the constraints that rules refer to; equal ones only once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._room = _MAX_TEXT
        self.constraints: list[Constraint] = []

    def rule(self, schema: Mapping[str, Any], param: str) -> str:
        """Return the rule of a value that fits a schema, written as JSON."""
        told = {key: value for key, value in schema.items() if key not in _NOTES or key in _DEFINITIONS}
        text = json.dumps(told, ensure_ascii=False)
        if text not in self._numbers:
            self._numbers[text] = len(self.constraints)
            self._room -= len(text)
            if len(self.constraints) == _MAX_PARTS or self._room < 0:
                raise InvalidRequest(f"{param}: the schemas up to this one are too many or too large", param=param)
            self.constraints.append(Constraint("json_schema", text, param))
        return f"part{self._numbers[text]}"


def only(schema: Mapping[str, Any], *keys: str) -> bool:
    """Say whether a schema says nothing that is not under some keys."""
    return all(key in keys or key in _NOTES for key in schema)


def _types(value: object) -> frozenset[str]:
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else None
    if names is None:
        return _ANY
    return frozenset().union(*(_TYPES.get(name, _ANY) if isinstance(name, str) else _ANY for name in names))


def _texts(schema: Mapping[str, Any]) -> Texts:
    """Return which texts fit what a schema says of texts."""
    shortest, longest = schema.get("minLength", 0), schema.get("maxLength")
    if any(key in schema for key in _SAY_MORE_OF_TEXTS) or not isinstance(shortest, int):
        return Texts(hidden=True)
    if longest is not None and not isinstance(longest, int):
        return Texts(hidden=True)
    return Texts(None, shortest, longest)


def _of(values: Sequence[object]) -> Values:
    """Return the values that are listed."""
    texts = tuple(dict.fromkeys(value for value in values if isinstance(value, str)))
    return Values(frozenset().union(*map(_type, values)), Texts(texts))


def _type(value: object) -> Iterable[str]:
    match value:
        case bool():
            return ("boolean",)
        case int() | float():
            return ("integer", "number")
        case None:
            return ("null",)
        case str():
            return ("string",)
        case list():
            return ("array",)
        case _:
            return ("object",)


def _both(first: Values, second: Values) -> Values:
    return Values(first.types & second.types, _texts_of_both(first.texts, second.texts))


def _texts_of_both(first: Texts, second: Texts) -> Texts:
    if first.hidden or second.hidden:
        return Texts(hidden=True)
    longest = min((each.longest for each in (first, second) if each.longest is not None), default=None)
    shortest = max(first.shortest, second.shortest)
    lists = [each.listed for each in (first, second) if each.listed is not None]
    if not lists:
        return Texts(None, shortest, longest)
    fitting = [text for text in lists[0] if shortest <= len(text) and (longest is None or len(text) <= longest)]
    return Texts(tuple(text for text in fitting if all(text in each for each in lists)))


def _either(first: Values, second: Values) -> Values:
    return Values(first.types | second.types, _texts_of_either(first, second))


def _texts_of_either(first: Values, second: Values) -> Texts:
    if "string" not in first.types:
        return second.texts
    if "string" not in second.types or first.texts == second.texts:
        return first.texts
    if Texts() in (first.texts, second.texts):
        return Texts()
    if first.texts.listed is None or second.texts.listed is None:
        return Texts(hidden=True)
    return Texts(tuple(dict.fromkeys((*first.texts.listed, *second.texts.listed))))


def _exclusive(first: Values, second: Values) -> Values:
    """Return what one of two allows, but not both."""
    if first.types & second.types:
        return Values(first.types | second.types, Texts(hidden=True))
    return _either(first, second)
