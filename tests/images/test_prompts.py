"""What stable-diffusion.cpp makes of prompts, without it."""

from __future__ import annotations

import pytest

from llamaserve.images.prompts import MOST_BREAKS, breaks, checked_prompt


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("", 0),
        ("a lighthouse, BRE AK, break", 0),
        ("a BREAK b BREAK c", 2),
        ("(B(REAK:1):-1) a", 1),  # which the library puts together again, with the weight of a break
        ("([B]REAK:0.5) B:1)REAK", 2),
        ("(BRE)AK" * 3, 3),
        (r"B\(REAK B\\REAK", 0),
    ],
)
def test_breaks_are_counted_however_brackets_cut_them(prompt: str, count: int) -> None:
    assert breaks(prompt) == count


@pytest.mark.parametrize("letter", ["\U000e0067", "\U0010ffff", "\U00040000"])
def test_characters_at_which_the_library_dies_are_refused(letter: str) -> None:
    with pytest.raises(ValueError, match=f"such as U\\+{ord(letter):X}"):
        checked_prompt(f"the flag of England {letter}")
    assert checked_prompt("\U0003ffff 🏴 鿿 𰀀")


@pytest.mark.parametrize("word", ["BREAK ", "(B(REAK:1):-1)a", "B[REAK]", "BREA:2)K"])
def test_there_may_be_so_many_breaks(word: str) -> None:
    assert checked_prompt(MOST_BREAKS * word) == MOST_BREAKS * word
    with pytest.raises(ValueError, match=f"BREAK {MOST_BREAKS + 1} times"):
        checked_prompt((MOST_BREAKS + 1) * word)
