"""Which tokens lie in the key-value cache, and which sequence may use them.

The cache has a fixed number of slots, each of which holds the evaluated tokens of one sequence: a running one, or a
finished one whose prefix the next request of the same conversation can reuse. All slots share the cells. Knows the
length of things and who owns them; the data itself is behind ``Memory``.
"""

from __future__ import annotations

from collections.abc import Sequence as TokenSequence
from itertools import count
from typing import Protocol

from llamaserve.engine.sequence import Sequence

FAIR_SHARE = 0.2  # of a prefix: enough to be the same conversation, whose answer is asked for once more
_BLOCK = 256  # tokens compared at once: comparing list slices is far faster than comparing tokens


class Memory(Protocol):
    """The key-value cache itself."""

    def truncate(self, sequence: int, length: int) -> int:
        """Keep the first ``length`` tokens of a slot; return how many were kept, which is that or 0."""

    def clear(self) -> None:
        """Forget everything."""


def common_prefix(one: TokenSequence[int], other: TokenSequence[int]) -> int:
    """Return how many tokens the two have in common at their beginning."""
    limit = min(len(one), len(other))
    start = 0
    while start < limit and one[start : start + _BLOCK] == other[start : start + _BLOCK]:
        start += _BLOCK
    start = min(start, limit)
    while start < limit and one[start] == other[start]:
        start += 1
    return start


class _Slot:
    def __init__(self, number: int) -> None:
        self.number = number
        self.owner: Sequence | None = None
        self.prefix: list[int] = []  # the resident tokens of a slot without owner
        self.last_used = 0

    @property
    def cells(self) -> int:
        return self.owner.evaluated if self.owner else len(self.prefix)


class PrefixCache:
    """The slots of one context."""

    def __init__(self, memory: Memory, slots: int, cells: int, *, kept_back: int = 1) -> None:
        """``kept_back`` is the number of a prompt's last tokens that are always evaluated, at least 1."""
        self._kept_back = kept_back
        self._memory = memory
        self._slots = [_Slot(number) for number in range(slots)]
        self._clock = count(1)
        self.cells = cells

    @property
    def used_cells(self) -> int:
        """Number of tokens in the cache."""
        return sum(slot.cells for slot in self._slots)

    @property
    def has_idle_slot(self) -> bool:
        """Whether another sequence could start."""
        return any(slot.owner is None for slot in self._slots)

    def acquire(self, sequence: Sequence) -> None:
        """Give the sequence the idle slot that holds the longest beginning of its tokens.

        A slot counts only if a fair share of what it holds is shared: all chats begin alike, and the prefix of another
        conversation is worth more than its first few tokens. Without one, an empty slot is taken, or the one unused
        longest. At least one token stays to be evaluated, because sampling needs its logits.
        """
        idle = [slot for slot in self._slots if slot.owner is None]
        wanted = sequence.tokens[: -self._kept_back]
        shared = {slot.number: common_prefix(slot.prefix, wanted) for slot in idle}
        own = [slot for slot in idle if shared[slot.number] and shared[slot.number] >= FAIR_SHARE * len(slot.prefix)]
        if own:
            slot = max(own, key=lambda slot: (shared[slot.number], slot.last_used))
        else:
            slot = min(idle, key=lambda slot: slot.last_used if slot.prefix else 0)
        sequence.evaluated = self._truncate(slot, shared[slot.number])
        slot.owner = sequence
        slot.prefix = []
        sequence.slot = slot.number

    def release(self, sequence: Sequence) -> None:
        """Take the slot back; the evaluated tokens stay in it as a prefix for a later sequence."""
        assert sequence.slot is not None
        slot = self._slots[sequence.slot]
        slot.owner = None
        slot.prefix = sequence.tokens[: sequence.evaluated]
        slot.last_used = next(self._clock)
        sequence.slot = None
        sequence.evaluated = 0

    def rewind(self, sequence: Sequence) -> None:
        """Drop what a step that was given up has written beyond the sequence's evaluated tokens."""
        assert sequence.slot is not None
        sequence.evaluated = self._memory.truncate(sequence.slot, sequence.evaluated)

    def forget_all(self) -> None:
        """Drop all that the cache holds, because it may be wrong. Running sequences begin again."""
        self._memory.clear()
        for slot in self._slots:
            slot.prefix = []
            if slot.owner is not None:
                slot.owner.evaluated = 0

    def make_room(self, cells: int) -> bool:
        """Evict idle prefixes, the longest unused first, until so many cells are free; False when that's not enough."""
        idle = sorted((slot for slot in self._slots if slot.owner is None and slot.prefix), key=lambda s: s.last_used)
        free = self.cells - self.used_cells
        while free < cells and idle:
            slot = idle.pop(0)
            free += slot.cells
            self._truncate(slot, 0)
        return free >= cells

    def _truncate(self, slot: _Slot, length: int) -> int:
        if length == len(slot.prefix):
            return length
        kept = self._memory.truncate(slot.number, length)
        del slot.prefix[kept:]
        return kept
