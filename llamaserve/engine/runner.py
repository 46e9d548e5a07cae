"""Executes what the scheduler planned: fills a batch, evaluates it with llama.cpp and samples the next tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence as TokenSequence
from typing import Protocol

from llamaserve.engine.llama import Batch, Context, SamplerChain, Vocab
from llamaserve.engine.sampling import build_chain
from llamaserve.engine.scheduler import Chunk
from llamaserve.engine.sequence import Sequence
from llamaserve.errors import EngineError


class Runner(Protocol):
    """The seam between deciding and executing; tests put a double here."""

    def evaluate(self, chunks: TokenSequence[Chunk]) -> list[int]:
        """Evaluate the chunks and return the next token of each that completes its sequence.

        Raises ``OutOfCells`` when nothing was evaluated for want of cells, ``Interrupted``, or ``EngineError`` when
        what was evaluated can't be trusted.
        """

    def interrupt(self) -> None:
        """Have the evaluation under way raise ``Interrupted`` if it evaluates prompts; from any thread."""


class LlamaRunner:
    """Runs chunks on one llama.cpp context."""

    def __init__(
        self, context: Context, vocab: Vocab, *, batch: int, max_tokens: int, prompts_apart: bool = False
    ) -> None:
        """With ``prompts_apart`` a prompt never shares a batch with decoding sequences, which would cut it to pieces
        that depend on them: in a split cache llama.cpp evaluates equal lengths together. The scheduler must not plan
        more than one prompt a step then.
        """
        self._prompts_apart = prompts_apart
        self._context = context
        self._vocab = vocab
        self._batch = Batch(batch)
        self._max_tokens = max_tokens  # of one sequence, prompt included

    def evaluate(self, chunks: TokenSequence[Chunk]) -> list[int]:
        """See ``Runner``."""
        if not self._prompts_apart:
            return self._evaluate(chunks)
        # The prompt first: it may be interrupted, and then nothing has been sampled yet.
        groups = [chunk for chunk in chunks if chunk.length > 1], [chunk for chunk in chunks if chunk.length == 1]
        tokens: dict[int | None, int] = {}
        for group in filter(None, groups):
            completed = [chunk.sequence.slot for chunk in group if chunk.completes]
            tokens |= zip(completed, self._evaluate(group), strict=True)
        return [tokens[chunk.sequence.slot] for chunk in chunks if chunk.completes]

    def _evaluate(self, chunks: TokenSequence[Chunk]) -> list[int]:
        batch = self._batch
        batch.clear()
        rows: list[tuple[Sequence, int]] = []
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.slot is not None
            start = sequence.evaluated
            completes = chunk.completes
            tokens = sequence.tokens[start : start + chunk.length]
            row = batch.add(tokens, start, sequence.slot, logits=completes)
            if completes:
                rows.append((sequence, row))
        self._context.evaluate(batch, interruptible=any(chunk.length > 1 for chunk in chunks))
        return [self._sample(sequence, row) for sequence, row in rows]

    def interrupt(self) -> None:
        """See ``Runner``."""
        self._context.interrupt()

    def _sample(self, sequence: Sequence, row: int) -> int:
        # max() is NaN as soon as one logit is: such a model would stream noise, or trip an assertion in a sampler.
        if not math.isfinite(self._context.logits(row).max()):
            raise EngineError("the model computed logits that are not numbers; its file is probably damaged")
        if sequence.sampler is None:
            sequence.sampler = build_chain(
                sequence.generation.sampling,
                self._vocab,
                history=sequence.tokens,
                context=self._max_tokens,
                choice=sequence.choice,
            )
        assert isinstance(sequence.sampler, SamplerChain)
        return sequence.sampler.sample(self._context, row)
