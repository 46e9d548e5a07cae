"""Trains the heads: logistic regressions, and how what they say becomes one probability.

A category's ``harm`` head learns from its own sentences and the harmless ones, so that it need not tell kinds of harm
from each other; its ``kind`` head from all harmful ones. What the harm heads say together is weighed by a further
regression on sentences that they did not learn from, and moved so that one half is the point from which on a text is
flagged. Chance decides nothing but which sentences those are, and its seed is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llamaserve.moderation.categories import CATEGORIES
from llamaserve.moderation.heads import CategoryHeads, HarmHead, Heads, KindHead
from llamaserve.moderation.spelling import buckets
from moderation.data import DANGEROUS, Sentence
from moderation.embedding import Vectors

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

FOLDS = 5
_ALIKE = 0.6  # the cosine of sentences that say much the same
ACCEPTED = 0.085  # of the sentences that only look dangerous, flagged among those that were not learned from
BUCKETS = 1024
DIRECTIONS = 24
# How much the features count beside each other: the larger, the less their weights are held back.
_VECTOR, _PRODUCTS, _WORDS = 4.0, 2.0, 3.0
_STEPS = 100
_DIGITS = 4  # of a weight, after the point


@dataclass(frozen=True)
class Linear:
    """Regressions as columns: logits are ``features @ weights + bias``."""

    weights: Array
    bias: Array

    def __call__(self, features: Array) -> Array:
        """Return the logits, of shape (texts, columns)."""
        logits: Array = features @ self.weights + self.bias
        return logits


@dataclass(frozen=True)
class Space:
    """The main directions of some vectors, scaled so that the products of places in them are as large as they should be
    beside the other features.
    """

    directions: Array  # (directions, width)
    middle: Array
    products: Array  # what each is on average

    @classmethod
    def of(cls, vectors: Vectors) -> Space:
        """Return the directions in which the vectors differ most, each with less weight the more they do."""
        exact = vectors.astype(np.float64)
        average = exact.mean(axis=0)
        _, spread, directions = np.linalg.svd(exact - average, full_matrices=False)
        first = np.abs(directions).argmax(axis=1)
        directions *= np.sign(directions[np.arange(len(directions)), first])[:, None]
        directions = directions[:DIRECTIONS] / np.sqrt(spread[:DIRECTIONS, None])
        raw = _pairs((exact - average) @ directions.T)
        size = np.sqrt((raw - raw.mean(axis=0)).var(axis=0).sum())
        directions *= np.sqrt(_PRODUCTS / size)
        return cls(directions, directions @ average, raw.mean(axis=0) * _PRODUCTS / size)

    def features(self, vectors: Vectors, words: Array) -> Array:
        """Return all that the harm heads look at, of shape (texts, features)."""
        exact = vectors.astype(np.float64)
        products = _pairs(exact @ self.directions.T - self.middle) - self.products
        return np.hstack([exact * _VECTOR, products, words * _WORDS])


@dataclass(frozen=True)
class Classifier:
    """What was learned: the logit of being harmful is ``strength`` times the categories' harm together, plus ``share``
    times that of the one head for all, which is the last column, plus ``offset``.
    """

    space: Space
    harm: Linear
    kind: Linear
    strength: float
    share: float
    offset: float

    def logits(self, vectors: Vectors, words: Array) -> Array:
        """Return the logits of being harmful; from 0 on a text is flagged."""
        together = _together(self.harm(self.space.features(vectors, words)))
        logits: Array = together @ np.array([self.strength, self.share]) + self.offset
        return logits

    def heads(self, model: str, sha256: str, sentences: str) -> Heads:
        """Return the heads in the form that the server reads, with rounded numbers."""
        categories = {
            name: CategoryHeads(self._harm_head(place), self._kind_head(place)) for place, name in enumerate(CATEGORIES)
        }
        return Heads(
            model=model,
            sha256=sha256,
            sentences=sentences,
            width=self.space.directions.shape[1],
            buckets=BUCKETS,
            directions=tuple(_rounded(each) for each in self.space.directions),
            middle=_rounded(self.space.middle),
            strength=round(self.strength, _DIGITS),
            harm=self._harm_head(len(CATEGORIES), self.share, self.offset),
            categories=categories,
        )

    def _harm_head(self, column: int, factor: float = 1.0, offset: float = 0.0) -> HarmHead:
        width = self.space.directions.shape[1]
        weights = self.harm.weights[:, column] * factor
        vector, products, words = np.split(weights, [width, width + len(self.space.products)])
        bias = float(self.harm.bias[column] * factor - products @ self.space.products) + offset
        return HarmHead(_rounded(vector * _VECTOR), _rounded(products), _rounded(words * _WORDS), round(bias, _DIGITS))

    def _kind_head(self, column: int) -> KindHead:
        return KindHead(_rounded(self.kind.weights[:, column]), round(float(self.kind.bias[column]), _DIGITS))


def words_of(texts: Sequence[str]) -> Array:
    """Return how much is in each bucket, of shape (texts, buckets)."""
    found = np.zeros((len(texts), BUCKETS))
    for row, text in zip(found, texts, strict=True):
        for place, value in buckets(text, BUCKETS).items():
            row[place] = value
    return found


def train(vectors: Vectors, words: Array, sentences: Sequence[Sentence], seed: int = 0) -> Classifier:
    """Return a classifier that has learned from all of the sentences. Raises ``ValueError`` when nothing can be learned
    from them.
    """
    fold, held_out = folds(sentences, seed), np.empty((len(sentences), 2))
    for number in range(FOLDS):
        rest, part = fold != number, fold == number
        space, harm = _harm(
            vectors[rest], words[rest], [each for each, kept in zip(sentences, rest, strict=True) if kept]
        )
        held_out[part] = _together(harm(space.features(vectors[part], words[part])))
    harmful = np.array([[each.is_harmful] for each in sentences])
    strength, share = regress(held_out, harmful, np.ones_like(harmful), penalty=1e-3).weights[:, 0]
    only_looks_so = np.array([each.kind == DANGEROUS for each in sentences])
    if not (strength > 0 and only_looks_so.any()):
        raise ValueError("what was learned from some of the sentences says nothing about the others")
    offset = -np.quantile(held_out[only_looks_so] @ np.array([strength, share]), 1 - ACCEPTED)
    space, harm = _harm(vectors, words, sentences)
    return Classifier(space, harm, _kind(vectors, sentences), float(strength), float(share), float(offset))


def _harm(vectors: Vectors, words: Array, sentences: Sequence[Sentence]) -> tuple[Space, Linear]:
    """Return the harm heads of the categories, and behind them the one for all, with the space for their features."""
    own = _own(sentences)
    harmful = own.any(axis=1, keepdims=True)
    space = Space.of(vectors)
    learned_from = np.hstack([own | ~harmful, np.ones_like(harmful)])
    return space, regress(space.features(vectors, words), np.hstack([own, harmful]), learned_from, penalty=1.0)


def _kind(vectors: Vectors, sentences: Sequence[Sentence]) -> Linear:
    """Return the heads that tell one category from the others."""
    own = _own(sentences)
    harmful = own.any(axis=1)
    scaled = regress(vectors[harmful] * _VECTOR, own[harmful], np.ones_like(own[harmful]), penalty=1.0)
    return Linear(scaled.weights * _VECTOR, scaled.bias)


def _own(sentences: Sequence[Sentence]) -> Mask:
    """Return which category a sentence is in, of shape (sentences, categories)."""
    own: Mask = np.array([each.kind for each in sentences])[:, None] == np.array(CATEGORIES)
    return own


def regress(features: npt.NDArray[np.floating], wanted: Mask, learned_from: Mask, penalty: float) -> Linear:
    """Return logistic regressions, one for each column of ``wanted``, each on the rows that ``learned_from`` marks.

    Steps down a quadratic bound of the loss, which is one for all columns (Böhning and Lindsay, 1988), with momentum
    that starts anew when it leads uphill.
    """
    rows = np.hstack([features, np.ones((len(features), 1))]).astype(np.float64)
    held = np.full((rows.shape[1], 1), penalty)
    held[-1] = 1e-6  # the bias is free
    inverse = np.linalg.inv(rows.T @ rows / 4 + np.diag(held[:, 0]))
    weights = np.zeros((rows.shape[1], wanted.shape[1]))
    ahead, age = weights, np.zeros(wanted.shape[1])
    for _ in range(_STEPS):
        slope = rows.T @ (learned_from * (sigmoid(rows @ ahead) - wanted)) + held * ahead
        after = ahead - inverse @ slope
        uphill = (slope * (after - weights)).sum(axis=0) > 0
        age = np.where(uphill, 0, age + 1)
        ahead = after + age / (age + 3) * (after - weights)
        weights = after
    return Linear(weights[:-1], weights[-1])


def folds(sentences: Sequence[Sentence], seed: int) -> npt.NDArray[np.int64]:
    """Return the fold of each sentence. Each style and kind is spread evenly over all folds."""
    random = np.random.default_rng(seed)
    found = np.empty(len(sentences), np.int64)
    groups: dict[tuple[str, str], list[int]] = {}
    for place, sentence in enumerate(sentences):
        groups.setdefault((sentence.style, sentence.kind), []).append(place)
    for places in groups.values():
        found[random.permutation(places)] = (np.arange(len(places)) + random.integers(FOLDS)) % FOLDS
    return found


def grouped_folds(vectors: Vectors) -> npt.NDArray[np.int64]:
    """Return the fold of each sentence such that those that are alike, whatever they are, are in the same one: any two
    whose vectors, of length 1, have a cosine of ``_ALIKE``, and who is alike to one of those.
    """
    group = np.arange(len(vectors))
    for place, one in enumerate(vectors):
        for other in np.flatnonzero(vectors[:place] @ one >= _ALIKE):
            group[group == group[other]] = group[place]
    names, sizes = np.unique(group, return_counts=True)
    found, full = np.empty(len(vectors), np.int64), np.zeros(FOLDS, np.int64)
    for place in np.argsort(-sizes, kind="stable"):
        found[group == names[place]] = full.argmin()
        full[full.argmin()] += sizes[place]
    return found


def sigmoid(logits: Array) -> Array:
    """Return the probabilities."""
    return 0.5 + 0.5 * np.tanh(logits / 2)


def _together(logits: Array) -> Array:
    """Return what the categories' heads say together, and what the one for all says, of shape (texts, 2)."""
    each = logits[:, :-1]
    highest = each.max(axis=1, keepdims=True)
    together = highest[:, 0] + np.log(np.exp(each - highest).sum(axis=1))
    return np.stack([together, logits[:, -1]], axis=1)


def _pairs(places: Array) -> Array:
    """Return the products of any two columns, in the order of ``Heads.features``."""
    one, other = np.triu_indices(places.shape[1])
    return places[:, one] * places[:, other]


def _rounded(numbers: Array) -> tuple[float, ...]:
    return tuple((numbers.round(_DIGITS) + 0.0).tolist())
