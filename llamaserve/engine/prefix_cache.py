"""Which tokens lie in the key-value cache, and which sequences share them.

The cache holds *prefixes*: the evaluated tokens of running sequences, and those of finished ones, since the next
request may begin the same way. A sequence starts with a copy of the longest beginning that any prefix has. In a unified
cache a copy shares the cells, so that the system prompt of ten chats lies there once. Prefixes that nobody continues
move to main memory when other sequences begin, or are cut from their ends when cells are short, those unused longest
first. What was evaluated with other LoRA adapters serves no sequence. Knows the length of things and who holds them;
the data itself is behind ``Memory``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence as TokenSequence
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from llamaserve.engine.saved_prefixes import NOTHING, PrefixFile, PrefixWriter
from llamaserve.engine.sequence import AdapterKey, Sequence, common_prefix
from llamaserve.engine.spill import Spill

SPARE = 64  # finished sequences that are kept beside the running ones; llama.cpp has 256 ids
_WORTH_KEEPING = 64  # tokens: shorter prefixes are evaluated again when the model is loaded again
_WORTH_BRINGING = 16  # tokens: fewer are evaluated about as fast as they are brought back
_WORTH_SAVING = 1024  # idle cells for which a sequence that starts waits until some blocks are saved ...
_SAVED_AT_ONCE = (
    4  # ... which are so many: 10 to 40 ms for the starter model, or what those cells cost in as many steps
)
_GRAIN = 32  # tokens: prefixes are cut to multiples, so that not every step of a full cache has to cut


class Memory(Protocol):
    """The key-value cache itself, by sequence id."""

    def truncate(self, sequence: int, length: int) -> int:
        """Keep the first ``length`` tokens of a sequence; return how many were kept, which is that or 0."""

    def copy(self, source: int, target: int, length: int) -> int:
        """Make an empty sequence begin with the first ``length`` tokens of another one; return how many it now has,
        which is that or 0.
        """

    def save(self, sequence: int, start: int, end: int) -> bytearray:
        """Return the state of a sequence's tokens from ``start`` to ``end``; no bytes when that is not possible."""

    def restore(self, sequence: int, state: bytearray, start: int, end: int) -> bool:
        """Append the tokens from ``start`` to ``end`` to a sequence of ``start`` tokens, from a state that was saved;
        False when that is not possible. The state may have more of them, which need cells meanwhile.
        """

    def clear(self) -> None:
        """Forget everything."""


class _Run:
    """Consecutive cells that several prefixes hold together."""

    __slots__ = ("holders", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.holders = 1


class _Prefix:
    """The resident tokens of one of llama.cpp's sequence ids. ``runs`` are its cells from the first token on that are,
    or were, shared; the rest are its own.
    """

    __slots__ = ("adapters", "id", "idle_tokens", "last_used", "owner", "runs", "saved")

    def __init__(self, number: int) -> None:
        self.id = number
        self.owner: Sequence | None = None
        self.idle_tokens: list[int] = []  # of a prefix without owner
        self.adapters: AdapterKey = ()  # with which its tokens are evaluated
        self.runs: list[_Run] = []
        self.last_used = 0
        self.saved = False  # whether all that main memory has room for is there, of a prefix without owner

    @property
    def length(self) -> int:
        """Number of resident tokens."""
        return self.owner.evaluated if self.owner else len(self.idle_tokens)

    @property
    def tokens(self) -> list[int]:
        """The resident tokens; those of a running sequence go on."""
        return self.owner.tokens if self.owner else self.idle_tokens

    def cells_in_runs(self) -> int:
        """Return the number of cells that are not its own."""
        return sum(run.length for run in self.runs)

    def cells_freed_from(self, length: int) -> int:
        """Return how many cells would be free if only so many tokens were kept."""
        freed, position = 0, 0
        for run in self.runs:
            position += run.length
            if run.holders == 1:
                freed += min(run.length, max(0, position - length))
        return freed + self.length - max(position, length)


def _by_use(prefix: _Prefix) -> int:
    return prefix.last_used


class PrefixCache:
    """The prefixes of one context. Sequences run in ``slots`` sequence ids."""

    def __init__(
        self,
        memory: Memory,
        slots: int,
        cells: int,
        *,
        reuses: bool = True,
        shares_cells: bool = True,
        spare: int = SPARE,
        divisible: bool = True,
        kept_back: int = 1,
        spill: Spill | None = None,
    ) -> None:
        """``reuses``: what was evaluated for one sequence may serve another. ``shares_cells``: a copy takes no cells.
        ``spare``: number of further sequence ids, which hold finished sequences; without, those stay in their slots
        until others need them. ``divisible``: a sequence's tokens can be cut at any place; otherwise only all of them
        can be reused. ``kept_back``: how many of a prompt's last tokens are always evaluated, at least 1. ``spill``:
        where prefixes go that leave the cache; without one they stay until cells are short, and are lost then.
        """
        self._memory = memory
        self._reuses = reuses
        self._shares_cells = shares_cells
        self.divisible = divisible
        self._kept_back = kept_back
        self._slots = [_Prefix(number) for number in range(slots)]
        self._spare = [_Prefix(slots + 1 + number) for number in range(spare)]  # the id between is left to ``Memory``
        self._prefixes = [*self._slots, *self._spare]
        self._moving = reuses and spill is not None  # whether prefixes can leave the cache and come back
        self._spill = spill or Spill()
        self._file: PrefixFile | None = None  # from which blocks there are
        self._clock = self._spill.clock
        self.cells = cells
        self.used_cells = 0  # cells with tokens in them, each counted once however many prefixes share it

    @property
    def idle_slots(self) -> int:
        """How many more sequences could start."""
        return sum(slot.owner is None for slot in self._slots)

    def wanted(self, sequence: Sequence) -> list[int]:
        """Return the tokens that need not be evaluated if they are resident: not the last, whose logits are needed."""
        if not self._reuses:
            return []
        return sequence.tokens[: min(len(sequence.tokens) - self._kept_back, sequence.reusable)]

    def reusable(self, wanted: TokenSequence[int], adapters: AdapterKey = ()) -> int:
        """Return how many of the wanted tokens a sequence with these adapters would find resident if it started now."""
        return max(self._longest(self._prefixes, wanted, adapters)[0], self._spill.longest(wanted, adapters)[0])

    def held_cells(self) -> int:
        """Return the number of cells that running sequences hold."""
        running = [slot for slot in self._slots if slot.owner]
        runs = {id(run): run.length for slot in running for run in slot.runs}
        return sum(runs.values()) + sum(slot.length - slot.cells_in_runs() for slot in running)

    def held_in_common(self, wanted: TokenSequence[int], adapters: AdapterKey = ()) -> int:
        """Return how many of the wanted tokens lie in cells that a running sequence with these adapters holds."""
        if not self._shares_cells:
            return 0
        return self._longest([slot for slot in self._slots if slot.owner], wanted, adapters)[0]

    def acquire(self, sequence: Sequence) -> None:
        """Give the sequence a slot that begins with as many of its tokens as any prefix does."""
        wanted = self.wanted(sequence)
        reusable, donor = self._longest(self._prefixes, wanted, sequence.adapters)
        whole = donor is not None and donor.owner is None and reusable == donor.length
        slot = self._slot_for(donor if whole else None)
        if slot is donor:
            self._cut(slot, reusable)
        elif donor is None:
            self._evict(slot)
        else:
            self._evict(slot)
            self._copy(donor, slot, reusable)
            if whole and slot.length == reusable:
                self._cut(donor, 0)  # it holds nothing that the slot does not
        sequence.slot = slot.id
        sequence.evaluated = slot.length
        slot.owner = sequence
        slot.idle_tokens = []
        slot.adapters = sequence.adapters
        self._make_way()
        self._bring_back(sequence, wanted)

    def advance(self, sequence: Sequence, tokens: int) -> None:
        """Take note that so many more of the sequence's tokens are evaluated."""
        sequence.evaluated += tokens
        self.used_cells += tokens

    def release(self, sequence: Sequence) -> None:
        """Take the slot back; the evaluated tokens stay as a prefix for later sequences."""
        slot = self._slot_of(sequence)
        if sequence.evaluated > len(sequence.tokens):  # guessed right, but after the end that it has come to
            self.rewind(sequence, len(sequence.tokens))
        slot.idle_tokens = sequence.tokens[: sequence.evaluated]
        slot.saved = False
        slot.owner = None
        slot.last_used = next(self._clock)
        sequence.slot = None
        sequence.evaluated = 0
        if not self._reuses:
            self._cut(slot, 0)
        elif self._spare and slot.idle_tokens:
            self._set_aside(slot)

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Keep only the first ``length`` tokens of a running sequence, and nothing that a step which was given up has
        written beyond its evaluated ones. Where llama.cpp can't cut it there, it begins again.
        """
        slot = self._slot_of(sequence)
        kept = self._memory.truncate(slot.id, length)
        self._drop_cells(slot, kept)
        sequence.evaluated = kept

    def forget_all(self, bad: AdapterKey = ()) -> None:
        """Drop all that the cache holds, because it may be wrong. Running sequences begin again. What lies in a file
        was there before, and stays; except what was evaluated with some ``bad`` adapters.
        """
        self._memory.clear()
        self._spill.clear(bad)
        self.used_cells = 0
        for prefix in self._prefixes:
            prefix.idle_tokens = []
            prefix.runs = []
            if prefix.owner is not None:
                prefix.owner.evaluated = 0

    def forget(self, adapter: str) -> None:
        """Drop the idle prefixes that were evaluated with an adapter, which is not there any more."""
        for prefix in self._idle():
            if any(name == adapter for name, _ in prefix.adapters):
                self._cut(prefix, 0)
        self._spill.forget(adapter)

    def save_ahead(self) -> bool:
        """Copy a block of an idle prefix to main memory, so that it can leave the cache at once; False when there is
        nothing to copy.
        """
        return self._moves and any(self._save(prefix, 1) for prefix in self._idle())

    def limit_spill(self, size: int) -> None:
        """Let prefixes take so many bytes of main memory, and drop what is over it."""
        if self._moving:
            self._spill.limit(size)
            for prefix in self._prefixes:
                prefix.saved = False

    def adopt(self, path: Path, identity: str) -> None:
        """Have the prefixes of a file, if it has this identity, before there are others."""
        self._file = PrefixFile.open(path, identity, block=self._spill.block) if self._moving else None
        if self._file is not None:
            self._spill.adopt(self._file.blocks())

    def export(self, path: Path, identity: str, room: int) -> tuple[int, int]:
        """Write the prefixes that are worth it to a file of at most ``room`` bytes, those used last first. Returns how
        many tokens and bytes it has; none when there is nothing to keep, and no file then, or when the disk is so full
        that the former file stays as it is. Raises ``EngineError``.

        The file that was adopted is extended, unless less than half of it is still wanted, or there is no room.
        """
        if not self._moving:
            return 0, 0
        former, self._file = self._file, None
        if former is not None and 2 * self._spill.stored < former.size:
            former = None
        with PrefixWriter(path, identity, block=self._spill.block, room=room, extends=former) as writer:
            self._write_all(writer)
            if not writer.full or writer.extends is None:
                size = writer.finish()
                return writer.tokens if size else 0, size
        return self.export(path, identity, room)

    def make_room(self, cells: int) -> bool:
        """Cut idle prefixes from their ends, those unused longest first, until so many cells are free; False when that
        is not enough. What main memory has room for is saved before.
        """
        if self.cells - self.used_cells >= cells:  # asked in every step
            return True
        for prefix in self._idle():
            missing = cells - (self.cells - self.used_cells)
            if missing <= 0:
                return True
            keep = max(0, prefix.length - missing) // _GRAIN * _GRAIN
            if self.divisible and prefix.cells_freed_from(keep) >= missing:
                self._save(prefix)
                self._cut(prefix, keep)
            else:
                self._evict(prefix)
        return self.cells - self.used_cells >= cells

    def drop_idle(self) -> bool:
        """Drop all prefixes that no running sequence needs; False when there are none."""
        idle = self._idle()
        for prefix in idle:
            self._cut(prefix, 0)
        return bool(idle)

    def _idle(self) -> list[_Prefix]:
        """Return the prefixes that no running sequence has, those unused longest first."""
        return sorted((prefix for prefix in self._prefixes if prefix.idle_tokens), key=_by_use)

    @property
    def _moves(self) -> bool:
        """Whether idle prefixes move to main memory before cells are short. Where a state has no parts they don't: in
        the cache a beginning of theirs may serve, and in main memory all of a conversation would be copied every turn.
        """
        return self._spill.budget > 0 and self._spill.in_blocks

    def _make_way(self) -> None:
        """Move idle prefixes to main memory, as far as there is room for them, since running sequences are faster
        without: attention goes over all cells up to the last one in use.

        Measured with the starter model: 4,000 idle cells make a step of eight sequences 14 % slower, or take 0.15 µs
        for each cell and row. Bringing a token back takes 2 to 3 µs; saving it, which is mostly done already, 2 to 40.
        """
        if not self._moves:
            return
        most = _SAVED_AT_ONCE if self.used_cells - self.held_cells() >= _WORTH_SAVING else 0
        for prefix in self._idle():
            most -= self._save(prefix, most)
            if self._spill.missing(prefix.idle_tokens, prefix.adapters) is None:
                self._cut(prefix, 0)

    def _slot_of(self, sequence: Sequence) -> _Prefix:
        assert sequence.slot is not None
        return self._slots[sequence.slot]

    def _longest(
        self, prefixes: Iterable[_Prefix], wanted: TokenSequence[int], adapters: AdapterKey
    ) -> tuple[int, _Prefix | None]:
        """Return how many of the wanted tokens the best of some prefixes has that were evaluated with these adapters,
        and that one: the latest of equally good ones.
        """
        best, found = 0, None
        for prefix in sorted(prefixes, key=_by_use, reverse=True):
            length, tokens = prefix.length, prefix.tokens
            if min(length, len(wanted)) <= best or tokens[best] != wanted[best] or prefix.adapters != adapters:
                continue  # it can't have more in common: many prefixes begin alike, and comparing them all takes long
            common = min(length, common_prefix(tokens, wanted))
            if common > best and (self.divisible or common == length):
                best, found = common, prefix
        return best, found

    def _slot_for(self, continued: _Prefix | None) -> _Prefix:
        """Return the idle slot for a sequence: the one that it continues, if it lies in a slot, else an empty one, else
        the one unused longest.
        """
        idle = [slot for slot in self._slots if slot.owner is None]
        if continued in idle:
            return continued
        return min(idle, key=lambda slot: slot.last_used if slot.idle_tokens else 0)

    def _set_aside(self, slot: _Prefix) -> None:
        """Move a finished sequence to a spare id, so that its slot is free for another."""
        spare = min(self._spare, key=lambda prefix: prefix.last_used if prefix.idle_tokens else 0)
        self._evict(spare)
        if self._memory.copy(slot.id, spare.id, len(slot.idle_tokens)):
            self._memory.truncate(slot.id, 0)
            spare.idle_tokens, slot.idle_tokens = slot.idle_tokens, []
            spare.runs, slot.runs = slot.runs, []
            spare.adapters = slot.adapters
            spare.last_used, spare.saved = slot.last_used, slot.saved

    def _copy(self, donor: _Prefix, slot: _Prefix, length: int) -> None:
        """Let an empty slot begin like the donor, if llama.cpp can do it."""
        if self._memory.copy(donor.id, slot.id, length) != length:
            return
        slot.idle_tokens = donor.tokens[:length]
        if not self._shares_cells:
            self.used_cells += length
            return
        own = length - donor.cells_in_runs()
        if own > 0:
            donor.runs.append(_Run(own))
        slot.runs = donor.runs[: self._boundary(donor, length)]
        for run in slot.runs:
            run.holders += 1

    def _evict(self, prefix: _Prefix) -> None:
        """Drop an idle prefix from the cache, into main memory if there is some for it and it has cells of its own."""
        if prefix.cells_freed_from(0):
            self._save(prefix)
        self._cut(prefix, 0)

    def _save(self, prefix: _Prefix, most: float = math.inf) -> int:
        """Copy blocks of an idle prefix that main memory does not have, at most so many; return how many it were."""
        saved = 0
        while self._spill.budget and saved < most and not prefix.saved:
            place = self._spill.missing(prefix.idle_tokens, prefix.adapters)
            state = self._memory.save(prefix.id, *place) if place else None
            if state and self._spill.add(prefix.idle_tokens, state, prefix.adapters):
                saved += 1
            else:
                prefix.saved = True
        return saved

    def _write_all(self, writer: PrefixWriter) -> None:
        held = ((math.inf if p.owner else p.last_used, p.adapters, p.tokens[: p.length], p) for p in self._prefixes)
        spilled = ((*prefix, None) for prefix in self._spill.prefixes())
        for _, adapters, tokens, prefix in sorted([*held, *spilled], key=itemgetter(0), reverse=True):
            if len(tokens) >= _WORTH_KEEPING:
                self._write(writer, adapters, tokens, prefix)

    def _write(self, writer: PrefixWriter, adapters: AdapterKey, tokens: list[int], prefix: _Prefix | None) -> None:
        """Write what a file does not have yet of a prefix, which may be in the cache: as much of its beginning as has
        room and is in good order.
        """
        place, start = NOTHING, 0
        for part, block in self._spill.cut(tokens, adapters):
            end = start + len(part)
            found = writer.find(place, adapters, part)
            if found is None:
                state = (block.state if writer.holds(block.state) else block.load()) if block else None
                if state is None and prefix is not None:
                    state = self._memory.save(prefix.id, start, end)
                found = writer.add(place, adapters, part, state) if state else None
            if found is None:
                return
            place, start = found, end

    def _bring_back(self, sequence: Sequence, wanted: TokenSequence[int]) -> None:
        """Let a sequence that starts go on with blocks from main memory, if it has much more of its tokens then."""
        shared, blocks = self._spill.longest(wanted, sequence.adapters)
        if shared < sequence.evaluated + _WORTH_BRINGING:
            return
        end = 0
        for block in blocks:
            end += len(block.tokens)
            if end <= sequence.evaluated:
                continue
            state = block.load()
            if state is None:
                self._spill.discard(block)
            if state is None or not self.make_room(len(block.tokens)):
                return
            if not self._spill.in_blocks:
                self.rewind(sequence, 0)
            start, keep = sequence.evaluated, min(end, shared)
            if not self._memory.restore(self._slot_of(sequence).id, state, start, keep):
                if not block.size:  # a file's, which is not of these settings, whatever it says
                    self._spill.discard(block)
                return
            self.advance(sequence, keep - start)

    def _cut(self, prefix: _Prefix, length: int) -> None:
        """Shorten an idle prefix; to nothing where llama.cpp can't cut it there."""
        if length < len(prefix.idle_tokens):
            kept = self._memory.truncate(prefix.id, length)
            self._drop_cells(prefix, kept)
            del prefix.idle_tokens[kept:]

    def _drop_cells(self, prefix: _Prefix, kept: int) -> None:
        """Take note that a prefix holds only the cells of its first ``kept`` tokens."""
        self.used_cells -= prefix.cells_freed_from(kept)
        if kept < prefix.cells_in_runs():
            first = self._boundary(prefix, kept)
            for run in prefix.runs[first:]:
                run.holders -= 1
            del prefix.runs[first:]

    def _boundary(self, prefix: _Prefix, length: int) -> int:
        """Return how many runs hold the first ``length`` tokens, dividing one that goes on beyond them."""
        position = 0
        for index, run in enumerate(prefix.runs):
            if position == length:
                return index
            position += run.length
            if position > length:
                rest = _Run(position - length)
                rest.holders = run.holders
                run.length -= rest.length
                for other in self._prefixes:
                    if index < len(other.runs) and other.runs[index] is run:
                        other.runs.insert(index + 1, rest)
                return index + 1
        return len(prefix.runs)
