"""Executes what the scheduler planned: fills a batch, evaluates it with llama.cpp and samples the next tokens."""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence as TokenSequence
from typing import Protocol

from llamaserve.engine.adapters import Adapters
from llamaserve.engine.candidates import Candidates, NothingLeft
from llamaserve.engine.constraint import CanNotGoOn, Form
from llamaserve.engine.llama import Batch, Context
from llamaserve.engine.logprobs import of_candidates, of_token
from llamaserve.engine.sampling import Greedy, Sampler, SamplerFactory
from llamaserve.engine.scheduler import Chunk
from llamaserve.engine.sequence import Sequence
from llamaserve.engine.thinking import LimitedThinking
from llamaserve.errors import EngineError, InvalidRequest

Picks = Greedy | Sampler | LimitedThinking


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
        adapters: Adapters,
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
        self._adapters = adapters
        self._batch = Batch(batch)

    def evaluate(self, chunks: TokenSequence[Chunk]) -> list[list[int]]:
        """See ``Runner``."""
        self._adapters.use(chunks[0].sequence.adapters)  # which all of them have
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
        adapted = bool(chunks[0].sequence.adapters)
        last: list[int] = []
        scored: list[tuple[Chunk, int]] = []
        completed: list[tuple[Chunk, int]] = []
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.slot is not None
            start = sequence.evaluated
            tokens = sequence.tokens[start : start + chunk.length]
            row = batch.add([*tokens, *chunk.draft], start, sequence.slot, logits=max(chunk.outputs, adapted))
            last.append(row)
            if sequence.scoring:
                scored.append((chunk, row + 1 - chunk.length))
            if chunk.completes:
                completed.append((chunk, row - len(chunk.draft)))
                if sequence.sampler is not None:
                    sequence.sampler.prepare()
        self._context.evaluate(batch, interruptible=self._interruptible and any(chunk.length > 1 for chunk in chunks))
        if adapted:
            self._check(last)
        for chunk, row in scored:
            self._score(chunk, row)
        return [self._sample(chunk, row) for chunk, row in completed]

    def interrupt(self) -> None:
        """See ``Runner``."""
        self._context.interrupt()

    def _check(self, rows: list[int]) -> None:
        """Refuse what LoRA adapters have made of the model if it is not numbers, or the same one for all tokens, which
        is what llama.cpp's norms make of infinite ones. The last row of each sequence sees all before it, so nothing of
        that kind stays in the cache unnoticed, where it would spoil others' next steps.
        """
        for logits in map(self._context.logits, rows):
            largest = logits.max()
            if not math.isfinite(largest) or largest == logits.min():
                raise EngineError(
                    "with the LoRA adapters of this request the model computed logits that are not numbers, or no "
                    "different ones: they are too strong together, or damaged. Try smaller scales"
                )

    def _score(self, chunk: Chunk, row: int) -> None:
        """Take note of the log-probabilities of the prompt's tokens that follow those of the chunk."""
        sequence = chunk.sequence
        wanted = sequence.generation.logprobs
        assert wanted is not None
        assert sequence.prompt_logprobs is not None
        known = len(sequence.prompt_logprobs) - 1 - sequence.evaluated  # of a chunk that is evaluated again
        for place in range(known, min(chunk.length, sequence.prompt_length - 1 - sequence.evaluated)):
            token = sequence.tokens[sequence.evaluated + place + 1]
            logits = self._context.logits(row + place)
            sequence.prompt_logprobs.append(of_token(logits, token, wanted.top, self._samplers.vocab))

    def _sample(self, chunk: Chunk, row: int) -> list[int]:
        """Sample from the chunk's last row, and go on as long as the draft has guessed what is sampled. Each token is
        drawn as it would be without a draft, from the same logits and with the same random number.
        """
        sequence = chunk.sequence
        tokens: list[int] = []
        try:
            sampler = sequence.sampler or self._start_sampling(sequence)
            assert isinstance(sampler, Picks)
            if sequence.generation.next_token is not None:
                self._look_ahead(sequence, sampler, row)
            for guess in (*chunk.draft, None) if sequence.limit > sequence.prompt_length else ():
                logits = self._context.logits(row + len(tokens))
                tokens.append(sampler.sample(logits))
                if sequence.logprobs is not None and (wanted := sequence.generation.logprobs) is not None:
                    sequence.logprobs.record(of_token(logits, tokens[-1], wanted.top, self._samplers.vocab))
                sequence.complete = sampler.complete
                if tokens[-1] != guess or sequence.complete:
                    break
        except NothingLeft:
            sequence.blocked = InvalidRequest("the request leaves no token that could come next: all are banned")
        except CanNotGoOn as error:
            sequence.blocked = InvalidRequest(str(error))
        except EngineError:
            raise
        except Exception:  # noqa: BLE001 (a bug of ours costs this request, not the model's process and all others)
            traceback.print_exc()
            sequence.blocked = EngineError("the server failed to choose a token; its log has the details")
        return tokens

    def _look_ahead(self, sequence: Sequence, sampler: Picks, row: int) -> None:
        """Take note of what could come next."""
        wanted = sequence.generation.next_token
        assert wanted is not None
        logits = self._context.logits(row)
        candidates = sampler.candidates(logits) if wanted.sampled else Candidates(logits)
        sequence.next_tokens = of_candidates(candidates, wanted.top, self._samplers.vocab)

    def _start_sampling(self, sequence: Sequence) -> Picks:
        generation = sequence.generation
        form = sequence.form
        assert form is None or isinstance(form, Form)
        sequence.sampler = sampler = self._samplers.build(
            generation.sampling, sequence.tokens, choice=sequence.choice, form=form, limit=generation.thinking
        )
        return sampler
