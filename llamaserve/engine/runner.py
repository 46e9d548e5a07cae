"""Executes what the scheduler planned: fills a batch, evaluates it with llama.cpp and samples the next tokens."""

from __future__ import annotations

from collections.abc import Sequence as TokenSequence
from typing import Protocol

from llamaserve.engine.candidates import NothingLeft
from llamaserve.engine.llama import Batch, Context
from llamaserve.engine.sampling import Greedy, Sampler, SamplerFactory
from llamaserve.engine.scheduler import Chunk
from llamaserve.engine.sequence import Sequence


class Runner(Protocol):
    """The seam between deciding and executing; tests put a double here."""

    def evaluate(self, chunks: TokenSequence[Chunk]) -> list[list[int]]:
        """Evaluate the chunks and return the next tokens of each that completes its sequence: one, and one more for
        each token of its draft that turned out to be right; fewer where a sequence is ``blocked``.

        Raises ``OutOfCells`` when nothing was evaluated for want of cells, ``Interrupted``, or ``EngineError`` when
        what was evaluated can't be trusted.
        """

    def interrupt(self) -> None:
        """Have the evaluation under way raise ``Interrupted`` if it evaluates prompts; from any thread."""


class LlamaRunner:
    """Runs chunks on one llama.cpp context."""

    def __init__(
        self,
        context: Context,
        samplers: SamplerFactory,
        *,
        batch: int,
        prompts_apart: bool = False,
        interruptible: bool = True,
    ) -> None:
        """With ``prompts_apart`` a prompt never shares a batch with decoding sequences, which would cut it to pieces
        that depend on them: in a split cache llama.cpp evaluates equal lengths together. The scheduler must not plan
        more than one prompt a step then. ``interruptible`` must be off for a model with recurrent state: llama.cpp
        moves the states of other sequences as part of a step, and one that is given up leaves them where they were.
        """
        self._interruptible = interruptible
        self._prompts_apart = prompts_apart
        self._context = context
        self._samplers = samplers
        self._batch = Batch(batch)

    def evaluate(self, chunks: TokenSequence[Chunk]) -> list[list[int]]:
        """See ``Runner``."""
        if not self._prompts_apart:
            return self._evaluate(chunks)
        # The prompt first: it may be interrupted, and then nothing has been sampled yet.
        groups = [chunk for chunk in chunks if chunk.length > 1], [chunk for chunk in chunks if chunk.length == 1]
        tokens: dict[int | None, list[int]] = {}
        for group in filter(None, groups):
            completed = [chunk.sequence.slot for chunk in group if chunk.completes]
            tokens |= zip(completed, self._evaluate(group), strict=True)
        return [tokens[chunk.sequence.slot] for chunk in chunks if chunk.completes]

    def _evaluate(self, chunks: TokenSequence[Chunk]) -> list[list[int]]:
        batch = self._batch
        batch.clear()
        completed: list[tuple[Chunk, int]] = []
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.slot is not None
            start = sequence.evaluated
            tokens = sequence.tokens[start : start + chunk.length]
            if chunk.completes:
                sampled = 1 + len(chunk.draft)
                row = batch.add([*tokens, *chunk.draft], start, sequence.slot, logits=sampled)
                completed.append((chunk, row + 1 - sampled))
            else:
                batch.add(tokens, start, sequence.slot, logits=0)
        self._context.evaluate(batch, interruptible=self._interruptible and any(chunk.length > 1 for chunk in chunks))
        return [self._sample(chunk, row) for chunk, row in completed]

    def interrupt(self) -> None:
        """See ``Runner``."""
        self._context.interrupt()

    def _sample(self, chunk: Chunk, row: int) -> list[int]:
        """Sample from the chunk's last row, and go on as long as the draft has guessed what is sampled. Each token is
        drawn as it would be without a draft, from the same logits and with the same random number.
        """
        sampler = chunk.sequence.sampler or self._start_sampling(chunk.sequence)
        assert isinstance(sampler, Greedy | Sampler)
        tokens: list[int] = []
        for guess in (*chunk.draft, None):
            try:
                tokens.append(sampler.sample(self._context.logits(row + len(tokens))))
            except NothingLeft:
                chunk.sequence.blocked = True
                break
            if tokens[-1] != guess:
                break
        return tokens

    def _start_sampling(self, sequence: Sequence) -> Greedy | Sampler:
        sampling = sequence.generation.sampling
        sequence.sampler = sampler = self._samplers.build(sampling, sequence.tokens, sequence.choice)
        return sampler
