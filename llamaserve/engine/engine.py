"""Generates text for many requests at once with one loaded model: decide, execute, report.

``submit``, ``stop``, ``cancel`` and ``step`` belong to one thread, which calls ``step`` while the engine is not idle.
``encode`` and the vocabulary may be used from any thread. Knows nothing of processes, HTTP or chat.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence as TokenSequence
from pathlib import Path

import msgspec
import psutil

from llamaserve import heap
from llamaserve.engine.adapters import Adapters, FileDigest, digests_of
from llamaserve.engine.costs import StepCosts
from llamaserve.engine.events import (
    Delta,
    EngineEvent,
    Failed,
    Finished,
    FinishReason,
    Occupancy,
    Progress,
    TokenLogprob,
    TokenLogprobs,
)
from llamaserve.engine.llama import Batch, Context, Interrupted, Model, Vocab, close_all, uses_gpu
from llamaserve.engine.logprobs import AnswerLogprobs, with_offsets
from llamaserve.engine.pacing import TimeShare
from llamaserve.engine.params import DRAFTED_ROWS, Adapter, Generation, LoadParams, Sampling
from llamaserve.engine.prefix_cache import SPARE, PrefixCache
from llamaserve.engine.runner import LlamaRunner, Runner
from llamaserve.engine.sampling import SamplerFactory
from llamaserve.engine.scheduler import Chunk, Scheduler
from llamaserve.engine.sequence import AdapterKey, Sequence, State
from llamaserve.engine.speculation import Draft, Drafter, PromptLookup, choose_rows
from llamaserve.engine.spill import Spill
from llamaserve.engine.threads import ThreadController
from llamaserve.engine.work import MAX_TEXT, TextWork
from llamaserve.errors import (
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    LlamaserveError,
    ModelLoadFailed,
    OutOfCells,
    TimeLimitExceeded,
    to_value,
)

_PROGRESS_INTERVAL = 0.5  # seconds
_REPORT_INTERVAL = 1.0  # seconds between reports of how busy it is, where the number of sequences stays the same
_PLAIN = Generation(sampling=Sampling(seed=0))
_MAX_SHOWN = 64  # names of control tokens
_MAX_NAME = 256  # characters
_UNREAD: Mapping[str, FileDigest] = {}


class Engine(TextWork):
    """One model's sequences, from submission to their last event."""

    def __init__(
        self,
        runner: Runner,
        cache: PrefixCache,
        vocab: Vocab,
        *,
        batch: int,
        context: int,
        adapters: Adapters,
        drafted_rows: int = 0,
        drafter: Callable[[list[int]], Drafter] = PromptLookup,
        one_prompt_a_step: bool = False,
        samplers: SamplerFactory | None = None,
        identity: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``drafted_rows``: how many guessed tokens a step may evaluate; 0 switches speculation off. ``drafter`` makes
        what guesses, from a sequence's own list of tokens. ``identity`` says for which engines saved prefixes are good.
        """
        super().__init__(vocab)
        self._runner = runner
        self._cache = cache
        self._context = context
        self._drafted_rows = drafted_rows
        self._drafter = drafter
        self._samplers = samplers or SamplerFactory(vocab, context)
        self._adapters = adapters
        self._identity = identity
        self._clock = clock
        self._costs = StepCosts()
        self._pace = TimeShare(self._costs)
        self._scheduler = Scheduler(
            cache,
            self._pace,
            batch=batch,
            drafts=self._drafts if drafted_rows else None,
            one_prompt_a_step=one_prompt_a_step,
            clock=clock,
        )
        self._reported = Occupancy()
        self._drafted = self._confirmed = 0  # tokens
        self._next_report = clock() + _REPORT_INTERVAL
        self._next_progress = -math.inf
        self._next_deadline = math.inf
        self._begun: set[int] = set()  # requests of which some token was sampled
        self._evaluating: frozenset[int] = frozenset()  # requests whose prompts are in the step under way
        self._unchecked = (
            False  # whether a step with LoRA adapters was given up, of which nobody knows what it has left
        )

    @property
    def idle(self) -> bool:
        """Whether ``step`` has nothing to do."""
        return self._scheduler.idle

    @property
    def steady(self) -> bool:
        """Whether the next step is one like the last: every sequence decodes, and none waits."""
        return self._scheduler.steady

    def encode(self, prompt: str | TokenSequence[int], generation: Generation = _PLAIN) -> list[int]:
        """Return a prompt's tokens, or raise why it can't be answered. Thread-safe, and quick for absurd lengths."""
        if isinstance(prompt, str):
            tokens = self._encode_text(prompt, generation)
        else:
            tokens = list(prompt)
            self.vocab.check(tokens, "prompt")
        if not tokens:
            raise InvalidRequest(
                "the prompt is empty; the model needs at least one token to start from", param="prompt"
            )
        context = self._context_of(generation)
        if len(tokens) + (generation.max_tokens != 0) > context and not generation.truncate:
            raise self._too_long(f"{len(tokens)} tokens, and the answer needs at least one more", context)
        return tokens

    def cut(self, tokens: list[int], generation: Generation) -> list[int]:
        """Return as many of a prompt's last tokens as fit together with the answer, and its begin token, if the
        request wants it cut. Raises ``ContextLengthExceeded`` when the answer leaves no room for any. Thread-safe.
        """
        context = self._context_of(generation)
        room = context - max(1, generation.max_tokens or 0)
        if not generation.truncate or len(tokens) <= room:
            return tokens
        begin = tokens[:1] if tokens[0] == self.vocab.bos else []
        if room <= len(begin):
            raise self._too_long(f"{len(tokens)} tokens, and the answer may take {generation.max_tokens}", context)
        return begin + tokens[len(tokens) - room + len(begin) :]

    def _context_of(self, generation: Generation) -> int:
        return min(self._context, generation.context or self._context)

    def _encode_text(self, text: str, generation: Generation) -> list[int]:
        """Return a text's tokens; of one that is certainly too long not all are looked at, except to cut it."""
        if len(text) > MAX_TEXT or not generation.truncate:
            size = self.size_if_over(text, self._context)
            if size is not None:
                raise self._too_long(size)
        return self.vocab.tokenize(text, add_bos=generation.add_bos, parse_special=True)

    def _too_long(self, size: str, context: int | None = None) -> ContextLengthExceeded:
        which, advice = "This model's maximum context length", "raise `context` for this model in models.yaml"
        if context not in (None, self._context):
            which, advice = "The request's truncation_length", "raise it"
        message = f"{which} is {context or self._context} tokens, but the prompt has {size}."
        return ContextLengthExceeded(f"{message} Shorten the prompt, or {advice}.", param="prompt")

    def check(self, generation: Generation) -> None:
        """Refuse sampling options, constraints and what else can't work with this model. Thread-safe."""
        if len(generation.shown) > _MAX_SHOWN or not all(len(name) <= _MAX_NAME for name in generation.shown):
            raise InvalidRequest(
                f"at most {_MAX_SHOWN} names of control tokens are taken, of {_MAX_NAME} characters each"
            )
        self._adapters.resolve(generation.adapters)
        self._samplers.check(generation.sampling, generation.constraint, generation.thinking)

    def submit(self, request: int, prompts: TokenSequence[TokenSequence[int]], generation: Generation) -> None:
        """Queue the answers to some encoded prompts. Their events carry ``request`` and an index. Raises
        ``InvalidRequest`` when it wants LoRA adapters that are not there any more.
        """
        adapters = self._adapters.resolve(generation.adapters)
        limit = generation.time_limit
        deadline = math.inf if limit is None else self._clock() + limit
        self._next_deadline = min(self._next_deadline, deadline)
        shown = frozenset(token for name in generation.shown if (token := self.vocab.control(name)) is not None)
        for number, prompt in enumerate(prompts):
            for choice in range(generation.choices):
                index = number * generation.choices + choice
                sequence = Sequence(request, index, prompt, generation, deadline, self._context)
                sequence.shown = shown
                sequence.adapters = adapters
                self._record_logprobs(sequence)
                if generation.constraint is not None:
                    sequence.form = self._samplers.grammars.start(generation.constraint)
                self._scheduler.submit(sequence)

    def _record_logprobs(self, sequence: Sequence) -> None:
        wanted = sequence.generation.logprobs
        if wanted is not None:
            sequence.logprobs = AnswerLogprobs()
        if wanted is not None and wanted.prompt:
            first = sequence.tokens[0]
            piece = self.vocab.piece(first, special=True)
            sequence.prompt_logprobs = [TokenLogprobs(TokenLogprob(first, piece, 0.0))]

    def read_adapters(self, wanted: TokenSequence[Adapter]) -> dict[str, FileDigest]:
        """Return what ``set_adapters`` has to know of these adapters' files, which takes long for large ones.
        Thread-safe. Raises ``ModelLoadFailed``.
        """
        return digests_of(wanted)

    def set_adapters(self, wanted: TokenSequence[Adapter], digests: Mapping[str, FileDigest] = _UNREAD) -> None:
        """Have these LoRA adapters, and no others, for the requests that come after; those before go on with what they
        started with. Raises ``ModelLoadFailed``, and nothing has changed then.
        """
        self._adapters.replace(wanted, digests)
        self._free_adapters()

    def _free_adapters(self) -> None:
        """Free the adapters that nobody wants or uses any more, and forget what was evaluated with them."""
        used = {digest for sequence in self._scheduler.sequences for digest, _ in sequence.adapters}
        for digest in self._adapters.unwanted - used:
            self._adapters.free(digest)
            self._cache.forget(digest)

    def cancel(self, request: int) -> None:
        """Drop a request that nobody waits for; nothing more is reported of it."""
        for sequence in self._of(request):
            self._drop(sequence)

    def stop(self, request: int | None = None) -> list[EngineEvent]:
        """End one request, or all of them, as if each had stopped by itself."""
        return [self._finish(sequence, "stop", "", stopped=True) for sequence in self._of(request)]

    def interrupt(self, request: int | None) -> None:
        """Give up the step under way if it evaluates a prompt of this request, or of any for None, so that a ``cancel``
        or ``stop`` that follows need not wait for a long step. From any thread.
        """
        if request in self._evaluating or (request is None and self._evaluating):
            self._runner.interrupt()

    def step(self) -> list[EngineEvent]:
        """Evaluate one batch and report what came of it."""
        overdue = self._end_overdue()
        return overdue if self.idle else overdue + self._step()

    def _step(self) -> list[EngineEvent]:
        chunks: list[Chunk] = []
        try:
            chunks = self._scheduler.plan()
            self._evaluating = frozenset(chunk.sequence.request for chunk in chunks if chunk.length > 1)
            start = self._clock()
            sampled = iter(self._runner.evaluate(chunks))
            self._take_note(chunks, self._clock() - start)
        except Interrupted:
            for chunk in chunks:
                self._cache.rewind(chunk.sequence, chunk.sequence.evaluated)
                _count_cached(chunk.sequence)
                self._unchecked |= bool(chunk.sequence.adapters)
            return []
        except OutOfCells as error:
            return [] if chunks and self._scheduler.shed(chunks) else self._fail(chunks, error)
        except EngineError as error:
            return [] if self._pardon() else self._fail(chunks, error)
        finally:
            self._evaluating = frozenset()
        events: list[EngineEvent] = []
        for chunk in chunks:
            completes = chunk.completes
            self._cache.advance(chunk.sequence, chunk.rows)
            if completes:
                events += self._accept(chunk, next(sampled))
        return events + self._end_blocked(chunks)

    def _end_blocked(self, chunks: list[Chunk]) -> list[EngineEvent]:
        """Fail the requests of which a sequence can't go on."""
        events: list[EngineEvent] = []
        for sequence in [chunk.sequence for chunk in chunks]:
            if sequence.blocked is not None and sequence.state is not State.FINISHED:
                self.cancel(sequence.request)
                events.append(Failed(sequence.request, to_value(sequence.blocked)))
        return events

    def _drafts(self, decoding: list[Sequence], limit: int) -> list[list[int]]:
        """Guess how some sequences go on, as far as it is worth to evaluate the guesses in the next step, which has
        room for ``limit`` of them.
        """
        limit = min(self._drafted_rows, limit)
        drafts: list[Draft] = []
        for sequence in decoding:
            if sequence.drafter is None:
                sequence.drafter = self._drafter(sequence.tokens)
            left = sequence.limit - len(sequence.tokens)
            draft = sequence.drafter.draft(min(limit, left - 1))
            if sequence.generation.constraint is not None and sequence.sampler is not None and draft.tokens:
                possible = sequence.sampler.possible(draft.tokens)
                draft = Draft(draft.tokens[:possible], draft.chances[:possible])
            drafts.append(draft)
        rows = choose_rows(drafts, self._costs.decode, len(decoding) + limit)
        return [list(draft.tokens[:count]) for draft, count in zip(drafts, rows, strict=True)]

    def _take_note(self, chunks: list[Chunk], seconds: float) -> None:
        """Learn what a step of this kind takes."""
        rows = prompt_tokens = 0
        for chunk in chunks:
            if chunk.sequence.decoding:
                rows += chunk.rows
            else:
                prompt_tokens += chunk.rows
        self._costs.record(rows, prompt_tokens, seconds)
        self._pace.record(rows, prompt_tokens, seconds)

    def save_ahead(self) -> bool:
        """Use an idle moment to copy some of what the cache holds to main memory, which takes milliseconds, so that the
        next request need not wait for it; False when there is nothing to copy.
        """
        return self._cache.save_ahead()

    def limit_spill(self, size: int) -> None:
        """Let prefixes take at most so many bytes of main memory beside the cache; what is over it is lost, and its
        memory the operating system's.
        """
        self._cache.limit_spill(size)
        heap.give_back()

    def save_prefixes(self, path: Path, size: int) -> tuple[int, int]:
        """Write the prefixes to a file of at most so many bytes, those used last first. Returns how many tokens and
        bytes were written; see ``PrefixCache.export``. Raises ``EngineError``.
        """
        return self._cache.export(path, self._identity, size)

    def occupancy(self) -> Occupancy | None:
        """Return how busy the engine is when that has changed since the last call, and now and then; else None."""
        now, before, moment = self._scheduler.occupancy, self._reported, self._clock()
        if (now.running, now.waiting) == (before.running, before.waiting) and moment < self._next_report:
            return None
        self._next_report = moment + _REPORT_INTERVAL
        self._reported = msgspec.structs.replace(now, drafted=self._drafted, accepted=self._confirmed)
        return None if self._reported == before else self._reported

    def progress(self) -> list[Progress]:
        """Return where the streamed requests stand that have no token yet; empty when that was done a moment ago."""
        now = self._clock()
        if now < self._next_progress:
            return []
        self._next_progress = now + _PROGRESS_INTERVAL
        reports: dict[int, Progress] = {}
        for place, sequence in enumerate(self._scheduler.waiting, start=1):
            if sequence.generation.stream and sequence.request not in self._begun:
                reports.setdefault(sequence.request, Progress(sequence.request, place, 0, sequence.prompt_length))
        for sequence in self._scheduler.running:
            if sequence.generation.stream and sequence.request not in self._begun:
                report = Progress(sequence.request, 0, sequence.evaluated, sequence.prompt_length)
                reports[sequence.request] = report
        return list(reports.values())

    def _of(self, request: int | None) -> list[Sequence]:
        return [s for s in self._scheduler.sequences if request is None or s.request == request]

    def _accept(self, chunk: Chunk, tokens: list[int]) -> list[EngineEvent]:
        """Take the tokens sampled after a chunk into its sequence and return what there is to report of it."""
        sequence = chunk.sequence
        wrong = len(chunk.draft) - max(0, len(tokens) - 1)
        self._drafted += len(chunk.draft)
        self._confirmed += len(chunk.draft) - wrong
        if wrong:
            self._cache.rewind(sequence, sequence.evaluated - wrong)
        self._begun.add(sequence.request)
        special, shown = sequence.generation.special, sequence.shown
        pieces: list[str] = []
        for token in tokens:
            if self.vocab.is_end_of_generation(token):
                return [self._finish(sequence, "stop", "".join(pieces))]
            sequence.tokens.append(token)
            if sequence.logprobs is not None:
                sequence.logprobs.begin(sequence.text.decoded)
            pieces.append(sequence.text.push(self.vocab.piece(token, special=special or token in shown)))
            if sequence.text.stopped:
                return [self._finish(sequence, "stop", "".join(pieces))]
            if len(sequence.tokens) >= sequence.limit and not sequence.complete:
                return [self._finish(sequence, "length", "".join(pieces))]
        if sequence.complete:
            return [self._finish(sequence, "stop", "".join(pieces))]
        if len(sequence.tokens) >= sequence.limit:  # from the beginning
            return [self._finish(sequence, "length", "")]
        return self._tell(sequence, "".join(pieces))

    def _tell(self, sequence: Sequence, text: str) -> list[EngineEvent]:
        """Report new text of a sequence that goes on, if there is any and it is streamed."""
        if not sequence.generation.stream:
            if text:
                sequence.unsent.append(text)
            return []
        scored = sequence.prompt_logprobs is not None and not sequence.reported
        if not text and not scored:
            return []
        prompt = tuple(with_offsets(sequence.prompt_logprobs or ())) if scored else ()
        logprobs = sequence.logprobs.take(sequence.text.shown) if sequence.logprobs is not None else ()
        tokens = sequence.generated - sequence.reported
        sequence.reported = sequence.generated
        return [Delta(sequence.request, sequence.index, text, tokens, logprobs, prompt)]

    def _finish(self, sequence: Sequence, reason: FinishReason, text: str, *, stopped: bool = False) -> Finished:
        matched = sequence.text.stopped
        text = "".join((*sequence.unsent, text, sequence.text.finish()))
        prompt = () if sequence.reported else tuple(with_offsets(sequence.prompt_logprobs or ()))
        generated = sequence.generated
        self._drop(sequence)
        return Finished(
            sequence.request,
            sequence.index,
            text,
            reason,
            sequence.prompt_length,
            generated,
            sequence.cached or 0,
            sequence.logprobs.take(sequence.text.shown if matched else None) if sequence.logprobs is not None else (),
            prompt,
            sequence.next_tokens,
            stopped or matched,
        )

    def _end_overdue(self) -> list[EngineEvent]:
        """End the sequences whose time is up: with what they have, or with an error when none of the request has
        anything.
        """
        if self._clock() < self._next_deadline:
            return []
        now = self._clock()
        events: list[EngineEvent] = []
        for sequence in [each for each in self._scheduler.sequences if each.deadline <= now]:
            if sequence.state is State.FINISHED:  # with its request, just now
                continue
            if sequence.request in self._begun:
                events.append(self._finish(sequence, "length", ""))
            else:
                self.cancel(sequence.request)
                limit = sequence.generation.time_limit
                error = TimeLimitExceeded(f"no token was generated within the time limit of {limit:g} seconds")
                events.append(Failed(sequence.request, to_value(error)))
        self._next_deadline = min((each.deadline for each in self._scheduler.sequences), default=math.inf)
        return events

    def _pardon(self) -> bool:
        """Let all begin again after a step that failed for what may be others' fault; False when it can't be."""
        pardoned = self._unchecked
        if pardoned:
            self._begin_again()
        return pardoned

    def _fail(self, chunks: list[Chunk], error: LlamaserveError) -> list[EngineEvent]:
        """End the requests that run with the LoRA adapters of a step that failed. Those with others begin again, since
        nothing that the cache holds is trusted any more.
        """
        running = self._scheduler.running
        adapters = (chunks[0].sequence if chunks else running[0]).adapters
        self._begin_again(adapters)
        requests = dict.fromkeys(sequence.request for sequence in running if sequence.adapters == adapters)
        for request in requests:
            self.cancel(request)
        return [Failed(request, to_value(error)) for request in requests]

    def _begin_again(self, bad: AdapterKey = ()) -> None:
        self._cache.forget_all(bad)
        self._unchecked = False
        for sequence in self._scheduler.running:
            _count_cached(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        if not self._of(sequence.request):
            self._begun.discard(sequence.request)
        if sequence.sampler is not None:
            sequence.sampler.close()
            sequence.sampler = None
        if self._adapters.unwanted:
            self._free_adapters()


class ContextEngine(Engine):
    """An engine on a context that somebody else owns."""

    def __init__(
        self,
        model: Model,
        native: Context,
        params: LoadParams,
        *,
        cells: int | None = None,
        drafter: Callable[[list[int]], Drafter] = PromptLookup,
        observe: Callable[[Runner], Runner] = lambda runner: runner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``cells`` limits what is used of the cache, and ``observe`` may put something between engine and runner."""
        # A split cache is the exact level: an answer there depends neither on its neighbours nor on what was cached. A
        # token by itself goes through other kernels than one among several, and its logits differ a little: so prompts
        # are evaluated apart, two tokens after a cached prefix, and no rows of guessed tokens.
        exact = not params.kv_unified
        state = model.has_state
        samplers = SamplerFactory(model.vocab, params.context)
        adapters = Adapters(model, native)
        adapters.replace(params.adapters)
        runner = LlamaRunner(
            native,
            samplers,
            adapters,
            batch=params.batch,
            prompts_apart=exact,
            interruptible=not state,
        )
        cache = PrefixCache(
            native,
            params.parallel,
            cells or native.cells,
            reuses=params.prefix_cache,
            shares_cells=params.kv_unified,
            spare=SPARE if params.kv_unified and not state else 0,
            divisible=not state,
            kept_back=2 if exact else 1,
            # In a split cache no sequence's cells slow down another. And llama.cpp puts copies off there until the next
            # evaluation, and would overwrite what is brought back meanwhile.
            spill=Spill(params.spill or 0, in_blocks=not state and not model.sliding_window) if not exact else None,
        )
        can_take_back = not state and not model.sliding_window
        super().__init__(
            observe(runner),
            cache,
            model.vocab,
            batch=params.batch,
            context=params.context,
            drafter=drafter,
            drafted_rows=DRAFTED_ROWS if params.speculation and can_take_back and not exact else 0,
            one_prompt_a_step=exact,
            samplers=samplers,
            adapters=adapters,
            identity=params.prefixes_identity,
            clock=clock,
        )
        if params.saved_prefixes is not None:
            cache.adopt(Path(params.saved_prefixes), params.prefixes_identity)


class LoadedEngine(ContextEngine):
    """An engine that owns its llama.cpp model and context."""

    def __init__(self, params: LoadParams, on_progress: Callable[[float], bool]) -> None:
        """Load the weights; ``on_progress`` gets fractions from 0 to 1 and says whether to go on. Raises
        ``ModelLoadFailed``.
        """
        if params.kv_cells // (1 if params.kv_unified else params.parallel) < params.context:
            raise ModelLoadFailed(f"{params.kv_cells} cells can't hold a request of {params.context} tokens")
        self._model = Model(params, on_progress)
        self._native: Context | None = None
        try:
            self._native = Context(self._model, params)
            sizes = _warm_up(self._native, self._model.vocab)
            if params.spill is None:
                spill = 0 if uses_gpu(params) else _default_spill(*sizes, self._native.cells)
                params = msgspec.structs.replace(params, spill=spill)
            super().__init__(self._model, self._native, params)
        except LlamaserveError:
            self.close()
            raise
        self._threads = ThreadController(params.threads) if params.adaptive_threads else None

    def submit(self, request: int, prompts: TokenSequence[TokenSequence[int]], generation: Generation) -> None:
        """See ``Engine``."""
        if self.idle and self._threads is not None:
            self._threads.resume()
        super().submit(request, prompts, generation)

    def step(self) -> list[EngineEvent]:
        """See ``Engine``."""
        if self._threads is None:
            return super().step()
        events = super().step()
        if self.idle:
            self._threads.pause()
        elif (threads := self._threads.update()) is not None and self._native is not None:
            self._native.set_threads(threads)
        return events

    def close(self) -> None:
        """Free the context and the weights."""
        for sequence in self._of(None) if hasattr(self, "_scheduler") else ():
            self._drop(sequence)
        close_all(self._native, self._model)


def _count_cached(sequence: Sequence) -> None:
    """Take note of what a sequence has left of the prompt tokens that it had found."""
    if not sequence.generated:
        sequence.cached = min(sequence.cached or 0, sequence.evaluated)


def _warm_up(context: Context, vocab: Vocab) -> tuple[int, int]:
    """Evaluate two tokens, so that the first request does not pay for reading the weights and building the graph.
    Returns the bytes of the state of one token, and of two.

    They are taken off again, and not overwritten with zeros as ``clear`` would do with all cells: that takes as long as
    loading a small model.
    """
    batch, token = Batch(2), max(0, vocab.bos)
    batch.add([token, token], 0, 0, logits=1)
    context.evaluate(batch)
    both = context.state_size(0)
    if context.truncate(0, 1) == 0:  # recurrent states can't be cut
        batch.clear()
        batch.add([token], 0, 0, logits=1)
        context.evaluate(batch)
    one = context.state_size(0)
    context.truncate(0, 0)
    return one, both


def _default_spill(first: int, second: int, cells: int) -> int:
    """Return how many bytes of main memory prefixes may take: as many as could be kept in the key-value cache without
    it, but never more than a quarter of what is free now. ``first`` and ``second`` are the bytes of the state of one
    and two tokens, which differ by a cell; the rest of it is recurrent.
    """
    cell = second - first
    return min(cells * cell + SPARE * (first - cell), psutil.virtual_memory().available // 4)
