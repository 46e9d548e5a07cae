"""What the benchmark asks: different for each round, the same in each run, of the size that is said."""

from __future__ import annotations

import ast

import pytest
from benchmark import texts


def words(text: str) -> int:
    return len(text.split())


def test_openings_differ_and_repeat() -> None:
    first, second = texts.stories("single/0", 8), texts.stories("single/1", 8)
    assert len(set(first + second)) == 16
    assert first == texts.stories("single/0", 8)


@pytest.mark.parametrize("tokens", [300, 1500, 4000])
def test_long_texts_have_their_length(tokens: int) -> None:
    first, second = (texts.manual(f"long/{number}", tokens, words) for number in range(2))
    assert 0.9 * tokens <= words(first) <= tokens
    assert first[:40] != second[:40]


def test_code_edits() -> None:
    edits = texts.code_edits()
    assert len(edits) >= 5
    assert len({edit.name for edit in edits}) == len(edits)
    for edit in edits:
        assert 60 <= len(edit.code.splitlines()) <= 100
        ast.parse(edit.wanted)
        changed = [a != b for a, b in zip(edit.code.splitlines(), edit.wanted.splitlines(), strict=True)]
        assert 1 <= sum(changed) <= 8
        assert edit.code in edit.prompt


def test_a_conversation_stays_with_its_subject() -> None:
    turns = texts.conversation("conversation/0", 6)
    assert len(set(turns)) == 6
    assert turns == texts.conversation("conversation/0", 6)
    assert len(set(texts.questions("shared/0", 8))) == 8
