"""Decides what each step evaluates: which sequences run, and how many tokens of each.

A step takes the next token of every decoding sequence first, with the tokens that are guessed to follow it, then prompt
tokens of the others, oldest first, as many as the running streams can bear. All of its sequences have the same LoRA
adapters; where there are several such sets, they take turns. Sequences wait in order of arrival, but none for another
set's as long as that has more of them running, and each set's oldest lets only a few pass; one whose prompt begins like
another's that is being evaluated waits for that and copies it. When cells run short, idle prefixes go first, then the
newest running sequence goes back to the queue: it keeps its tokens and sampler and is evaluated again later.

All this is so within a share. Where there are several, slots go to that with the fewest running sequences, prompts come
first of that which has had the least, and it is the one with the most that has to give a slot back; turns of sets go
round the shares. This module decides only; it knows nothing of llama.cpp, of tokens' meaning or of clients.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Sequence as TokenSequence
from itertools import count
from operator import attrgetter
from typing import Protocol

import msgspec

from llamaserve.engine.events import Occupancy
from llamaserve.engine.fair_share import Shares
from llamaserve.engine.params import SCORED_ROWS
from llamaserve.engine.prefix_cache import PrefixCache
from llamaserve.engine.rounds import Round
from llamaserve.engine.sequence import AdapterKey, Sequence, State, common_prefix
from llamaserve.errors import OutOfCells

_WORTH_WAITING = 16  # tokens that a sequence need not evaluate if it waits for another's prompt
_MOST_PASSES = 4  # by sequences of other sets of adapters that came later, before the oldest of a set has its turn
_TURN = 0.05  # seconds for a set of adapters while others wait, or a step: a change costs some milliseconds
_CONTESTS = 2  # plans for each share that has prompts, until the oldest is first in one: half of a fair share


class Chunk(msgspec.Struct, frozen=True):
    """The next ``length`` tokens of a sequence to evaluate, and the ``draft``, tokens guessed to follow them. When
    the former are its last, its next token is sampled, and one more for each guess that was right.
    """

    sequence: Sequence
    length: int
    draft: TokenSequence[int] = ()

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled after this chunk."""
        return self.length == self.sequence.pending

    @property
    def rows(self) -> int:
        """Number of tokens that it takes in the batch."""
        return self.length + len(self.draft)

    @property
    def outputs(self) -> int:
        """Number of its last rows whose logits are wanted."""
        return self.length if self.sequence.scoring else 1 + len(self.draft) if self.completes else 0


class Pace(Protocol):
    """How many prompt tokens a step should take."""

    def prompt_tokens(self, decoding: int, prompts: int, pending: int) -> int:
        """Return how many of the ``pending`` tokens of so many prompts, beside sequences that decode; 0 when those have
        waited enough.
        """


_in_order = attrgetter("arrival")


def _by_slot(chunk: Chunk) -> int:
    return chunk.sequence.slot or 0


def _by_share(sequences: list[Sequence]) -> dict[str, list[Sequence]]:
    shares: dict[str, list[Sequence]] = {}
    for sequence in sequences:
        shares.setdefault(sequence.share, []).append(sequence)
    return shares


def _oldest_of_sets(waiting: list[Sequence]) -> dict[AdapterKey, Sequence]:
    return {sequence.adapters: sequence for sequence in reversed(waiting)}


Drafts = Callable[[list[Sequence], int], list[list[int]]]  # guesses for some decoding sequences, so many in all


class Scheduler:
    """The waiting and the running sequences of one model."""

    def __init__(
        self,
        cache: PrefixCache,
        pace: Pace,
        *,
        batch: int,
        drafts: Drafts | None = None,
        one_prompt_a_step: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cache = cache
        self._pace = pace
        self._drafts = drafts
        self._one_prompt_a_step = one_prompt_a_step
        self._cells = cache.cells
        self._batch = batch
        self._arrivals = count()
        self._preempted = 0
        self._waiting: list[Sequence] = []  # both in order of arrival
        self._running: list[Sequence] = []
        self._clock = clock
        self._turns: list[AdapterKey] = []  # the sets of adapters of those that run; the first one's turn it is
        self._round = Round()  # of the shares of those that run
        self._turn_ends = -math.inf
        # How often the oldest of a share's set that waits was passed by others of the share, or one before it.
        self._passes: dict[str, dict[AdapterKey, int]] = {}
        self._shares = Shares()
        self._members: Counter[str] = Counter()  # sequences of each share that are not finished
        self._uncharged = 0  # tokens that the one share has had since there are no others
        self._planned = 0  # tokens of the last plan
        self._contests = 0  # plans since prompts of several shares were last evaluated oldest first

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running and not self._waiting

    @property
    def steady(self) -> bool:
        """Whether every sequence decodes and none waits."""
        return not self._waiting and all(sequence.decoding for sequence in self._running)

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a slot, in order of arrival."""
        return list(self._running)

    @property
    def waiting(self) -> list[Sequence]:
        """The sequences that have none, in the order in which they will get one."""
        return self._in_order_of_admission()

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that are not finished."""
        return [*self._running, *self._waiting]

    @property
    def occupancy(self) -> Occupancy:
        """How busy the engine is."""
        return Occupancy(len(self._running), len(self._waiting), self._cache.used_cells, preempted=self._preempted)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its share that came before it."""
        sequence.arrival = next(self._arrivals)
        self._waiting.append(sequence)
        if sequence.share not in self._members:
            self._settle()
        self._members[sequence.share] += 1

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, at whatever state; its evaluated tokens stay as a prefix."""
        if sequence.state is State.RUNNING:
            self._cache.release(sequence)
            self._running.remove(sequence)
            self._leave_turns(sequence)
        elif sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        if sequence.state is not State.FINISHED:
            self._leave_share(sequence.share)
        sequence.state = State.FINISHED
        sequence.leader = None
        self._cache.cells = self._cells  # what ``shed`` had taken away

    def plan(self) -> list[Chunk]:
        """Decide the next step. Empty only when there is nothing to do.

        Raises ``OutOfCells`` when the one running sequence has outgrown the cache.
        """
        self._admit()
        chunks = self._chunks()
        if not self._make_room(chunks):
            chunks = [Chunk(chunk.sequence, chunk.length) for chunk in chunks]
        while not self._make_room(chunks):
            if len(self._running) == 1:
                raise OutOfCells("the request has outgrown the key-value cache")
            self._preempt()
            chunks = [Chunk(chunk.sequence, chunk.length) for chunk in self._chunks()]
        self._charge(chunks)
        return chunks

    @property
    def _contested(self) -> bool:
        """Whether there are sequences of several shares."""
        return len(self._members) > 1

    def _charge(self, chunks: list[Chunk]) -> None:
        """Count a plan's tokens for the shares that they are evaluated for."""
        if not self._contested:
            self._uncharged += self._planned
            return
        for chunk in chunks:
            self._shares.charge(chunk.sequence.share, chunk.rows)

    def _settle(self) -> None:
        """Charge the share that has been alone with what it has had, before another comes or it leaves."""
        if self._uncharged:
            (share,) = self._members
            self._shares.charge(share, self._uncharged)
            self._uncharged = 0

    def _leave_share(self, share: str) -> None:
        """Take note that a sequence of a share is finished."""
        if self._members[share] > 1:
            self._members[share] -= 1
            return
        self._settle()
        del self._members[share]
        self._passes.pop(share, None)

    def shed(self, chunks: list[Chunk]) -> bool:
        """Make the next plan smaller after llama.cpp found no cells for this one; False when that is not possible."""
        if self._cache.drop_idle():
            return True
        drafts = any(chunk.draft for chunk in chunks)
        if drafts or len(self._running) > 1:  # there are fewer cells than were counted on; the next plan has less
            self._cache.cells = self._cache.used_cells + sum(chunk.rows for chunk in chunks) - 1
            return True
        return False

    def _make_room(self, chunks: list[Chunk]) -> bool:
        self._planned = sum(chunk.rows for chunk in chunks)
        return self._cache.make_room(self._planned)

    def _admit(self) -> None:
        """Give free slots to those who wait, in order, except where one had better wait for another's prompt."""
        if not self._waiting or not (slots := self._cache.idle_slots):
            return
        committed = self._cache.held_cells() + sum(sequence.pending for sequence in self._running)
        started = 0
        for sequence in self._in_order_of_admission():
            if started == slots:
                break
            if self._follows(sequence):
                continue
            wanted = self._cache.wanted(sequence)
            committed += len(sequence.tokens) + 1 - self._cache.held_in_common(wanted, sequence.adapters)
            if self._running and committed > self._cache.cells:
                break
            self._waiting.remove(sequence)
            self._count_passes(sequence)
            self._start(sequence)
            started += 1

    def _start(self, sequence: Sequence) -> None:
        self._cache.acquire(sequence)
        if not sequence.generated:  # one that begins again may find less than the first time
            found = sequence.evaluated
            sequence.cached = found if sequence.cached is None else min(sequence.cached, found)
        sequence.state = State.RUNNING
        insort(self._running, sequence, key=_in_order)
        if sequence.adapters not in self._turns:
            self._turns.append(sequence.adapters)
        self._round.join(sequence.share)

    def _in_order_of_admission(self) -> list[Sequence]:
        """Return those who wait in the order in which they will get a slot."""
        if not self._contested:
            return self._in_order_of_sets(self._waiting, self._running)
        running = _by_share(self._running)
        queues = {
            share: self._in_order_of_sets(waiting, running.get(share, []))
            for share, waiting in _by_share(self._waiting).items()
        }
        return self._shares.interleave(queues, {share: len(sequences) for share, sequences in running.items()})

    def _in_order_of_sets(self, waiting: list[Sequence], running: list[Sequence]) -> list[Sequence]:
        """Return those of a share who wait in the order in which they will get a slot. Of several sets of adapters it
        is the one with the fewest running sequences that gets the next one, unless others have let enough pass.
        """
        oldest = _oldest_of_sets(waiting)
        if len(oldest) < 2:
            return list(waiting)
        passes = self._passes.get(waiting[0].share, {})
        before = Counter(sequence.adapters for sequence in running)
        ranks: list[int] = []
        for sequence in waiting:
            passed = passes.get(sequence.adapters, 0) if oldest[sequence.adapters] is sequence else 0
            ranks.append(before[sequence.adapters] if passed < _MOST_PASSES else -1)
            before[sequence.adapters] += 1
        return [sequence for _, _, sequence in sorted(zip(ranks, count(), waiting, strict=False))]

    def _count_passes(self, starting: Sequence) -> None:
        """Take note of whom a sequence that starts has passed. Its own share has had its turn, and its own set."""
        waiting = self._waiting
        if self._contested:
            queues = _by_share(waiting)
            self._shares.start(starting.share, queues)
            waiting = queues.get(starting.share, [])
        passes = self._passes.get(starting.share, {})
        self._passes[starting.share] = {
            adapters: passes.get(adapters, 0) + (oldest.arrival < starting.arrival)
            for adapters, oldest in _oldest_of_sets(waiting).items()
            if adapters != starting.adapters
        }

    def _follows(self, sequence: Sequence) -> bool:
        """Whether a running sequence is evaluating what this one would otherwise evaluate once more."""
        if sequence.leader is not None:
            leader, shared = sequence.leader
            if leader.state is State.RUNNING and leader.evaluated < shared:
                return True
            sequence.leader = None
        wanted = self._cache.wanted(sequence)
        if not self._cache.divisible:  # a beginning can't be copied from a sequence that has gone on
            return False
        reusable = self._cache.reusable(wanted, sequence.adapters)
        for other in self._running:
            if other.evaluated >= other.prompt_length or other.adapters != sequence.adapters:
                continue
            shared = common_prefix(self._cache.wanted(other), wanted)
            if shared < max(other.evaluated, reusable) + _WORTH_WAITING:
                continue
            if other.share != sequence.share and other is not self._next_prompt():
                continue  # it would wait for the prompts of that share before it
            sequence.leader = other, shared
            return True
        return False

    def _chunks(self) -> list[Chunk]:
        if len(self._turns) < 2:
            return self._chunks_of(self._running, 0)
        if self._clock() >= self._turn_ends:
            self._pass_turn()
            self._prefer_share()
        streams = sum(sequence.decoding for sequence in self._running)
        for _ in range(len(self._turns)):
            having_turn = [sequence for sequence in self._running if sequence.adapters == self._turns[0]]
            others = streams - sum(sequence.decoding for sequence in having_turn)
            if chunks := self._chunks_of(having_turn, others):
                return chunks
            self._pass_turn()  # its prompts have to wait for the streams of others
        return []

    def _pass_turn(self) -> None:
        self._turns.append(self._turns.pop(0))
        self._turn_ends = self._clock() + _TURN

    def _prefer_share(self) -> None:
        """Put a set of the share whose turn it is before the others: one with many sets has no more turns for it."""
        if self._contested:
            share = self._round.turn()
            sets = {sequence.adapters for sequence in self._running if sequence.share == share}
            first = next(place for place, adapters in enumerate(self._turns) if adapters in sets)
            self._turns.insert(0, self._turns.pop(first))

    def _leave_turns(self, left: Sequence) -> None:
        """Take note that a sequence runs no more."""
        if all(sequence.adapters != left.adapters for sequence in self._running):
            self._turns.remove(left.adapters)
        if all(sequence.share != left.share for sequence in self._running):
            self._round.leave(left.share)

    def _chunks_of(self, running: list[Sequence], others: int) -> list[Chunk]:
        """Return the chunks of a step of some sequences with the same adapters, which so many others' streams wait
        for.
        """
        decoding = [sequence for sequence in running if sequence.decoding]
        room = self._batch - len(decoding)
        prompts: list[Chunk] = []
        if len(decoding) < len(running):
            pending = [sequence.pending for sequence in running if not sequence.decoding]
            wanted = self._pace.prompt_tokens(len(decoding) + others, len(pending), min(sum(pending), room))
            if (budget := min(wanted, room)) > 0:
                prompts = self._prompt_chunks(self._prompts_in_order(running), budget)
            room -= sum(chunk.rows for chunk in prompts)
        drafts = self._drafts(decoding, room) if self._drafts and decoding else [[]] * len(decoding)
        chunks = [Chunk(sequence, 1, draft) for sequence, draft in zip(decoding, drafts, strict=True)] + prompts
        chunks.sort(key=_by_slot)  # a split cache wants them in this order
        return chunks

    def _next_prompt(self) -> Sequence:
        prompts = [sequence for sequence in self._running if not sequence.decoding]
        return min(prompts, key=lambda sequence: self._shares.had(sequence.share))

    def _prompts_in_order(self, running: list[Sequence]) -> list[Sequence]:
        """Return the sequences whose prompts are evaluated, those of the share that has had least first. In one of some
        plans it is the oldest, so that no prompt stands still.
        """
        prompts = [sequence for sequence in running if not sequence.decoding]
        if not self._contested or (shares := len({sequence.share for sequence in prompts})) < 2:
            return prompts
        self._contests += 1
        if self._contests >= _CONTESTS * shares:
            self._contests = 0
            return prompts
        return sorted(prompts, key=lambda sequence: self._shares.had(sequence.share))

    def _prompt_chunks(self, prompts: list[Sequence], budget: int) -> list[Chunk]:
        chunks = []
        scored = SCORED_ROWS
        for sequence in prompts:
            if budget <= 0:
                break
            length = min(sequence.pending, budget)
            if sequence.scoring:
                length = min(length, scored)
                scored -= length
                if not length:
                    continue
            if self._one_prompt_a_step and sequence.pending - length == 1 and length > 2:
                length -= 1  # a last token by itself goes through other kernels than one among several
            chunks.append(Chunk(sequence, length))
            budget = 0 if self._one_prompt_a_step else budget - length
        return chunks

    def _preempt(self) -> None:
        """Send the newest running sequence back to the queue, of the share that has most of them."""
        running = Counter(sequence.share for sequence in self._running)
        sequence = max(self._running, key=lambda each: (running[each.share], each.arrival))
        self._running.remove(sequence)
        self._preempted += 1
        self._leave_turns(sequence)
        self._cache.release(sequence)
        sequence.state = State.WAITING
        insort(self._waiting, sequence, key=_in_order)
