"""Trains the heads: logistic regressions on unit vectors, and how what they say becomes one probability.

The heads of all categories are trained at once. Each learns from some of the sentences: a category's ``harm`` from its
own and the harmless ones, so that it need not tell kinds of harm from each other; its ``kind`` from all harmful ones.
What the harm heads say together is weighed by a further regression on sentences that the heads did not learn from, and
moved so that one half is the point from which on a text is flagged. Chance decides nothing but which sentences those
are, and its seed is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llamaserve.moderation.categories import CATEGORIES
from llamaserve.moderation.heads import CategoryHeads, Head, Heads
from moderation.data import DANGEROUS, Sentence
from moderation.embedding import Vectors

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

FOLDS = 5
ACCEPTED = 0.08  # of the sentences that only look dangerous, flagged among those that were not learned from
_SCALE = 4.0  # of the unit vectors: how strongly weights are held back
_STEPS = 200
_DIGITS = 4  # of a weight, after the point
_KINDS = len(CATEGORIES)


@dataclass(frozen=True)
class Linear:
    """Heads as columns: logits are ``vectors @ weights + bias``. First the categories' ``harm``, then the one against
    all harmless sentences, then the categories' ``kind``.
    """

    weights: Array
    bias: Array

    def __call__(self, vectors: Vectors) -> Array:
        """Return the logits, of shape (texts, heads)."""
        logits: Array = vectors @ self.weights + self.bias
        return logits


@dataclass(frozen=True)
class Classifier:
    """The heads, and what makes a probability of them: the logit is ``strength`` times the categories' harm together,
    plus ``share`` times that of the one head for all, plus ``offset``.
    """

    linear: Linear
    strength: float
    share: float
    offset: float

    def harm(self, vectors: Vectors) -> Array:
        """Return the logits of being harmful; above 0 a text is flagged."""
        return _summary(self.linear(vectors)) @ np.array([self.strength, self.share]) + self.offset

    def kinds(self, vectors: Vectors) -> Array:
        """Return by how much less probable each category is than the most probable one, of shape (texts, 13)."""
        logits = self.linear(vectors)[:, _KINDS + 1 :]
        shares: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shares

    def scores(self, vectors: Vectors) -> Array:
        """Return what ``Heads.scores`` does, without what parents get of their children."""
        probability: Array = sigmoid(self.harm(vectors))[:, None] * self.kinds(vectors)
        return probability

    def heads(self, model: str, sha256: str) -> Heads:
        """Return the heads in the form that the server reads, with rounded numbers."""
        columns = [_head(self.linear, column) for column in range(2 * _KINDS + 1)]
        categories = {
            name: CategoryHeads(columns[place], columns[_KINDS + 1 + place]) for place, name in enumerate(CATEGORIES)
        }
        harm = _head(self.linear, _KINDS, self.share, self.offset)
        strength = round(self.strength, _DIGITS)
        return Heads(model, sha256, len(self.linear.weights), strength, harm, categories)


def train(vectors: Vectors, sentences: Sequence[Sentence], seed: int = 0) -> Classifier:
    """Return a classifier that has learned from all of the sentences."""
    held_out = np.empty((len(sentences), 2))
    fold = folds(sentences, seed)
    for number in range(FOLDS):
        rest, part = fold != number, fold == number
        linear = train_heads(vectors[rest], [each for each, kept in zip(sentences, rest, strict=True) if kept])
        held_out[part] = _summary(linear(vectors[part]))
    harmful = np.array([each.is_harmful for each in sentences])
    mixture = regress(held_out, harmful[:, None], np.ones((len(sentences), 1), bool), penalty=1e-3)
    strength, share = mixture.weights[:, 0]
    logits = held_out @ mixture.weights[:, 0]
    looks_dangerous = np.array([each.kind == DANGEROUS for each in sentences])
    offset = -float(np.quantile(logits[looks_dangerous], 1 - ACCEPTED))
    return Classifier(train_heads(vectors, sentences), float(strength), float(share), offset)


def train_heads(vectors: Vectors, sentences: Sequence[Sentence]) -> Linear:
    """Return the heads that some sentences teach."""
    kinds = np.array([each.kind for each in sentences])
    own = kinds[:, None] == np.array(CATEGORIES)
    harmful = own.any(axis=1, keepdims=True)
    wanted = np.hstack([own, harmful, own])
    learned_from = np.hstack([own | ~harmful, np.ones_like(harmful), np.broadcast_to(harmful, own.shape)])
    scaled = regress(vectors * _SCALE, wanted, learned_from, penalty=1.0)
    return Linear(scaled.weights * _SCALE, scaled.bias)


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


def sigmoid(logits: Array) -> Array:
    """Return the probabilities."""
    return 0.5 + 0.5 * np.tanh(logits / 2)


def _summary(logits: Array) -> Array:
    """Return what the harm heads say together, and what the one for all says, of shape (texts, 2)."""
    harm = logits[:, :_KINDS]
    highest = harm.max(axis=1)
    return np.stack([highest + np.log(np.exp(harm - highest[:, None]).sum(axis=1)), logits[:, _KINDS]], axis=1)


def _head(linear: Linear, column: int, factor: float = 1.0, offset: float = 0.0) -> Head:
    weights = (linear.weights[:, column] * factor).round(_DIGITS) + 0.0
    return Head(tuple(weights.tolist()), round(float(linear.bias[column] * factor + offset), _DIGITS))
