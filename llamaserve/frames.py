"""Length-prefixed frames over a stream socket: how two of our processes talk.

A frame is a 4-byte big-endian length and that many bytes. Blocking readers and writers serve the child processes,
asyncio ones the API process. This module does not know what the bytes mean.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading

_LENGTH = struct.Struct(">I")
MAX_FRAME = 256 * 1024 * 1024  # bytes; a longer one can only be a bug or a broken peer


class FrameError(ConnectionError):
    """The peer went away in the middle of a frame, or announced an impossible length."""


def _length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
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


class FrameStream:
    """Asyncio frames over a connected socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> FrameStream:
        """Wrap a connected socket, which the stream then owns."""
        sock.setblocking(False)
        return cls(*await asyncio.open_connection(sock=sock))

    async def read(self) -> bytes | None:
        """Return the next frame's payload, or None when the peer closed between frames."""
        try:
            header = await self._reader.readexactly(_LENGTH.size)
        except asyncio.IncompleteReadError as error:
            if not error.partial:
                return None
            raise FrameError("the peer closed inside a frame header") from error
        try:
            return await self._reader.readexactly(_length(header))
        except asyncio.IncompleteReadError as error:
            raise FrameError("the peer closed inside a frame") from error

    def write(self, payload: bytes) -> None:
        """Queue one frame; ``drain`` waits until the peer keeps up."""
        self._writer.write(_framed(payload))

    async def drain(self) -> None:
        """Wait while the peer is slower than the writes."""
        await self._writer.drain()

    def close(self) -> None:
        """Close both directions without waiting."""
        self._writer.close()
