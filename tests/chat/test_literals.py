"""Values as JSON, as Python and as Gemma writes them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat.literals import as_json, is_cut, is_word, json_object, literal
from llamaserve.chat.reading import Arguments, Incoming

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def _read(*pieces: str, raw: str = "") -> tuple[str, bool]:
    """Return what is read of a value in pieces, and whether it is complete."""
    text = Incoming()
    found: list[str] = []
    complete = False

    def run() -> Any:
        nonlocal complete
        complete = yield from literal(text, raw)

    reading = run()
    for piece in (*pieces, None):
        if piece is None:
            text.end()
        else:
            text.push(piece)
        for part in reading:
            if part is None:
                break
            assert isinstance(part, Arguments)
            found.append(part.text)
    return "".join(found), complete


@given(_VALUES, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_json_stays_as_it_is(value: Any, indent: int | str | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert as_json(text) == text
    assert _read(*text) == (text, True)


@given(_VALUES)
def test_python_becomes_json(value: Any) -> None:
    found = as_json(repr(value))
    assert found is not None
    assert json.loads(found) == value


@given(_VALUES, st.data())
def test_a_beginning_of_a_value_is_not_one(value: Any, data: st.DataObject) -> None:
    text = json.dumps([value])
    beginning = text[: data.draw(st.integers(0, len(text) - 1))]
    assert as_json(beginning) is None
    assert is_cut(beginning)
    assert not is_cut(text)


@given(st.text(alphabet="[]{}()\"'\\,:=trueNon01.-u \n") | st.text(), st.sampled_from(["", "<q>"]))
def test_whatever_is_read_is_json(text: str, raw: str) -> None:
    found, complete = _read(text, raw=raw)
    assert _read(*text, raw=raw) == (found, complete)
    if complete:
        json.loads(found)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{'a': True, \"b\": None}", {"a": True, "b": None}),
        ("(1, 2,)", [1, 2]),
        ("[]", []),
        ("{a: b, c-d: [e]}", {"a": "b", "c-d": ["e"]}),
        ("0x1F", 31),
        ("1_000", 1000),
        ("+1", 1),
        ("007", 7.0),
        (".5", 0.5),
        ("NaN", "NaN"),
        ("1e999", float("inf")),
        ("'it\\'s'", "it's"),
        ("'''a 'b'\n\"c\"'''", "a 'b'\n\"c\""),
        ("'\\x41\\u0042\\U00000043\\U0001F600'", "ABC😀"),
        ("'\\d\\xZ\\u12\\U00110000'", "\\d\\xZ\\u12\\U00110000"),
        ("'\\a\\\n\\0'", "\x07\x00"),
        ("'tab\there'", "tab\there"),
    ],
)
def test_what_can_only_be_meant_in_one_way(text: str, value: Any) -> None:
    found, complete = _read(*text)
    assert complete
    assert json.loads(found) == value


@pytest.mark.parametrize("text", ["", "[1 2]", "{1}", "{a 1}", "[}", ")", "[1", "'a", "f(1)", "[" * 65 + "]" * 65])
def test_what_is_no_value(text: str) -> None:
    assert as_json(text) is None


def test_a_lone_surrogate_is_never_made() -> None:
    found, complete = _read("'\\U0000D800'")
    assert complete
    found.encode()


def test_raw_texts() -> None:
    text = "{a:<q>\\n\"'<q>,<q>b c<q>:[<q><q>]}"
    found, complete = _read(*text, raw="<q>")
    assert complete
    assert json.loads(found) == {"a": "\\n\"'", "b c": [""]}


def test_endless_words_and_depths_are_no_values() -> None:
    assert not _read("1" * 5000)[1]
    assert not _read("[" * 5000)[1]
    assert _read("[" * 64 + "]" * 64)[1]


def test_an_object_must_be_one() -> None:
    for text, found in {'{"a": 1}': '{"a": 1}', "[1]": "", "": "", " {}": ""}.items():
        incoming = Incoming()
        incoming.push(text)
        incoming.end()
        assert "".join(part.text for part in json_object(incoming) if isinstance(part, Arguments)) == found


def test_words() -> None:
    assert is_word("größe-1.x")
    assert not any(map(is_word, ["", "a b", "a:b", "a,b", '"', "x" * 401]))
