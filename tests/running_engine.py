"""An engine over the real model whose cells, tokens and steps a test can see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence as TokenSequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from llamaserve.engine.engine import ContextEngine
from llamaserve.engine.events import Delta, EngineEvent, Failed, Finished
from llamaserve.engine.llama import Batch, Context, Model
from llamaserve.engine.params import Generation, LoadParams
from llamaserve.engine.runner import Runner
from llamaserve.engine.scheduler import Chunk
from llamaserve.engine.speculation import Drafter, PromptLookup

Key = tuple[int, int]  # request and index


@dataclass
class Answer:
    """One sequence's result: tokens with the one that ended it, and the text of all its events."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: Finished | None = None


class RecordingRunner:
    """A real runner that remembers each sampled token, and how often a sequence had to be evaluated again."""

    def __init__(self, inner: Runner, answers: dict[Key, Answer]) -> None:
        self.inner = inner
        self.answers = answers
        self.preemptions = 0
        self.largest_step = 0

    def evaluate(self, chunks: TokenSequence[Chunk]) -> list[list[int]]:
        """See ``Runner``."""
        self.largest_step = max(self.largest_step, len(chunks))
        for chunk in chunks:
            sequence = chunk.sequence
            # Parts of an answer are evaluated more than a token at a time only after they were lost.
            self.preemptions += sequence.generated > 0 and sequence.pending > 1 and chunk.completes
        outcomes = self.inner.evaluate(chunks)
        completed = [chunk.sequence for chunk in chunks if chunk.completes]
        for sequence, outcome in zip(completed, outcomes, strict=True):
            self.answers[sequence.request, sequence.index].tokens.extend(outcome)
        return outcomes

    def interrupt(self) -> None:
        """See ``Runner``."""
        self.inner.interrupt()


class RunningEngine:
    """An engine on its own context. ``cells`` limits what it uses of ``params.kv_cells``."""

    def __init__(self, model: Model, params: LoadParams, cells: int | None = None) -> None:
        self.model = model
        self.params = params
        self.context = Context(model, params)
        self.answers: dict[Key, Answer] = defaultdict(Answer)
        self.drafter: Callable[[list[int]], Drafter] = PromptLookup  # of what begins anew
        self.forget(cells)

    def forget(self, cells: int | None = None) -> None:
        """Begin anew with an empty cache."""
        params = self.params
        self.context.clear()
        self.answers.clear()
        self.engine = ContextEngine(
            self.model, self.context, params, cells=cells, drafter=self.drafter, observe=self._observe
        )

    def _observe(self, runner: Runner) -> Runner:
        self.runner = RecordingRunner(runner, self.answers)
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
                if isinstance(event, Finished):
                    answer.finished = event

    def alone(self, prompt: str | list[int], generation: Generation) -> list[Answer]:
        """Answer one prompt with an empty cache and nothing beside it; one answer a choice."""
        self.forget()
        self.submit(0, prompt, generation)
        self.run()
        return [self.answers[0, index] for index in range(generation.choices)]

    def close(self) -> None:
        """Free the context."""
        self.engine.stop()
        self.context.close()


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
