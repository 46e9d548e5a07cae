"""A started child process: its link, what it says on standard error, and how it ends.

It can load one model. Knows frames of events and nothing of what they mean, but for the first one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeVar

import msgspec

from llamaserve.engine.events import Device
from llamaserve.frames import FrameError, FrameStream
from llamaserve.worker.protocol import Event, Hello, decode_events

logger = logging.getLogger(__name__)

T = TypeVar("T")

_START_LIMIT = 60.0  # seconds until it is up, which takes a fraction of one even on a slow machine
_EXIT_GRACE = 5.0  # seconds between closing the socket and SIGKILL
_LONGEST_LINE = 64 * 1024  # bytes of standard error
_LONGEST_WORD = 500  # characters of one line that explains an end
_LAST_WORDS = 5  # lines of standard error kept to explain an unexpected end

# Threads that meet at a barrier spin for about 50 µs and then sleep: as fast as OpenMP's default on a quiet machine,
# and it does not hold up every other program's threads on a busy one. No debugger is started when llama.cpp aborts.
# Numpy needs no threads of its own.
ENVIRONMENT: Final = {"GOMP_SPINCOUNT": "1000", "GGML_NO_BACKTRACE": "1", "OPENBLAS_NUM_THREADS": "1"}
_SECRETS: Final = ("LLAMASERVE_API_KEY", "LLAMASERVE_ADMIN_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class Process(Protocol):
    """A running process, whoever its parent is."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """How it has ended, less than 0 for a signal; None when it is not known to have."""

    async def read_standard_error(self, size: int) -> bytes:
        """Return what it has said next, at most so many bytes; nothing once it is over."""

    async def wait(self) -> int:
        """Wait for its end, and return how it has ended."""

    def kill(self) -> None:
        """End it by force."""


class Child:
    """A child process; ``name`` is what its words are logged under. It must be closed."""

    def __init__(self, name: str, process: Process, link: FrameStream) -> None:
        self.name = name
        self._process = process
        self._link = link
        self._last_words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._reader = asyncio.create_task(self._read_standard_error())
        self._greeting = asyncio.create_task(self._greeted())
        self.devices: list[Device] = []  # known once it is up

    @classmethod
    async def start(cls, name: str, launch: Callable[[socket.socket], Awaitable[Process]] | None = None) -> Child:
        """Start one; it is not up yet. When this is cancelled, none is left. ``launch`` starts a process that serves a
        link; without it, one is started as a program of its own.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            link = await FrameStream.open(ours)
            try:
                return cls(name, await (launch or _execute)(theirs), link)
            except BaseException:
                link.close()
                raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def end(self) -> str:
        """How it has ended, and its last words."""
        code = self._process.returncode
        how = "ended"
        if code is not None and code < 0:
            names = {each.value: each.name for each in signal.Signals}
            how = f"was ended by {names.get(-code, f'signal {-code}')}"
        elif code:
            how = f"ended with exit code {code}"
        return f"{how} ({'; '.join(self._last_words)})" if self._last_words else how

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended."""
        return self._process.returncode is not None

    async def up(self) -> bool:
        """Wait until it has imported everything and can load a model; False when it ends before that. Any number of
        callers may wait.
        """
        return await asyncio.shield(self._greeting)

    def write(self, frame: bytes) -> None:
        """Queue a frame."""
        self._link.write(frame)

    async def events(self) -> list[Event] | None:
        """Return the next frame's events after the greeting, or None once it has ended and its last words are read."""
        return await self._heard(self._read_events())

    async def deliver(self, receive: Callable[[bytes], None]) -> None:
        """Hand each frame to ``receive`` at the moment it arrives, until it has ended and its last words are read."""
        await self._heard(self._link.deliver(receive))

    async def closed(self) -> None:
        """Wait until it has ended and its last words are read."""
        await self._process.wait()
        await asyncio.shield(self._reader)

    def close_link(self) -> None:
        """Say that nothing more is wanted of it, upon which it ends by itself."""
        self._link.close()

    def kill(self) -> None:
        """End it by force."""
        if self._process.returncode is None:
            self._process.kill()

    async def aclose(self) -> None:
        """End it: by force if it does not end by itself, and at once if it is not up yet."""
        self._link.close()
        if not self._greeting.done():
            self.kill()
        try:
            await asyncio.wait_for(self._process.wait(), _EXIT_GRACE)
        except TimeoutError:
            self.kill()
        await self.closed()
        await asyncio.shield(self._greeting)

    async def _greeted(self) -> bool:
        try:
            async with asyncio.timeout(_START_LIMIT):
                return await self._heard(self._read_greeting()) is not None
        except TimeoutError:
            self._last_words.append(f"it was not up within {_START_LIMIT:g} s")
            self.kill()
            await self.closed()
            return False

    async def _read_greeting(self) -> Hello | None:
        match await self._read_events():
            case None:
                return None
            case [Hello() as hello]:
                self.devices = hello.devices
                return hello
            case _:
                raise FrameError("its first event is not a greeting")

    async def _read_events(self) -> list[Event] | None:
        frame = await self._link.read()
        return None if frame is None else decode_events(frame)

    async def _heard(self, listening: Awaitable[T | None]) -> T | None:
        """Return what is heard, or None once it has ended and its last words are read."""
        try:
            heard = await listening
            if heard is not None:
                return heard
        except (FrameError, msgspec.MsgspecError) as error:
            logger.error("%s: the process sent what can't be read: %s", self.name, error)
            self.kill()
        except ConnectionError:
            logger.debug("%s: the process is gone", self.name)
        await self.closed()
        return None

    async def _read_standard_error(self) -> None:
        """Log what it says, line by line; an endless line is cut into pieces."""
        rest = b""
        while chunk := await self._process.read_standard_error(_LONGEST_LINE):
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
            logger.warning("%s: %s", self.name, text)


def environment() -> dict[str, str]:
    """Return the environment of a process that reads models: ours, but no secrets."""
    return ENVIRONMENT | {name: value for name, value in os.environ.items() if name not in _SECRETS}


def _command(descriptor: int) -> list[str]:
    return [sys.executable, "-P", "-m", "llamaserve.worker.host", str(descriptor)]


async def _execute(link: socket.socket) -> Process:
    """Start a program that serves the link."""
    descriptor = link.fileno()
    process = await asyncio.create_subprocess_exec(
        *_command(descriptor),
        pass_fds=(descriptor,),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment(),
    )
    return _Program(process)


class _Program:
    """A process that is our own child."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        self.pid = process.pid
        self.read_standard_error = process.stderr.read
        self.wait = process.wait
        self._process = process

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def kill(self) -> None:
        """End it by force. Not by ``Process.kill``, which may reap a child that has just died, and then its exit status
        is lost to asyncio.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
