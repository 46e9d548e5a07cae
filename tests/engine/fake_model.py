"""A model that says what the test tells it to, one byte a token: doubles at the seams ``Runner`` and ``Memory``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence as TokenSequence
from pathlib import Path

from fake_memory import FakeMemory
from simulated_clock import SimulatedClock

from llamaserve.engine.adapters import Adapters
from llamaserve.engine.engine import Engine
from llamaserve.engine.events import Delta, EngineEvent, Failed, Finished
from llamaserve.engine.llama import Interrupted
from llamaserve.engine.params import Generation, Sampling
from llamaserve.engine.prefix_cache import PrefixCache
from llamaserve.engine.scheduler import Chunk
from llamaserve.engine.sequence import Sequence
from llamaserve.engine.speculation import Drafter, PromptLookup
from llamaserve.errors import EngineError, InvalidRequest, ModelLoadFailed, OutOfCells

END = 256  # the end-of-generation token
SAMPLING = Sampling(seed=0)


class ByteVocab:
    """Tokens 0 to 255 are bytes, 256 ends the answer."""

    size = 257

    def check(self, tokens: Iterable[int], param: str) -> None:
        """See ``Vocab``."""
        for token in tokens:
            if not 0 <= token < self.size:
                raise InvalidRequest(f"token id {token}", param=param)

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """See ``Vocab``."""
        return list(text.encode())

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """See ``Vocab``."""
        return b"" if token == END else bytes([token])

    def is_end_of_generation(self, token: int) -> bool:
        """See ``Vocab``."""
        return token == END


class FakeLoras:
    """A model and a context at once: every file holds an adapter, unless it says "damaged"."""

    def __init__(self) -> None:
        self.open: list[FakeLora] = []
        self.at_work: list[tuple[FakeLora, float]] = []

    def load_adapter(self, path: str) -> FakeLora:
        """See ``Model``."""
        if Path(path).read_text() == "damaged":
            raise ModelLoadFailed(f"llama.cpp can't load the LoRA adapter {path}: it is damaged")
        return FakeLora(self, Path(path).read_text())

    def use_adapters(self, adapters: TokenSequence[tuple[FakeLora, float]]) -> None:
        """See ``Context``."""
        assert all(weights in self.open for weights, _ in adapters)
        self.at_work = list(adapters)

    def adapters(self) -> Adapters:
        """Return what keeps the books of them."""
        return Adapters(self, self)  # type: ignore[arg-type]  # has what it uses of the two


class FakeLora:
    """An adapter's weights: a text."""

    def __init__(self, owner: FakeLoras, text: str) -> None:
        self.owner = owner
        self.text = text
        owner.open.append(self)

    def close(self) -> None:
        """See ``LoraWeights``."""
        assert all(weights is not self for weights, _ in self.owner.at_work)
        self.owner.open.remove(self)


class FakeSampler:
    """Counts how many samplers are open."""

    open = 0

    def __init__(self) -> None:
        FakeSampler.open += 1
        self.closed = False

    def close(self) -> None:
        """See ``Sampler``."""
        assert not self.closed
        self.closed = True
        FakeSampler.open -= 1


class ScriptedRunner:
    """Says ``answers[request, index]`` byte by byte, then the end token; '.' for ever where there is no answer.

    ``fail`` is asked before each step and may return an error to raise, ``spoil`` for each token; ``during`` runs
    within a step.
    ``cells`` is what the cache really holds, if that is less than the engine believes. A simulated clock goes on with
    each step.
    """

    def __init__(
        self,
        memory: FakeMemory,
        answers: dict[tuple[int, int], bytes],
        cells: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = memory
        self.answers = answers
        self.cells = cells
        self.clock = clock
        self.drafts: list[tuple[int, int]] = []  # the length of each, and how much of it was right
        self.steps = 0
        self.fail: Callable[[TokenSequence[Chunk]], EngineError | None] = lambda chunks: None
        self.spoil: Callable[[Sequence], EngineError | None] = lambda sequence: None
        self.during: Callable[[], None] = lambda: None
        self._interrupted = False

    def interrupt(self) -> None:
        """See ``Runner``."""
        self._interrupted = True

    def evaluate(self, chunks: TokenSequence[Chunk]) -> list[list[int]]:
        """See ``Runner``."""
        self.steps += 1
        if (error := self.fail(chunks)) is not None:
            raise error
        if self.cells is not None and self.memory.used + sum(chunk.rows for chunk in chunks) > self.cells:
            raise OutOfCells("the key-value cache is full")
        self._interrupted = False
        if isinstance(self.clock, SimulatedClock):
            self.clock.pass_step(sum(chunk.rows for chunk in chunks))
        self.during()
        outcomes: list[list[int]] = []
        for chunk in chunks:
            sequence = chunk.sequence
            assert sequence.slot is not None
            tokens = sequence.tokens[sequence.evaluated :][: chunk.length]
            self.memory.evaluate(sequence.slot, sequence.evaluated, [*tokens, *chunk.draft])
            if chunk.completes:
                if sequence.sampler is None:
                    sequence.sampler = FakeSampler()
                if (error := self.spoil(sequence)) is not None:
                    raise error
                outcomes.append(self._sample(chunk))
            if self._interrupted:
                raise Interrupted
        return outcomes

    def _sample(self, chunk: Chunk) -> list[int]:
        sampled: list[int] = []
        for guess in (*chunk.draft, None):
            sampled.append(self._next(chunk.sequence, chunk.sequence.generated + len(sampled)))
            if sampled[-1] != guess:
                break
        if chunk.draft:
            self.drafts.append((len(chunk.draft), len(sampled) - 1))
        return sampled

    def _next(self, sequence: Sequence, generated: int) -> int:
        answer = self.answers.get((sequence.request, sequence.index))
        if answer is None:
            return ord(".")
        return (*answer, END)[min(generated, len(answer))]


class FakeModel:
    """An engine on these doubles, and what it has reported."""

    def __init__(
        self,
        answers: dict[tuple[int, int], bytes] | None = None,
        *,
        slots: int = 4,
        cells: int = 200,
        real_cells: int | None = None,
        batch: int = 16,
        context: int = 60,
        drafted_rows: int = 0,
        drafter: Callable[[list[int]], Drafter] = PromptLookup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.memory = FakeMemory()
        self.runner = ScriptedRunner(self.memory, answers or {}, real_cells, clock)
        self.cache = PrefixCache(self.memory, slots, cells)
        self.loras = FakeLoras()
        self.engine = Engine(
            self.runner,
            self.cache,
            ByteVocab(),  # type: ignore[arg-type]  # has what the engine uses of a Vocab
            batch=batch,
            context=context,
            adapters=self.loras.adapters(),
            drafted_rows=drafted_rows,
            drafter=drafter,
            clock=clock,
        )
        self.events: list[EngineEvent] = []

    def submit(
        self,
        request: int,
        *prompts: str,
        choices: int = 1,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        stream: bool = False,
        time_limit: float | None = None,
        adapters: tuple[tuple[str, float], ...] | None = None,
    ) -> None:
        """Encode and submit."""
        generation = Generation(
            sampling=SAMPLING,
            choices=choices,
            max_tokens=max_tokens,
            stop=stop,
            stream=stream,
            time_limit=time_limit,
            adapters=adapters,
        )
        self.engine.submit(request, [self.engine.encode(prompt) for prompt in prompts], generation)

    def step(self, times: int = 1) -> None:
        """Take steps while there is something to do."""
        for _ in range(times):
            if not self.engine.idle:
                self.events += self.engine.step()

    def run(self, limit: int = 2000) -> None:
        """Take steps until there is nothing to do; ``limit`` catches an engine that makes no progress."""
        self.step(limit)
        assert self.engine.idle, f"not finished after {limit} steps"

    def of(self, request: int, index: int = 0) -> list[EngineEvent]:
        """Return the events of one sequence, or of its request's failure."""
        return [
            event
            for event in self.events
            if (isinstance(event, Failed) and event.request == request)
            or (isinstance(event, Delta | Finished) and (event.request, event.index) == (request, index))
        ]

    def finished(self, request: int, index: int = 0) -> Finished:
        """Return a sequence's last event, checking that it is the only one of its kind."""
        *before, last = self.of(request, index)
        assert isinstance(last, Finished)
        assert all(isinstance(event, Delta) for event in before)
        return last

    def text(self, request: int, index: int = 0) -> str:
        """Return all text of a sequence, however it was sent."""
        return "".join(event.text for event in self.of(request, index) if isinstance(event, Delta | Finished))
