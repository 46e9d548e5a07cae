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
from llamaserve.moderation.spelling import plain
from moderation.data import BENIGN, DANGEROUS, HARMLESS, Data, LongText, Sentence
from moderation.embedding import Vectors, embed
from moderation.training import FOLDS, Array, Mask, folds, train, words_of

LEAST_SENTENCES = 400
LEAST_ACCURACY = 0.85  # of ``flagged``, by cross-validation, on sentences that are not subtle
MOST_FALSE = 0.10  # of the sentences that only look dangerous
_SEEDS = range(1, 6)  # of the divisions into folds; those within training have another
_MIXED = {12: 100, 60: 20}  # how many texts of a fold are put together, by how many sentences they have


@dataclass(frozen=True)
class Counts:
    """How many of some sentences or texts are flagged, by what they are, and how many there are."""

    flagged: Mapping[str, int]
    all: Mapping[str, int]

    def share(self, kind: str) -> float:
        """Return which part is flagged; not a number if there are none."""
        return self.flagged[kind] / self.all[kind] if self.all[kind] else float("nan")

    @property
    def accuracy(self) -> float:
        """Which part is judged as it should be; not a number if there are none."""
        right = (self.flagged[kind] if kind == "harmful" else self.all[kind] - self.flagged[kind] for kind in self.all)
        return sum(right) / sum(self.all.values()) if any(self.all.values()) else float("nan")


@dataclass(frozen=True)
class Category:
    """How a category's flag fits what is in it; its children are in it, too."""

    sentences: int
    precision: float
    recall: float


@dataclass(frozen=True)
class Report:
    """Everything measured. ``divisions`` has the counts of each cross-validation, of which every one has the sentences
    in other folds, and ``direct`` those of the sentences that are not subtle. ``unseen`` is by the style that was not
    learned from.
    """

    divisions: Sequence[Counts]
    direct: Sequence[Counts]
    unseen: Mapping[str, Counts]
    categories: Mapping[str, Category]
    long_texts: Counts
    mixed: Mapping[str, tuple[int, int]]  # texts put together of sentences: flagged, and all

    @property
    def meets_goals(self) -> bool:
        """Whether the classifier is good enough to be shipped, by whichever division: it must be right about enough
        sentences that are not meant to be hard, and must not flag too much of what only looks dangerous anywhere.
        """
        enough = sum(self.direct[0].all.values()) >= LEAST_SENTENCES
        right = all(counts.accuracy >= LEAST_ACCURACY for counts in self.direct)
        return enough and right and all(counts.share(DANGEROUS) <= MOST_FALSE for counts in self.divisions)


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
        texts = [plain(each.text) for each in data.sentences]
        return cls(data, embed(texts, file), words_of(texts), model, sha256, file)

    def heads(self, learned_from: Mask | None = None) -> Heads:
        """Return heads that have learned from some of the sentences, or from all."""
        rows = np.ones(len(self.vectors), bool) if learned_from is None else learned_from
        kept = [each for each, row in zip(self.data.sentences, rows, strict=True) if row]
        return train(self.vectors[rows], self.words[rows], kept).heads(self.model, self.sha256, self.data.sha256)

    def scores(self, heads: Heads, place: int) -> Scores:
        """Return what heads say of the sentence at a place."""
        return heads.scores(self.vectors[place].tolist(), self.data.sentences[place].text)


def evaluate(material: Material, say: Callable[[str], None]) -> Report:
    """Train again and again, each time without what is then judged. Raises ``ValueError`` when that cannot be done."""
    sentences = material.data.sentences
    flags: list[list[Mapping[str, bool]]] = []
    mixed: dict[str, tuple[int, int]] = {}
    for seed in _SEEDS:
        fold = folds(sentences, seed)
        flags.append([{}] * len(sentences))
        for number in range(FOLDS):
            say(f"cross-validation {seed} of {len(_SEEDS)}, fold {number + 1} of {FOLDS}")
            heads, part = material.heads(fold != number), np.flatnonzero(fold == number).tolist()
            for place in part:
                flags[-1][place] = material.scores(heads, place).flags(heads.thresholds)
            if seed == _SEEDS[0]:
                texts = _mixed(heads, [sentences[place] for place in part], material.file)
                mixed = {kind: _added(mixed.get(kind, (0, 0)), flagged) for kind, flagged in texts.items()}
    unseen, long_texts = {}, []
    for style in material.data.styles if len(material.data.styles) > 1 else ():
        say(f"all styles but {style}")
        own = np.array([each.style == style for each in sentences])
        heads = material.heads(~own)
        found = [material.scores(heads, place).flagged(heads.thresholds) for place in np.flatnonzero(own).tolist()]
        unseen[style] = _counts([each for each in sentences if each.style == style], found)
        long = [each for each in material.data.long_texts if each.style == style]
        long_texts.append(_long_counts(long, _flagged(heads, [each.text for each in long], material.file)))
    judged = [[any(each.values()) for each in division] for division in flags]
    return Report(
        divisions=[_counts(sentences, each) for each in judged],
        direct=[_counts(*_direct(sentences, each)) for each in judged],
        unseen=unseen,
        categories={name: _category(name, sentences, flags) for name in CATEGORIES},
        long_texts=total(long_texts),
        mixed=mixed,
    )


def total(counts: Sequence[Counts]) -> Counts:
    """Return the counts of all together."""
    kinds = counts[0].all if counts else {"harmful": 0, BENIGN: 0}
    flagged = {kind: sum(each.flagged[kind] for each in counts) for kind in kinds}
    return Counts(flagged, {kind: sum(each.all[kind] for each in counts) for kind in kinds})


def scores_of(heads: Heads, texts: Sequence[str], file: Path) -> list[Scores]:
    """Return the scores of texts of any length, as the server finds them."""
    pieces = [[*dict.fromkeys(chunks(plain(text)))] for text in texts]
    vectors = iter(embed([piece for each in pieces for piece in each], file).tolist())
    return [merged([heads.scores(next(vectors), piece) for piece in each]) for each in pieces]


def _flagged(heads: Heads, texts: Sequence[str], file: Path) -> list[bool]:
    return [each.flagged(heads.thresholds) for each in scores_of(heads, texts, file)] if texts else []


def _mixed(heads: Heads, sentences: Sequence[Sentence], file: Path) -> dict[str, list[bool]]:
    """Return whether texts are flagged that are put together of sentences: of harmless ones, of those with some that
    look dangerous, and of those with a harmful one.
    """
    random = np.random.default_rng(0)

    def some(texts: Sequence[str], count: int) -> list[str]:
        return [texts[place] for place in random.integers(len(texts), size=count).tolist()]

    plain, looking_so, harmful = (
        [each.text for each in sentences if each.kind == BENIGN],
        [each.text for each in sentences if each.kind == DANGEROUS],
        [each.text for each in sentences if each.is_harmful],
    )
    texts: dict[str, list[str]] = {}
    for size, count in _MIXED.items():
        for _ in range(count):
            chosen, other, places = some(plain, size), some(looking_so, size // 4), random.permutation(size).tolist()
            swapped = [*chosen[len(other) :], *other]
            texts.setdefault(f"{size} sentences, harmless", []).append(" ".join(chosen))
            texts.setdefault(f"{size} sentences, harmless, a quarter of which look dangerous", []).append(
                " ".join(swapped[place] for place in places)
            )
            chosen[places[0]] = some(harmful, 1)[0]
            texts.setdefault(f"{size} sentences, with a harmful one", []).append(" ".join(chosen))
    return {kind: _flagged(heads, each, file) for kind, each in texts.items()}


def _added(counted: tuple[int, int], flagged: Sequence[bool]) -> tuple[int, int]:
    return counted[0] + sum(flagged), counted[1] + len(flagged)


def _counts(sentences: Sequence[Sentence], judged: Sequence[bool]) -> Counts:
    kinds = ["harmful" if sentence.is_harmful else sentence.kind for sentence in sentences]
    return _counted(("harmful", *HARMLESS), kinds, judged)


def _long_counts(texts: Sequence[LongText], judged: Sequence[bool]) -> Counts:
    return _counted(("harmful", BENIGN), ["harmful" if text.categories else BENIGN for text in texts], judged)


def _counted(names: Sequence[str], kinds: Sequence[str], judged: Sequence[bool]) -> Counts:
    flagged, everything = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for kind, flag in zip(kinds, judged, strict=True):
        flagged[kind] += flag
        everything[kind] += 1
    return Counts(flagged, everything)


def _direct(sentences: Sequence[Sentence], judged: Sequence[bool]) -> tuple[list[Sentence], list[bool]]:
    """Return the sentences that are not subtle, and what was found of them."""
    pairs = [(sentence, flag) for sentence, flag in zip(sentences, judged, strict=True) if not sentence.subtle]
    return [sentence for sentence, _ in pairs], [flag for _, flag in pairs]


def _category(name: str, sentences: Sequence[Sentence], divisions: Sequence[Sequence[Mapping[str, bool]]]) -> Category:
    """Return how the flag fits the category, over all divisions."""
    is_in = [name in (each.kind, PARENT.get(each.kind)) for each in sentences]
    flagged = [each[name] for flags in divisions for each in flags]
    both = sum(one and other for one, other in zip(is_in * len(divisions), flagged, strict=True))
    precision = both / sum(flagged) if any(flagged) else float("nan")
    return Category(sum(is_in), precision, both / (sum(is_in) * len(divisions)))
