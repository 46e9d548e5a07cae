"""The sentences and longer texts of ``sentences/*.yaml``, with what they are. Each file has one author's style."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import yaml

from llamaserve.moderation.categories import CATEGORIES

FOLDER: Final = Path(__file__).resolve().parent / "sentences"
BENIGN: Final = "benign"
PEOPLE: Final = "benign_people"  # says who somebody is, which classifiers like to take for hate
DANGEROUS: Final = "benign_dangerous"  # looks so, and is not
HARMLESS: Final = (BENIGN, PEOPLE, DANGEROUS)
LEAST: Final = 10  # sentences of a kind; of fewer, some style or fold has none


@dataclass(frozen=True)
class Sentence:
    """A sentence; its ``kind`` is a category or one of ``HARMLESS``. ``hard`` ones are of files that say so."""

    text: str
    kind: str
    style: str
    hard: bool = False

    @property
    def is_harmful(self) -> bool:
        """Whether it is in a category."""
        return self.kind in CATEGORIES


@dataclass(frozen=True)
class LongText:
    """A text of several sentences, and the categories that at least one of them is in."""

    text: str
    categories: frozenset[str]
    style: str


@dataclass(frozen=True)
class Data:
    """All that there is to learn from and to measure with."""

    sentences: Sequence[Sentence]
    long_texts: Sequence[LongText]

    @property
    def styles(self) -> list[str]:
        """The names of the files."""
        return sorted({sentence.style for sentence in self.sentences})

    def check(self, easy: int = 0) -> None:
        """Raise ``ValueError`` when there is too little of some kind, or fewer than so many sentences are not hard."""
        counts = Counter(sentence.kind for sentence in self.sentences)
        few = [f"{counts[kind]} of {kind}" for kind in (*CATEGORIES, BENIGN, DANGEROUS) if counts[kind] < LEAST]
        if few:
            raise ValueError(f"there must be at least {LEAST} sentences of each kind, and there are {', '.join(few)}")
        if (count := sum(not sentence.hard for sentence in self.sentences)) < easy:
            raise ValueError(
                f"at least {easy} sentences that are not hard are needed to measure, and there are {count}"
            )

    @property
    def sha256(self) -> str:
        """The sum of all that heads learn from, by which it shows whether a file of heads is of these sentences."""
        told = [(each.style, each.kind, each.text) for each in self.sentences]
        return hashlib.sha256(msgspec.json.encode(told)).hexdigest()


class _Long(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    categories: tuple[str, ...]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    harmful: dict[str, tuple[str, ...]]
    benign: tuple[str, ...]
    benign_dangerous: tuple[str, ...]
    long: tuple[_Long, ...]
    benign_people: tuple[str, ...] = ()
    hard: bool = False


def read(folder: Path = FOLDER) -> Data:
    """Return what the files of a folder have. Raises ``ValueError`` for a file that has not the form that it should
    have, and for a sentence that is there twice.
    """
    sentences: list[Sentence] = []
    long_texts: list[LongText] = []
    for path in sorted(folder.glob("*.yaml")):
        try:
            file = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), _File)
        except (yaml.YAMLError, msgspec.ValidationError) as error:
            raise ValueError(f"{path.name}: {error}") from None
        named = {*file.harmful, *(name for long in file.long for name in long.categories)}
        if unknown := named - set(CATEGORIES):
            raise ValueError(f"{path.name} has categories that there are not: {', '.join(sorted(unknown))}")
        harmless = {BENIGN: file.benign, PEOPLE: file.benign_people, DANGEROUS: file.benign_dangerous}
        sentences += [
            Sentence(text, kind, path.stem, file.hard)
            for kind, texts in (file.harmful | harmless).items()
            for text in texts
        ]
        long_texts += [LongText(long.text, frozenset(long.categories), path.stem) for long in file.long]
    if not sentences:
        raise ValueError(f"{folder} has no sentences")
    texts = [*(each.text for each in sentences), *(each.text for each in long_texts)]
    counts = Counter(text.casefold() for text in texts)
    if twice := [text for text, count in counts.items() if count > 1]:
        raise ValueError(f"there twice: {twice[0]!r}")
    return Data(sentences, long_texts)
