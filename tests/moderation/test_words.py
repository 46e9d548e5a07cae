"""How probable words are, from the probabilities of tokens of all kinds of tokenizers."""

from __future__ import annotations

from math import log

import pytest
from hypothesis import given, strategies as st

from llamaserve.engine.events import TokenLogprob
from llamaserve.errors import EngineError
from llamaserve.moderation.words import Words, next_tokens

VERDICT = Words(("safe", "unsafe"))
NUMBERS = Words(tuple(str(number) for number in range(1, 15)), stems=("1",))


def test_tokens_of_one_text_are_added_up() -> None:
    tokens = [TokenLogprob(1, b" yes", log(0.25)), TokenLogprob(2, b" yes", log(0.5)), TokenLogprob(3, b"\xe2", -9.0)]
    assert next_tokens(tokens) == pytest.approx({" yes": 0.75, "\ufffd": 0.0001234098})


@pytest.mark.parametrize(
    "token", ["unsafe", " unsafe", "Unsafe", "UNSAFE", "\n\nunsafe", "▁unsafe", "Ġunsafe", "ĊUnsafe"]
)
def test_white_space_and_case_do_not_count(token: str) -> None:
    assert VERDICT.shares([{token: 0.3, "safe": 0.1}]) == pytest.approx({"safe": 0.25, "unsafe": 0.75})


@pytest.mark.parametrize("token", ["uns", " un", "u", "unsaf", "unsafe\n", "unsafe<|eot_id|>", "unsafe,"])
def test_a_token_counts_for_the_word_that_it_begins_or_ends(token: str) -> None:
    assert VERDICT.shares([{token: 0.3, "safe": 0.3}]) == pytest.approx({"safe": 0.5, "unsafe": 0.5})


@pytest.mark.parametrize("token", ["", " ", "\n", "safely", "unsafety", "the", "<|eot_id|>", "x"])
def test_a_token_that_is_none_of_the_words_counts_for_nothing(token: str) -> None:
    assert VERDICT.shares([{token: 0.9, "safe": 0.02}]) == {"safe": 1.0, "unsafe": 0.0}


def test_a_word_of_several_tokens_is_added_up_from_all_its_beginnings() -> None:
    shares = VERDICT.shares([{"unsafe": 0.2, " unsafe": 0.1, "uns": 0.1, "safe": 0.1, "Safe": 0.1}])
    assert shares == pytest.approx({"safe": 1 / 3, "unsafe": 2 / 3})


def test_a_token_that_begins_two_words_counts_for_both_alike() -> None:
    shares = Words(("Sexual", "Suicide")).shares([{" S": 0.4, " Su": 0.1}])
    assert shares == pytest.approx({"Sexual": 0.4, "Suicide": 0.6})


def test_no_is_neither_not_nor_none() -> None:
    assert Words(("yes", "no")).shares([{"Not": 0.5, "None": 0.3, "No": 0.01, "Yes": 0.03}])["yes"] == pytest.approx(
        0.75
    )


def test_numbers_of_one_token_are_told_apart() -> None:
    """As in Llama 3's vocabulary, in which up to three digits are a token: behind "1" no other digit comes."""
    shares = NUMBERS.shares([{"1": 0.5, "10": 0.3, "11": 0.2}, {",": 0.6, "<|eot_id|>": 0.4}])
    assert (shares["1"], shares["10"], shares["11"], shares["2"]) == pytest.approx((0.5, 0.3, 0.2, 0.0))


def test_numbers_of_a_token_for_each_digit_are_told_apart_behind_the_first() -> None:
    shares = NUMBERS.shares([{"1": 0.8, "2": 0.2}, {"0": 0.5, "4": 0.25, ",": 0.125, "\n": 0.125}])
    found = {word: share for word, share in shares.items() if share}
    assert found == pytest.approx({"1": 0.2, "2": 0.2, "10": 0.4, "14": 0.2})


def test_a_digit_that_makes_no_number_counts_for_nothing() -> None:
    shares = NUMBERS.shares([{"1": 1.0}, {"9": 0.5, "3": 0.25, "": 0.2, ",": 0.05}])  # the empty one ends the answer
    assert (shares["13"], shares["1"]) == pytest.approx((0.5, 0.5))


def test_a_stem_is_told_apart_from_a_word_that_it_begins() -> None:
    words = Words(("Non-violent", "None"), stems=(" Non",))
    assert words.asked_behind == ("", " Non")
    shares = words.shares([{" None": 0.4, " Non": 0.4}, {"-v": 0.75, "e": 0.25}])
    assert shares == pytest.approx({"Non-violent": 0.375, "None": 0.625})


def test_a_model_that_says_none_of_the_words_is_an_error() -> None:
    with pytest.raises(EngineError, match="none of 'safe', 'unsafe'"):
        VERDICT.shares([{"Hello": 1.0, "unsafe": 0.0}])


tokens = st.dictionaries(
    st.one_of(st.text(max_size=6), st.from_regex(r"[ \n]?1?[0-9],?", fullmatch=True)), st.floats(0.0, 1.0), max_size=8
)


@given(tokens, tokens)
def test_shares_are_a_distribution_whatever_comes(first: dict[str, float], behind: dict[str, float]) -> None:
    try:
        shares = NUMBERS.shares([first, behind])
    except EngineError:
        return
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(0.0 <= share <= 1.0 for share in shares.values())
