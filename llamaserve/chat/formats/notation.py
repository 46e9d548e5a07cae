"""Rules of values that are written neither as JSON nor in tags: objects with commas, in which texts may have quotes of
their own.

The usual types are written as the model knows them, and every other schema as JSON, which the readers of these formats
take as well. Knows nothing of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamaserve.chat.formats.parameters import Parts, Schemas, only
from llamaserve.engine.lark import string

_DEPTH = 8  # values inside each other
_MAX_LINES = 2_000  # of one tool


@dataclass(frozen=True)
class Notation:
    """How values are written: the ``words`` for true, false and null, what stands between members, how the name of an
    object's member is written with what separates it from the value, and the number of the marker around texts, if they
    are written without escapes.
    """

    words: tuple[str, str, str]
    comma: str
    key: Callable[[str], str]
    quote: int | None = None
    quote_text: str = ""


JSON_WORDS = ("true", "false", "null")


class ValueRules:
    """Writes the rules of one tool's values."""

    def __init__(self, notation: Notation, name: str, schemas: Schemas, parts: Parts, place: str) -> None:
        self._notation = notation
        self._name = name
        self._schemas = schemas
        self._parts = parts
        self._place = place
        self._count = 0
        self.lines: list[str] = []

    def members(self, members: Sequence[tuple[str, str, bool]]) -> str:
        """Return the rule of members in their order: how each begins, the rule of its value, and whether it must be
        there.
        """
        name = self._new_name()
        count, comma = len(members), self._notation.comma
        for number, (begin, value, required) in enumerate(members):
            first = f"{string(begin)} {value} {name}_rest{number + 1}"
            other = "" if required else f" | {name}_first{number + 1}"
            self.lines.append(f"{name}_first{number}: {first}{other}")
            later = f"({string(comma + begin)} {value}){'' if required else '?'}"
            self.lines.append(f"{name}_rest{number}: {later} {name}_rest{number + 1}")
        self.lines += [f'{name}_first{count}: ""', f'{name}_rest{count}: ""']
        return f"{name}_first0"

    def value(self, schema: object, depth: int = 0) -> str:
        """Return the rule of a value that fits a schema."""
        schema = self._schemas.resolved(schema)
        return self._native(schema, depth) or self._parts.rule(self._schemas.whole(schema), self._place)

    def _native(self, schema: object, depth: int) -> str | None:
        """Return the rule of a value as the model knows it; None if it has to be JSON."""
        if not isinstance(schema, Mapping) or depth == _DEPTH or len(self.lines) > _MAX_LINES:
            return None
        values = self._schemas.values(schema)
        if values.plain and self._notation.quote is not None:
            return self._text(schema)
        if values.types <= {"boolean", "null"} and only(schema, "type", "anyOf") and values.types:
            true, false, null = map(string, self._notation.words)
            choices = [true, false] * ("boolean" in values.types) + [null] * ("null" in values.types)
            return f"({' | '.join(choices)})"
        if schema.get("type") == "array" and only(schema, "type", "items") and "items" in schema:
            return self._array(schema["items"], depth)
        if schema.get("type") == "object" and only(schema, "type", "properties", "required", "additionalProperties"):
            return self._object(schema, depth)
        return None

    def _text(self, schema: Mapping[str, Any]) -> str | None:
        values = self._schemas.values(schema)
        texts, quote = values.texts, self._notation.quote
        null = f" | {string(self._notation.words[2])}" if "null" in values.types else ""
        if texts.listed is not None:
            choices = [string(text) if text else '""' for text in texts.listed if self._notation.quote_text not in text]
            return f"(marker{quote} ({' | '.join(choices)}) marker{quote}{null})" if choices else None
        if texts.shortest or texts.longest is not None:
            return None
        return f"(marker{quote} through{quote}{null})"

    def _array(self, items: object, depth: int) -> str:
        name = self._new_name()
        item = self.value(items, depth + 1)
        self.lines.append(f'{name}: "[" ({item} ({string(self._notation.comma)} {item})*)? "]"')
        return name

    def _object(self, schema: Mapping[str, Any], depth: int) -> str | None:
        properties, required = schema.get("properties"), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(properties, Mapping) or not properties or not isinstance(required, list):
            return None
        if not isinstance(others, bool) or any(key not in properties for key in required):
            return None
        members = [
            (self._notation.key(key), self.value(value, depth + 1), key in required)
            for key, value in properties.items()
        ]
        name = self._new_name()
        self.lines.append(f'{name}: "{{" {self.members(members)} "}}"')
        return name

    def _new_name(self) -> str:
        self._count += 1
        return f"{self._name}_{self._count}"
