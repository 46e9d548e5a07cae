"""Answers in each of the formats, read whole, in pieces, and cut anywhere."""

from __future__ import annotations

import json
import random

import pytest
from golden import FORMATS, GOLDEN, read, reader

from llamaserve.chat.formats import known
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Content, Part

_GOLDEN = pytest.mark.parametrize(
    ("name", "text", "expected"), GOLDEN, ids=[f"{name}-{number}" for number, (name, _, _) in enumerate(GOLDEN)]
)


def _check_arguments(parts: list[Part]) -> None:
    """Make sure that calls have a beginning, and that the arguments of one that has an end are a JSON object."""
    text: str | None = None
    for part in parts:
        match part:
            case CallBegins():
                text = ""
            case Arguments():
                assert text is not None
                text += part.text
            case CallEnds():
                assert text is not None
                assert isinstance(json.loads(text), dict)
                text = None


def _content(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def _pieces_of_marker(name: str) -> list[str]:
    calls = known.by_name(name)
    marker = (calls.marker or "") if calls is not None else ">>>"
    return [marker[:end] for end in range(max(1, len(marker)))]


def test_there_is_an_answer_in_each_format() -> None:
    assert {name for name, _, _ in GOLDEN} == set(FORMATS)


@_GOLDEN
def test_an_answer_is_read(name: str, text: str, expected: list[Part]) -> None:
    found = read(name, text)
    assert found == expected
    _check_arguments(found)


@_GOLDEN
def test_pieces_make_no_difference(name: str, text: str, expected: list[Part]) -> None:
    assert read(name, *text) == expected
    for at in range(len(text)):
        assert read(name, text[:at], text[at:]) == expected


@_GOLDEN
@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut"])
def test_an_answer_may_stop_anywhere(name: str, text: str, expected: list[Part], cut: bool) -> None:
    chance = random.Random(text)
    for end in range(len(text)):
        found = read(name, text[:end], cut=cut)
        _check_arguments(found)
        assert read(name, *text[:end], cut=cut) == found
        at = chance.randint(0, end)
        assert read(name, text[:at], text[at:end], cut=cut) == found
        if cut:  # what may be the beginning of a call is no text then, if there is more of it than of a marker
            said = _content(found).rstrip()
            assert any(
                _content(expected).startswith(said.removesuffix(piece).rstrip()) for piece in _pieces_of_marker(name)
            )


@_GOLDEN
def test_text_comes_at_once(name: str, text: str, expected: list[Part]) -> None:
    """What is passed on when an answer has come to some place does not wait for its end."""
    answer = reader(name)
    parts = [part for letter in text for part in answer.push(letter)]
    if isinstance(expected[-1], CallEnds):
        assert expected.count(CallEnds()) == parts.count(CallEnds())
    before = sum(len(part.text) for part in parts if isinstance(part, Content | Arguments))
    assert before >= sum(len(part.text) for part in expected if isinstance(part, Content | Arguments)) - len(text) / 2


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_without_calls_comes_letter_by_letter(name: str) -> None:
    answer = reader(name)
    begin = ">>>all\n" if "3.2" in name else ""
    assert answer.push(f"{begin}A") == [Content("A")]
    assert answer.push("b") == [Content("b")]
    assert answer.push(" ") in ([], [Content(" ")])
    assert _content(answer.push("c")).strip() == "c"
    assert answer.finish() == []
