"""Generates text for many requests at once with one loaded model: decide, execute, report.

``submit``, ``stop``, ``cancel`` and ``step`` belong to one thread, which calls ``step`` while the engine is not idle.
``encode`` and the vocabulary may be used from any thread. Knows nothing of processes, HTTP or chat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as TokenSequence

from llamaserve.engine.events import Delta, EngineEvent, Failed, Finished, FinishReason, Occupancy
from llamaserve.engine.llama import Batch, Context, Model, OutOfCells, Vocab, close_all
from llamaserve.engine.params import Generation, LoadParams
from llamaserve.engine.prefix_cache import PrefixCache
from llamaserve.engine.runner import LlamaRunner, Runner
from llamaserve.engine.scheduler import Scheduler
from llamaserve.engine.sequence import Sequence, State
from llamaserve.errors import ContextLengthExceeded, EngineError, InvalidRequest, LlamaserveError, to_value


class Engine:
    """One model's sequences, from submission to their last event."""

    def __init__(self, runner: Runner, cache: PrefixCache, vocab: Vocab, *, batch: int, context: int) -> None:
        self.vocab = vocab
        self._runner = runner
        self._cache = cache
        self._scheduler = Scheduler(cache, batch=batch)
        self._context = context
        self._reported = Occupancy()

    @property
    def idle(self) -> bool:
        """Whether ``step`` has nothing to do."""
        return self._scheduler.idle

    def encode(self, prompt: str | TokenSequence[int]) -> list[int]:
        """Return a prompt's tokens, or raise why it can't be answered. Thread-safe, and quick for absurd lengths."""
        if isinstance(prompt, str):
            self._check_room(self.vocab.fewest_tokens(prompt), exact=False)
            tokens = self.vocab.tokenize(prompt, add_bos=True, parse_special=True)
        else:
            tokens = list(prompt)
            self.vocab.check(tokens, "prompt")
        if not tokens:
            raise InvalidRequest("the prompt is empty; the model needs at least one token to start from")
        self._check_room(len(tokens), exact=True)
        return tokens

    def _check_room(self, tokens: int, *, exact: bool) -> None:
        if tokens + 1 > self._context:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self._context} tokens, but the prompt has "
                f"{'' if exact else 'at least '}{tokens} tokens, and the answer needs at least one more. "
                "Shorten the prompt, or raise `context` for this model in models.yaml."
            )

    def check(self, generation: Generation) -> None:
        """Refuse sampling options that name tokens the model does not have. Thread-safe."""
        self.vocab.check(generation.sampling.logit_bias, "logit_bias")

    def submit(self, request: int, prompts: TokenSequence[TokenSequence[int]], generation: Generation) -> None:
        """Queue the answers to some encoded prompts. Their events carry ``request`` and an index."""
        for number, prompt in enumerate(prompts):
            for choice in range(generation.choices):
                index = number * generation.choices + choice
                self._scheduler.submit(Sequence(request, index, prompt, generation))

    def cancel(self, request: int) -> None:
        """Drop a request that nobody waits for; nothing more is reported of it."""
        for sequence in self._of(request):
            self._drop(sequence)

    def stop(self, request: int | None = None) -> list[EngineEvent]:
        """End one request, or all of them, as if each had stopped by itself."""
        return [self._finish(sequence, "stop", "") for sequence in self._of(request)]

    def step(self) -> list[EngineEvent]:
        """Evaluate one batch and report what came of it."""
        chunks = self._scheduler.plan()
        try:
            outcomes = iter(self._runner.evaluate(chunks))
        except OutOfCells as error:
            return [] if self._scheduler.shed() else self._fail_all([chunk.sequence for chunk in chunks], error)
        except EngineError as error:
            return self._fail_all([chunk.sequence for chunk in chunks], error)
        sampled: list[tuple[Sequence, int | EngineError]] = []
        for chunk in chunks:
            completes = chunk.completes
            chunk.sequence.evaluated += chunk.length
            if completes:
                sampled.append((chunk.sequence, next(outcomes)))
        events: list[EngineEvent] = []
        for sequence, outcome in sampled:
            events += self._accept(sequence, outcome)
        return events

    def occupancy(self) -> Occupancy | None:
        """Return how busy the engine is when that has changed since the last call, else None."""
        now = self._scheduler.occupancy
        if (now.running, now.waiting) == (self._reported.running, self._reported.waiting):
            return None
        self._reported = now
        return now

    def _of(self, request: int | None) -> list[Sequence]:
        return [s for s in self._scheduler.sequences if request is None or s.request == request]

    def _accept(self, sequence: Sequence, outcome: int | EngineError) -> list[EngineEvent]:
        """Take a sampled token into its sequence and return what there is to report of it."""
        if sequence.state is State.FINISHED:  # a sibling failed in this very step
            return []
        if isinstance(outcome, EngineError):
            return self._fail_all([sequence], outcome)
        if self.vocab.is_end_of_generation(outcome):
            return [self._finish(sequence, "stop", "")]
        sequence.tokens.append(outcome)
        text = sequence.text.push(self.vocab.piece(outcome))
        if sequence.text.stopped:
            return [self._finish(sequence, "stop", text)]
        if sequence.generated == sequence.generation.max_tokens or len(sequence.tokens) >= self._context:
            return [self._finish(sequence, "length", text)]
        if not text:
            return []
        if sequence.generation.stream:
            return [Delta(sequence.request, sequence.index, text)]
        sequence.unsent.append(text)
        return []

    def _finish(self, sequence: Sequence, reason: FinishReason, text: str) -> Finished:
        text = "".join((*sequence.unsent, text, sequence.text.finish()))
        generated = sequence.generated
        self._drop(sequence)
        return Finished(
            sequence.request, sequence.index, text, reason, sequence.prompt_length, generated, sequence.cached or 0
        )

    def _fail_all(self, sequences: list[Sequence], error: LlamaserveError) -> list[EngineEvent]:
        """End the whole requests of these sequences; what the cache holds of them is not trusted any more."""
        for sequence in sequences:
            if sequence.state is State.RUNNING:
                self._cache.forget(sequence)
        requests = dict.fromkeys(sequence.request for sequence in sequences)
        for request in requests:
            self.cancel(request)
        return [Failed(request, to_value(error)) for request in requests]

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None


class LoadedEngine(Engine):
    """An engine that owns its llama.cpp model and context."""

    def __init__(self, params: LoadParams, on_progress: Callable[[float], bool]) -> None:
        """Load the weights; ``on_progress`` gets fractions from 0 to 1 and says whether to go on. Raises
        ``ModelLoadFailed``.
        """
        self._model = Model(params, on_progress)
        self._native: Context | None = None
        try:
            self._native = Context(self._model, params)
            _warm_up(self._native, self._model.vocab)
        except LlamaserveError:
            self.close()
            raise
        vocab = self._model.vocab
        runner = LlamaRunner(self._native, vocab, batch=params.batch, max_tokens=params.context)
        cache = PrefixCache(self._native, params.parallel, self._native.cells)
        super().__init__(runner, cache, vocab, batch=params.batch, context=params.context)

    def close(self) -> None:
        """Free the context and the weights."""
        for sequence in self._of(None) if hasattr(self, "_scheduler") else ():
            self._drop(sequence)
        close_all(self._native, self._model)


def _warm_up(context: Context, vocab: Vocab) -> None:
    """Evaluate one token, so that the first request does not pay for reading the weights and building the graph."""
    batch = Batch(1)
    batch.add([max(0, vocab.bos)], 0, 0, logits=True)
    context.evaluate(batch)
    context.clear()
