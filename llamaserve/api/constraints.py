"""The request fields that say what form an answer must have: OpenAI's ``response_format`` and what others call it.

At most one of them may be in use. What a grammar or a schema means is the engine's business.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, WithJsonSchema

from llamaserve.api.chat_schemas import RESPONSE_FORMAT
from llamaserve.api.fields import RequestFields, Text, check_text
from llamaserve.engine.params import Constraint
from llamaserve.errors import InvalidRequest

_MAX_TEXT = 256 * 1024  # characters of a schema, grammar or pattern
_ANY_OBJECT = {"type": "object"}


class StructuredOutputs(BaseModel):
    """vLLM's name for all of them in one."""

    model_config = ConfigDict(extra="forbid")

    json_schema: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class ConstraintOptions(RequestFields):
    """What form the answer must have."""

    response_format: Annotated[dict[str, Any] | None, WithJsonSchema(RESPONSE_FORMAT)] = Field(
        None, description="text, json_object or json_schema, as OpenAI has it; the schema also beside the type."
    )
    json_schema: dict[str, Any] | bool | str | None = Field(
        None,
        validation_alias=AliasChoices("json_schema", "guided_json"),
        description="The answer is JSON that fits this schema.",
    )
    grammar: Text | None = Field(
        None,
        validation_alias=AliasChoices("grammar", "grammar_string", "guided_grammar"),
        description="The answer is a sentence of this GBNF grammar.",
    )
    regex: Text | None = Field(
        None,
        validation_alias=AliasChoices("regex", "guided_regex"),
        description="The whole answer matches this regular expression.",
    )
    guided_choice: list[Text] | None = Field(None, max_length=65536, description="The answer is one of these texts.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's form of these.")

    def constraint(self) -> Constraint | None:
        """Return what the answer must be; None for any text. Raises ``InvalidRequest``."""
        found = [(name, constraint) for name, constraint in self._constraints() if constraint is not None]
        if len(found) > 1:
            names = " and ".join(name for name, _ in found[:2])
            raise InvalidRequest(f"{names} can't be combined: an answer can have one form", param=found[1][0])
        for name, constraint in found:
            if len(constraint.text) > _MAX_TEXT:
                raise InvalidRequest(
                    f"{name} has {len(constraint.text)} characters; at most {_MAX_TEXT} are taken", param=name
                )
            return constraint
        return None

    def _constraints(self) -> Iterator[tuple[str, Constraint | None]]:
        called = self.called
        yield "response_format", _response_format(self.response_format)
        yield called("json_schema"), _schema(called("json_schema"), self.json_schema)
        yield called("grammar"), _text(called("grammar"), "grammar", self.grammar)
        yield called("regex"), _text(called("regex"), "regex", self.regex)
        yield "guided_choice", _choice("guided_choice", self.guided_choice)
        if (given := self.structured_outputs) is not None:
            name = "structured_outputs"
            yield name, _schema(name, given.json_schema)
            yield name, _text(name, "regex", given.regex)
            yield name, _choice(name, given.choice)
            yield name, _text(name, "grammar", given.grammar)
            yield name, _schema(name, _ANY_OBJECT) if given.json_object else None


def _response_format(value: Mapping[str, Any] | None) -> Constraint | None:
    name = "response_format"
    match value:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return _schema_or_object(name, value)
        case {"type": "json_schema", "json_schema": dict(inner)}:
            return _schema_or_object(name, inner)
        case {"type": "json_schema", "schema": _}:
            return _schema_or_object(name, value)
        case {"type": "json_schema"}:
            raise InvalidRequest(f"{name}: there is no json_schema in it", param=name)
        case {"type": "grammar", "grammar": str(text)} if text:
            return _text(name, "grammar", text)
        case {"type": "regex", "pattern": str(text)} if text:
            return _text(name, "regex", text)
    raise InvalidRequest(
        f"{name}: the type must be text, json_object, json_schema, grammar (with grammar) or regex (with pattern)",
        param=name,
    )


def _schema_or_object(name: str, where: Mapping[str, Any]) -> Constraint | None:
    schema = where.get("schema")
    return _schema(name, _ANY_OBJECT if schema is None or schema == "" else schema)


def _schema(name: str, schema: Any) -> Constraint | None:
    if schema is None or schema == "":
        return None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{name}: the schema is no JSON: {error}", param=name) from error
    if not isinstance(schema, dict | bool):
        raise InvalidRequest(f"{name}: a schema must be an object, or true or false", param=name)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError) as error:  # also half of a surrogate pair
        raise InvalidRequest(f"{name}: the schema can't be written as JSON: {error}", param=name) from error
    return Constraint("json_schema", text, name)


def _text(name: str, kind: Any, text: str | None) -> Constraint | None:
    if not text:
        return None
    try:
        check_text(text)
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from error
    return Constraint(kind, text, name)


def _choice(name: str, choices: list[str] | None) -> Constraint | None:
    if choices is None:
        return None
    if not choices or "" in choices:
        raise InvalidRequest(f"{name}: there must be texts to choose from, and none of them empty", param=name)
    return Constraint("choice", json.dumps(choices, ensure_ascii=False), name)
