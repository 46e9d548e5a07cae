"""Prefixes that had to leave the key-value cache, kept as bytes in main memory until they are wanted again.

Bringing one back is a copy (10 ms for 1,500 tokens of the starter model), evaluating it anew is not (4 s). Knows tokens
and bytes; what the bytes mean is llama.cpp's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as TokenSequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Spilled:
    """A prefix and its state."""

    tokens: list[int]
    state: bytearray


class Spill:
    """The spilled prefixes of one context, the latest last, never more than ``budget`` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._prefixes: list[Spilled] = []

    @property
    def size(self) -> int:
        """Bytes in use."""
        return sum(len(each.state) for each in self._prefixes)

    def put(self, prefix: Spilled) -> None:
        """Keep a prefix, and drop the oldest ones where there are too many bytes. One that is too large is not kept."""
        if len(prefix.state) > self.budget:
            return
        self._prefixes.append(prefix)
        while self.size > self.budget:
            del self._prefixes[0]

    def best(self, common: Callable[[TokenSequence[int]], int]) -> tuple[int, Spilled | None]:
        """Return how many tokens of a prefix are wanted, as ``common`` counts them, at most, and of which prefix."""
        counted = [(common(each.tokens), number) for number, each in enumerate(self._prefixes)]
        count, number = max(counted, default=(0, 0))
        return (count, self._prefixes[number]) if count else (0, None)

    def take(self, prefix: Spilled) -> None:
        """Forget a prefix that is brought back."""
        self._prefixes.remove(prefix)

    def clear(self) -> None:
        """Forget all."""
        self._prefixes.clear()
