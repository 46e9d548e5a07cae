"""What the heads get right and wrong: on sentences that they did not learn from, and on longer texts in chunks.

All scores come from the code that the server runs, with the rounded numbers that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llamaserve.moderation.categories import CATEGORIES, PARENT, Scores
from llamaserve.moderation.chunks import chunks
from llamaserve.moderation.heads import Heads, merged
from llamaserve.moderation.spelling import plain
from moderation.data import BENIGN, DANGEROUS, HARMLESS, Data, LongText, Sentence
from moderation.embedding import Vectors, embed
from moderation.training import FOLDS, Array, Mask, folds, grouped_folds, train, words_of

EASY, HARD, ALL = "not hard", "hard", "all"  # parts of the sentences
LEAST_SENTENCES = 400  # that are not hard
LEAST_ACCURACY = 0.85  # of ``flagged``, by cross-validation, on those
MOST_FALSE = 0.10  # of the sentences that only look dangerous, of those and of all
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


Parts = Mapping[str, Counts]  # by part of the sentences, those that have any


@dataclass(frozen=True)
class Report:
    """Everything measured. ``divisions`` has the counts of each cross-validation, of which every one has the sentences
    in other folds, ``grouped`` those of one in which sentences that are alike are in the same fold. ``unseen`` is by
    the style that was not learned from.
    """

    divisions: Sequence[Parts]
    grouped: Parts
    unseen: Mapping[str, Counts]
    categories: Mapping[str, Category]
    long_texts: Counts
    mixed: Mapping[str, tuple[int, int]]  # texts put together of sentences: flagged, and all

    def of(self, part: str) -> list[Counts]:
        """Return the counts of a part of the sentences in each division."""
        return [division[part] for division in self.divisions]

    @property
    def parts(self) -> list[str]:
        """The parts of the sentences that there are."""
        return list(self.divisions[0])

    @property
    def meets_goals(self) -> bool:
        """Whether the classifier is good enough to be shipped, by whichever division: right about enough of the
        sentences that are not hard, and with few of those flagged that only look dangerous.
        """
        right = all(counts.accuracy >= LEAST_ACCURACY for counts in self.of(EASY))
        return right and all(counts.share(DANGEROUS) <= MOST_FALSE for counts in [*self.of(EASY), *self.of(ALL)])


@dataclass(frozen=True)
class Material:
    """The data with their vectors and words, and the model that the vectors are from. ``chunks`` has the chunks of each
    sentence with their vectors, of which the server judges a text.
    """

    data: Data
    vectors: Vectors
    words: Array
    chunks: Sequence[Sequence[tuple[str, list[float]]]]
    model: str
    sha256: str
    file: Path

    @classmethod
    def of(cls, data: Data, model: str, sha256: str, file: Path) -> Material:
        """Embed the sentences, and their chunks where they have several."""
        texts = [plain(each.text) for each in data.sentences]
        pieces = [_chunks(text) for text in texts]
        several = [piece for text, each in zip(texts, pieces, strict=True) if each != [text] for piece in each]
        vectors = embed([*texts, *several], file)
        known = dict(zip([*texts, *several], vectors.tolist(), strict=True))
        chunked = [[(piece, known[piece]) for piece in each] for each in pieces]
        return cls(data, vectors[: len(texts)], words_of(texts), chunked, model, sha256, file)

    def heads(self, learned_from: Mask | None = None) -> Heads:
        """Return heads that have learned from some of the sentences, or from all."""
        rows = np.ones(len(self.vectors), bool) if learned_from is None else learned_from
        kept = [each for each, row in zip(self.data.sentences, rows, strict=True) if row]
        return train(self.vectors[rows], self.words[rows], kept).heads(self.model, self.sha256, self.data.sha256)

    def flags(self, heads: Heads, place: int) -> Mapping[str, bool]:
        """Return in which categories heads see the sentence at a place."""
        scores = merged([heads.scores(vector, piece) for piece, vector in self.chunks[place]])
        return scores.flags(heads.thresholds)


def evaluate(material: Material, say: Callable[[str], None]) -> Report:
    """Train again and again, each time without what is then judged. Raises ``ValueError`` when that cannot be done."""
    sentences = material.data.sentences
    divisions: list[list[Mapping[str, bool]]] = []
    mixed: dict[str, tuple[int, int]] = {}
    for seed in _SEEDS:
        fold = folds(sentences, seed)
        divisions.append(_cross_validated(material, fold, f"cross-validation {seed} of {len(_SEEDS)}", say))
    say("cross-validation with alike sentences in one fold")
    grouped = _cross_validated(material, grouped_folds(material.vectors), "alike sentences together", say)
    fold = folds(sentences, _SEEDS[0])
    for number in range(FOLDS):
        say(f"longer texts, fold {number + 1} of {FOLDS}")
        part = [each for each, own in zip(sentences, fold == number, strict=True) if own]
        texts = _mixed(material.heads(fold != number), part, material.file)
        mixed = {kind: _added(mixed.get(kind, (0, 0)), flagged) for kind, flagged in texts.items()}
    unseen, long_texts = {}, []
    for style in material.data.styles if len(material.data.styles) > 1 else ():
        say(f"all styles but {style}")
        own = np.array([each.style == style for each in sentences])
        heads = material.heads(~own)
        found = [any(material.flags(heads, place).values()) for place in np.flatnonzero(own).tolist()]
        unseen[style] = _counts([each for each in sentences if each.style == style], found)
        long = [each for each in material.data.long_texts if each.style == style]
        long_texts.append(_long_counts(long, _flagged(heads, [each.text for each in long], material.file)))
    return Report(
        divisions=[_parts(sentences, each) for each in divisions],
        grouped=_parts(sentences, grouped),
        unseen=unseen,
        categories={name: _category(name, sentences, divisions) for name in CATEGORIES},
        long_texts=total(long_texts),
        mixed=mixed,
    )


def _cross_validated(
    material: Material, fold: npt.NDArray[np.int64], name: str, say: Callable[[str], None]
) -> list[Mapping[str, bool]]:
    """Return the flags of each sentence, by heads that have learned from the other folds."""
    flags: list[Mapping[str, bool]] = [{}] * len(fold)
    for number in range(FOLDS):
        say(f"{name}, fold {number + 1} of {FOLDS}")
        heads = material.heads(fold != number)
        for place in np.flatnonzero(fold == number).tolist():
            flags[place] = material.flags(heads, place)
    return flags


def total(counts: Sequence[Counts]) -> Counts:
    """Return the counts of all together."""
    kinds = counts[0].all if counts else {"harmful": 0, BENIGN: 0}
    flagged = {kind: sum(each.flagged[kind] for each in counts) for kind in kinds}
    return Counts(flagged, {kind: sum(each.all[kind] for each in counts) for kind in kinds})


def scores_of(heads: Heads, texts: Sequence[str], file: Path) -> list[Scores]:
    """Return the scores of texts of any length, as the server finds them."""
    pieces = [_chunks(plain(text)) for text in texts]
    vectors = iter(embed([piece for each in pieces for piece in each], file).tolist())
    return [merged([heads.scores(next(vectors), piece) for piece in each]) for each in pieces]


def _chunks(text: str) -> list[str]:
    return list(dict.fromkeys(chunks(text)))


def _flagged(heads: Heads, texts: Sequence[str], file: Path) -> list[bool]:
    return [each.flagged(heads.thresholds) for each in scores_of(heads, texts, file)] if texts else []


def _mixed(heads: Heads, sentences: Sequence[Sentence], file: Path) -> dict[str, list[bool]]:
    """Return whether texts are flagged that are put together of sentences: of harmless ones, of those with some that
    look dangerous, and of those with a harmful one.
    """
    random = np.random.default_rng(0)

    def some(texts: Sequence[str], count: int) -> list[str]:
        return [texts[place] for place in random.integers(len(texts), size=count).tolist()]

    harmless, looking_so, harmful = (
        [each.text for each in sentences if each.kind == BENIGN],
        [each.text for each in sentences if each.kind == DANGEROUS],
        [each.text for each in sentences if each.is_harmful],
    )
    texts: dict[str, list[str]] = {}
    for size, count in _MIXED.items():
        for _ in range(count):
            chosen, other, places = some(harmless, size), some(looking_so, size // 4), random.permutation(size).tolist()
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


def _parts(sentences: Sequence[Sentence], flags: Sequence[Mapping[str, bool]]) -> Parts:
    """Return the counts of each part of the sentences."""
    judged = [any(each.values()) for each in flags]
    wanted = {EASY: [not each.hard for each in sentences], HARD: [each.hard for each in sentences]}
    wanted[ALL] = [True] * len(sentences)
    return {
        part: _counts([*compress(sentences, chosen)], [*compress(judged, chosen)])
        for part, chosen in wanted.items()
        if any(chosen)
    }


def _category(name: str, sentences: Sequence[Sentence], divisions: Sequence[Sequence[Mapping[str, bool]]]) -> Category:
    """Return how the flag fits the category, over all divisions."""
    is_in = [name in (each.kind, PARENT.get(each.kind)) for each in sentences]
    flagged = [each[name] for flags in divisions for each in flags]
    both = sum(one and other for one, other in zip(is_in * len(divisions), flagged, strict=True))
    precision = both / sum(flagged) if any(flagged) else float("nan")
    return Category(sum(is_in), precision, both / (sum(is_in) * len(divisions)))
