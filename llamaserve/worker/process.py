"""One life of one child process: start it, talk to it, notice its end.

``WorkerProcess.start`` returns when the model is loaded. From then on requests run until the process ends, for whatever
reason; then every open request gets ``EngineCrashed``. Whether to start another is the supervisor's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec

from llamaserve.engine.events import Delta, Failed, Finished, Occupancy, Progress
from llamaserve.engine.params import Generation, LoadParams
from llamaserve.errors import EngineCrashed, from_value, to_value
from llamaserve.frames import FrameError, FrameStream
from llamaserve.worker.protocol import (
    Accepted,
    Cancel,
    Command,
    Detokenize,
    Event,
    Generate,
    Load,
    LoadFailed,
    Loading,
    Prompt,
    Ready,
    RequestEvent,
    Stop,
    Text,
    Tokenize,
    Tokens,
    decode_events,
    encode_command,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_EXIT_GRACE = 5.0  # seconds between closing the socket and SIGKILL
_LONGEST_LINE = 64 * 1024  # bytes of standard error
_LONGEST_WORD = 500  # characters of one line that explains an end
_AT_ONCE = 256  # events; what a slow client is behind is written in pieces, so that no large buffer is needed for it
_LAST_WORDS = 5  # lines of standard error kept to explain an unexpected end

# Threads that meet at a barrier spin for about 50 µs and then sleep: as fast as OpenMP's default on a quiet machine,
# and it does not hold up every other program's threads on a busy one. No debugger is started when llama.cpp aborts.
_CHILD_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "GGML_NO_BACKTRACE": "1"}


class _Inbox:
    """The events of one request that are not taken yet. Unlike a queue it hands over all that a step brought at once,
    and its taker wakes up once a step.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.progress: Progress | None = None  # the latest, which wakes nobody

    def put(self, event: Event) -> None:
        """Add an event and wake the taker."""
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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
        self._open = len(prompts) * generation.choices
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

    def stop(self) -> None:
        """End the request with a normal finish and the text so far."""
        self._worker.send_soon(Stop(self._request))

    def close(self) -> None:
        """Take no more events; what is still being generated is dropped."""
        self._worker.close_request(self._request)
        if self._open and not self._inbox.failed:
            self._worker.send_soon(Cancel(self._request))
        self._open = 0


class WorkerProcess:
    """A running child with a loaded model."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, link: FrameStream) -> None:
        self._name = name
        self._process = process
        self._link = link
        self._numbers = itertools.count(1)
        self._requests: dict[int, _Inbox] = {}
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self.occupancy = Occupancy()
        self.gpu = False  # whether layers of the model are on a GPU; known once it is loaded
        self.ended = asyncio.Event()

    @classmethod
    async def start(cls, name: str, params: LoadParams, on_progress: Callable[[float], None]) -> WorkerProcess:
        """Start a child and load the model in it. Raises ``ModelLoadFailed``, or ``EngineCrashed`` when the child ends
        without a word. When it is cancelled, no child is left.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            link = await FrameStream.open(ours)
            try:
                process = await _spawn(theirs)
            except BaseException:
                link.close()
                raise
        worker = cls(name, process, link)
        worker._tasks.append(asyncio.create_task(worker._read_standard_error()))
        try:
            link.write(encode_command(Load(params)))
            await worker._wait_until_ready(on_progress)
        except BaseException:
            await asyncio.shield(worker.aclose())
            raise
        worker._tasks.append(asyncio.create_task(worker._dispatch()))
        return worker

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def generate(self, prompts: list[Prompt], generation: Generation) -> GenerationStream:
        """Answer prompts; the caller closes the stream."""
        return GenerationStream(self, prompts, generation)

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

    def stop_all(self) -> None:
        """End all requests with a normal finish."""
        self.send_soon(Stop(None))

    async def aclose(self) -> None:
        """End the child, by force if it does not end by itself."""
        self._closing = True
        self._link.close()
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_GRACE)
        except TimeoutError:
            self._kill()
            await self._process.wait()
        await asyncio.gather(*self._tasks)

    # What follows is for GenerationStream.

    def next_request(self) -> int:
        """Return a number that no other request of this child has."""
        return next(self._numbers)

    def open_request(self, request: int, frame: bytes) -> _Inbox:
        """Send a request's command, and return the place to which its events come."""
        if self.ended.is_set():
            raise self._crash()
        self._link.write(frame)
        inbox = self._requests[request] = _Inbox()
        return inbox

    def close_request(self, request: int) -> None:
        """Drop events of the request that still arrive."""
        self._requests.pop(request, None)

    def send_soon(self, command: Command) -> None:
        """Queue a command; one to a child that has ended is dropped, since its requests fail anyway."""
        if not self.ended.is_set():
            self._link.write(encode_command(command))

    async def _ask(self, command: Tokenize | Detokenize) -> Event:
        inbox = self.open_request(command.request, encode_command(command))
        try:
            return (await inbox.arrival()).popleft()
        finally:
            self.close_request(command.request)

    async def _wait_until_ready(self, on_progress: Callable[[float], None]) -> None:
        while (events := await self._heard(self._read_events())) is not None:
            for event in events:
                match event:
                    case Loading(fraction):
                        on_progress(fraction)
                    case Ready(gpu):
                        self.gpu = gpu
                        return
                    case LoadFailed(error):
                        raise from_value(error)
        raise EngineCrashed(f"the process that loaded {self._name} {self._end()}")

    async def _read_events(self) -> list[Event] | None:
        frame = await self._link.read()
        return None if frame is None else decode_events(frame)

    async def _heard(self, listening: Awaitable[T | None]) -> T | None:
        """Return what is heard from the child, or None once it has ended and its last words are read."""
        try:
            heard = await listening
            if heard is not None:
                return heard
        except (FrameError, msgspec.MsgspecError) as error:
            logger.error("%s: the process sent what can't be read: %s", self._name, error)
            self._kill()
        except ConnectionError:
            logger.debug("%s: the process is gone", self._name)
        await self._process.wait()
        await self._tasks[0]
        return None

    async def _dispatch(self) -> None:
        """Hand out events until the child ends, then fail what is left."""
        try:
            await self._heard(self._link.deliver(self._hand_out))
        except Exception:  # a bug of ours: nobody would hear of the child any more
            logger.exception("%s: reading from the process failed", self._name)
            self._kill()
        self.ended.set()
        self._link.close()
        self.occupancy = Occupancy()
        crash = self._crash()
        if not self._closing:
            logger.error("%s", crash.message)
        for request, inbox in self._requests.items():
            inbox.put(Failed(request, to_value(crash)))

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

    async def _read_standard_error(self) -> None:
        """Log what the child says, line by line; an endless line is cut into pieces."""
        assert self._process.stderr is not None
        rest = b""
        while chunk := await self._process.stderr.read(_LONGEST_LINE):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= _LONGEST_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._hear(line)
        self._hear(rest)

    def _hear(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            self._last_words.append(text[:_LONGEST_WORD])
            logger.warning("%s: %s", self._name, text)

    def _kill(self) -> None:
        """End the child by force. Not by ``Process.kill``, which may reap a child that has just died, and then its exit
        status is lost to asyncio.
        """
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)

    def _crash(self) -> EngineCrashed:
        return EngineCrashed(
            f"the process that ran {self._name} {self._end()}; the request was not finished", retry_after=1
        )

    def _end(self) -> str:
        code = self._process.returncode
        how = "ended"
        if code is not None and code < 0:
            names = {each.value: each.name for each in signal.Signals}
            how = f"was ended by {names.get(-code, f'signal {-code}')}"
        elif code:
            how = f"ended with exit code {code}"
        return f"{how} ({'; '.join(self._last_words)})" if self._last_words else how


async def _spawn(socket_for_child: socket.socket) -> asyncio.subprocess.Process:
    descriptor = socket_for_child.fileno()
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "llamaserve.worker.host", str(descriptor)),
        pass_fds=(descriptor,),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=_CHILD_ENVIRONMENT | dict(os.environ),
    )
