"""OpenAI's categories, and scores in them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st
from openai.types.moderation import Categories, CategoryScores

from llamaserve.moderation.categories import CATEGORIES, PARENT, Scores

some_scores = st.builds(Scores.of, st.dictionaries(st.sampled_from(CATEGORIES), st.floats(0.0, 1.0)))


def test_the_categories_are_those_of_the_sdk_in_its_order() -> None:
    for answer in (Categories, CategoryScores):
        assert tuple(field.alias or name for name, field in answer.model_fields.items()) == CATEGORIES


def test_every_category_with_a_slash_has_a_parent_that_is_a_category() -> None:
    assert set(PARENT) == {name for name in CATEGORIES if "/" in name}
    assert set(PARENT.values()) <= set(CATEGORIES) - set(PARENT)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_a_score_is_a_number_from_0_to_1(value: float) -> None:
    with pytest.raises(ValueError, match="'hate' is not from 0 to 1"):
        Scores.of({"hate": value})


def test_scores_are_of_all_categories_and_no_others() -> None:
    with pytest.raises(ValueError, match="all 13 categories"):
        Scores({"hate": 0.5})
    with pytest.raises(ValueError, match="nothing else"):
        Scores.of({"spam": 0.5})


def test_merging_takes_the_highest_of_each() -> None:
    merged = Scores.merged(Scores.of({"hate": 0.2, "sexual": 0.9}), Scores.of({"hate": 0.4}))
    assert merged == Scores.of({"hate": 0.4, "sexual": 0.9})
    assert Scores.merged() == Scores.of({})


@given(some_scores, some_scores)
def test_merging_is_the_same_in_any_order_and_lowers_nothing(one: Scores, other: Scores) -> None:
    merged = Scores.merged(one, other)
    assert merged == Scores.merged(other, one)
    assert all(merged.values[name] >= one.values[name] for name in CATEGORIES)


@given(some_scores)
def test_a_parent_becomes_as_high_as_its_highest_child(scores: Scores) -> None:
    lifted = scores.with_parents()
    assert all(lifted.values[parent] >= lifted.values[child] for child, parent in PARENT.items())
    for name in CATEGORIES:
        family = [scores.values[name], *(scores.values[child] for child, parent in PARENT.items() if parent == name)]
        assert lifted.values[name] == max(family)


@given(some_scores, st.floats(0.0, 1.0))
def test_scaling_leaves_numbers_from_0_to_1(scores: Scores, factor: float) -> None:
    assert all(scores.scaled(factor).values[name] == scores.values[name] * factor for name in CATEGORIES)


def test_a_category_is_flagged_from_its_threshold_on() -> None:
    scores = Scores.of({"hate": 0.5, "sexual": 0.49, "violence": 0.3})
    assert [name for name, flag in scores.flags().items() if flag] == ["hate"]
    assert [name for name, flag in scores.flags({"violence": 0.3, "hate": 0.6}).items() if flag] == ["violence"]
    assert tuple(scores.flags()) == CATEGORIES
    assert scores.flagged()
    assert not scores.flagged({"hate": 0.6})
