"""Three hundred schemas that hypothesis makes up, answered by the starter model: each finished answer fits its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from running_engine import RunningEngine

from llamaserve.engine.llama import Model
from llamaserve.engine.params import Constraint, Generation, LoadParams, Sampling

_AT_ONCE = 8
_EXAMPLES = 40  # of so many schemas each
_TOKENS = 96

_names = st.sampled_from(["a", "name", "größe", "x y", 'q"q', "id", "back\\slash", "ключ", "z" * 20])
_words = st.sampled_from(["", "red", "blue", "two words", 'a"b', "né", "日本", "\n", "\\", "/", "1"])
_numbers = st.integers(-1000, 1000) | st.sampled_from([0.5, -2.25, 1e3, 0])
_patterns = st.sampled_from(
    ["^[a-z]{2,4}$", "^(yes|no)$", "^\\d{3}-\\d{2}$", "^A.*z$", '^[^"]{3}$', "x", "^$", "^[A-Z][a-z]+( [A-Z][a-z]+)?$"]
)
_formats = st.sampled_from(["date", "time", "date-time", "uuid", "ipv4", "email"])
_plain = st.recursive(
    st.none() | st.booleans() | _numbers | _words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_names, inner, max_size=2),
    max_leaves=3,
)


@st.composite
def _strings(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["length", "pattern", "format"]))
    if kind == "pattern":
        return {"type": "string", "pattern": draw(_patterns)}
    if kind == "format":
        return {"type": "string", "format": draw(_formats)}
    shortest = draw(st.integers(0, 4))
    return {"type": "string", "minLength": shortest, "maxLength": shortest + draw(st.integers(0, 8))}


@st.composite
def _amounts(draw: st.DrawFn) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": draw(st.sampled_from(["integer", "integer", "number"]))}
    low = draw(st.integers(-500, 500))
    high = low + draw(st.integers(2, 900))
    schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = low
    schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = high
    if schema["type"] == "integer" and high - low > 20 and draw(st.booleans()):
        schema["multipleOf"] = draw(st.integers(2, 9))
    return schema


_choices = st.lists(_plain, min_size=1, max_size=4).map(lambda values: {"enum": values})
_constants = _plain.map(lambda value: {"const": value})
_leaves = st.one_of(
    _strings(), _amounts(), _choices, _constants, st.sampled_from([{"type": "boolean"}, {"type": "null"}])
)


def _composed(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.one_of(_objects(inner), _objects(inner), _arrays(inner), _alternatives(inner), inner.map(_nullable))


@st.composite
def _objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(_names, inner, min_size=1, max_size=3))
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
    schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    if draw(st.integers(0, 3)) == 0:
        schema["additionalProperties"] = draw(inner)
    return schema


@st.composite
def _arrays(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    fewest = draw(st.integers(0, 2))
    schema: dict[str, Any] = {"type": "array", "items": draw(inner), "minItems": fewest}
    schema["maxItems"] = fewest + draw(st.integers(0, 2))
    if draw(st.integers(0, 3)) == 0:
        schema["prefixItems"] = draw(st.lists(inner, min_size=1, max_size=2))
        schema["maxItems"] += 2
    return schema


def _alternatives(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.lists(inner, min_size=1, max_size=3).map(lambda schemas: {"anyOf": schemas})


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _tree(leaf: dict[str, Any]) -> dict[str, Any]:
    """A schema that refers to itself."""
    children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}
    node = {"type": "object", "properties": {"value": leaf, "children": children}, "required": ["value"]}
    return {"$ref": "#/$defs/node", "$defs": {"node": {**node, "additionalProperties": False}}}


def _list(leaf: dict[str, Any]) -> dict[str, Any]:
    """Another one, through its root."""
    following = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    properties = {"head": leaf, "tail": following}
    return {"type": "object", "properties": properties, "required": ["head", "tail"], "additionalProperties": False}


def _shared(leaf: dict[str, Any]) -> dict[str, Any]:
    """One part used twice, under a name that has to be escaped."""
    properties = {"one": {"$ref": "#/$defs/a~1b%20c"}, "two": {"$ref": "#/$defs/a~1b%20c"}}
    schema = {"type": "object", "properties": properties, "required": ["one", "two"], "additionalProperties": False}
    return {**schema, "$defs": {"a/b c": leaf}}


def _both(leaf: dict[str, Any]) -> dict[str, Any]:
    """Two parts that hold at once."""
    first = {"type": "object", "properties": {"left": leaf}, "required": ["left"]}
    second = {"properties": {"right": {"type": "boolean"}}, "required": ["right"]}
    return {"allOf": [first, second], "type": "object", "properties": {"left": {}, "right": {}}}


_SCHEMAS = st.one_of(
    st.recursive(_leaves, _composed, max_leaves=5),
    _leaves.map(_tree),
    _leaves.map(_list),
    _leaves.map(_shared),
    _leaves.map(_both),
)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Counter[str]]:
    """How the answers ended. Many must be whole, or there was nothing to check."""
    counts: Counter[str] = Counter()
    yield counts
    assert counts.total() >= 300
    assert counts["stop"] > counts.total() // 2, counts


@pytest.fixture(scope="module")
def running(model: Model, load_params: LoadParams) -> Iterator[RunningEngine]:
    params = msgspec.structs.replace(load_params, parallel=_AT_ONCE, context=256, kv_cells=_AT_ONCE * 256)
    engine = RunningEngine(model, params)
    yield engine
    engine.close()


@given(schemas=st.lists(_SCHEMAS, min_size=_AT_ONCE, max_size=_AT_ONCE), seed=st.integers(0, 2**20))
@settings(
    max_examples=_EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@pytest.mark.timeout(600)
def test_every_finished_answer_fits_its_schema(
    running: RunningEngine, outcomes: Counter[str], schemas: list[dict[str, Any]], seed: int
) -> None:
    running.forget()
    for number, schema in enumerate(schemas):
        constraint = Constraint("json_schema", json.dumps(schema), "response_format")
        sampling = Sampling(seed=seed + number, temperature=[0.0, 0.7, 1.3][number % 3])
        generation = Generation(sampling=sampling, constraint=constraint, max_tokens=_TOKENS)
        running.engine.check(generation)
        running.submit(number, "As JSON: ", generation)
    running.run()
    for number, schema in enumerate(schemas):
        answer = running.answers[number, 0]
        assert answer.finished is not None
        outcomes[answer.finished.reason] += 1
        if answer.finished.reason == "stop":
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(answer.text))
        else:
            assert len(answer.tokens) == _TOKENS
