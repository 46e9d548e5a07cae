"""An engine over the real model whose cells, tokens and steps a test can see."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence as TokenSequence
from dataclasses import dataclass, field

import llama_cpp.llama_cpp as lib
import msgspec
import numpy as np
import numpy.typing as npt
from simulated_clock import SimulatedClock

from llamaserve.engine.engine import ContextEngine
from llamaserve.engine.events import Delta, EngineEvent, Failed, Finished, TokenLogprobs
from llamaserve.engine.llama import Batch, Context, Interrupted, Model
from llamaserve.engine.params import Generation, LoadParams
from llamaserve.engine.runner import Runner
from llamaserve.engine.scheduler import Chunk
from llamaserve.engine.speculation import Drafter, PromptLookup
from llamaserve.errors import OutOfCells

Key = tuple[int, int]  # request and index
_SEQUENCE_IDS = 256  # of llama.cpp; a split cache has one for each part


@dataclass
class Answer:
    """One sequence's result: its tokens, without an end-of-generation token, and the text of all its events."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: Finished | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


class RecordingRunner:
    """A real runner that remembers what was evaluated and sampled of each sequence.

    ``prompt_tokens`` counts the tokens of each one's prompt that were evaluated, ``drafts`` has the length of each
    draft and how much of it was right. The next evaluation is given up, if it is of prompts, when ``interrupting`` is
    set.
    """

    def __init__(self, inner: Runner, answers: dict[Key, Answer], clock: Callable[[], float]) -> None:
        self.inner = inner
        self.answers = answers
        self.preemptions = 0  # how often a sequence had to be evaluated again
        self.largest_step = 0
        self.prompt_tokens: Counter[Key] = Counter()
        self.drafts: list[tuple[int, int]] = []
        self.interrupting = False
        self.interruptions = 0
        self.full = 0
        self._clock = clock

    def evaluate(self, chunks: TokenSequence[Chunk]) -> list[list[int]]:
        """See ``Runner``."""
        self.largest_step = max(self.largest_step, len(chunks))
        if isinstance(self._clock, SimulatedClock):
            self._clock.pass_step(sum(chunk.rows for chunk in chunks))
        if self.interrupting:
            self.interrupting = False
            self.inner.interrupt()
        for chunk in chunks:
            sequence = chunk.sequence
            # Parts of an answer are evaluated more than a token at a time only after they were lost.
            self.preemptions += sequence.generated > 0 and sequence.pending > 1 and chunk.completes
        try:
            outcomes = self.inner.evaluate(chunks)
        except Interrupted:
            self.interruptions += 1
            raise
        except OutOfCells:
            self.full += 1
            raise
        completed = [chunk for chunk in chunks if chunk.completes]
        for chunk, outcome in zip(completed, outcomes, strict=True):
            sequence = chunk.sequence
            self.answers[sequence.request, sequence.index].tokens.extend(outcome)
            if chunk.draft:
                self.drafts.append((len(chunk.draft), len(outcome) - 1))
        for chunk in chunks:
            sequence = chunk.sequence
            if not sequence.generated:
                self.prompt_tokens[sequence.request, sequence.index] += chunk.length
        return outcomes

    def interrupt(self) -> None:
        """See ``Runner``."""
        self.inner.interrupt()


class RunningEngine:
    """An engine on its own context. ``cells`` limits what it uses of ``params.kv_cells``, ``batch`` of its batch."""

    def __init__(self, model: Model, params: LoadParams, cells: int | None = None) -> None:
        self.model = model
        self.params = params
        self.context = Context(model, params)
        self.answers: dict[Key, Answer] = defaultdict(Answer)
        self.drafter: Callable[[list[int]], Drafter] = PromptLookup  # these two of what begins anew
        self.clock: Callable[[], float] = time.monotonic
        self.forget(cells)

    def forget(self, cells: int | None = None, batch: int | None = None) -> None:
        """Begin anew with an empty cache."""
        self.context.clear()
        self.answers.clear()
        self.engine = ContextEngine(
            self.model,
            self.context,
            msgspec.structs.replace(self.params, batch=batch or self.params.batch),
            cells=cells,
            drafter=self.drafter,
            observe=self._observe,
            clock=self.clock,
        )

    def _observe(self, runner: Runner) -> Runner:
        self.runner = RecordingRunner(runner, self.answers, self.clock)
        return self.runner

    def submit(self, request: int, prompt: str | list[int], generation: Generation) -> None:
        """Encode and submit one prompt."""
        self.engine.submit(request, [self.engine.encode(prompt)], generation)

    def step(self, times: int = 1) -> None:
        """Take steps while there is something to do."""
        for _ in range(times):
            if not self.engine.idle:
                self.take(self.engine.step())

    def run(self) -> None:
        """Take steps until there is nothing to do."""
        while not self.engine.idle:
            self.take(self.engine.step())

    def take(self, events: list[EngineEvent]) -> None:
        """Put events into ``answers``."""
        for event in events:
            assert not isinstance(event, Failed), event
            if isinstance(event, Delta | Finished):
                answer = self.answers[event.request, event.index]
                assert answer.finished is None
                answer.text += event.text
                answer.logprobs += event.logprobs
                answer.prompt_logprobs += event.prompt_logprobs
                if isinstance(event, Finished):
                    answer.finished = event
                    del answer.tokens[event.completion_tokens :]  # a draft may have been right beyond the end

    def alone(self, prompt: str | list[int], generation: Generation) -> list[Answer]:
        """Answer one prompt with an empty cache and nothing beside it; one answer a choice."""
        self.forget()
        self.submit(0, prompt, generation)
        self.run()
        return [self.answers[0, index] for index in range(generation.choices)]

    def check_books(self) -> None:
        """Check that llama.cpp holds of every sequence id what the engine believes, and no more."""
        cache = self.engine._cache
        lengths = {prefix.id: prefix.length for prefix in cache._prefixes}
        for number in range(_SEQUENCE_IDS if self.params.kv_unified else self.params.parallel):
            assert _resident(self.context, number) == lengths.get(number, 0), f"sequence id {number}"
        runs = {id(run): run for prefix in cache._prefixes for run in prefix.runs}
        own = sum(prefix.length - prefix.cells_in_runs() for prefix in cache._prefixes)
        assert cache.used_cells == own + sum(run.length for run in runs.values())
        for run in runs.values():
            assert run.holders == sum(run in prefix.runs for prefix in cache._prefixes) > 0
            assert run.length > 0
        assert all(prefix.cells_in_runs() <= prefix.length for prefix in cache._prefixes)
        spilled = [block for root in cache._spill._roots.values() for block in root.children.values()]
        for block in spilled:
            spilled += block.children.values()
        assert sum(block.size for block in spilled) == cache._spill.size <= cache._spill.budget

    def check_nothing_is_left(self) -> None:
        """Check that, apart from what may serve later requests, everything is as it was at first."""
        cache = self.engine._cache
        assert self.engine.idle
        self.check_books()
        cache.drop_idle()
        assert cache.used_cells == 0
        self.check_books()

    def close(self) -> None:
        """Free the context."""
        self.engine.stop()
        self.context.close()


def _resident(context: Context, sequence: int) -> int:
    """Return how many tokens of a sequence are in llama.cpp's memory."""
    return int(lib.llama_memory_seq_pos_max(context._memory, sequence)) + 1


def teacher_forced(model: Model, params: LoadParams, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Return the logits after ``tokens``, computed in a context of their own."""
    context = Context(model, msgspec.structs.replace(params, batch=len(tokens)))
    try:
        batch = Batch(len(tokens))
        row = batch.add(tokens, 0, 0, logits=True)
        context.evaluate(batch)
        return context.logits(row).copy()
    finally:
        context.close()


def all_logits(model: Model, params: LoadParams, tokens: list[int]) -> npt.NDArray[np.float32]:
    """Return the logits after each of ``tokens``, computed one by one in a context of their own."""
    context = Context(model, msgspec.structs.replace(params, batch=len(tokens)))
    try:
        rows = []
        for position in range(len(tokens)):
            batch = Batch(len(tokens))
            row = batch.add(tokens[position : position + 1], position, 0, logits=True)
            context.evaluate(batch)
            rows.append(context.logits(row).copy())
        return np.array(rows)
    finally:
        context.close()
