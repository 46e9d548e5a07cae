"""An answer ends where its indentation falls back, however its text arrives."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from llamaserve.api.indentation import IndentLimit


def shown(pieces: list[str], least: int) -> tuple[str, bool]:
    limit = IndentLimit(least)
    text = "".join(limit.push(piece) for piece in pieces)
    return text + limit.finish() * (not limit.ended), limit.ended


@pytest.mark.parametrize(
    ("text", "least", "expected"),
    [
        ("a = 1\n    b = 2\nc = 3", 4, "a = 1\n    b = 2"),
        ("a = 1\n    b = 2\n   c = 3", 4, "a = 1\n    b = 2"),
        ("a = 1\n\n  \n    b = 2\n\n\nc", 4, "a = 1\n\n  \n    b = 2"),
        ("a\n\t\tb\n\tc", 2, "a\n\t\tb"),
        ("a\r\n    b\r\nc", 4, "a\r\n    b"),
        ("\nb", 1, ""),
        ("a\nb", 1, "a"),
    ],
)
def test_a_text_ends_before_a_line_that_is_indented_less(text: str, least: int, expected: str) -> None:
    assert shown([text], least) == (expected, True)


@pytest.mark.parametrize(
    ("text", "least"),
    [("a\nb\n\nc", 0), ("a", 9), ("a\n  b\n   c\n", 2), ("a\n\n\n", 4), ("    a\n        b\n    ", 4)],
)
def test_other_texts_stay_whole(text: str, least: int) -> None:
    assert shown([text], least) == (text, False)


@given(st.lists(st.text("ab \t\r\n", max_size=6), max_size=12), st.integers(0, 4))
def test_it_does_not_matter_how_the_text_is_cut(pieces: list[str], least: int) -> None:
    assert shown(pieces, least) == shown(["".join(pieces)], least)


@given(st.text("ab \t\n", max_size=40), st.integers(1, 4))
def test_what_is_shown_is_a_beginning_whose_lines_are_indented_enough(text: str, least: int) -> None:
    found, ended = shown([text], least)
    assert text.startswith(found)
    assert ended == (found != text)
    for line in found.split("\n")[1:]:
        assert not line.strip() or len(line) - len(line.lstrip()) >= least
