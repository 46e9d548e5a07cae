"""Words and their parts in buckets."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from llamaserve.moderation.spelling import buckets, plain


@given(st.text(), st.integers(1, 5000))
def test_the_squares_add_up_to_one(text: str, count: int) -> None:
    found = buckets(text, count)
    assert all(0 <= place < count and value > 0 for place, value in found.items())
    assert sum(value * value for value in found.values()) == pytest.approx(1.0 if found else 0.0)


@pytest.mark.parametrize("text", ["", " \n", "...", "_ - ,"])
def test_nothing_is_known_of_a_text_without_words(text: str) -> None:
    assert buckets(text, 64) == {}


def test_case_and_white_space_do_not_count() -> None:
    assert buckets("Come  HERE,\nplease", 64) == buckets("come here please", 64)
    assert buckets("come here", 4096) != buckets("here come", 4096)


def test_words_that_are_alike_share_buckets() -> None:
    one, other, another = (set(buckets(text, 1 << 20)) for text in ("threatened", "threatening", "lemonade"))
    assert len(one & other) > 5
    assert not one & another


def test_the_buckets_are_the_same_in_every_process() -> None:
    places = [169, 220, 226, 306, 328, 423, 490, 526, 597, 726, 761, 779, 895, 907]
    assert list(buckets("a boat", 1000)) == places


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Kill the process.", "Kill the process."),
        ("\uff2b\uff49\uff4c\uff4c", "Kill"),  # full-width
        ("\U0001d40a\U0001d422\U0001d425\U0001d425", "Kill"),  # mathematical bold
        ("k\u200bi\u00adl\ufeffl", "kill"),
        ("k\u0336i\u0336l\u20ddl", "kill"),
        ("k\ufe0fi\u3164l\u2800l", "kill"),
        ("cafe\u0301", "caf\u00e9"),
        ("na\u00efve \ud55c\uad6d \u0915\u093f", "na\u00efve \ud55c\uad6d \u0915\u093f"),
        ("\u24c0ill \u32bf\uff01", "Kill 50\uff01"),  # circled; what ends sentences stays
        ("\ufdfa", "\ufdfa"),  # a sentence of eighteen letters
    ],
)
def test_letters_are_what_they_are_read_as(text: str, read: str) -> None:
    assert plain(text) == read


@given(st.text())
def test_usual_letters_stay_and_texts_hardly_grow(text: str) -> None:
    assert len(plain(text)) <= 3 * len(text)
    assert text.isascii() <= (plain(text) == text)
