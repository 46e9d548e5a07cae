from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings, strategies as st

from llamaserve import frames
from llamaserve.frames import MAX_FRAME, FrameError, FrameSocket, FrameStream

_payloads = st.lists(
    st.one_of(st.binary(max_size=50), st.integers(0, 300_000).map(lambda length: b"x" * length)), max_size=6
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def _framed(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def _read_all_blocking(data: bytes) -> list[bytes | None]:
    """Give a ``FrameSocket`` these bytes and then the end, and return what it reads, the end as None."""
    ours, theirs = socket.socketpair()
    with theirs:
        link = FrameSocket(ours)
        try:
            writer = threading.Thread(target=lambda: (theirs.sendall(data), theirs.shutdown(socket.SHUT_WR)))
            writer.start()
            try:
                return _until_the_end(link)
            finally:
                writer.join()
        finally:
            link.close()


def _until_the_end(link: FrameSocket) -> list[bytes | None]:
    read: list[bytes | None] = [link.read()]
    while read[-1] is not None:
        read.append(link.read())
    return read


def _read_all_async(data: bytes) -> list[bytes | None]:
    async def run() -> list[bytes | None]:
        ours, theirs = socket.socketpair()
        link = await FrameStream.open(ours)
        _, writer = await asyncio.open_connection(sock=theirs)
        try:
            writer.write(data)
            writer.write_eof()
            read = [await link.read()]
            while read[-1] is not None:
                read.append(await link.read())
            return read
        finally:
            link.close()
            writer.close()
            await asyncio.sleep(0)

    return asyncio.run(run())


_readers = pytest.mark.parametrize("read_all", [_read_all_blocking, _read_all_async])


@_readers
@settings(max_examples=25, deadline=None)
@given(payloads=_payloads)
def test_frames_arrive_as_they_were_sent(read_all: object, payloads: list[bytes]) -> None:
    assert read_all(b"".join(map(_framed, payloads))) == [*payloads, None]  # type: ignore[operator]


@_readers
@pytest.mark.parametrize("length", range(1, 4 + 5))
def test_a_cut_frame_is_an_error_and_never_a_short_payload(read_all: object, length: int) -> None:
    with pytest.raises(FrameError, match="header" if length < 4 else "inside a frame$"):
        read_all(_framed(b"whole") + _framed(b"hello")[:length])  # type: ignore[operator]


@_readers
@pytest.mark.parametrize("length", [MAX_FRAME + 1, 2**31, 2**32 - 1, int.from_bytes(b"GET ")])
def test_an_absurd_length_is_refused_before_anything_is_read(read_all: object, length: int) -> None:
    with pytest.raises(FrameError, match=f"of {length} bytes"):
        read_all(struct.pack(">I", length) + b"data")  # type: ignore[operator]


@pytest.mark.parametrize("length", [0, 1, 99])
def test_a_frame_over_the_limit_is_not_sent(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket], length: int
) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME", 99)
    link = FrameSocket(pair[0])
    link.write(b"x" * length)
    with pytest.raises(FrameError, match="100 bytes"):
        link.write(b"x" * 100)
    link.close()
    assert pair[1].recv(1000) == _framed(b"x" * length)
    assert pair[1].recv(1000) == b""


def test_frames_of_several_threads_stay_whole() -> None:
    ours, theirs = socket.socketpair()
    sender, receiver = FrameSocket(ours), FrameSocket(theirs)
    payloads = [bytes([number]) * 100_000 for number in range(8)]
    threads = [
        threading.Thread(target=lambda payload=payload: [sender.write(payload) for _ in range(5)])
        for payload in payloads
    ]
    try:
        for thread in threads:
            thread.start()
        read = [receiver.read() for _ in range(40)]
        assert sorted(frame or b"" for frame in read) == sorted(payloads * 5)
        for thread in threads:
            thread.join()
    finally:
        sender.close()
        receiver.close()


@settings(max_examples=20, deadline=None)
@given(payloads=_payloads)
def test_both_kinds_understand_each_other(payloads: list[bytes]) -> None:
    """A blocking echo in a thread, as in a child process, and the asyncio end of the API process."""

    def echo(sock: socket.socket) -> None:
        link = FrameSocket(sock)
        while (frame := link.read()) is not None:
            link.write(frame)
        link.close()

    async def run(ours: socket.socket) -> list[bytes | None]:
        link = await FrameStream.open(ours)
        answers = []
        for payload in payloads:
            link.write(payload)
            await link.drain()
            answers.append(await link.read())
        link.close()
        await asyncio.sleep(0)
        return answers

    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=echo, args=(theirs,))
    thread.start()
    assert asyncio.run(run(ours)) == payloads
    thread.join()
