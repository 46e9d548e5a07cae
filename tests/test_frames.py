from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator

import pytest
import uvloop
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


def _with_stream(data: bytes, read_all: Callable[[FrameStream], Awaitable[list[bytes | None]]]) -> list[bytes | None]:
    """Give a ``FrameStream`` these bytes and then the end, and return what ``read_all`` makes of them."""

    async def run() -> list[bytes | None]:
        ours, theirs = socket.socketpair()
        link = await FrameStream.open(ours)
        _, writer = await asyncio.open_connection(sock=theirs)
        try:
            writer.write(data)
            writer.write_eof()
            return await read_all(link)
        finally:
            link.close()
            writer.close()
            await asyncio.sleep(0)

    return asyncio.run(run())


def _read_all_async(data: bytes) -> list[bytes | None]:
    async def read_all(link: FrameStream) -> list[bytes | None]:
        read = [await link.read()]
        while read[-1] is not None:
            read.append(await link.read())
        return read

    return _with_stream(data, read_all)


def _read_all_delivered(data: bytes) -> list[bytes | None]:
    async def read_all(link: FrameStream) -> list[bytes | None]:
        read: list[bytes | None] = []
        await link.deliver(read.append)
        return [*read, None]

    return _with_stream(data, read_all)


def _read_one_and_have_the_rest_delivered(data: bytes) -> list[bytes | None]:
    async def read_all(link: FrameStream) -> list[bytes | None]:
        read = [await link.read()]
        if read[0] is not None:
            await asyncio.sleep(0.01)  # more may arrive while nobody looks
            await link.deliver(read.append)
            read.append(None)
        return read

    return _with_stream(data, read_all)


_readers = pytest.mark.parametrize(
    "read_all", [_read_all_blocking, _read_all_async, _read_all_delivered, _read_one_and_have_the_rest_delivered]
)


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


def test_what_the_receiver_raises_ends_the_stream() -> None:
    def receive(payload: bytes) -> None:
        received.append(payload)
        if payload == b"bad":
            raise ValueError("it is bad")

    async def run() -> None:
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        link = await FrameStream.open(ours)
        with theirs:
            theirs.sendall(_framed(b"good") + _framed(b"bad") + _framed(b"late"))
            with pytest.raises(ValueError, match="it is bad"):
                await link.deliver(receive)
            await asyncio.sleep(0)
            assert theirs.recv(1) == b""

    received: list[bytes] = []
    asyncio.run(run())
    assert received == [b"good", b"bad"]


def test_a_peer_that_nobody_reads_has_to_wait() -> None:
    """Whoever floods us fills neither our memory nor, once it is read, loses anything."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        link = await FrameStream.open(ours)
        with theirs:
            flood = asyncio.create_task(loop.sock_sendall(theirs, _framed(b"x" * 1000) * 20_000))
            done, _ = await asyncio.wait({flood}, timeout=0.5)
            assert not done
            for _ in range(20_000):
                assert await link.read() == b"x" * 1000
            await flood
        assert await link.read() is None
        link.close()
        await asyncio.sleep(0)

    asyncio.run(run())


def test_a_stream_waits_for_a_peer_that_does_not_read() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        link = await FrameStream.open(ours)
        with theirs:
            link.write(b"x" * 2_000_000)
            drained = asyncio.create_task(link.drain())
            done, _ = await asyncio.wait({drained}, timeout=0.1)
            assert not done
            received = 0
            while received < 2_000_004:
                received += len(await loop.sock_recv(theirs, 1_000_000))
            await drained
            link.write(b"x" * 2_000_000)
        with pytest.raises(ConnectionError):
            await link.drain()

    asyncio.run(run())


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_who_writes_to_a_peer_that_is_gone_hears_it_by_reading(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair()
        link = await FrameStream.open(ours)
        theirs.close()
        await asyncio.sleep(0.05)  # until the loop has seen it
        link.write(b"x")
        assert await link.read() is None
        with pytest.raises(ConnectionError):
            await link.drain()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(run())
