"""Children without the wait for Python and all its imports: forks of a process that has everything imported.

A fork is there within milliseconds, at any moment; starting a program anew takes some tenths of a second, and more on a
small board. The fork server (``fork_server_main``) is started with the first child that is wanted, has one thread and
has never touched a GPU, so that its forks may. For Linux: macOS lets no fork use its frameworks.

Each fork has a channel, a socket of its own, to the fork server, which says its process id and later how it ended; when
our side says no more, the fork is killed. So none outlives this process, and none is taken for another of its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import struct
import sys
from asyncio.subprocess import DEVNULL
from typing import Final

from llamaserve.errors import EngineCrashed, Unavailable
from llamaserve.worker.child import Child, Process, environment

logger = logging.getLogger(__name__)

# What a channel carries: the process id, or -errno if there is none; then the exit status, or -signal.
NUMBER: Final = struct.Struct(">q")

_START_LIMIT = 60.0  # seconds, for the fork server's own start, too
_EXIT_GRACE = 5.0  # seconds between closing the control socket and SIGKILL
_GONE = "the process that starts those of the models has ended"


class ForkServer:
    """Starts children. It must be closed, which ends those that are left."""

    def __init__(self) -> None:
        self._starting = asyncio.Lock()
        self._program: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Process id of the fork server, if it has been started."""
        return self._program.pid if self._program is not None else None

    async def start(self, name: str) -> Child:
        """Start a child, as ``Child.start`` does."""
        return await Child.start(name, self._fork)

    async def aclose(self) -> None:
        """End the fork server."""
        self._closed = True
        async with self._starting:
            await self._end()

    async def _fork(self, link: socket.socket) -> Process:
        """Have a process forked that serves ``link``. Cancelled, it leaves one that is killed at once."""
        channel, its_channel = _pair(socket.SOCK_SEQPACKET)
        standard_error, its_standard_error = _pair(socket.SOCK_STREAM)
        try:
            with its_channel, its_standard_error:
                theirs = [each.fileno() for each in (link, its_standard_error, its_channel)]
                async with self._starting:
                    socket.send_fds(await self._up(), [b"\0"], theirs)
            async with asyncio.timeout(_START_LIMIT):
                pid = await _number(channel)
            if pid < 0:
                raise OSError(-pid, os.strerror(-pid))
        except BaseException as error:
            channel.close()
            standard_error.close()
            if isinstance(error, TimeoutError) and self._program is not None and self._program.returncode is None:
                self._program.kill()
            if isinstance(error, ConnectionError | TimeoutError):
                raise EngineCrashed(_GONE) from error
            raise
        return _Fork(pid, channel, standard_error)

    async def _up(self) -> socket.socket:
        """Return the socket to the fork server, starting it if it is not there."""
        if self._closed:
            raise Unavailable("the server is being shut down")
        if self._program is not None and self._program.returncode is not None:
            logger.error("%s; a new one is started", _GONE)
            await self._end()
        if self._control is None:
            self._control, theirs = _pair(socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    self._program = await _execute(theirs.fileno())
                except BaseException:
                    await self._end()
                    raise
        return self._control

    async def _end(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._program is not None:
            try:
                await asyncio.wait_for(self._program.wait(), _EXIT_GRACE)
            except TimeoutError:  # it hangs
                self._program.kill()
                await self._program.wait()
            self._program = None


class _Fork:
    """A ``Process`` that is not our child but the fork server's."""

    def __init__(self, pid: int, channel: socket.socket, standard_error: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._channel = channel
        self._standard_error = standard_error
        self._ending = asyncio.create_task(self._end())

    async def read_standard_error(self, size: int) -> bytes:
        """Return what it has said next, at most so many bytes; nothing once it is over."""
        said = await asyncio.get_running_loop().sock_recv(self._standard_error, size)
        if not said:
            self._standard_error.close()
        return said

    async def wait(self) -> int:
        """Wait for its end, and return how it has ended."""
        return await asyncio.shield(self._ending)

    def kill(self) -> None:
        """End it by force."""
        with contextlib.suppress(OSError):  # the fork server is gone, or it is over and that will be heard of
            self._channel.shutdown(socket.SHUT_WR)

    async def _end(self) -> int:
        with self._channel:
            try:
                self.returncode = await _number(self._channel)
            except ConnectionError:
                self.returncode = -signal.SIGKILL  # so the kernel ends forks whose fork server is gone
        return self.returncode


def _pair(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets, of which the first is for asyncio."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.setblocking(False)
    return ours, theirs


async def _number(channel: socket.socket) -> int:
    """Return the next number of a channel. Raises ``ConnectionError`` when the fork server is gone."""
    message = await asyncio.get_running_loop().sock_recv(channel, NUMBER.size)
    if not message:
        raise ConnectionError(_GONE)
    (number,) = NUMBER.unpack(message)
    return int(number)


async def _execute(control: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "llamaserve.worker.fork_server_main", str(control)),
        pass_fds=(control,),
        stdin=DEVNULL,
        stdout=DEVNULL,
        stderr=None if sys.stderr is not None else DEVNULL,  # it may be closed
        env=environment(),
    )
