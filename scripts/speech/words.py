"""Words of transcripts in the form in which they are compared, and how far two lists of them are apart.

Case, punctuation and accents do not count: many of the transcripts lack them. Words are split at apostrophes and
hyphens, small numbers are words, and so are the signs on a telephone's keys. Knows nothing of recordings.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_NUMBERS = {
    "en": "zero one two three four five six seven eight nine ten eleven twelve",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce",
    "fr": "zero un deux trois quatre cinq six sept huit neuf dix onze douze",
    "it": "zero uno due tre quattro cinque sei sette otto nove dieci undici dodici",
}
_SIGNS = {
    "en": {"#": "pound", "*": "star", "&": "and"},
    "es": {"#": "numero", "*": "asterisco", "&": "y"},
    "fr": {"#": "diese", "*": "etoile", "&": "et"},
    "it": {"#": "cancelletto", "*": "asterisco", "&": "e"},
}
LANGUAGES = tuple(_NUMBERS)

_WORD = re.compile(r"[^\W_]+|[#*&]")


def normalised(text: str, language: str) -> list[str]:
    """Return the words of a text."""
    numbers, signs = _NUMBERS[language].split(), _SIGNS[language]
    letters = unicodedata.normalize("NFKD", text.casefold())
    words = _WORD.findall("".join(each for each in letters if not unicodedata.combining(each)))
    return [
        numbers[int(word)] if word.isdecimal() and int(word) < len(numbers) else signs.get(word, word) for word in words
    ]


def errors(reference: Sequence[str], heard: Sequence[str]) -> int:
    """Return the fewest words to replace, leave out or add that make one list of the other."""
    costs = list(range(len(heard) + 1))
    for row, wanted in enumerate(reference, 1):
        diagonal, costs[0] = costs[0], row
        for column, found in enumerate(heard, 1):
            replaced = diagonal + (wanted != found)
            diagonal = costs[column]
            costs[column] = min(replaced, diagonal + 1, costs[column - 1] + 1)
    return costs[-1]
