"""Texts, JSON values and names, checked; what messages and tools make of them is tested there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat.values import MAX_DEPTH, object_of, shown, written
from llamaserve.errors import InvalidRequest

INTEGERS = st.integers(-(2**63), 2**64 - 1) | st.just(2**64)
# With all that JSON or msgpack do not have.
ANYTHING = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=4)
    ),
)


def can_be_written(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        return False
    return "18446744073709551616" not in json.dumps(value)


def is_taken(value: Any) -> bool:
    try:
        return written(value, "x") == json.dumps(value, ensure_ascii=False)
    except InvalidRequest as error:
        return error.param != "x"


@given(ANYTHING)
def test_what_can_be_written_as_json_is_taken(value: Any) -> None:
    assert is_taken(value) == can_be_written(value)


@given(ANYTHING)
def test_an_object_is_the_same_as_its_text(value: Any) -> None:
    outcomes = []
    for given_as in (value, json.dumps(value)):
        try:
            outcomes.append(object_of(given_as, "x"))
        except InvalidRequest:
            outcomes.append({"refused": True})
    if not isinstance(value, str | None):
        assert outcomes[0] == outcomes[1]


def test_the_limit_of_nesting_is_exact() -> None:
    value: Any = "leaf"
    for _ in range(MAX_DEPTH):
        value = [value]
    written(value, "x")
    with pytest.raises(InvalidRequest, match="x nests more than 64 deep"):
        written({"a": value}, "x")


def test_values_are_shown_short_and_in_ascii() -> None:
    assert shown("ä") == "'\\xe4'"
    assert shown("x" * 38) == f"'{'x' * 38}'"
    for long in ("ä" * 999, "x" * 39, "x" * 41, 10**100):
        assert len(shown(long)) == 40
        assert shown(long).endswith(" ...")
    assert [shown(value) for value in (None, True, 1.5, [1], {"a": 1})] == [
        "None",
        "True",
        "1.5",
        "a list",
        "an object",
    ]


def test_deep_values_are_shown() -> None:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    assert shown(value) == "a list"
