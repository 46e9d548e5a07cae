"""Prefixes kept as bytes in main memory, where they cost running sequences nothing.

Attention goes over all cells of a unified cache up to the last one in use, so finished conversations are kept here
until they go on. A prefix is cut into blocks, each with the state of its own tokens, and prefixes that begin alike have
their first blocks in common: a system prompt lies here once, and of a conversation that has grown only the new tokens
are saved. Knows tokens and bytes; what the bytes mean is llama.cpp's business.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence as TokenSequence
from itertools import count

from llamaserve.engine.sequence import common_prefix

BLOCK = 256  # tokens: saved or brought back in a few milliseconds (starter model: 6 MB)


class Block:
    """Consecutive tokens of some prefixes, and their state. Only the last one of a prefix may be a short one."""

    __slots__ = ("children", "last_used", "parent", "state", "tokens")

    def __init__(self, parent: Block | None, tokens: list[int], state: bytearray) -> None:
        self.parent = parent
        self.tokens = tokens
        self.state = state
        self.children: dict[tuple[int, ...], Block] = {}
        self.last_used = 0


class Spill:
    """The spilled prefixes of one context: a tree of blocks of at most ``budget`` bytes."""

    def __init__(self, budget: int = 0, *, in_blocks: bool = True) -> None:
        """With a ``budget`` of 0 nothing is kept. ``in_blocks`` must be off for a memory whose state can't be put
        together from those of parts, and serves as a whole only: each prefix is one block then.
        """
        self.budget = budget
        self.in_blocks = in_blocks
        self.size = 0  # bytes in use
        self._length = BLOCK if in_blocks else sys.maxsize
        self._root = Block(None, [], bytearray())
        self._clock = count(1)

    def missing(self, tokens: list[int]) -> tuple[int, int] | None:
        """Return where the first block of a prefix that is not here begins and ends; None when all of it is here."""
        *_, last = self._path(tokens)
        start = _end(last)
        rest = tokens[start : start + self._length]
        if not rest or (self.in_blocks and any(child.tokens[: len(rest)] == rest for child in last.children.values())):
            return None
        return start, start + len(rest)

    def add(self, tokens: list[int], state: bytearray) -> bool:
        """Take the state of the block that ``missing`` names. False when there is no room for it beside those of the
        same prefix before it; other blocks make room, those unused longest and without successors first.
        """
        *_, parent = self._path(tokens)
        if sum(len(each.state) for each in _line(parent)) + len(state) > self.budget:
            return False
        start = _end(parent)
        block = Block(parent, tokens[start : start + self._length], state)
        for key, other in list(parent.children.items()):
            if self.in_blocks and other.tokens == block.tokens[: len(other.tokens)]:
                self._drop(key, other)  # a last block that has grown
        parent.children[tuple(block.tokens)] = block
        self.size += len(state)
        self._touch(block)
        while self.size > self.budget:
            self._drop(*min(self._leaves(), key=lambda leaf: leaf[1].last_used))
        return True

    def longest(self, wanted: TokenSequence[int]) -> tuple[int, list[Block]]:
        """Return how many of the wanted tokens the best prefix here has, and its blocks up to the one in which it
        departs from them.
        """
        *_, last = self._path(wanted)
        start = best = _end(last)
        for child in last.children.values():
            common = start + common_prefix(child.tokens, wanted[start : start + len(child.tokens)])
            if common > best and (self.in_blocks or common == len(child.tokens)):
                best, last = common, child
        if best:
            self._touch(last)
        return best, [*_line(last)][::-1]

    def clear(self) -> None:
        """Forget all."""
        self._root.children.clear()
        self.size = 0

    def _path(self, tokens: TokenSequence[int]) -> Iterator[Block]:
        """Yield the root and those blocks, one after the other, that begin these tokens."""
        block, start = self._root, 0
        while True:
            yield block
            child = block.children.get(tuple(tokens[start : start + self._length]))
            if child is None:
                return
            block, start = child, start + len(child.tokens)

    def _touch(self, block: Block) -> None:
        now = next(self._clock)
        for each in _line(block):
            each.last_used = now

    def _leaves(self) -> Iterator[tuple[tuple[int, ...], Block]]:
        blocks = list(self._root.children.items())
        while blocks:
            key, block = blocks.pop()
            if block.children:
                blocks += block.children.items()
            else:
                yield key, block

    def _drop(self, key: tuple[int, ...], block: Block) -> None:
        assert block.parent is not None
        del block.parent.children[key]
        self.size -= len(block.state)


def _line(block: Block) -> Iterator[Block]:
    """Yield a block and those before it, without the root."""
    each: Block | None = block
    while each is not None and each.parent is not None:
        yield each
        each = each.parent


def _end(block: Block) -> int:
    """Return how many tokens there are up to the end of a block."""
    return sum(len(each.tokens) for each in _line(block))
