"""Rendering chat templates in child processes, which are killed when a template takes too much time or memory.

A chat template is a program from a stranger: it comes with a model file or with a request. Jinja's sandbox keeps it
from the process's objects, but not from looping for ever or from ``10 ** 10 ** 9``, which no thread can interrupt. So
each render is a job for a renderer process (``renderer.py``); this module owns those processes and serves asyncio.

It knows nothing of HTTP, of Jinja, or of where a template comes from, and has no template for a model without one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from types import TracebackType
from typing import Any

import msgspec

from llamaserve.errors import ChatTemplateError, ErrorValue, InvalidRequest, Unavailable, from_value
from llamaserve.frames import FrameStream

TIME_LIMIT = 2.0  # seconds for one job; an ordinary template takes a few milliseconds
MEMORY_LIMIT = 512  # MB of address space for one renderer process, Python included
START_LIMIT = 30.0  # seconds until a renderer process must be ready; it takes a fraction of one
OUT_OF_MEMORY = 3  # exit status of a renderer that had no memory left even for an error message
RESERVED = frozenset({"messages", "bos_token", "eos_token", "add_generation_prompt"})

# All that a renderer process sees of the environment: no tokens and no keys.
_INHERITED = ("DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "TMPDIR", "TZ")


class RenderJob(msgspec.Struct, frozen=True):
    """One prompt to render. The contents of ``messages`` are strings; ``variables`` go to the template as they are."""

    template: str
    messages: list[dict[str, Any]]
    bos_token: str
    eos_token: str
    add_generation_prompt: bool = True
    variables: dict[str, Any] = {}


class RenderAnswer(msgspec.Struct, frozen=True):
    """A renderer's answer: ``text`` or ``error``. A ``spent`` renderer has run out of memory and takes no more jobs."""

    text: str = ""
    error: ErrorValue | None = None
    spent: bool = False


class TemplateRenderer:
    """A pool of at most ``size`` renderer processes, started when a job needs one and reused. For one event loop."""

    def __init__(self, size: int = 2, *, time_limit: float = TIME_LIMIT) -> None:
        self._time_limit = time_limit
        self._size = size
        self._slots = asyncio.Semaphore(size)
        self._children: set[_Child] = set()
        self._idle: list[_Child] = []
        self._endings: set[asyncio.Task[int]] = set()
        self._closed = False

    async def __aenter__(self) -> TemplateRenderer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def pids(self) -> frozenset[int]:
        """The process ids of the running renderers."""
        return frozenset(child.process.pid for child in self._children)

    async def warm(self) -> None:
        """Have a renderer process ready, so that the first job does not wait for one to start."""
        async with self._slots:
            self._idle.append(await self._take())

    async def render(self, job: RenderJob) -> str:
        """Return the prompt text.

        Raises ``ChatTemplateError`` when the template refuses the messages, fails, or takes too much time or memory;
        ``InvalidRequest`` when the variables hold a reserved name or a value that can't be passed on; ``Unavailable``
        when the pool is closed or no process can be started.
        """
        payload = _encoded(job)
        self._check_open()
        async with self._slots:
            answer = await self._ask(await self._take(), payload)
        if answer.error is not None:
            raise from_value(answer.error)
        return answer.text

    async def aclose(self) -> None:
        """End all renderers and wait until they are gone. Jobs that run or wait fail with ``Unavailable``."""
        self._closed = True
        for child in tuple(self._children):
            self._end(child)
        for _ in range(self._size):  # jobs inside, which may be starting a process, leave first
            await self._slots.acquire()
        for _ in range(self._size):
            self._slots.release()
        await asyncio.gather(*self._endings)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the chat template renderer is shut down")

    async def _take(self) -> _Child:
        """Return a renderer for the holder of a slot: an idle one, or a new one."""
        self._check_open()
        while self._idle:
            child = self._idle.pop()
            if child.process.returncode is None:
                return child
            self._end(child)
        try:
            return await self._start()
        except OSError as error:  # also: the process ended at once (ConnectionError), or was too slow (TimeoutError)
            self._check_open()
            raise Unavailable(f"the chat template renderer could not be started: {error or 'no answer'}") from error

    async def _start(self) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            stream = await FrameStream.open(ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "llamaserve.chat.renderer", str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    env=_environment(),
                )
            except BaseException:
                stream.close()
                raise
        child = _Child(process, stream)
        self._children.add(child)
        try:
            self._check_open()
            async with asyncio.timeout(START_LIMIT):
                await child.receive()  # an empty frame: ready
        except BaseException:
            self._end(child)
            raise
        return child

    async def _ask(self, child: _Child, payload: bytes) -> RenderAnswer:
        """Have one job done. Unless an answer comes in time the process ends, so no late answer meets the next job."""
        reusable = False
        try:
            async with asyncio.timeout(self._time_limit):
                answer = await self._exchange(child, payload)
            reusable = not answer.spent
            return answer
        except TimeoutError:
            reason = f"the chat template took longer than {self._time_limit:g} s"
            raise ChatTemplateError(reason, param="messages") from None
        finally:
            if reusable:
                self._idle.append(child)
            else:
                self._end(child)

    async def _exchange(self, child: _Child, payload: bytes) -> RenderAnswer:
        try:
            child.stream.write(payload)
            await child.stream.drain()
            return msgspec.msgpack.decode(await child.receive(), type=RenderAnswer)
        except ConnectionError:
            self._check_open()
            raise ChatTemplateError(_why_ended(await child.process.wait()), param="messages") from None

    def _end(self, child: _Child) -> None:
        """Kill a renderer at once; a task of its own waits until it is gone, so that a cancelled job need not."""
        if child not in self._children:
            return
        self._children.remove(child)
        child.kill()
        ending = asyncio.create_task(child.process.wait())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)


class _Child:
    """One renderer process and the stream to it."""

    def __init__(self, process: asyncio.subprocess.Process, stream: FrameStream) -> None:
        self.process = process
        self.stream = stream

    async def receive(self) -> bytes:
        payload = await self.stream.read()
        if payload is None:
            raise ConnectionError("the renderer process ended")
        return payload

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        self.stream.close()


def _encoded(job: RenderJob) -> bytes:
    taken = sorted(RESERVED & job.variables.keys())
    if taken:
        raise InvalidRequest(f"a chat template variable can't be named {taken[0]!r}")
    try:
        return msgspec.msgpack.encode(job)
    except (OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"the messages or variables can't be passed to the chat template: {error}") from error


def _environment() -> dict[str, str]:
    """Return the child's environment. It imports from where this process does, and never from the working directory."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return inherited | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}


def _why_ended(status: int) -> str:
    # An unasked SIGKILL is the kernel's out-of-memory killer.
    if status in (OUT_OF_MEMORY, -signal.SIGKILL):
        return f"the chat template needed more than {MEMORY_LIMIT} MB of memory"
    ending = f"signal {-status}" if status < 0 else f"exit status {status}"
    return f"the chat template crashed its renderer process ({ending})"
