"""Guesses the next tokens of sequences, and decides how many guesses a step is worth.

A step that evaluates a few tokens of a sequence costs less than as many steps of one, so tokens guessed beforehand (a
draft) and confirmed by what the model then samples are gained time, and the others lost. Prompt lookup guesses that a
text goes on as it did where its last tokens stood before: much of code, quotations and corrections does. Knows tokens
as numbers only, and nothing of sampling or of how drafts are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as TokenSequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter, mul
from typing import Protocol

MIN_MATCH = 2  # tokens
MAX_MATCH = 32  # tokens compared when looking for a match; what is followed from there on counts as that long
GAIN = 1.1  # by how much drafts must be expected to speed a step up; less is within the error of the estimates

_SEARCHED = 8  # earlier occurrences looked at for the longest match
_TOKEN_BITS = 20  # of a token in a key: the largest vocabularies have 2**18 tokens
_KEY_MASK = (1 << MIN_MATCH * _TOKEN_BITS) - 1

_PRIORS = {2: 0.2, 3: 0.4, 6: 0.6, 12: 0.85}  # least length of a match: how often the token after it is right, at first
_CLASSES = [sum(length >= least for least in _PRIORS) - 1 for length in range(MAX_MATCH + 1)]
_FIRST_WEIGHT = 1 / 3  # of the first outcome in an estimate; the next ones weigh 1/4, 1/5, ...
_LEAST_WEIGHT = 1 / 32  # so that old outcomes are forgotten


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens and, for each, the probability that it and all before it are what the model will sample."""

    tokens: TokenSequence[int] = ()
    chances: TokenSequence[float] = ()


NO_DRAFT = Draft()


class Drafter(Protocol):
    """What guesses the continuation of one sequence."""

    def draft(self, limit: int) -> Draft:
        """Return a guess of at most ``limit`` tokens, the chances of which never increase."""


class PromptLookup:
    """Drafts what followed the longest earlier match of the sequence's last tokens, the latest of equally long ones.

    A match is followed for as long as the sequence repeats it, and each token that comes is compared with the one after
    the match, whether it was drafted or not: a sequence whose drafts are not evaluated still shows when they would be
    right.
    """

    def __init__(self, tokens: list[int]) -> None:
        """``tokens`` is the sequence's own list, prompt and answer, which only ever grows; it is read when drafting."""
        self._tokens = tokens
        self._read = 0  # how many of them are indexed
        self._key = 0  # the last MIN_MATCH of those
        self._latest: dict[int, int] = {}  # the end of the last occurrence of each key: the position after it
        self._earlier: list[int] = []  # for the key that ends at each position, the end of the one before; 0 for none
        self._source = 0  # the end of the match: where its continuation begins
        self._length = 0  # of the match, in tokens, up to MAX_MATCH; 0 when there is none
        self._estimates = list(_PRIORS.values())  # by class of length
        self._weights = [_FIRST_WEIGHT] * len(_PRIORS)

    def draft(self, limit: int) -> Draft:
        """See ``Drafter``. Takes microseconds, apart from the first call, which reads the prompt."""
        self._read_on()
        if not self._length or limit < 1:
            return NO_DRAFT
        tokens = self._tokens[self._source : self._source + limit]
        if len(tokens) < limit:  # the continuation runs into itself: the text goes round in a circle
            tokens = (tokens * (limit // len(tokens) + 1))[:limit]
        estimates = self._estimates
        classes = _CLASSES[self._length : self._length + limit]
        chances = list(accumulate((estimates[number] for number in classes), mul))
        while len(chances) < limit:
            chances.append(chances[-1] * estimates[-1])
        return Draft(tokens, chances)

    def _read_on(self) -> None:
        """Index the tokens that are new, and compare those of the answer with the match on the way."""
        tokens, latest, earlier, key = self._tokens, self._latest, self._earlier, self._key
        answering = self._read > 0
        for position in range(self._read, len(tokens)):
            token = tokens[position]
            key = (key << _TOKEN_BITS | token) & _KEY_MASK
            earlier.append(latest.get(key, 0))
            latest[key] = position + 1
            if answering and not (self._length and self._follow(token)):
                self._search(position + 1)
        self._key = key
        self._read = len(tokens)
        if not answering:
            self._search(self._read)

    def _follow(self, token: int) -> bool:
        """Learn whether the match goes on with ``token``, and lengthen it if so."""
        right = self._tokens[self._source] == token
        number = _CLASSES[self._length]
        weight = self._weights[number]
        self._estimates[number] += (right - self._estimates[number]) * weight
        self._weights[number] = max(weight / (1 + weight), _LEAST_WEIGHT)
        if right:
            self._source += 1
            self._length = min(self._length + 1, MAX_MATCH)
        return right

    def _search(self, end: int) -> None:
        """Find the longest match of the tokens before ``end``, the latest of equally long ones."""
        tokens, earlier = self._tokens, self._earlier
        best = MIN_MATCH - 1
        candidate = end
        for _ in range(_SEARCHED):
            candidate = earlier[candidate - 1] if candidate else 0
            longest = min(candidate, MAX_MATCH)
            if longest <= best:
                break
            if tokens[candidate - 1 - best] == tokens[end - 1 - best]:  # else it can't be longer
                length = 0
                while length < longest and tokens[candidate - 1 - length] == tokens[end - 1 - length]:
                    length += 1
                if length > best:
                    best = length
                    self._source = candidate
        self._length = best if best >= MIN_MATCH else 0


def choose_rows(drafts: TokenSequence[Draft], cost: Callable[[int], float], limit: int) -> list[int]:
    """Return how many tokens of each draft to evaluate in the next step, so that most tokens a second are expected.

    ``drafts`` has an entry for every decoding sequence. ``cost`` tells the seconds of a step by its rows, one for each
    of those sequences and one for each token of a draft, and ``limit`` is the largest number of rows. The curve may
    have any shape: all numbers of rows are considered, each with the likeliest tokens. Drafts that are not expected to
    gain ``GAIN`` are left out altogether.
    """
    rows = [0] * len(drafts)
    candidates = [(chance, index) for index, draft in enumerate(drafts) for chance in draft.chances]
    if not candidates:
        return rows
    candidates.sort(key=itemgetter(0), reverse=True)  # stable: a draft's tokens stay in their order
    expected = float(len(drafts))  # tokens
    best = GAIN * expected / cost(len(drafts))
    taken = 0
    for total, (chance, _) in enumerate(candidates[: max(0, limit - len(drafts))], len(drafts) + 1):
        expected += chance
        rate = expected / cost(total)
        if rate > best:
            best = rate
            taken = total - len(drafts)
    for _, index in candidates[:taken]:
        rows[index] += 1
    return rows
