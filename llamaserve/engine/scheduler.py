"""Decides what each step evaluates: which sequences run, and how many tokens of each.

A step takes one token of every decoding sequence first, then prompt tokens of the others, oldest first. Sequences wait
in order of arrival. When cells run short, idle prefixes go first, then the newest running sequence goes back to the
front of the queue: it keeps its tokens and sampler and is evaluated again later. This module decides only; it knows
nothing of llama.cpp, of tokens' meaning or of clients.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from llamaserve.engine.events import Occupancy
from llamaserve.engine.prefix_cache import PrefixCache
from llamaserve.engine.sequence import Sequence, State
from llamaserve.errors import OutOfCells

PREFILL_BESIDE_DECODE = 128  # prompt tokens a step while others decode: bounds the gap in their streams


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next ``length`` tokens of a sequence to evaluate. When they are its last, its next token is sampled."""

    sequence: Sequence
    length: int

    @property
    def completes(self) -> bool:
        """Whether the sequence's next token can be sampled after this chunk."""
        return self.length == self.sequence.pending


def tokens_of(chunks: list[Chunk]) -> int:
    """Return the number of tokens in a step."""
    return sum(chunk.length for chunk in chunks)


class Scheduler:
    """The waiting and the running sequences of one model."""

    def __init__(self, cache: PrefixCache, *, batch: int, one_prompt_a_step: bool = False) -> None:
        self._cache = cache
        self._one_prompt_a_step = one_prompt_a_step
        self._cells = cache.cells
        self._batch = batch
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of arrival

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._running and not self._waiting

    @property
    def running(self) -> list[Sequence]:
        """The sequences that have a slot, in order of arrival."""
        return list(self._running)

    @property
    def sequences(self) -> list[Sequence]:
        """All sequences that are not finished."""
        return [*self._running, *self._waiting]

    @property
    def occupancy(self) -> Occupancy:
        """How busy the engine is."""
        return Occupancy(len(self._running), len(self._waiting), self._cache.used_cells)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence behind those that came before it."""
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, at whatever state; its evaluated tokens stay as a prefix."""
        if sequence.state is State.RUNNING:
            self._cache.release(sequence)
            self._running.remove(sequence)
        elif sequence.state is State.WAITING:
            self._waiting.remove(sequence)
        sequence.state = State.FINISHED
        if self.idle:
            self._cache.cells = self._cells  # what ``shed`` had taken away

    def plan(self) -> list[Chunk]:
        """Decide the next step. Empty only when there is nothing to do.

        Raises ``OutOfCells`` when the one running sequence has outgrown the cache.
        """
        self._admit()
        chunks = self._chunks()
        while not self._cache.make_room(tokens_of(chunks)):
            if len(self._running) == 1:
                raise OutOfCells("the request has outgrown the key-value cache")
            self._preempt_newest()
            chunks = self._chunks()
        return chunks

    def shed(self, chunks: list[Chunk]) -> bool:
        """Make the next plan smaller after llama.cpp found no cells for this one; False when that is not possible."""
        if self._cache.used_cells > sum(sequence.evaluated for sequence in self._running):
            self._cache.make_room(self._cache.cells)  # drops all idle prefixes
            return True
        if len(self._running) > 1:  # there are fewer cells than were counted on; the next plan preempts
            self._cache.cells = self._cache.used_cells + tokens_of(chunks) - 1
            return True
        return False

    def _admit(self) -> None:
        committed = sum(len(sequence.tokens) + 1 for sequence in self._running)
        while self._waiting and self._cache.has_idle_slot:
            sequence = self._waiting[0]
            committed += len(sequence.tokens) + 1
            if self._running and committed > self._cache.cells:
                return
            self._waiting.popleft()
            self._cache.acquire(sequence)
            if sequence.cached is None:
                sequence.cached = sequence.evaluated
            sequence.state = State.RUNNING
            self._running.append(sequence)

    def _chunks(self) -> list[Chunk]:
        decoding = [Chunk(sequence, 1) for sequence in self._running if sequence.decoding]
        budget = min(PREFILL_BESIDE_DECODE, self._batch) if decoding else self._batch
        budget = min(budget, self._batch - len(decoding))
        chunks = decoding
        for sequence in self._running:
            if budget <= 0:
                break
            if not sequence.decoding:
                length = min(sequence.pending, budget)
                if self._one_prompt_a_step and sequence.pending - length == 1 and length > 2:
                    length -= 1  # a last token by itself goes through other kernels than one among several
                chunks.append(Chunk(sequence, length))
                budget = 0 if self._one_prompt_a_step else budget - length
        return sorted(chunks, key=lambda chunk: chunk.sequence.slot or 0)  # a split cache wants them in this order

    def _preempt_newest(self) -> None:
        sequence = self._running.pop()
        self._cache.release(sequence)
        sequence.state = State.WAITING
        self._waiting.appendleft(sequence)
