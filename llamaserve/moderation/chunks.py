"""Cuts a text into chunks that are about as long as the sentences that the classifier was trained on.

A chunk is a sentence or a few short ones after one another. Where two have room in one, each overlaps with the next by
a sentence, so that what is said in both is seen together once. What is longer, or is written without spaces, is cut
where it has to be, and its parts do not overlap. Knows nothing of tokens: a chunk is short enough for 512 of them in
any script. The time is linear in the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Final

LONGEST: Final = 120  # characters of a chunk; with 200, a harmful sentence among others is missed twice as often
_JOINERS: Final = {"\u200d", "\u034f"}  # what stands on both sides of them belongs together
# A line, or what ends with a full stop or the like and the quotation marks and brackets that close there. The dots of
# "e.g." or "3.5" end nothing, because no white space follows or a small letter does.
_END: Final = re.compile(
    r"""(?<![.!?\u2026])[.!?\u2026]++["'\u201d\u2019\u00bb)\]]*+\s++(?=[^a-z\s])|[\u3002\uff01\uff1f\u0964\u061f]++[\u300d\u300f\u201d]?|[\r\n\u2028\u2029]\s*+"""
)


def chunks(text: str) -> list[str]:
    """Return the chunks in their order, none of them empty or longer than ``LONGEST``; none of a text that has nothing
    but white space.
    """
    pieces = [piece for sentence in _sentences(text) for piece in _cut(sentence)]
    found: list[str] = []
    start = 0
    while start < len(pieces):
        end, length = start + 1, len(pieces[start])
        while end < len(pieces) and length + 1 + len(pieces[end]) <= LONGEST:
            length += 1 + len(pieces[end])
            end += 1
        found.append(" ".join(pieces[start:end]))
        if end == len(pieces):
            break
        start = end - 1 if end - 1 > start else end
    return found


def _sentences(text: str) -> Iterator[str]:
    """Yield the sentences without the white space around them."""
    start = 0
    for match in _END.finditer(text):
        if sentence := text[start : match.end()].strip():
            yield sentence
        start = match.end()
    if sentence := text[start:].strip():
        yield sentence


def _cut(sentence: str) -> Iterator[str]:
    """Yield a sentence in parts that are not too long, cut between words if there are any."""
    start = 0
    while len(sentence) - start > LONGEST:
        end = _place(sentence, start, start + LONGEST)
        if part := sentence[start:end].strip():
            yield part
        start = end
    if part := sentence[start:].strip():
        yield part


def _place(sentence: str, start: int, end: int) -> int:
    """Return where to cut: behind the last white space, or else between two characters that are no parts of one."""
    for place in range(end, start + LONGEST // 2, -1):
        if sentence[place].isspace():
            return place
    for place in range(end, start + LONGEST // 2, -1):
        if not _continues(sentence, place):
            return place
    return end


def _continues(sentence: str, place: int) -> bool:
    """Whether what is at a place belongs to the character before: an accent, the second half of an emoji."""
    here, before = sentence[place], sentence[place - 1]
    return (
        unicodedata.category(here) in ("Mn", "Mc", "Me")
        or here in _JOINERS
        or before in _JOINERS
        or "\U0001f3fb" <= here <= "\U0001f3ff"
        or ("\U0001f1e6" <= here <= "\U0001f1ff" and "\U0001f1e6" <= before <= "\U0001f1ff")
    )
