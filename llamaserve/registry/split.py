"""The names of a model's files when it was split into several: ``NAME-00001-of-00003.gguf`` and so on.

llama.cpp is given the first and finds the others by these names, so a model is named by its first part everywhere.
This module knows names only; whether the files are there, and belong together, is for others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class Part:
    """What a file's name says: it is part ``number`` of ``count``, counted from 1, of the model ``stem``."""

    stem: str
    number: int
    count: int

    def sibling(self, number: int) -> str:
        """Return the name of another part of the same model."""
        return f"{self.stem}-{number:05d}-of-{self.count:05d}.gguf"


def part_of(name: str) -> Part | None:
    """Return which part a file name or path names; None for a file in one piece."""
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found["number"]) <= int(found["count"]):
        return None
    return Part(found["stem"], int(found["number"]), int(found["count"]))


def part_names(name: str) -> tuple[str, ...]:
    """Return the names of all files of the model whose first part, or only file, has this name."""
    part = part_of(name)
    if part is None or part.number != 1:
        return (name,)
    return tuple(part.sibling(number) for number in range(1, part.count + 1))


def part_paths(path: Path) -> tuple[Path, ...]:
    """Return all files of the model with this first part, which lie in one folder."""
    return tuple(path.with_name(name) for name in part_names(path.name)) if path.name else (path,)


def stem(name: str) -> str:
    """Return a file name without its ending, and without the number of a part."""
    part = part_of(name)
    return part.stem if part else Path(name).stem
