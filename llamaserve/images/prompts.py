"""Prompts as stable-diffusion.cpp reads them: how brackets stress words, which prompts it can't take, and where a new
part begins.

(a) stresses words by 1.1, [a] by 1/1.1, and (a:1.3) as it says; BREAK begins a new part. Source: the library's
parse_prompt_attention.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Final

MOST_BYTES: Final = 4096  # language models take time and memory for the square of it
MOST_BREAKS: Final = 16

_LEAST_WEIGHT, _LARGEST_WEIGHT = 0.001, 100.0

_ZERO: Final = re.compile(r"[+-]?[0.]+")  # and not what is only too small for a number
_NEAR: Final = 1e-6  # by which logarithms are rounded, at most
# Of others the library asks C's isspace, whose table ends with the last byte; glibc's is read beyond its end, and far
# beyond it the process dies. Everything that can be written is below, but for the flags of parts of countries.
_BEYOND: Final = re.compile("[\U00040000-\U0010ffff]")
_BRACKETS: Final = {"(": 1.1, "[": 1 / 1.1}
_BRACKET: Final = re.compile(r"\\[()\[\]\\]|([(\[])|:([+-]?[.\d]+)\)|([)\]])", re.ASCII)  # or one that is a letter
_WEIGHT: Final = re.compile(r":([+-]?[.\d]+)\)", re.ASCII)  # as in (word:1.3); the library ends its process over others


def checked_prompt(text: str) -> str:
    """Return a prompt. Raises ``ValueError`` for what the library can't take."""
    if "\0" in text:
        raise ValueError("must not contain the character U+0000")
    if found := _BEYOND.search(text):
        raise ValueError(f"must not contain characters over U+3FFFF, such as U+{ord(found[0]):X}")
    if (size := len(text.encode())) > MOST_BYTES:
        raise ValueError(f"has {size} bytes in UTF-8; {MOST_BYTES} are the most")
    if (count := breaks(text)) > MOST_BREAKS:
        raise ValueError(f"has the word BREAK {count} times; {MOST_BREAKS} are the most, since each begins a new part")
    for found in _WEIGHT.finditer(text, text.find("(")) if "(" in text else ():
        if not _is_weight(found[1]):
            raise ValueError(
                f"has the weight {found[1][:40]!r} for a word in brackets; it must be 0, or from {_LEAST_WEIGHT} to "
                f"{_LARGEST_WEIGHT:g}"
            )
    if not _is_bearable(text):
        raise ValueError(
            f"has words whose weight, for all the brackets around them, is not from {_LEAST_WEIGHT} to "
            f"{_LARGEST_WEIGHT:g}"
        )
    return text


def breaks(text: str) -> int:
    """Return how many times a prompt may begin a new part. The library puts text together again that brackets have cut,
    so they may stand within the word, too.
    """
    return _BRACKET.sub(_letter, text).count("BREAK")


def _letter(found: re.Match[str]) -> str:
    """Return what is left of a bracket as a part of the text."""
    return "" if any(found.groups()) else found[0]


def _is_bearable(text: str) -> bool:
    """Whether no words are stressed too much or too little by all the brackets around them."""
    opened: dict[str, list[int]] = {"(": [], "[": []}
    changes: list[tuple[int, float]] = []  # of the weight's logarithm, by place
    for found in _BRACKET.finditer(text):
        opening, weight, closing = found.groups()
        kind = "[" if closing == "]" else "("
        if opening:
            opened[opening].append(found.start())
        elif (weight or closing) and opened[kind]:
            factor = abs(float(weight)) if weight else _BRACKETS[kind]
            logarithm = math.log(factor) if factor else 0.0
            changes += [(opened[kind].pop(), logarithm), (found.start(), -logarithm)]
    changes += [(place, math.log(_BRACKETS[kind])) for kind, places in opened.items() for place in places]
    stresses = itertools.accumulate(change for _, change in sorted(changes))
    return all(math.log(_LEAST_WEIGHT) - _NEAR <= each <= math.log(_LARGEST_WEIGHT) + _NEAR for each in stresses)


def _is_weight(text: str) -> bool:
    try:
        weight = abs(float(text))
    except ValueError:
        return False
    return _ZERO.fullmatch(text) is not None or _LEAST_WEIGHT <= weight <= _LARGEST_WEIGHT
