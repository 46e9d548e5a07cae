"""A text in usual letters, and its words and their parts as numbers of buckets, for which a classifier has weights.

Vectors tell what a text is about; small words, which decide who does what to whom, hardly move them. Parts of words are
there for spellings that no dictionary has. Which bucket one falls into is a checksum's matter, so that no list of words
has to be kept; a few share theirs. Source of the idea: Weinberger et al., Feature Hashing, 2009.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import pairwise
from math import sqrt
from typing import Final
from zlib import crc32

_WORD: Final = re.compile(r"[^\W_]+|[?!]")
_LENGTHS: Final = (3, 4)  # characters of a part
_NOT_ASCII: Final = re.compile(r"[^\x00-\x7f]")
# What can't be seen, but for Unicode's format characters, and what is put over or around the character before.
_UNSEEN: Final = re.compile(r"[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
_MARKS: Final = re.compile(r"[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")
_GROWS: Final = 3  # a character becomes so many at most; some stand for whole sentences


def plain(text: str) -> str:
    """Return a text in usual letters: full-width, mathematical and circled ones become those that they are read as
    (NFKC), and what can't be seen between letters or is piled on them goes.
    """
    if text.isascii():
        return text
    return _NOT_ASCII.sub(lambda found: _usual(found[0]), unicodedata.normalize("NFC", text))


def _usual(character: str) -> str:
    if unicodedata.category(character) == "Cf" or _UNSEEN.match(character) or _MARKS.match(character):
        return ""
    usual = unicodedata.normalize("NFKC", character)
    return usual if usual.isalnum() and len(usual) <= _GROWS else character


def buckets(text: str, count: int) -> dict[int, float]:
    """Return the numbers, below ``count``, of the buckets that hold something, with how much: all squares add up to 1.
    Nothing for a text without words.
    """
    words = _WORD.findall(text.lower())
    line = f" {' '.join(words)} "
    parts = {f"#{line[start : start + size]}" for size in _LENGTHS for start in range(len(line) - size + 1)}
    pairs = {f"{first} {second}" for first, second in pairwise(words)}
    found = Counter(crc32(each.encode("utf-8", "replace")) % count for each in {*words, *parts, *pairs})
    length = sqrt(sum(number * number for number in found.values()))
    return {place: number / length for place, number in sorted(found.items())} if words else {}
