"""A text's words and their parts as numbers of buckets, which a classifier can have weights for.

Vectors tell what a text is about; small words, which decide who does what to whom, hardly move them. Parts of words are
there for spellings that no dictionary has. Which bucket one falls into is a checksum's matter, so that no list of words
has to be kept; a few share theirs. Source of the idea: Weinberger et al., Feature Hashing, 2009.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from math import sqrt
from typing import Final
from zlib import crc32

_WORD: Final = re.compile(r"[^\W_]+|[?!]")
_LENGTHS: Final = (3, 4)  # characters of a part


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
