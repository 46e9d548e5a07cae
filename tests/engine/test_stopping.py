from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from llamaserve.engine.stopping import StopMatcher

# Few different characters, so that stop strings occur, overlap and begin inside each other.
_texts = st.text(alphabet="ab\n😀", max_size=40)
_stops = st.lists(st.text(alphabet="ab\n😀", min_size=1, max_size=5), max_size=4)


@st.composite
def _cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(_texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _first_complete(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Where the stop string that is complete first begins, and which it is: tried at every end, the longest first."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop), stop
    return None


def _longest_stop_beginning(text: str, stops: list[str]) -> str:
    """The longest end of the text with which a stop string begins."""
    for start in range(len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[start:]
    return ""


@given(_cut_texts(), _stops)
def test_any_cut_gives_the_text_before_the_stop_string_that_is_complete_first(
    cut: tuple[str, list[str]], stops: list[str]
) -> None:
    text, pieces = cut
    matcher = StopMatcher(stops)
    released = "".join(map(matcher.push, pieces)) + matcher.finish()
    found = _first_complete(text, stops)
    assert released == (text if found is None else text[: found[0]])
    assert matcher.matched == (None if found is None else found[1])


@given(_cut_texts(), _stops)
def test_only_the_possible_beginning_of_a_stop_string_is_held_back(
    cut: tuple[str, list[str]], stops: list[str]
) -> None:
    _, pieces = cut
    matcher = StopMatcher(stops)
    seen = released = ""
    for piece in pieces:
        released += matcher.push(piece)
        seen += piece
        if matcher.matched is not None:
            return
        assert released + _longest_stop_beginning(seen, stops) == seen
    assert released + matcher.finish() == seen


@given(_cut_texts(), _stops.filter(bool))
def test_nothing_follows_a_stop_string(cut: tuple[str, list[str]], stops: list[str]) -> None:
    _, pieces = cut
    matcher = StopMatcher(stops)
    matcher.push(stops[0])
    assert matcher.matched is not None
    assert "".join(map(matcher.push, pieces)) == ""
    assert matcher.finish() == ""


def test_without_stop_strings_text_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert [matcher.push("a"), matcher.push(""), matcher.push("b"), matcher.finish()] == ["a", "", "b", ""]


def test_of_stop_strings_that_end_together_the_longest_wins() -> None:
    matcher = StopMatcher(["b", "ab"])
    assert matcher.push("xa") == "x"
    assert matcher.push("b") == ""
    assert matcher.matched == "ab"


def test_a_stop_string_inside_a_longer_one_is_found_first() -> None:
    matcher = StopMatcher(["abcd", "bc"])
    assert matcher.push("abcd") == "a"
    assert matcher.matched == "bc"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["a", ""])
