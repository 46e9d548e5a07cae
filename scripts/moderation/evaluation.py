"""What the heads get right and wrong: on sentences that they did not learn from, and on longer texts in chunks.

All scores come from the code that the server runs, with the rounded numbers that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamaserve.moderation.categories import CATEGORIES, PARENT, Scores
from llamaserve.moderation.chunks import chunks
from llamaserve.moderation.heads import Heads, merged
from moderation.data import BENIGN, DANGEROUS, Data, LongText, Sentence
from moderation.embedding import Vectors, embed
from moderation.training import FOLDS, Array, Mask, folds, train, words_of

LEAST_ACCURACY = 0.85  # of ``flagged``, by cross-validation
MOST_FALSE = 0.10  # of the sentences that only look dangerous
_SEED = 1  # of the folds; those within training have another
_PLACES = 12  # sentences of a text that is put together
_MIXED = 100  # such texts of a fold


@dataclass(frozen=True)
class Counts:
    """How many of some sentences or texts are flagged, by what they are, and how many there are."""

    flagged: Mapping[str, int]
    all: Mapping[str, int]

    def share(self, kind: str) -> float:
        """Return which part is flagged."""
        return self.flagged[kind] / self.all[kind]

    @property
    def accuracy(self) -> float:
        """Which part is judged as it should be."""
        right = (self.flagged[kind] if kind == "harmful" else self.all[kind] - self.flagged[kind] for kind in self.all)
        return sum(right) / sum(self.all.values())


@dataclass(frozen=True)
class Category:
    """How a category's flag fits what is in it; its children are in it, too."""

    sentences: int
    precision: float
    recall: float


@dataclass(frozen=True)
class Report:
    """Everything measured. ``unseen`` is by the style that was not learned from."""

    cross_validation: Counts
    unseen: Mapping[str, Counts]
    categories: Mapping[str, Category]
    long_texts: Counts
    mixed: Mapping[str, tuple[int, int]]  # texts put together of sentences: flagged, and all

    @property
    def unseen_together(self) -> Counts:
        """The counts of all styles, each of which was judged by what had learned from the others."""
        return _sum(list(self.unseen.values()))

    @property
    def meets_goals(self) -> bool:
        """Whether the classifier is good enough to be shipped."""
        counts = self.cross_validation
        return counts.accuracy >= LEAST_ACCURACY and counts.share(DANGEROUS) <= MOST_FALSE


@dataclass(frozen=True)
class Material:
    """The data with their vectors and words, and the model that the vectors are from."""

    data: Data
    vectors: Vectors
    words: Array
    model: str
    sha256: str
    file: Path

    @classmethod
    def of(cls, data: Data, model: str, sha256: str, file: Path) -> Material:
        """Embed the sentences."""
        texts = [each.text for each in data.sentences]
        return cls(data, embed(texts, file), words_of(texts), model, sha256, file)

    def heads(self, learned_from: Mask | None = None) -> Heads:
        """Return heads that have learned from some of the sentences, or from all."""
        rows = np.ones(len(self.vectors), bool) if learned_from is None else learned_from
        kept = [each for each, row in zip(self.data.sentences, rows, strict=True) if row]
        return train(self.vectors[rows], self.words[rows], kept).heads(self.model, self.sha256, self.data.sha256)


def evaluate(material: Material, say: Callable[[str], None]) -> Report:
    """Train again and again, each time without what is then judged."""
    sentences = material.data.sentences
    fold = folds(sentences, _SEED)
    flags: list[Mapping[str, bool]] = [{}] * len(sentences)
    mixed = {"harmless": [0, 0], "with a harmful one": [0, 0]}
    for number in range(FOLDS):
        say(f"cross-validation, fold {number + 1} of {FOLDS}")
        heads, part = material.heads(fold != number), np.flatnonzero(fold == number).tolist()
        for place in part:
            flags[place] = heads.scores(material.vectors[place].tolist(), sentences[place].text).flags(heads.thresholds)
        for kind, flagged in _mixed(heads, [sentences[place] for place in part], material.file).items():
            mixed[kind][0] += sum(flagged)
            mixed[kind][1] += len(flagged)
    unseen, long_texts = {}, []
    for style in material.data.styles:
        say(f"all styles but {style}")
        own = np.array([each.style == style for each in sentences])
        heads = material.heads(~own)
        scores = [
            heads.scores(material.vectors[place].tolist(), sentences[place].text)
            for place in np.flatnonzero(own).tolist()
        ]
        judged = [each.flagged(heads.thresholds) for each in scores]
        unseen[style] = _counts([each for each in sentences if each.style == style], judged)
        texts = [each for each in material.data.long_texts if each.style == style]
        long_texts.append(_long_counts(texts, _flagged(heads, [each.text for each in texts], material.file)))
    return Report(
        cross_validation=_counts(sentences, [any(each.values()) for each in flags]),
        unseen=unseen,
        categories={name: _category(name, sentences, flags) for name in CATEGORIES},
        long_texts=_sum(long_texts),
        mixed={kind: (flagged, count) for kind, (flagged, count) in mixed.items()},
    )


def scores_of(heads: Heads, texts: Sequence[str], file: Path) -> list[Scores]:
    """Return the scores of texts of any length, as the server finds them."""
    pieces = [chunks(text) for text in texts]
    vectors = iter(embed([piece for each in pieces for piece in each], file).tolist())
    return [merged([heads.scores(next(vectors), piece) for piece in each]) for each in pieces]


def _flagged(heads: Heads, texts: Sequence[str], file: Path) -> list[bool]:
    return [each.flagged(heads.thresholds) for each in scores_of(heads, texts, file)] if texts else []


def _mixed(heads: Heads, sentences: Sequence[Sentence], file: Path) -> dict[str, list[bool]]:
    """Return whether texts are flagged that are made of harmless sentences, and of those with a harmful one."""
    random = np.random.default_rng(_SEED)
    benign = [each.text for each in sentences if each.kind == BENIGN]
    harmful = [each.text for each in sentences if each.is_harmful]
    if not benign or not harmful:
        return {}
    texts: dict[str, list[str]] = {"harmless": [], "with a harmful one": []}
    for _ in range(_MIXED):
        chosen = [benign[place] for place in random.integers(len(benign), size=_PLACES).tolist()]
        texts["harmless"].append(" ".join(chosen))
        chosen[int(random.integers(_PLACES))] = harmful[int(random.integers(len(harmful)))]
        texts["with a harmful one"].append(" ".join(chosen))
    return {kind: _flagged(heads, each, file) for kind, each in texts.items()}


def _counts(sentences: Sequence[Sentence], judged: Sequence[bool]) -> Counts:
    flagged, everything = (
        dict.fromkeys(("harmful", BENIGN, DANGEROUS), 0),
        dict.fromkeys(("harmful", BENIGN, DANGEROUS), 0),
    )
    for sentence, flag in zip(sentences, judged, strict=True):
        kind = "harmful" if sentence.is_harmful else sentence.kind
        flagged[kind] += flag
        everything[kind] += 1
    return Counts(flagged, everything)


def _long_counts(texts: Sequence[LongText], judged: Sequence[bool]) -> Counts:
    flagged, everything = {"harmful": 0, BENIGN: 0}, {"harmful": 0, BENIGN: 0}
    for text, flag in zip(texts, judged, strict=True):
        kind = "harmful" if text.categories else BENIGN
        flagged[kind] += flag
        everything[kind] += 1
    return Counts(flagged, everything)


def _sum(counts: Sequence[Counts]) -> Counts:
    kinds = counts[0].all
    flagged = {kind: sum(each.flagged[kind] for each in counts) for kind in kinds}
    return Counts(flagged, {kind: sum(each.all[kind] for each in counts) for kind in kinds})


def _category(name: str, sentences: Sequence[Sentence], flags: Sequence[Mapping[str, bool]]) -> Category:
    is_in = [name in (each.kind, PARENT.get(each.kind)) for each in sentences]
    flagged = [each[name] for each in flags]
    both = sum(one and other for one, other in zip(is_in, flagged, strict=True))
    return Category(sum(is_in), both / sum(flagged) if any(flagged) else float("nan"), both / sum(is_in))
