"""Work on what strangers send, in child processes that are killed when a job takes too much time or memory.

Some of it is a program (a chat template), some takes a library for ever (a grammar), and no thread can interrupt
either. So each job goes to a process of a ``Sandbox``, which serves asyncio; ``serve`` is the other side, in the child.

A job and its answer are bytes: this module does not know what they mean, and how to tell a client that a job failed is
its users' business. It knows nothing of HTTP.

Time is CPU time, and the kernel ends a process that takes more: a job is not to blame for a machine that is busy, or
that stands still for a while.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from llamaserve.errors import Unavailable
from llamaserve.frames import FrameSocket, FrameStream

START_LIMIT = 30.0  # seconds until a process must be ready; it takes a fraction of one
STALL_LIMIT = 30.0  # seconds by the clock that a job may take beside what it works
LEAST_SHARE = 0.25  # of a core, on average, that it must get in the rest
OUT_OF_MEMORY = 3  # exit status of a process that had no memory left even for an answer

# All that a process sees of the environment: no tokens and no keys.
_INHERITED = ("DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "TMPDIR", "TZ")

# The first byte of an answer: whether its process takes more jobs.
_READY, _SPENT = b"\0", b"\1"

# What a job may take stands before it, and what it took in its answer: seconds of CPU time.
_SECONDS: Final = struct.Struct("<d")

_RETRY_AFTER = 5.0  # seconds


class TookTooLong(Exception):
    """The job was not done within its time; the message is how long that is, such as ``longer than 2 s``."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"longer than {limit}")


class Budget:
    """What several jobs may take together: ``seconds`` of CPU time. Each may wait ``turn_limit`` seconds for its turn,
    which takes none of them.
    """

    def __init__(self, seconds: float, turn_limit: float) -> None:
        self.seconds = self.left = seconds
        self.turn_limit = turn_limit

    @property
    def name(self) -> str:
        """What it is called when it is used up."""
        return f"{self.seconds:g} s in all"


class Ended(Exception):
    """The process ended by itself in the middle of the job; the message is how."""

    def __init__(self, status: int) -> None:
        super().__init__(f"signal {-status}" if status < 0 else f"exit status {status}")
        self.status = status


class OutOfMemory(Ended):
    """The process ended because it needed too much memory."""


class Sandbox:
    """A pool of at most ``size`` processes, started when a job needs one and reused. For one event loop.

    Each runs ``python -m module FD``, which has to call ``serve`` with that FD. ``name`` is what a client reads of the
    pool when it is not available. A job may take ``time_limit`` seconds of CPU time. A process without a job for
    ``idle_limit`` seconds ends.
    """

    def __init__(
        self, module: str, name: str, *, size: int, time_limit: float, idle_limit: float | None = None
    ) -> None:
        self._module = module
        self._name = name
        self._time_limit = time_limit
        self._idle_limit = idle_limit
        self._size = size
        self._slots = asyncio.Semaphore(size)
        self._children: set[_Child] = set()
        self._idle: list[_Child] = []  # the last that worked last
        self._endings: set[asyncio.Task[int]] = set()
        self._closed = False
        self._closing = asyncio.Lock()  # two that close it must not each have some of the slots

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def pids(self) -> frozenset[int]:
        """The ids of the running processes."""
        return frozenset(child.process.pid for child in self._children)

    async def warm(self) -> None:
        """Have a process ready, so that the first job does not wait for one to start."""
        async with self._slots:
            self._keep(await self._take())

    async def ask(self, payload: bytes, budget: Budget | None = None) -> bytes:
        """Return the answer to one job, whose time is taken from the budget.

        Raises ``TookTooLong``, ``OutOfMemory`` or ``Ended`` when there is none, and ``Unavailable`` when the pool is
        closed, no process can be started, the budget's limit for a turn is over, or the machine is so busy that the job
        does not get on.
        """
        self._check_open()
        if budget is not None and budget.left <= 0:
            raise TookTooLong(budget.name)
        try:
            async with asyncio.timeout(None if budget is None else budget.turn_limit) as turn, self._slots:
                child = await self._take()
                turn.reschedule(None)
                return await self._ask(child, payload, budget)
        except TimeoutError:
            raise Unavailable(f"too much work waits for {self._name}", retry_after=_RETRY_AFTER) from None

    async def aclose(self) -> None:
        """End all processes and wait until they are gone. Jobs that run or wait fail with ``Unavailable``."""
        self._closed = True
        for child in tuple(self._children):
            self._end(child)
        async with self._closing:
            for _ in range(self._size):  # jobs inside, which may be starting a process, leave first
                await self._slots.acquire()
            for _ in range(self._size):
                self._slots.release()
        await asyncio.gather(*self._endings)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(f"{self._name} is shut down")

    async def _take(self) -> _Child:
        """Return a process for the holder of a slot: an idle one, or a new one."""
        self._check_open()
        while self._idle:
            child = self._idle.pop()
            if child.dismissal is not None:
                child.dismissal.cancel()
            if child.process.returncode is None:
                return child
            self._end(child)
        try:
            return await self._start()
        except OSError as error:  # also: the process ended at once (ConnectionError), or was too slow (TimeoutError)
            self._check_open()
            raise Unavailable(f"{self._name} could not be started: {str(error) or 'no answer'}") from error

    async def _start(self) -> _Child:
        ours, theirs = socket.socketpair()
        with theirs:
            stream = await FrameStream.open(ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", self._module, str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    env=environment(),
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

    async def _ask(self, child: _Child, payload: bytes, budget: Budget | None) -> bytes:
        """Have one job done. Unless an answer comes in time the process ends, so no late answer meets the next job."""
        limit, name = self._time_limit, f"{self._time_limit:g} s"
        if budget is not None and budget.left < limit:
            limit, name = budget.left, budget.name
        reusable, took = False, limit
        try:
            async with asyncio.timeout(STALL_LIMIT + limit / LEAST_SHARE):
                frame = await self._exchange(child, _SECONDS.pack(limit) + payload)
            (seconds,) = _SECONDS.unpack_from(frame, 1)
            if 0 <= seconds <= limit:
                took = seconds
            reusable = frame.startswith(_READY)
            return frame[1 + _SECONDS.size :]
        except TimeoutError:
            raise Unavailable(f"{self._name} does not get on", retry_after=_RETRY_AFTER) from None
        except Ended as ended:
            if ended.status == -signal.SIGPROF:
                raise TookTooLong(name) from None
            raise
        finally:
            if budget is not None:
                budget.left -= took
            if reusable:
                self._keep(child)
            else:
                self._end(child)

    async def _exchange(self, child: _Child, payload: bytes) -> bytes:
        try:
            child.stream.write(payload)
            await child.stream.drain()
            return await child.receive()
        except ConnectionError:
            self._check_open()
            raise _ended(await child.process.wait()) from None

    def _keep(self, child: _Child) -> None:
        """Have a process wait for its next job, but not for ever."""
        self._idle.append(child)
        if self._idle_limit is not None:
            child.dismissal = asyncio.get_running_loop().call_later(self._idle_limit, self._dismiss, child)

    def _dismiss(self, child: _Child) -> None:
        self._idle.remove(child)
        self._end(child)

    def _end(self, child: _Child) -> None:
        """Kill a process at once; a task of its own waits until it is gone, so that a cancelled job need not."""
        if child not in self._children:
            return
        self._children.remove(child)
        child.kill()
        ending = asyncio.create_task(child.process.wait())
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)


class _Child:
    """One process and the stream to it."""

    def __init__(self, process: asyncio.subprocess.Process, stream: FrameStream) -> None:
        self.process = process
        self.stream = stream
        self.dismissal: asyncio.TimerHandle | None = None  # what ends it when there is no work

    async def receive(self) -> bytes:
        payload = await self.stream.read()
        if payload is None:
            raise ConnectionError("the process ended")
        return payload

    def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        self.stream.close()


def environment() -> dict[str, str]:
    """Return the child's environment. It imports from where this process does, and never from the working directory."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return inherited | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}


def _ended(status: int) -> Ended:
    # An unasked SIGKILL is the kernel's out-of-memory killer.
    return OutOfMemory(status) if status in (OUT_OF_MEMORY, -signal.SIGKILL) else Ended(status)


# What follows runs in the child.


def serve(fd: int, answer: Callable[[bytes], tuple[bytes, bool]], *, memory_limit: int) -> int:
    """Answer the jobs that come through the inherited socket ``fd``, and return the exit status of the process.

    ``answer`` returns an answer, and whether the process is spent: then it ends, since its memory is used up.
    ``memory_limit`` is the MB of address space of the whole process, Python included.
    """
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)  # for the parent, which then closes the socket
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which a parent may have left otherwise
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _limit_memory(memory_limit)
    try:
        answer_jobs(FrameSocket(socket.socket(fileno=fd)), answer)
    except ConnectionError:
        return 0  # the parent went away in the middle of a frame
    except MemoryError:
        return OUT_OF_MEMORY
    return 0


def answer_jobs(frames: FrameSocket, answer: Callable[[bytes], tuple[bytes, bool]]) -> None:
    """Answer jobs until the parent closes the socket or the process is spent."""
    gc.freeze()  # the modules' objects stay for good; without them a collection takes well under a millisecond
    frames.write(b"")
    while (payload := frames.read()) is not None:
        (limit,), payload = _SECONDS.unpack_from(payload), payload[_SECONDS.size :]
        before = _worked()
        # The signal's default action ends the process even inside one long C call, also when the parent is gone.
        signal.setitimer(signal.ITIMER_PROF, limit)
        result, spent = answer(payload)
        signal.setitimer(signal.ITIMER_PROF, 0)
        frames.write((_SPENT if spent else _READY) + _SECONDS.pack(_worked() - before) + result)
        if spent:
            return
        del payload, result
        gc.collect()  # what a job left in cycles, such as a traceback's, can hold much memory


def _worked() -> float:
    """Return the seconds of CPU time of this process; ``time.process_time`` stands still while a timer runs."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _limit_memory(limit: int) -> None:
    # macOS accepts this limit but does not keep to it: there only the time limit applies, and what `answer` refuses.
    if sys.platform == "darwin":
        return
    wanted = limit * 1024 * 1024
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    limit = wanted if allowed == resource.RLIM_INFINITY else min(wanted, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
