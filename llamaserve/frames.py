"""Length-prefixed frames over a stream socket: how two of our processes talk.

A frame is a 4-byte big-endian length and that many bytes. Blocking readers and writers serve the child processes,
asyncio ones the API process. This module does not know what the bytes mean.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from typing import cast

_LENGTH = struct.Struct(">I")
MAX_FRAME = 256 * 1024 * 1024  # bytes; a longer one can only be a bug or a broken peer
_ENOUGH = 256 * 1024  # bytes that are kept of what nobody reads, before the peer has to wait


class FrameError(ConnectionError):
    """The peer went away in the middle of a frame, or announced an impossible length."""


def _length(header: bytes | bytearray) -> int:
    (length,) = _LENGTH.unpack_from(header)
    if length > MAX_FRAME:
        raise FrameError(f"the peer announced a frame of {length} bytes")
    return int(length)


def _framed(payload: bytes) -> bytes:
    if len(payload) > MAX_FRAME:
        raise FrameError(f"a frame of {len(payload)} bytes is over the limit of {MAX_FRAME}")
    return _LENGTH.pack(len(payload)) + payload


class FrameSocket:
    """Blocking frames over a connected socket. One thread may read while several write."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._reader = sock.makefile("rb", buffering=64 * 1024)
        self._write_lock = threading.Lock()

    def read(self) -> bytes | None:
        """Return the next frame's payload, or None when the peer closed between frames."""
        header = self._reader.read(_LENGTH.size)
        if not header:
            return None
        if len(header) < _LENGTH.size:
            raise FrameError("the peer closed inside a frame header")
        length = _length(header)
        payload: bytes = self._reader.read(length)
        if len(payload) < length:
            raise FrameError("the peer closed inside a frame")
        return payload

    def write(self, payload: bytes) -> None:
        """Send one frame whole."""
        data = _framed(payload)
        with self._write_lock:
            self._sock.sendall(data)

    def close(self) -> None:
        """Close both directions."""
        self._reader.close()
        self._sock.close()


class FrameStream(asyncio.Protocol):
    """Asyncio frames over a connected socket: read one by one, or delivered to a function as they come.

    It parses what the event loop reads by itself: with an ``asyncio.StreamReader`` a task woke up for each frame, which
    is once for every token, and reading took a fifth of this process's CPU time in a profile.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._changed = asyncio.Event()  # something has arrived, or nothing more will
        self._writable = asyncio.Event()
        self._writable.set()
        self._receive: Callable[[bytes], None] | None = None
        self._ended = False
        self._error: Exception | None = None  # why it ended, unless the peer closed

    @classmethod
    async def open(cls, sock: socket.socket) -> FrameStream:
        """Wrap a connected socket, which the stream then owns."""
        sock.setblocking(False)
        _, stream = await asyncio.get_running_loop().create_connection(cls, sock=sock)
        return stream

    async def read(self) -> bytes | None:
        """Return the next frame's payload, or None when the peer closed between frames."""
        while (frame := self._take()) is None:
            if self._ended:
                self._check_end()
                return None
            self._changed.clear()
            self._transport.resume_reading()
            await self._changed.wait()
        return frame

    async def deliver(self, receive: Callable[[bytes], None]) -> None:
        """Hand each frame's payload to ``receive`` at the moment it arrives. Returns when the peer closed between
        frames, and raises whatever ``receive`` does.
        """
        self._receive = receive
        self._deliver()
        self._transport.resume_reading()
        while not self._ended:
            self._changed.clear()
            await self._changed.wait()
        self._check_end()

    def write(self, payload: bytes) -> None:
        """Queue one frame; ``drain`` waits until the peer keeps up. That it is gone is told to who reads or drains."""
        if not self._transport.is_closing():  # uvloop's raises a RuntimeError then
            self._transport.write(_framed(payload))

    async def drain(self) -> None:
        """Wait while the peer is slower than the writes."""
        await self._writable.wait()
        if self._ended:
            raise ConnectionResetError("the peer is gone") from self._error

    def close(self) -> None:
        """Close both directions without waiting."""
        self._transport.close()

    def _take(self) -> bytes | None:
        """Cut the first frame from what has arrived, if it is whole."""
        if len(self._buffer) < _LENGTH.size:
            return None
        end = _LENGTH.size + _length(self._buffer)
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[_LENGTH.size : end])
        del self._buffer[:end]
        return frame

    def _deliver(self) -> None:
        """Hand on what is whole; an error in it ends the stream and is raised where ``deliver`` is awaited."""
        assert self._receive is not None
        try:
            while (frame := self._take()) is not None:
                self._receive(frame)
        except Exception as error:  # noqa: BLE001 - raised by `deliver`
            self._end(error)
            self._transport.abort()

    def _end(self, error: Exception | None) -> None:
        if not self._ended:
            self._ended, self._error = True, error
            self._changed.set()
            self._writable.set()

    def _check_end(self) -> None:
        """Raise why the stream ended, unless the peer closed between frames."""
        if self._error is not None:
            raise self._error
        if self._buffer:
            where = "a frame" if len(self._buffer) >= _LENGTH.size else "a frame header"
            raise FrameError(f"the peer closed inside {where}")

    # What follows is called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one without being a subclass

    def data_received(self, data: bytes) -> None:
        """Hand on the frames in the data, or wake who reads."""
        self._buffer += data
        if self._receive is not None:
            self._deliver()
            return
        self._changed.set()
        if len(self._buffer) > _ENOUGH:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let all who wait know."""
        self._end(exc)

    def pause_writing(self) -> None:
        """Make ``drain`` wait."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let ``drain`` go on."""
        self._writable.set()
