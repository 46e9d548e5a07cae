"""Clients that mean harm, or don't know better: silence in the middle of a request, bytes that are no HTTP, bodies that
are no JSON or too clever, and hundreds of connections at once.

None of it may cost another client anything. What is told of it must be the client's fault (4xx) or a limit; the bodies
are requests with entries of their own, since some are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

from faults.clients import Crowd
from faults.questions import CHAT_MODEL, Question

HEAD_LIMIT = 60.0  # seconds in which the server must let go of a silent client; it says that it takes 30
_READ_LIMIT = 30.0  # seconds for the answer to bytes that are no HTTP
_STORM_LIMIT = 300.0

_MALFORMED: Sequence[bytes] = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\nhost: a\r\n\r\n",
    b"\x00" * 2048,
    b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 4\r\ncontent-length: 9\r\n\r\nabcd",
    b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 99999999999999999999\r\n\r\n{}",
    b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /health HTTP/1.1\r\n" + b"x-b: b\r\n" * 20_000 + b"\r\n",
    b"GET /%00%ff%fe/../..//v1/models HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer \xff\xfe\r\n\r\n",
)


def _bodies() -> Sequence[tuple[str, bytes]]:
    """Return paths and bodies that are wrong in their own ways, or dear to look at."""
    chat, completion = "/v1/chat/completions", "/v1/completions"
    hello = [{"role": "user", "content": "Hello"}]

    def body(**fields: Any) -> bytes:
        return json.dumps({"model": CHAT_MODEL, "max_tokens": 1, **fields}).encode()

    bomb = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}"
    schema = {"type": "string", "pattern": "(a{0,999}){0,999}"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return (
        (chat, b"{"),
        (chat, b"\xff\xfe{}"),
        (chat, b"[" * 100_000),
        (chat, b'{"messages": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}"),
        (chat, b'{"messages": 1' + b"0" * 50_000 + b"}"),
        (chat, b'{"temperature": NaN, "messages": []}'),
        (completion, b'{"prompt": "\\ud800\\udc00\\ud800", "max_tokens": 1, "model": "' + CHAT_MODEL.encode() + b'"}'),
        (completion, body(prompt="a\x00b")),
        (completion, body(prompt=[[]])),
        (completion, body(prompt=[-1, 2**40])),
        (completion, body(prompt="x" * 2_000_000)),
        (completion, body(prompt="Hi", temperature=1e308, top_p=-1)),
        (completion, body(prompt="Hi", logit_bias={str(n): 100 for n in range(50_000)})),
        (completion, body(prompt="Hi", stop=["x" * 10_000] * 1000)),
        (completion, body(prompt="Hi", n=10**9)),
        (completion, body(prompt="Hi", model={"a": 1})),
        (completion, body(prompt="Hi", model="../../etc/passwd")),
        (chat, body(messages=hello * 5000)),
        (chat, body(messages=hello, instruction_template_str=bomb)),
        (chat, body(messages=hello, response_format=form)),
        (chat, body(messages=hello, grammar="root ::= " + "(" * 5000)),
        ("/v1/embeddings", b'{"input": [' + b'"a",' * 5000 + b'"a"]}'),
        ("/v1/internal/decode", body(tokens=[10**12])),
    )


async def malformed(crowd: Crowd) -> None:
    """Send bytes that are no HTTP, some of them at once."""
    await asyncio.gather(*(_bytes(crowd, data) for data in crowd.random.sample(_MALFORMED, 6)))


async def _bytes(crowd: Crowd, data: bytes) -> None:
    reply = b""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_READ_LIMIT):
            reader, writer = await asyncio.open_connection("127.0.0.1", crowd.server.port)
            try:
                writer.write(data)
                await writer.drain()
                writer.write_eof()
                reply = await reader.read(4096)
            finally:
                writer.close()
    if reply.startswith(b"HTTP/1.1 5"):
        crowd.journal.violate("hostile", "bytes that are no HTTP led to an error of the server", repr(data[:80]))


async def odd_bodies(crowd: Crowd) -> None:
    """Send some odd bodies, one after another."""
    for path, body in crowd.random.sample(_bodies(), 5):
        entry = crowd.journal.begin(Question(f"odd {path} {body[:60]!r}", "odd", path, {}), "bob")
        await crowd.post(entry, body)


async def silent(crowd: Crowd, *, until: asyncio.Event) -> None:
    """Send half a head, or half a body, and wait until the server has enough of it, or this is told to end."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{crowd.server.port}\r\n".encode()
    secret = crowd.server.secrets["ann"].encode()
    body = head + b"authorization: Bearer " + secret + b"\r\ncontent-length: 500\r\n\r\n{"
    in_head = crowd.random.random() < 0.5
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", crowd.server.port)
        try:
            writer.write(head if in_head else body)
            await writer.drain()
            await _until_closed(crowd, reader, until, judged=in_head)
        finally:
            writer.close()


async def _until_closed(crowd: Crowd, reader: asyncio.StreamReader, until: asyncio.Event, *, judged: bool) -> None:
    closed, told = asyncio.ensure_future(reader.read(1)), asyncio.ensure_future(until.wait())
    try:
        await asyncio.wait({closed, told}, timeout=HEAD_LIMIT, return_when=asyncio.FIRST_COMPLETED)
        if judged and not closed.done() and not told.done():
            crowd.journal.violate("hostile", f"half a head was still waited for after {HEAD_LIMIT:g} seconds")
    finally:
        for task in (closed, told):
            task.cancel()
        await asyncio.gather(closed, told, return_exceptions=True)


async def storm(crowd: Crowd, asked: Sequence[Question], connections: int) -> None:
    """Ask with hundreds of connections at once, some of which never say anything."""
    mute = [asyncio.create_task(_mute(crowd.server.port)) for _ in range(connections // 4)]
    try:
        async with asyncio.timeout(_STORM_LIMIT):
            await asyncio.gather(*(crowd.ask(crowd.random.choice(asked)) for _ in range(connections)))
    finally:
        for task in mute:
            task.cancel()
        await asyncio.gather(*mute, return_exceptions=True)


async def _mute(port: int) -> None:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.sleep(_STORM_LIMIT)
        finally:
            writer.close()
