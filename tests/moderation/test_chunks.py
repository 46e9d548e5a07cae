"""Chunks: nothing of a text is lost, none is too long, and sentences stay whole where they can."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from llamaserve.moderation.chunks import LONGEST, chunks

WORDS = "The harbour was quiet, and nobody saw the small grey boat come in behind the ferry."
texts = st.one_of(
    st.text(),
    st.text("ab .!?\n\u3002\u00e9\u0301\u200d\U0001f468", max_size=2000),
    st.lists(st.sampled_from([WORDS, "Yes.", "No!", "\n", "x" * 150, "\u5b57" * 90]), max_size=30).map(" ".join),
)


def bare(text: str) -> str:
    return "".join(text.split())


def test_a_sentence_is_one_chunk() -> None:
    assert chunks(WORDS) == [WORDS]
    assert chunks(f"  {WORDS}\n") == [WORDS]


@pytest.mark.parametrize("text", ["", " ", "\n\n\t", "\u2003" * 500])
def test_there_are_no_chunks_of_nothing(text: str) -> None:
    assert chunks(text) == []


def test_short_sentences_share_a_chunk_and_long_ones_do_not() -> None:
    assert chunks("Come here. Sit down! Are you cold?") == ["Come here. Sit down! Are you cold?"]
    assert chunks(f"{WORDS} {WORDS}") == [WORDS, WORDS]


def test_chunks_overlap_by_a_sentence() -> None:
    sentences = [f"This is the sentence with the number {number} in it." for number in range(5)]
    found = chunks(" ".join(sentences))
    assert found == [f"{one} {other}" for one, other in pairwise(sentences)]


@pytest.mark.parametrize("end", [". ", "! ", "?! ", "\u2026 ", '." ', "\u3002", "\uff01\u300d", "\n", "\r\n", "\u2029"])
def test_sentences_end_in_many_ways(end: str) -> None:
    long = "X" + "y" * (LONGEST // 2 + 10)
    assert [piece[:1] for piece in chunks(f"{long}{end}{long}")] == ["X", "X"]


def test_a_dot_within_a_sentence_does_not_end_it() -> None:
    text = "It costs 3.5 million, i.e. more than e.g. a house by the lake would, as the newspaper wrote last week."
    assert chunks(text) == [text]


def test_what_is_too_long_is_cut_between_words() -> None:
    text = " ".join(["wordword"] * 60)
    found = chunks(text)
    assert set(" ".join(found).split()) == {"wordword"}
    assert bare("".join(found)) == bare(text)


@pytest.mark.parametrize("unit", ["e\u0301", "\U0001f469\u200d\U0001f680", "\U0001f44d\U0001f3fd", "\u0915\u093f"])
def test_what_is_written_without_spaces_is_not_cut_within_a_character(unit: str) -> None:
    for shift in range(4):
        found = chunks("a" * shift + unit * 200)
        assert "".join(found) == "a" * shift + unit * 200
        assert all(piece.startswith(("a", unit[0])) and piece.endswith(unit[-1]) for piece in found)


def test_flags_are_not_cut_in_two() -> None:
    found = chunks("\U0001f1e9\U0001f1ea" * 200)
    assert "".join(found) == "\U0001f1e9\U0001f1ea" * 200
    assert {len(piece) % 2 for piece in found} == {0}


def test_accents_without_end_are_cut_all_the_same() -> None:
    found = chunks("e" + "\u0301" * 10_000)
    assert max(map(len, found)) <= LONGEST
    assert sum(map(len, found)) == 10_001


@given(texts)
def test_no_chunk_is_empty_or_too_long_or_has_anything_of_its_own(text: str) -> None:
    found = chunks(text)
    assert all(0 < len(piece) <= LONGEST and piece == piece.strip() for piece in found)
    everything = bare(text)
    assert all(bare(piece) in everything for piece in found)
    assert everything.startswith(bare("".join(found[:1])))
    assert everything.endswith(bare("".join(found[-1:])))


@given(st.lists(st.sampled_from([" ", ", ", ". ", "? ", ".", "\u3002", "\n", "  "]), max_size=300))
def test_nothing_is_lost_and_all_is_in_order(gaps: list[str]) -> None:
    text = "".join(f"Word{number:03}{gap}" for number, gap in enumerate(gaps))
    seen = [[int(number) for number in re.findall(r"\d{3}", piece)] for piece in chunks(text)]
    assert all(one[0] < other[0] <= one[-1] + 1 for one, other in pairwise(seen))
    assert {number for piece in seen for number in piece} == set(range(len(gaps)))


@given(texts)
def test_there_are_not_many_more_chunks_than_the_length_asks_for(text: str) -> None:
    assert len(chunks(text)) <= len(text) // (LONGEST // 4) + 1


@pytest.mark.parametrize(
    "unit", ["a", " ", ".", ". ", "a. ", '."', ' ."', "\n", "a \n", "\u0301", "\u3002", "!\u300d", "A.\u2003"]
)
def test_a_million_characters_take_no_longer_than_they_should(unit: str) -> None:
    text = (unit * 1_000_000)[:1_000_000]
    start = time.process_time()
    found = chunks(text)
    assert time.process_time() - start < 5
    assert len(found) < 20_000
