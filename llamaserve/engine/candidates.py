"""The tokens that may come next, and arithmetic on them that stays fast for a vocabulary of 150,000.

Knows nothing of why a token is kept or dropped, of requests or of llama.cpp.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.intp]
Tokens = npt.NDArray[np.int32]

_BLOCK = 256  # weights summed up at once: a running sum of a whole vocabulary takes longer than all the rest


class NothingLeft(Exception):
    """Every candidate was dropped: by bans, or because nothing else could follow."""


class Candidates:
    """Tokens with their logits; ``logits`` may be written to. As long as no token was dropped, ``ids`` is None and the
    logit of token *i* is at place *i*. A logit of minus infinity stands for a token that is dropped, too.
    """

    __slots__ = ("ids", "logits", "sorted")

    def __init__(self, logits: Floats, ids: Tokens | None = None) -> None:
        self.ids = ids
        self.logits = logits
        self.sorted = False  # whether the most probable comes first, and so on

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def tokens(self) -> Tokens:
        """The ids of the candidates, in the order of ``logits``."""
        return np.arange(len(self.logits), dtype=np.int32) if self.ids is None else self.ids

    def token(self, place: int) -> int:
        """Return the id of one of them."""
        return place if self.ids is None else int(self.ids[place])

    def keep(self, places: Places | slice) -> None:
        """Drop all others, and take the order of the places."""
        self.ids = self.tokens[places] if self.ids is not None or isinstance(places, slice) else places.astype(np.int32)
        self.logits = self.logits[places]

    def keep_where(self, kept: npt.NDArray[np.bool_]) -> None:
        """Drop all others; the order stays."""
        self.keep(np.flatnonzero(kept))

    def drop_impossible(self) -> None:
        """Drop those with a logit of minus infinity, which would spoil means and products."""
        possible = self.logits > -np.inf
        if not possible.all():
            self.best()
            self.keep_where(possible)

    def best(self) -> int:
        """Return the place of the most probable. Raises ``NothingLeft``."""
        place = 0 if self.sorted else int(self.logits.argmax())
        if self.logits[place] == -np.inf:
            raise NothingLeft
        return place

    def sort(self) -> None:
        """Put the most probable first, and so on."""
        if not self.sorted:
            self.keep(np.argsort(-self.logits))
            self.sorted = True

    def weights(self) -> Floats:
        """Return what each one's probability is proportional to; 1 for the most probable."""
        weights: Floats = self.logits - self.logits[self.best()]
        np.exp(weights, out=weights)
        return weights

    def probabilities(self) -> Floats:
        """Return the softmax of the logits."""
        weights = self.weights()
        weights /= weights.sum()
        return weights

    def places_of(self, tokens: Tokens) -> tuple[Places, npt.NDArray[np.bool_] | slice]:
        """Return where those of some tokens are that are candidates, and which of the tokens these are."""
        if self.ids is None:
            return tokens.astype(np.intp), slice(None)
        order = np.argsort(self.ids)
        found = np.searchsorted(self.ids, tokens, sorter=order)
        places = order[np.minimum(found, len(order) - 1)]
        present = self.ids[places] == tokens
        return places[present], present


def top(logits: Floats, count: int) -> list[int]:
    """Return the places of the ``count`` largest logits, the largest first."""
    if count < 1:
        return []
    places = np.argpartition(logits, -count)[-count:] if count < len(logits) else np.arange(len(logits))
    best: list[int] = places[np.argsort(-logits[places])].tolist()
    return best


def draw(weights: Floats, chance: float) -> int:
    """Return the place that a random number from 0 to 1 picks, each with a probability proportional to its weight."""
    if len(weights) <= _BLOCK:
        return _pick(weights, chance)
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK))
    before = np.cumsum(sums, dtype=np.float64)
    wanted = chance * before[-1]
    block = int(np.searchsorted(before, wanted, side="right"))
    if block == len(sums):
        block = int(np.flatnonzero(sums)[-1])
    rest = (wanted - (before[block - 1] if block else 0.0)) / sums[block]
    return block * _BLOCK + _pick(weights[block * _BLOCK :][:_BLOCK], rest)


def _pick(weights: Floats, chance: float) -> int:
    sums = np.cumsum(weights, dtype=np.float64)
    place = int(np.searchsorted(sums, chance * sums[-1], side="right"))
    return place if place < len(weights) else int(np.flatnonzero(weights)[-1])
