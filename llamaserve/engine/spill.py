"""Prefixes kept as bytes in main memory, where they cost running sequences nothing.

Attention goes over all cells of a unified cache up to the last one in use, so finished conversations are kept here
until they go on. A prefix is cut into blocks, each with the state of its own tokens, and prefixes that begin alike have
their first blocks in common: a system prompt lies here once, and of a conversation that has grown only the new tokens
are saved. Prefixes that were evaluated with different LoRA adapters have nothing in common. Blocks of a file from an
earlier life are among the others: their states stay in the file and take no memory. Knows tokens and bytes; what the
bytes mean is llama.cpp's business.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence as TokenSequence
from itertools import count

from llamaserve.engine.saved_prefixes import NOTHING, StoredBlock, StoredState
from llamaserve.engine.sequence import AdapterKey, common_prefix

BLOCK = 256  # tokens: saved or brought back in a few milliseconds (starter model: 6 MB)


class Block:
    """Consecutive tokens of some prefixes, and their state. Only the last one of a prefix may be a short one."""

    __slots__ = ("children", "last_used", "parent", "state", "tokens")

    def __init__(self, parent: Block | None, tokens: list[int], state: bytearray | StoredState) -> None:
        self.parent = parent
        self.tokens = tokens
        self.state = state
        self.children: dict[tuple[int, ...], Block] = {}
        self.last_used = 0

    @property
    def size(self) -> int:
        """Bytes of main memory that the state takes."""
        return len(self.state) if isinstance(self.state, bytearray) else 0

    def load(self) -> bytearray | None:
        """Return the state; None when it lies in a file and is not as it was written."""
        return self.state if isinstance(self.state, bytearray) else self.state.read()


class Spill:
    """The spilled prefixes of one context: a tree of blocks for each set of adapters, of at most ``budget`` bytes
    together.
    """

    def __init__(self, budget: int = 0, *, in_blocks: bool = True) -> None:
        """With a ``budget`` of 0 nothing is kept. ``in_blocks`` must be off for a memory whose state can't be put
        together from those of parts, and serves as a whole only: each prefix is one block then.
        """
        self.budget = budget
        self.in_blocks = in_blocks
        self.size = 0  # bytes in use
        self.clock = count(1)  # of uses
        self._length = BLOCK if in_blocks else sys.maxsize
        self._roots: dict[AdapterKey, Block] = {}

    @property
    def block(self) -> int:
        """How many tokens a block has that others follow; 0 where each prefix is one block."""
        return self._length if self.in_blocks else 0

    def missing(self, tokens: list[int], adapters: AdapterKey = ()) -> tuple[int, int] | None:
        """Return where the first block of a prefix that is not here begins and ends; None when all of it is here."""
        *_, last = self._path(self._root(adapters), tokens)
        start = _end(last)
        rest = tokens[start : start + self._length]
        if not rest or (self.in_blocks and any(child.tokens[: len(rest)] == rest for child in last.children.values())):
            return None
        return start, start + len(rest)

    def add(self, tokens: list[int], state: bytearray, adapters: AdapterKey = ()) -> bool:
        """Take the state of the block that ``missing`` names. False when there is no room for it beside those of the
        same prefix before it; other blocks make room, those unused longest and without successors first.
        """
        root = self._root(adapters)
        *_, parent = self._path(root, tokens)
        if sum(each.size for each in _line(parent)) + len(state) > self.budget:
            return False
        start = _end(parent)
        block = Block(parent, tokens[start : start + self._length], state)
        for other in list(parent.children.values()):
            if self.in_blocks and other.tokens == block.tokens[: len(other.tokens)]:
                self._drop(other)  # a last block that has grown
        parent.children[tuple(block.tokens)] = block
        self._roots[adapters] = root
        self.size += len(state)
        self._touch(block)
        self._shrink()
        return True

    def longest(self, wanted: TokenSequence[int], adapters: AdapterKey = ()) -> tuple[int, list[Block]]:
        """Return how many of the wanted tokens the best prefix here has, and its blocks up to the one in which it
        departs from them.
        """
        *_, last = self._path(self._root(adapters), wanted)
        start = best = _end(last)
        for child in last.children.values():
            common = start + common_prefix(child.tokens, wanted[start : start + len(child.tokens)])
            if common > best and (self.in_blocks or common == len(child.tokens)):
                best, last = common, child
        if best:
            self._touch(last)
        return best, [*_line(last)][::-1]

    def cut(self, tokens: list[int], adapters: AdapterKey) -> Iterator[tuple[list[int], Block | None]]:
        """Yield the parts that a prefix is cut into, and the blocks of those that are here."""
        _, *blocks = self._path(self._root(adapters), tokens)
        for number, start in enumerate(range(0, len(tokens), self._length)):
            yield tokens[start : start + self._length], blocks[number] if number < len(blocks) else None

    def prefixes(self) -> Iterator[tuple[int, AdapterKey, list[int]]]:
        """Yield the prefixes that are no other's beginning: when each was used last, and what it is."""
        for adapters, root in self._roots.items():
            for block in _below(root):
                if not block.children:
                    blocks = [*_line(block)][::-1]
                    yield block.last_used, adapters, [token for each in blocks for token in each.tokens]

    @property
    def stored(self) -> int:
        """Bytes of states in files."""
        blocks = (block for root in self._roots.values() for block in _below(root))
        return sum(block.state.size for block in blocks if isinstance(block.state, StoredState))

    def limit(self, budget: int) -> None:
        """Have another budget, and drop what is over it."""
        self.budget = budget
        self._shrink()

    def adopt(self, stored: Iterable[StoredBlock]) -> None:
        """Take the blocks of a file, while there are no others; the prefixes used last come first."""
        assert not self._roots
        blocks: list[Block] = []
        for each in stored:
            root = self._roots.setdefault(each.adapters, Block(None, [], bytearray()))
            parent = root if each.parent == NOTHING else blocks[each.parent]
            block = parent.children[tuple(each.tokens)] = Block(parent, each.tokens, each.state)
            blocks.append(block)
        for block in reversed(blocks):
            self._touch(block)

    def discard(self, block: Block) -> None:
        """Forget a block and all that follow it, if it is still here."""
        if block.parent is not None and block.parent.children.get(tuple(block.tokens)) is block:
            for each in [block, *_below(block)][::-1]:
                self._drop(each)

    def clear(self, bad: AdapterKey = ()) -> None:
        """Forget what is in memory, and of what is in a file that which was evaluated with some ``bad`` adapters."""
        if bad:
            self._roots.pop(bad, None)
        for root in self._roots.values():
            for block in [root, *_below(root)]:
                block.children = {tokens: child for tokens, child in block.children.items() if not child.size}
        self._roots = {adapters: root for adapters, root in self._roots.items() if root.children}
        self.size = 0

    def forget(self, adapter: str) -> None:
        """Forget what was evaluated with an adapter."""
        for adapters, root in list(self._roots.items()):
            if any(name == adapter for name, _ in adapters):
                self.size -= sum(block.size for block in _below(root))
                del self._roots[adapters]

    def _root(self, adapters: AdapterKey) -> Block:
        return self._roots.get(adapters) or Block(None, [], bytearray())

    def _path(self, root: Block, tokens: TokenSequence[int]) -> Iterator[Block]:
        """Yield the root and those blocks, one after the other, that begin these tokens."""
        block, start = root, 0
        while True:
            yield block
            child = block.children.get(tuple(tokens[start : start + self._length]))
            if child is None:
                return
            block, start = child, start + len(child.tokens)

    def _touch(self, block: Block) -> None:
        now = next(self.clock)
        for each in _line(block):
            each.last_used = now

    def _shrink(self) -> None:
        """Drop blocks, those unused longest first, until the rest is within the budget. Nothing in memory is followed
        by what is in a file.
        """
        while self.size > self.budget:
            self._drop(min(self._leaves(), key=lambda leaf: leaf.last_used))

    def _leaves(self) -> Iterator[Block]:
        below = (block for root in self._roots.values() for block in _below(root))
        return (block for block in below if block.size and not block.children)

    def _drop(self, block: Block) -> None:
        assert block.parent is not None
        del block.parent.children[tuple(block.tokens)]
        self.size -= block.size
        if block.parent.parent is None and not block.parent.children:
            self._roots = {adapters: root for adapters, root in self._roots.items() if root.children}


def _line(block: Block) -> Iterator[Block]:
    """Yield a block and those before it, without the root."""
    each: Block | None = block
    while each is not None and each.parent is not None:
        yield each
        each = each.parent


def _below(root: Block) -> Iterator[Block]:
    """Yield all blocks that come after one."""
    blocks = list(root.children.values())
    while blocks:
        block = blocks.pop()
        blocks += block.children.values()
        yield block


def _end(block: Block) -> int:
    """Return how many tokens there are up to the end of a block."""
    return sum(len(each.tokens) for each in _line(block))
