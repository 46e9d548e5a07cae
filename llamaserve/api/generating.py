"""Running a generation for an HTTP request, streamed or whole, until it is answered or its client has left.

Knows requests, responses and the stream of engine events; what an answer looks like is the endpoints' business.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response

from llamaserve.api.accounting import Account, account
from llamaserve.api.services import Running, Services
from llamaserve.api.sse import EventStream, TextEvent, event
from llamaserve.engine.events import Delta, Finished, FinishReason, Progress
from llamaserve.engine.params import Generation
from llamaserve.errors import InvalidRequest, LlamaserveError
from llamaserve.registry.admission import Place
from llamaserve.registry.served import ServedModel, Use
from llamaserve.registry.tasks import GENERATING
from llamaserve.worker.process import GenerationStream, WorkerProcess
from llamaserve.worker.protocol import Prompt
from llamaserve.worker.supervisor import Status

T = TypeVar("T")

EARLY = 5.0  # seconds in which an error is still an HTTP error; after that a stream has begun, and errors are in-band
WAITS_FOR_TURN = "waiting for other requests with this key"
WORKING = "working"  # what a request waits for of which no more is known
_LAST_WORDS = 1.0  # seconds for a generation that nobody waits for to say how far it came
CLIENT_CLOSED = 499  # nobody reads this status; nginx logs it for the same thing


@dataclass
class Job:
    """What is to be generated for one request, and the facts that every part of the answer repeats."""

    id: str
    model: ServedModel
    generation: Generation
    prompts: Callable[[], Awaitable[Sequence[Prompt]]]
    param: str  # the request field that the prompts come from
    sequences: int  # prompts times choices
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: list[int] = field(default_factory=list)  # known once the job is open
    tokens_per_second: int = 0  # of each answer in a stream, at most; 0: as fast as they come
    truncated_tokens: int = 0  # what the prompts had more; who makes them may have cut some already
    dropped_messages: int = 0  # of a conversation that was too long; known once the job is open
    keep_alive: float | None = None  # seconds for which the model stays after this, if the request says so
    headers: dict[str, str] = field(default_factory=dict)  # of the answer; more may come while the job is being opened
    place: Place | None = None
    use: Use | None = None
    stream: GenerationStream | None = None
    account: Account = field(default_factory=account)
    generated: int = 0  # tokens that have come
    counted: bool = False  # in the account

    @property
    def answering(self) -> ServedModel:
        """The model that answers: ``model``, or the one that has replaced it while it was waited for."""
        return (self.use and self.use.model) or self.model

    async def worker(self) -> WorkerProcess:
        """Return the process that answers; the job must be open, or be opened just now."""
        assert self.use is not None
        return await self.use.worker()


def new_id(prefix: str) -> str:
    """Return an id that nobody can guess."""
    return f"{prefix}-{secrets.token_hex(12)}"


async def open_generation(services: Services, job: Job) -> GenerationStream:
    """Load the model if need be, and start generating. Raises whatever makes the request impossible."""
    try:
        await job.model.require(*GENERATING)
        if job.generation.constraint is not None:
            await services.grammars.check(job.generation.constraint)
        await job.account.turn(job.model.name)
        job.place = job.model.admission.enter(job.sequences, job.account.owner)
        job.use = job.model.use()
        worker = await job.worker()
        job.stream = stream = worker.generate(list(await job.prompts()), _limited(job))
        services.running[job.id] = Running(stream, job.account.owner)
        accepted = await stream.accepted()
        job.use.keep(job.keep_alive)
        if job.model.closing:  # and all that was generated has been told so before this came
            stream.stop()
        job.prompt_tokens = accepted.prompt_tokens
        job.truncated_tokens += accepted.truncated
    except BaseException as error:
        close_generation(services, job)
        if isinstance(error, InvalidRequest) and error.param == "prompt":
            error.param = job.param
        raise
    return stream


def _limited(job: Job) -> Generation:
    """Return what is to be generated: in the time that the model has for it, and out of the share of the key."""
    return msgspec.structs.replace(job.answering.limited(job.generation), share=job.account.owner)


def close_generation(services: Services, job: Job) -> None:
    """End the generation if it is still going on, and let others have its place."""
    services.running.pop(job.id, None)
    if not job.counted:
        count_used(job, job.generated)
    if job.stream is not None:
        job.stream.close()
    if job.use is not None:
        job.use.leave()
    if job.place is not None:
        job.place.leave()


def count_used(job: Job, completion: int, cached: int = 0) -> None:
    """Put into the account what the generation has used."""
    job.counted = True
    job.account.used(prompt=sum(job.prompt_tokens), cached=cached, completion=completion)


def let_go_when_over(job: Job, stream: GenerationStream) -> None:
    """Hold the model only until all is generated, however long the client takes to read it. Its process can't be asked
    anything for this job after that.
    """
    assert job.use is not None
    stream.when_over(job.use.leave)


def phase(job: Job) -> str:
    """Say in a few words what a client waits for."""
    if job.account.waits:
        return WAITS_FOR_TURN
    progress = job.stream.progress if job.stream is not None else None
    return phase_of(job.answering, progress, lambda at: f"prompt {at.evaluated / at.prompt_tokens:.0%}")


def phase_of(model: ServedModel, progress: Progress | None, begun: Callable[[Progress], str]) -> str:
    """Say what a request waits for, in the words of ``begun`` once it is under way."""
    if model.waits_for_room:
        return "waiting for other models to make room"
    if model.status is Status.LOADING:
        return f"loading {model.progress:.0%}"
    if progress is None:
        return WORKING
    return f"queued, place {progress.place}" if progress.place else begun(progress)


def counted_usage(job: Job, finished: Sequence[Finished]) -> dict[str, Any]:
    """Return OpenAI's usage object, and put it into the account: each prompt counts once, every answer counts."""
    choices = job.generation.choices
    prompt = sum(job.prompt_tokens)
    completion = sum(each.completion_tokens for each in finished)
    cached: dict[int, int] = {}
    for each in finished:  # where several answers share a prompt, what all of them reused
        number = each.index // choices
        cached[number] = min(each.cached_tokens, cached.get(number, each.cached_tokens))
    count_used(job, completion, sum(cached.values()))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())}
        | ({"truncated_tokens": job.truncated_tokens} if job.truncated_tokens else {}),
    }


async def generate_whole(
    services: Services, job: Job, opened: Callable[[], Awaitable[None]] | None = None
) -> tuple[list[Finished], dict[str, Any]]:
    """Return all answers in the order of their index, and the usage. ``opened`` runs while the job is open."""
    stream = await open_generation(services, job)
    finished: list[Finished] = []
    try:
        if opened is not None:
            await opened()
        await _collect(stream, finished)
        finished.sort(key=lambda event: event.index)
        return finished, counted_usage(job, finished)
    except asyncio.CancelledError:  # what was generated until now is known once it is stopped
        stream.stop()
        with contextlib.suppress(TimeoutError, LlamaserveError):
            async with asyncio.timeout(_LAST_WORDS):
                await _collect(stream, finished)
        job.generated = sum(each.completion_tokens for each in finished)
        raise
    finally:
        close_generation(services, job)


async def _collect(stream: GenerationStream, finished: list[Finished]) -> None:
    async for each in stream.events():
        finished += [each] if isinstance(each, Finished) else []


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T | Response:
    """Run the work, but cancel it as soon as the client hangs up."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_client_has_left(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return Response(status_code=CLIENT_CLOSED)
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _client_has_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ChunkFormat(Protocol):
    """How an endpoint writes the parts of a streamed answer."""

    async def start(self) -> Sequence[Mapping[str, Any]]:
        """Return the chunks to send before any text."""

    def events(self, piece: Delta | Finished) -> Iterable[bytes]:
        """Return the events for what the engine reports: a piece of an answer, or its last."""

    def usage(self, usage: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the chunk that carries the usage."""


class TextChunks(ABC):
    """The chunks of an endpoint whose answers are nothing but text."""

    def __init__(self) -> None:
        self._text_events: dict[int, TextEvent] = {}

    def events(self, piece: Delta | Finished) -> Iterable[bytes]:
        """See ``ChunkFormat``."""
        if piece.logprobs or piece.prompt_logprobs:
            yield event(self.with_logprobs(piece))
        elif piece.text:
            if piece.index not in self._text_events:
                self._text_events[piece.index] = TextEvent(functools.partial(self.text, piece.index))
            yield self._text_events[piece.index](piece.text)
        if isinstance(piece, Finished):
            yield event(self.finish(piece.index, piece.reason))

    @abstractmethod
    def text(self, index: int, text: str) -> Mapping[str, Any]:
        """Return the chunk for a piece of text; pieces of one index differ in nothing else."""

    @abstractmethod
    def with_logprobs(self, piece: Delta | Finished) -> Mapping[str, Any]:
        """Return the chunk for a piece of text and the log-probabilities that belong to it."""

    @abstractmethod
    def finish(self, index: int, reason: FinishReason) -> Mapping[str, Any]:
        """Return the chunk that ends a choice."""


async def open_early(services: Services, job: Job) -> tuple[asyncio.Task[GenerationStream], Callable[[], None]]:
    """Begin to open a generation for a stream, and return what becomes of it and how to end it. Errors that show within
    the first seconds are raised, later ones are the task's.
    """
    opening = asyncio.create_task(open_generation(services, job))
    opening.add_done_callback(lambda done: done.cancelled() or done.exception())

    def close() -> None:
        if not opening.cancel() and not opening.cancelled() and opening.exception() is None:
            close_generation(services, job)

    try:
        await asyncio.wait({opening}, timeout=EARLY)
        if opening.done():
            opening.result()
    except BaseException:
        close()
        raise
    return opening, close


async def stream_response(services: Services, job: Job, chunks: ChunkFormat, *, include_usage: bool) -> EventStream:
    """Return the streamed answer. Errors that show within the first seconds are raised, later ones go in-band."""
    opening, close = await open_early(services, job)
    return EventStream(
        _events(job, opening, chunks, include_usage=include_usage),
        close=close,
        phase=functools.partial(phase, job),
        heartbeat=services.settings.heartbeat,
        headers=job.headers,
    )


class _Pace:
    """Slows a stream down to ``max_tokens_second``."""

    def __init__(self, job: Job) -> None:
        self._model = job.model
        self._seconds = 1 / (job.tokens_per_second * job.sequences) if job.tokens_per_second else 0.0
        self._due = 0.0

    def wait(self, event: Delta | Finished) -> float:
        """Return how many seconds to wait before an event may be shown."""
        if not self._seconds or self._model.closing:
            return 0.0
        now = time.monotonic()
        self._due = max(self._due, now) + self._seconds * (event.tokens if isinstance(event, Delta) else 0)
        return self._due - now


async def _events(
    job: Job, opening: asyncio.Task[GenerationStream], chunks: ChunkFormat, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield server-sent events; those of one step of the engine at once, since every piece costs a system call."""
    stream = await asyncio.shield(opening)
    start = await chunks.start()
    let_go_when_over(job, stream)
    for chunk in start:
        yield event(chunk)
    finished: list[Finished] = []
    pace, totals = _Pace(job), None
    while arrived := await stream.arrived():
        job.account.progressed(sum(each.tokens for each in arrived if isinstance(each, Delta)))
        step: list[bytes] = []
        for each in arrived:
            if (seconds := pace.wait(each)) > 0:
                yield b"".join(step)
                step.clear()
                await asyncio.sleep(seconds)
            step += chunks.events(each)
            if isinstance(each, Finished):
                finished.append(each)
            else:
                job.generated += each.tokens
        if len(finished) == job.sequences:
            totals = counted_usage(job, finished)
            await job.account.settle("answered")
        yield b"".join(step)
    if include_usage and totals is not None:
        yield event(chunks.usage(totals))
