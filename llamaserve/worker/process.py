"""One life of one child process with a model: load it, talk to it, notice its end.

``WorkerProcess.start`` returns when the model is loaded. From then on requests run until the process ends; then every
open request gets ``EngineCrashed``, or ``Unavailable`` if the process was told to end. Whether to start another is the
supervisor's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import Context
from pathlib import Path

from llamaserve.engine.events import Delta, Embedded, Failed, Finished, Occupancy, Progress
from llamaserve.engine.params import Adapter, Embedding, Footprint, Generation
from llamaserve.errors import EngineCrashed, Unavailable, from_value, to_value
from llamaserve.images.values import GeneratedImage, ImageGeneration, ImageStep, PartialImage
from llamaserve.speech.values import Heard, Transcribed, Transcription
from llamaserve.worker.child import Child
from llamaserve.worker.protocol import (
    Accepted,
    Cancel,
    Command,
    Detokenize,
    Done,
    Embed,
    Event,
    Generate,
    GenerateImage,
    LimitSpill,
    Load,
    LoadFailed,
    Loading,
    ModelParams,
    Prompt,
    Rank,
    Ready,
    RequestEvent,
    Saved,
    SavePrefixes,
    SetAdapters,
    Stop,
    Text,
    Tokenize,
    Tokens,
    Transcribe,
    decode_events,
    encode_command,
)
from llamaserve.worker.spare import Spares

logger = logging.getLogger(__name__)

_AT_ONCE = 256  # events; what a slow client is behind is written in pieces, so that no large buffer is needed for it


class _Inbox:
    """The events of one request that are not taken yet. Unlike a queue it hands over all that a step brought at once,
    and its taker wakes up once a step.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._finished = 0
        self._over: tuple[int, Callable[[], None]] | None = None
        self.progress: Progress | None = None  # the latest, which wakes nobody

    def put(self, event: Event) -> None:
        """Add an event and wake the taker."""
        self._events.append(event)
        self._finished += isinstance(event, Finished | Transcribed | GeneratedImage)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self._look_whether_over()

    def when_over(self, sequences: int, call: Callable[[], None]) -> None:
        """Make a call once so many sequences have finished or the request has failed, taken or not."""
        self._over = (sequences, call)
        self._look_whether_over()

    def _look_whether_over(self) -> None:
        if self._over is not None and (self._finished >= self._over[0] or self.failed):
            (_, call), self._over = self._over, None
            call()

    @property
    def failed(self) -> bool:
        """Whether the last event is a ``Failed``, after which there are no more."""
        return bool(self._events) and isinstance(self._events[-1], Failed)

    async def arrival(self) -> deque[Event]:
        """Wait until there are events, and return them for the caller to take from the left. Raises what a ``Failed``
        says once it is the first.
        """
        while not self._events:
            self._waiter = self._loop.create_future()
            await self._waiter
        event = self._events[0]
        if isinstance(event, Failed):
            raise from_value(event.error)
        return self._events


class GenerationStream:
    """The events of one request. It must be closed, which cancels what is not finished."""

    def __init__(self, worker: WorkerProcess, prompts: list[Prompt], generation: Generation) -> None:
        self._worker = worker
        self._request = worker.next_request()
        self._sequences = self._open = len(prompts) * generation.choices
        frame = encode_command(Generate(self._request, prompts, generation))
        self._inbox = worker.open_request(self._request, frame)

    @property
    def progress(self) -> Progress | None:
        """Where a streamed request stood when the child last said so; None before that and from the first token on."""
        return self._inbox.progress

    async def accepted(self) -> Accepted:
        """Wait until all prompts are found to fit, and return how long they are; raises why they don't."""
        event = (await self._inbox.arrival()).popleft()
        assert isinstance(event, Accepted)
        return event

    async def arrived(self) -> list[Delta | Finished]:
        """Wait for what is generated, and return what has come, in order: nothing once all sequences have finished."""
        if not self._open:
            return []
        inbox = await self._inbox.arrival()
        events: list[Delta | Finished] = []
        while inbox and len(events) < _AT_ONCE and not isinstance(inbox[0], Failed):
            event = inbox.popleft()
            assert isinstance(event, Delta | Finished)
            if isinstance(event, Finished):
                self._open -= 1
            events.append(event)
        return events

    async def events(self) -> AsyncIterator[Delta | Finished]:
        """Yield what is generated, in order, until every sequence has finished."""
        while events := await self.arrived():
            for event in events:
                yield event

    def when_over(self, call: Callable[[], None]) -> None:
        """Make a call once there is nothing more to come, even if what has come is not taken yet."""
        self._inbox.when_over(self._sequences, call)

    def stop(self) -> None:
        """End the request with a normal finish and the text so far."""
        self._worker.send_soon(Stop(self._request))

    def close(self) -> None:
        """Take no more events; what is still being generated is dropped."""
        self._worker.close_request(self._request)
        if self._open and not self._inbox.failed:
            self._worker.send_soon(Cancel(self._request))
        self._open = 0


class TranscriptionStream:
    """What is heard in one audio. It must be closed, which cancels what is not finished."""

    def __init__(self, worker: WorkerProcess, path: Path, transcription: Transcription, share: str) -> None:
        self._worker = worker
        self._request = worker.next_request()
        self._inbox = worker.open_request(
            self._request, encode_command(Transcribe(self._request, str(path), transcription, share))
        )
        self._over = False

    @property
    def progress(self) -> Progress | None:
        """Where the request stood when the child last said so, in seconds of audio; None before that."""
        return self._inbox.progress

    @property
    def failed(self) -> bool:
        """Whether it has come to an end without a transcript."""
        return self._inbox.failed

    def when_over(self, call: Callable[[], None]) -> None:
        """See ``GenerationStream``."""
        self._inbox.when_over(1, call)

    async def events(self) -> AsyncIterator[Heard | Transcribed]:
        """Yield what is heard, in order; the last one is a ``Transcribed``."""
        while not self._over:
            event = (await self._inbox.arrival()).popleft()
            assert isinstance(event, Heard | Transcribed)
            self._over = isinstance(event, Transcribed)
            yield event

    def close(self) -> None:
        """Take no more events; what is still to be transcribed is not."""
        self._worker.close_request(self._request)
        if not self._over and not self._inbox.failed:
            self._worker.send_soon(Cancel(self._request))
        self._over = True


class ImageStream:
    """What becomes of one picture. It must be closed, after which nothing is told of it; but the library can't stop."""

    def __init__(self, worker: WorkerProcess, job: ImageGeneration) -> None:
        self._worker = worker
        self._request = worker.next_request()
        self._inbox = worker.open_request(self._request, encode_command(GenerateImage(self._request, job)))
        self._closed = False
        self.over = asyncio.Event()  # set once the child is done with it, whether that is taken or not
        self._inbox.when_over(1, self.over.set)

    async def events(self) -> AsyncIterator[ImageStep | PartialImage | GeneratedImage]:
        """Yield what becomes of it, in order; the last one is a ``GeneratedImage``."""
        while True:
            event = (await self._inbox.arrival()).popleft()
            assert isinstance(event, ImageStep | PartialImage | GeneratedImage)
            yield event
            if isinstance(event, GeneratedImage):
                return

    def close(self) -> None:
        """Take no more events. If it has not begun, it never does."""
        if not self._closed:
            self._closed = True
            self._worker.close_request(self._request)
            if not self.over.is_set():
                self._worker.send_soon(Cancel(self._request))


class WorkerProcess:
    """A running child with a loaded model."""

    def __init__(self, name: str, child: Child) -> None:
        self._name = name
        self._child = child
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Inbox] = {}
        self._closing = False
        self._dispatcher: asyncio.Task[None] | None = None
        self.occupancy = Occupancy()
        self.gpu = False  # whether layers of the model are on a GPU; known once it is loaded
        self.memory = Footprint()  # what the load has taken, likewise
        self.ended = asyncio.Event()

    @classmethod
    async def start(
        cls, name: str, params: ModelParams, on_progress: Callable[[float], None], spares: Spares | None = None
    ) -> WorkerProcess:
        """Load the model in a child, the spare one if there is one. Raises ``ModelLoadFailed``, or ``EngineCrashed``
        when the child ends without a word. When it is cancelled, no child is left.
        """
        with spares.loading() if spares is not None else contextlib.nullcontext():
            worker = cls(name, await (spares.take(name) if spares is not None else Child.start(name)))
            try:
                await worker._load(params, on_progress)
            except BaseException:
                await asyncio.shield(worker.aclose())
                raise
            return worker

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    # Whatever takes turns with others in the child says for whose ``share`` of the model's time it counts.

    def generate(self, prompts: list[Prompt], generation: Generation) -> GenerationStream:
        """Answer prompts; the caller closes the stream."""
        return GenerationStream(self, prompts, generation)

    def transcribe(self, path: Path, transcription: Transcription, *, share: str = "") -> TranscriptionStream:
        """Write down the speech in a file of samples (see ``speech.values``), which the child deletes once it has it
        open: should all processes be killed then, nothing of it is left. The caller closes the stream.
        """
        return TranscriptionStream(self, path, transcription, share)

    def generate_image(self, job: ImageGeneration) -> ImageStream:
        """Make a picture. The caller closes the stream."""
        return ImageStream(self, job)

    async def embed(self, inputs: Sequence[Prompt], embedding: Embedding, *, share: str = "") -> Embedded:
        """Return the vectors of texts or token ids. Whoever gives up waiting has the rest of the work dropped."""
        return await self._embedded(Embed(self.next_request(), list(inputs), embedding, share))

    async def rank(self, query: str, documents: Sequence[str], *, truncate: bool = False, share: str = "") -> Embedded:
        """Return for each document the logit of its being an answer to the query."""
        return await self._embedded(Rank(self.next_request(), query, list(documents), truncate, share))

    async def _embedded(self, command: Embed | Rank) -> Embedded:
        try:
            event = await self._ask(command)
        except asyncio.CancelledError:
            self.send_soon(Cancel(command.request))
            raise
        assert isinstance(event, Embedded)
        return event

    async def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Return the token ids of a text."""
        event = await self._ask(Tokenize(self.next_request(), text, add_bos, parse_special))
        assert isinstance(event, Tokens)
        return event.tokens

    async def detokenize(self, tokens: list[int], *, special: bool) -> str:
        """Return the text of token ids."""
        event = await self._ask(Detokenize(self.next_request(), tokens, special))
        assert isinstance(event, Text)
        return event.text

    async def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Have these LoRA adapters, and no others, for requests that come after. Raises ``ModelLoadFailed``, and
        nothing has changed then.
        """
        event = await self._ask(SetAdapters(self.next_request(), list(adapters)))
        assert isinstance(event, Done)

    async def limit_spill(self, size: int) -> None:
        """Let prefixes take at most so many bytes of main memory beside the key-value cache; the rest is given back."""
        event = await self._ask(LimitSpill(self.next_request(), size))
        assert isinstance(event, Done)

    async def save_prefixes(self, path: Path, size: int) -> Saved:
        """Write all prefixes to a file of at most so many bytes, those used last first. Raises ``EngineError`` when it
        can't be written; a former file is left as it was then.
        """
        event = await self._ask(SavePrefixes(self.next_request(), str(path), size))
        assert isinstance(event, Saved)
        return event

    def stop_all(self) -> None:
        """End all requests with a normal finish."""
        self.send_soon(Stop(None))

    async def aclose(self) -> None:
        """End the child, by force if it does not end by itself."""
        self._closing = True
        await self._child.aclose()
        if self._dispatcher is not None:
            await asyncio.shield(self._dispatcher)

    @property
    def _is_gone(self) -> bool:
        """Whether nothing can be sent any more: it has ended, or has been told to."""
        return self._closing or self.ended.is_set()

    # What follows is for GenerationStream.

    def next_request(self) -> int:
        """Return a number that no other request of this child has."""
        return next(self._numbers)

    def open_request(self, request: int, frame: bytes) -> _Inbox:
        """Send a request's command, and return the place to which its events come."""
        if self._is_gone:
            raise self._end()
        self._child.write(frame)
        inbox = self._requests[request] = _Inbox()
        return inbox

    def close_request(self, request: int) -> None:
        """Drop events of the request that still arrive."""
        self._requests.pop(request, None)

    def send_soon(self, command: Command) -> None:
        """Queue a command; one to a child that has ended is dropped, since its requests fail anyway."""
        if not self._is_gone:
            self._child.write(encode_command(command))

    async def _ask(
        self, command: Embed | Rank | Tokenize | Detokenize | SetAdapters | LimitSpill | SavePrefixes
    ) -> Event:
        inbox = self.open_request(command.request, encode_command(command))
        try:
            return (await inbox.arrival()).popleft()
        finally:
            self.close_request(command.request)

    async def _load(self, params: ModelParams, on_progress: Callable[[float], None]) -> None:
        self._child.write(encode_command(Load(params)))
        if await self._child.up():
            while (events := await self._child.events()) is not None:
                for event in events:
                    match event:
                        case Loading(fraction):
                            on_progress(fraction)
                        case Ready(gpu, memory):
                            self.gpu, self.memory = gpu, memory
                            self._dispatcher = asyncio.create_task(self._dispatch(), context=Context())
                            return
                        case LoadFailed(error):
                            raise from_value(error)
        raise EngineCrashed(f"the process that loaded {self._name} {self._child.end}")

    async def _dispatch(self) -> None:
        """Hand out events until the child ends, then fail what is left."""
        try:
            await self._child.deliver(self._hand_out)
        except Exception:  # a bug of ours: nobody would hear of the child any more
            logger.exception("%s: reading from the process failed", self._name)
            self._child.kill()
        self.ended.set()
        self._child.close_link()
        self.occupancy = Occupancy()
        end = self._end()
        if isinstance(end, EngineCrashed):
            logger.error("%s", end.message)
        for request, inbox in self._requests.items():
            inbox.put(Failed(request, to_value(end)))

    def _hand_out(self, frame: bytes) -> None:
        for event in decode_events(frame):
            if isinstance(event, Occupancy):
                self.occupancy = event
            elif isinstance(event, RequestEvent) and (inbox := self._requests.get(event.request)) is not None:
                if isinstance(event, Progress):
                    inbox.progress = event
                else:
                    inbox.progress = None
                    inbox.put(event)

    def _end(self) -> Unavailable:
        """Return why requests fail: the child was told to end, or did of itself."""
        if self._closing:
            return Unavailable(f"{self._name} was stopped before the request was finished", retry_after=1)
        return self.crash()

    def crash(self) -> EngineCrashed:
        """Return how the child ended."""
        return EngineCrashed(
            f"the process that ran {self._name} {self._child.end}; the request was not finished", retry_after=1
        )
