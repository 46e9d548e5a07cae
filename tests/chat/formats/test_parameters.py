"""What a schema says of values: of which types they may be, and which texts."""

from __future__ import annotations

import time
from typing import Any

import pytest

from llamaserve.chat.formats.parameters import Parts, Schemas, Texts, Values, only
from llamaserve.errors import InvalidRequest

_EVERY = Values()
_STRING, _NULL = frozenset({"string"}), frozenset({"null"})
_HIDDEN = Texts(hidden=True)
_DEFINITIONS = {
    "Kind": {"enum": ["a", "b"], "type": "string"},
    "Other": {"$ref": "#/$defs/Kind"},
    "Loop": {"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "null"}]},
    "a/b~c": {"type": "integer"},
}
_SCHEMAS = Schemas({"type": "object", "$defs": _DEFINITIONS})


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({}, _EVERY),
        (True, _EVERY),
        (False, Values(frozenset())),
        ({"description": "x", "type": "string"}, Values(_STRING)),
        ({"type": "number"}, Values(frozenset({"number", "integer"}))),
        ({"type": ["string", "null"]}, Values(_STRING | _NULL)),
        ({"type": "string", "pattern": "a"}, Values(_STRING, _HIDDEN)),
        ({"type": "string", "format": "date"}, Values(_STRING, _HIDDEN)),
        ({"type": "string", "minLength": 1, "maxLength": 3}, Values(_STRING, Texts(None, 1, 3))),
        ({"type": "string", "minLength": "x"}, Values(_STRING, _HIDDEN)),
        ({"enum": ["a", "a", None]}, Values(_STRING | _NULL, Texts(("a",)))),
        ({"enum": ["a", "bb"], "minLength": 2, "type": "string"}, Values(_STRING, Texts(("bb",)))),
        ({"const": True}, Values(frozenset({"boolean"}), Texts(()))),
        ({"enum": [1, 1.5, [], {}]}, Values(frozenset({"integer", "number", "array", "object"}), Texts(()))),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, Values(_STRING | _NULL)),
        ({"anyOf": [{"const": "a"}, {"const": "b"}]}, Values(_STRING, Texts(("a", "b")))),
        ({"anyOf": [{"const": "a"}, {"type": "string"}]}, Values(_STRING)),
        ({"anyOf": [{"const": "a"}, {"type": "string", "minLength": 2}]}, Values(_STRING, _HIDDEN)),
        ({"oneOf": [{"const": "a"}, {"type": "string"}]}, Values(_STRING, _HIDDEN)),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, Values(_STRING | _NULL)),
        ({"allOf": [{"type": ["string", "null"]}, {"enum": ["a", None, 1]}]}, Values(_STRING | _NULL, Texts(("a",)))),
        ({"$ref": "#/$defs/Kind"}, Values(_STRING, Texts(("a", "b")))),
        ({"$ref": "#/$defs/Other", "description": "x"}, Values(_STRING, Texts(("a", "b")))),
        ({"$ref": "#/$defs/a~1b~0c"}, Values(frozenset({"integer"}))),
        ({"$ref": "#/$defs/missing"}, _EVERY),
        ({"$ref": "https://example.org"}, _EVERY),
        ({"type": "text"}, _EVERY),
        ({"type": 1}, _EVERY),
    ],
)
def test_values(schema: Any, expected: Values) -> None:
    assert _SCHEMAS.values(schema) == expected


def test_what_refers_to_itself_is_left_to_who_knows_more() -> None:
    found = _SCHEMAS.values({"$ref": "#/$defs/Loop"})
    assert not found.plain
    assert found.types == _EVERY.types


def test_chains_and_trees_of_references_are_not_followed_for_long() -> None:
    chain: dict[str, Any] = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(20_000)}
    tree: dict[str, Any] = {f"t{i}": {"anyOf": [{"$ref": f"#/$defs/t{i + 1}"}] * 2} for i in range(100)}
    schemas = Schemas({"$defs": chain | tree})
    begun = time.perf_counter()
    assert schemas.values({"$ref": "#/$defs/d0"}).texts == _HIDDEN
    assert schemas.values({"$ref": "#/$defs/t0"}).types == _EVERY.types
    assert isinstance(schemas.resolved({"$ref": "#/$defs/d0"}), dict)
    assert time.perf_counter() - begun < 1


def test_a_schema_by_itself_has_the_definitions_it_needs() -> None:
    assert _SCHEMAS.whole({"type": "string"}) == {"type": "string"}
    assert _SCHEMAS.whole({"items": {"$ref": "#/$defs/Kind"}}) == {
        "items": {"$ref": "#/$defs/Kind"},
        "$defs": _DEFINITIONS,
    }
    assert _SCHEMAS.whole(True) == {}


def test_equal_parts_are_one() -> None:
    parts = Parts()
    assert parts.rule({"type": "integer", "description": "a"}, "x") == "part0"
    assert parts.rule({"type": "number"}, "x") == "part1"
    assert parts.rule({"type": "integer", "title": "b"}, "y") == "part0"
    assert [part.text for part in parts.constraints] == ['{"type": "integer"}', '{"type": "number"}']


def test_there_are_not_too_many_parts() -> None:
    parts = Parts()
    for number in range(512):
        parts.rule({"const": number}, "tools[0]")
    with pytest.raises(InvalidRequest) as refused:
        parts.rule({"const": 512}, "tools[0]")
    assert refused.value.param == "tools[0]"


def test_what_a_schema_says() -> None:
    assert only({"type": "array", "items": {}, "description": "x"}, "type", "items")
    assert not only({"type": "array", "minItems": 1}, "type", "items")
