"""The default classifier: trained heads on a text's embedding and its words, and the scores that they give.

A head says how far a text is on its side: a logit. Each category has two: one was trained to tell its sentences from
harmless ones, the other from those of the other categories. A further one tells what is harmful from what is not at
all. Together they say how probably a text is harmful; the category that it is in most probably gets that as its score,
and another as much less as it is less probable.

Plain Python, because this runs where numpy is not loaded. Knows nothing of how texts become vectors, of training
(``scripts/train_moderation.py``) or of HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import exp, log, sqrt
from operator import mul
from pathlib import Path
from typing import Annotated, Final

import msgspec

from llamaserve.moderation.categories import CATEGORIES, THRESHOLD, Scores
from llamaserve.moderation.spelling import buckets
from llamaserve.registry.gguf import GGUFHeader

FILE: Final = Path(__file__).resolve().parent / "heads.json"
_DOUBTED: Final = 64  # chunks; more count no more, or it would pay to hide something among very many
SHA256_KEY: Final = "llamaserve.converted.sha256"  # in a GGUF file: the sum of the weights that it was made from

Weights = tuple[float, ...]


class Features(msgspec.Struct, frozen=True):
    """What is known of a text: its vector, the products of any two of the numbers that say where it lies in the main
    directions, and its words by bucket.
    """

    vector: Sequence[float]
    products: Sequence[float]
    words: Mapping[int, float]


class KindHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear function of the vector."""

    vector: Weights
    bias: float

    def logit(self, features: Features) -> float:
        """Return how far a text is on this head's side."""
        logit: float = sum(map(mul, self.vector, features.vector), self.bias)
        return logit


class HarmHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear function of all features."""

    vector: Weights
    products: Weights
    words: Weights
    bias: float

    def logit(self, features: Features) -> float:
        """Return how far a text is on this head's side."""
        known = sum(map(mul, self.vector, features.vector), self.bias)
        words: float = sum(self.words[place] * value for place, value in features.words.items())
        products: float = sum(map(mul, self.products, features.products))
        return known + words + products


class CategoryHeads(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The two heads of a category: against what is harmless, and against the other categories."""

    harm: HarmHead
    kind: KindHead


class Heads(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trained heads. ``model`` and ``sha256`` say whose embeddings they are for: the model's name, and the sum of
    its published weights; ``sentences`` is that of what they learned from. ``middle`` is where the ``directions``
    start. ``strength`` is by how much the categories' harm counts beside that of ``harm``, the head for all.

    Raises ``ValueError`` for heads that don't fit each other.
    """

    model: str
    sha256: str
    sentences: str
    width: Annotated[int, msgspec.Meta(ge=1)]
    buckets: Annotated[int, msgspec.Meta(ge=1)]
    directions: tuple[Weights, ...]
    middle: Weights
    strength: Annotated[float, msgspec.Meta(gt=0)]
    harm: HarmHead
    categories: dict[str, CategoryHeads]

    def __post_init__(self) -> None:
        if tuple(self.categories) != CATEGORIES:
            raise ValueError("there must be heads for OpenAI's categories, in their order")
        each = self.categories.values()
        harm = [self.harm, *(heads.harm for heads in each)]
        vectors = [*self.directions, *(head.vector for head in harm), *(heads.kind.vector for heads in each)]
        products = len(self.directions) * (len(self.directions) + 1) // 2
        fits = {
            "vector": all(len(weights) == self.width for weights in vectors),
            "words": all(len(head.words) == self.buckets for head in harm),
            "products": all(len(head.products) == products for head in harm),
            "middle": len(self.middle) == len(self.directions),
        }
        if wrong := [name for name, fit in fits.items() if not fit]:
            raise ValueError(f"heads have another number of weights than they should: {', '.join(wrong)}")

    @property
    def thresholds(self) -> Mapping[str, float]:
        """From which score on a text is in a category. Training has put the point where it belongs at one half."""
        return dict.fromkeys(CATEGORIES, THRESHOLD)

    def fit(self, header: GGUFHeader) -> bool:
        """Whether a model has the weights that the heads were trained on: the file says so, or else, as other
        conversions do not, it is called so.
        """
        if header.embedding_length != self.width:
            return False
        if (sha256 := header.text(SHA256_KEY)) is not None:
            return sha256 == self.sha256
        return _letters(self.model) in _letters(header.name or "")

    def scores(self, vector: Sequence[float], text: str) -> Scores:
        """Return the scores of a text, whose embedding is a vector of length 1."""
        if len(vector) != self.width:
            raise ValueError(f"the vector has {len(vector)} numbers, and the heads are for {self.width}")
        features = self.features(vector, text)
        harm = [heads.harm.logit(features) for heads in self.categories.values()]
        harmful = _sigmoid(self.strength * _log_sum_exp(harm) + self.harm.logit(features))
        kinds = [heads.kind.logit(features) for heads in self.categories.values()]
        likeliest = max(kinds)
        shares = [exp(kind - likeliest) for kind in kinds]
        return Scores(dict(zip(CATEGORIES, (harmful * share for share in shares), strict=True))).with_parents()

    def features(self, vector: Sequence[float], text: str) -> Features:
        """Return what the heads look at."""
        places = [sum(map(mul, way, vector)) - start for way, start in zip(self.directions, self.middle, strict=True)]
        products = [one * other for number, one in enumerate(places) for other in places[number:]]
        return Features(vector, products, buckets(text, self.buckets))


def merged(chunks: Sequence[Scores]) -> Scores:
    """Return the scores of a text from those of its chunks: the highest in each category, and lower the more chunks
    there are, as each is a chance to be wrong. The odds are divided by the square root of their number, as far as that
    counts: with less, too many long harmless texts are flagged, with more, harmful sentences among others are missed
    (docs/moderation.md).
    """
    doubt = sqrt(min(max(len(chunks), 1), _DOUBTED))
    highest = Scores.merged(*chunks).values
    return Scores({name: score / (score + (1.0 - score) * doubt) for name, score in highest.items()})


@cache
def load_heads(file: Path = FILE) -> Heads:
    """Return the heads of a file, which is read once. Raises ``msgspec.ValidationError`` when they are none."""
    return msgspec.json.decode(file.read_bytes(), type=Heads)


def _log_sum_exp(logits: Sequence[float]) -> float:
    highest = max(logits)
    return highest + log(sum(exp(each - highest) for each in logits))


def _sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + exp(-logit)) if logit >= 0.0 else exp(logit) / (1.0 + exp(logit))


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
