"""Text that comes in pieces."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat.reading import Content, Incoming, Reading


def _read(reading: Callable[[Incoming], Reading[Any]], *pieces: str) -> tuple[str, Any, str]:
    """Return the content that is read from pieces, what the reading returns, and what is left."""
    text = Incoming()
    found: list[str] = []
    result: list[Any] = []

    def run() -> Reading[None]:
        result.append((yield from reading(text)))

    parts = run()
    for piece in (*pieces, None):
        if piece is None:
            text.end()
        else:
            text.push(piece)
        for part in parts:
            if part is None:
                break
            assert isinstance(part, Content)
            found.append(part.text)
    left = "".join(part.text for part in text.up_to((), Content) if isinstance(part, Content))
    return "".join(found), result[0], left


_texts = st.text(alphabet="ab<>/ \n", max_size=20)
_words = st.lists(st.text(alphabet="ab<>", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@given(_texts, _words, st.booleans())
def test_a_text_up_to_a_word(text: str, words: tuple[str, ...], trim: bool) -> None:
    found, word, left = _read(lambda incoming: incoming.up_to(words, Content, trim=trim), *text)
    first = min((text.index(each), -len(each), each) for each in words if each in text) if word else None
    assert (first is None) == (not any(each in text for each in words))
    if first is None:
        assert (found, left) == (text, "")
    else:
        before = text[: first[0]]
        assert word == first[2]
        assert found == (before.rstrip() if trim else before)
        assert found + left == text


@given(_texts, _words)
def test_a_text_that_is_collected(text: str, words: tuple[str, ...]) -> None:
    _, found, left = _read(lambda incoming: incoming.collect(*words, limit=10), *text)
    ends = [at for each in words if (at := text.find(each)) >= 0 and at + len(each) <= 10]
    assert found == (text[: min(ends)] if ends else None)
    assert (found or "") + left == text


@pytest.mark.parametrize(
    ("text", "word"), [("abc", "abc"), ("ab", "ab"), ("abd", "ab"), ("b", None), ("", None), ("a", "a")]
)
def test_the_longest_word_is_taken(text: str, word: str | None) -> None:
    _, found, left = _read(lambda incoming: incoming.take("a", "ab", "abc"), *text)
    assert found == word
    assert (found or "") + left == text
    assert _read(lambda incoming: incoming.next_is("a", "ab", "abc"), *text) == ("", word, text)


def test_white_space_makes_no_difference_where_a_word_is_taken_loosely() -> None:
    for text in ('{"name": "', ' \n{ "name":"', '{\n"na me"\t:\n"'):
        assert _read(lambda incoming: incoming.take_loosely('{"name": "'), *text) == ("", True, "")
    assert _read(lambda incoming: incoming.attempt(incoming.take_loosely("ab")), " a c") == ("", False, " a c")


def test_an_attempt_that_fails_has_passed_nothing() -> None:
    def nested(text: Incoming) -> Reading[str | None]:
        yield from text.take("a")
        inner = yield from text.attempt(text.take("c"))
        assert inner is None
        yield from text.take("b")
        return None

    assert _read(lambda text: text.attempt(nested(text)), *"abd") == ("", None, "abd")
    assert _read(lambda text: text.attempt(text.take_loosely("ab")), *"abd") == ("", True, "d")


def test_what_closes_is_passed_as_far_as_it_is_there() -> None:
    for text, left in {"</a> b": " b", "</a": "", "": "", "</b>": "</b>", "}</a>": "}</a>"}.items():
        assert _read(lambda incoming: incoming.close(incoming.take_loosely("</a>")), *text)[2] == left


def test_letters() -> None:
    assert _read(lambda incoming: incoming.letter(), "ab") == ("", "a", "ab")
    assert _read(lambda incoming: incoming.letter()) == ("", "", "")
    text = Incoming()
    text.push("aab")
    assert text.run(re.compile("a+")) == "aa"
    assert text.run(re.compile("a+")) == ""
    assert not text.exhausted
    assert text.run(re.compile("b+")) == "b"
    assert text.exhausted


def test_the_end() -> None:
    assert _read(lambda incoming: incoming.at_end()) == ("", True, "")
    assert _read(lambda incoming: incoming.at_end(), "", "a") == ("", False, "a")
    assert _read(lambda incoming: incoming.whole(), *"ab") == ("", "ab", "ab")
    assert _read(lambda incoming: incoming.skip_space(), *" \n a") == ("", " \n ", "a")


def test_what_has_been_read_is_forgotten() -> None:
    text = Incoming()
    parts = text.up_to(("<end>",), Content)
    for _ in range(1000):
        text.push("x" * 100)
        assert next(parts) == Content("x" * 100)
        assert next(parts) is None
    assert len(text._text) <= 200
