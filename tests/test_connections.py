"""Clients that send next to nothing, or heads without end, and clients that are gone."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import RunningServer, wait_until

from llamaserve import connections, listening

REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Server:
    """uvicorn with our connections, in this process, and an application that answers after a while."""

    def __init__(self, answer: float = 0.0) -> None:
        self.answer = answer

    async def __aenter__(self) -> tuple[str, int]:
        import uvicorn

        async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
            await asyncio.sleep(self.answer)
            body = b""
            while scope["path"] == "/echo":
                message = await receive()
                body += message["body"]
                if not message["more_body"]:
                    break
            length = [(b"content-length", str(len(body)).encode())] if body else []
            await send({"type": "http.response.start", "status": 200 if body else 204, "headers": length})
            await send({"type": "http.response.body", "body": body})

        config = uvicorn.Config(app, http=connections.Connection, lifespan="off", log_config=None, ws="none")
        self.server = uvicorn.Server(config)
        self.sock = socket.create_server(("127.0.0.1", 0))
        config.load()
        self.server.lifespan = config.lifespan_class(config)
        await self.server.startup([self.sock])
        address: tuple[str, int] = self.sock.getsockname()
        return address

    async def __aexit__(self, *_: object) -> None:
        await self.server.shutdown([self.sock])


async def seconds_until_closed(address: tuple[str, int], *pieces: bytes, pause: float = 0.0) -> tuple[float, bytes]:
    """Send pieces and return when the connection was closed, and what came."""
    reader, writer = await asyncio.open_connection(*address)
    before = time.monotonic()
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        data = await asyncio.wait_for(reader.read(), 10)
    except ConnectionError:
        data = b""
    finally:
        writer.close()
    return time.monotonic() - before, data


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_LIMIT", 0.5)


@pytest.mark.parametrize("pieces", [(), (b"GET / HT",), (REQUEST[:-2],), (b"G", b"E", b"T", b" ", b"/", b" ")])
def test_who_does_not_send_a_whole_head_is_not_waited_for(pieces: tuple[bytes, ...]) -> None:
    async def run() -> None:
        async with Server() as address:
            seconds, data = await seconds_until_closed(address, *pieces, pause=0.05)
            assert 0.4 < seconds < 5
            assert data in (b"", b"Invalid HTTP request received.") or b"400" in data

    asyncio.run(run())


def test_a_second_request_has_as_long_as_the_first() -> None:
    async def run() -> None:
        async with Server() as address:
            seconds, data = await seconds_until_closed(address, REQUEST, b"GET /", pause=0.2)
            assert data.startswith(b"HTTP/1.1 204")
            assert 0.6 < seconds < 5

    asyncio.run(run())


def test_who_waits_for_an_answer_is_left_alone() -> None:
    async def run() -> None:
        async with Server(answer=1.5) as address:
            reader, writer = await asyncio.open_connection(*address)
            for _ in range(2):
                writer.write(REQUEST)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                assert head.startswith(b"HTTP/1.1 204")
            writer.close()

    asyncio.run(run())


def test_a_head_without_end_is_cut_off() -> None:
    async def run() -> None:
        async with Server() as address:
            seconds, data = await seconds_until_closed(address, REQUEST[:-2], *[b"X-A: " + b"b" * 4000 + b"\r\n"] * 100)
            assert data.startswith(b"HTTP/1.1 431") or not data  # or it was gone before it was read
            assert seconds < 0.4

    asyncio.run(run())


def test_the_rest_of_a_body_after_its_answer_is_no_head() -> None:
    """As where a request is refused before all of it has come."""

    async def run() -> None:
        async with Server() as address:
            reader, writer = await asyncio.open_connection(*address)
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
            for _ in range(100):
                writer.write(b"x" * 10_000)
                await writer.drain()
                await asyncio.sleep(0.007)  # longer than a head may take
            writer.write(REQUEST)
            answers = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            answers += await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert answers.count(b"HTTP/1.1 204") == 2
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("head", [b"Content-Length: 100000000", b"Transfer-Encoding: chunked"])
def test_the_rest_of_a_body_after_its_answer_is_not_waited_for_long(
    head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REST_LIMIT", 0.5)

    async def run() -> None:
        async with Server() as address:
            pieces = [b"GET / HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n", *[b"1"] * 30]
            seconds, data = await seconds_until_closed(address, *pieces, pause=0.05)
            assert data.startswith(b"HTTP/1.1 204") or not data
            assert 0.4 < seconds < 3

    asyncio.run(run())


def test_the_rest_of_a_body_after_its_answer_is_not_taken_at_any_length() -> None:
    async def run() -> None:
        async with Server() as address:
            head = b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n"
            seconds, data = await seconds_until_closed(address, head, *[b"x" * 100_000] * 40)
            assert data.startswith(b"HTTP/1.1 204") or not data
            assert seconds < 3

    asyncio.run(run())


@pytest.mark.parametrize("cut", [None, 1, 7])
@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_a_client_that_offers_another_protocol_has_its_body_read(protocol: bytes, cut: int | None) -> None:
    """As Java's client does with every request."""
    body = b'{"prompt": "upgrade: h2c"}'
    request = b"POST /echo HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nContent-Length: %d\r\n" % len(body)
    request += b"Host: localhost\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUPGRADE: %s\r\n\r\n%s" % (protocol, body)
    size = cut or len(request)
    pieces = [request[start : start + size] for start in range(0, len(request), size)]

    async def run() -> None:
        async with Server() as address:
            reader, writer = await asyncio.open_connection(*address)
            for _ in range(2):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.001)
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                assert head.startswith(b"HTTP/1.1 200")
                assert await asyncio.wait_for(reader.readexactly(len(body)), 10) == body
            writer.close()

    asyncio.run(run())


def test_requests_that_come_together_are_all_answered() -> None:
    async def run() -> None:
        async with Server() as address:
            seconds, data = await seconds_until_closed(
                address, REQUEST + b"\r\n" + REQUEST + REQUEST[:20], REQUEST[20:]
            )
            assert data.count(b"HTTP/1.1 204") == 3
            assert seconds < 8

    asyncio.run(run())


def test_what_is_no_http_is_refused_at_once() -> None:
    async def run() -> None:
        async with Server() as address:
            for data in (b"\x16\x03\x01\x02\x00", b"\x00" * 100, b"get / HTTP/1.1\r\n"):
                seconds, answer = await seconds_until_closed(address, data)
                assert answer.startswith(b"HTTP/1.1 400")
                assert seconds < 0.4

    asyncio.run(run())


def test_connections_of_machines_that_are_gone_end() -> None:
    sockets = listening.listen(None, 0)
    try:
        with socket.create_connection(sockets[0].getsockname()):
            sockets[0].setblocking(True)
            taken, _ = sockets[0].accept()
            with taken:
                assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 120_000
                    assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
    finally:
        for each in sockets:
            each.close()


def test_connections_that_say_nothing_keep_nobody_out(tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text("models: {}\n")
    with RunningServer("serve", "--models-file", str(tmp_path / "models.yaml")) as server:
        url = httpx.URL(server.url)
        address = (url.host, url.port or 80)
        silent = [socket.create_connection(address) for _ in range(600)]
        try:
            for each in silent[::2]:
                each.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
            wait_until(lambda: server.get("/v1/internal/status")["memory"]["files"] > 600)
            assert httpx.get(server.url + "/health").status_code == 200
        finally:
            for each in silent:
                each.close()
        wait_until(lambda: server.get("/v1/internal/status")["memory"]["files"] < 100)
