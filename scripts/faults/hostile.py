"""Clients that mean harm, or don't know better: silence in the middle of a request, bytes that are no HTTP, bodies that
are no JSON or too clever, and hundreds of connections at once.

None of it may cost another client anything. What is told of it must be the client's fault (4xx) or a limit; the bodies
are requests with entries of their own, since some are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from faults.clients import HANG, Crowd
from faults.questions import CHAT_MODEL, Question
from llamaserve.api.bodies import PATIENCE
from llamaserve.connections import HEAD_LIMIT

_SLACK = 15.0  # seconds that the server may need beyond its own limits
_READ_LIMIT = HEAD_LIMIT + _SLACK  # seconds for what becomes of bytes that are no HTTP

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
    reply, began = b"", time.monotonic()
    try:
        async with asyncio.timeout(_READ_LIMIT):
            reader, writer = await asyncio.open_connection("127.0.0.1", crowd.server.port)
            try:
                writer.write(data)
                await writer.drain()
                writer.write_eof()
                reply = await reader.read(4096)
            finally:
                writer.close()
    except TimeoutError:
        if not crowd.journal.calendar.excuses(began, time.monotonic()).away:
            what = f"bytes that are no HTTP got neither an answer nor an end within {_READ_LIMIT:g} seconds"
            crowd.journal.violate("hostile", what, repr(data[:80]))
    except OSError:  # an end of another kind
        return
    if reply.startswith(b"HTTP/1.1 5"):
        crowd.journal.violate("hostile", "bytes that are no HTTP led to an error of the server", repr(data[:80]))


async def odd_bodies(crowd: Crowd) -> None:
    """Send some odd bodies, one after another."""
    for path, body in crowd.random.sample(_bodies(), 5):
        entry = crowd.journal.begin(Question(f"odd {path} {body[:60]!r}", "odd", path, {}), "bob")
        await crowd.post(entry, body)


async def silent(crowd: Crowd) -> None:
    """Send half a head, or half a body, and see whether the server lets go of that in time."""
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{crowd.server.port}\r\n".encode()
    secret = crowd.server.secrets["ann"].encode()
    body = head + b"authorization: Bearer " + secret + b"\r\ncontent-length: 500\r\n\r\n{"
    in_head, began = crowd.random.random() < 0.5, time.monotonic()
    what, limit = ("head", HEAD_LIMIT + _SLACK) if in_head else ("body", PATIENCE + _SLACK)
    try:
        reply = await _last_words(crowd.server.port, head if in_head else body, limit)
    except TimeoutError:
        problem = f"half a {what} was still waited for after {limit:g} seconds"
    except OSError as error:
        problem = f"half a body was answered with {error!r}" if not in_head else ""
    else:
        problem = f"half a body was answered with {reply[:80]!r}" if not (in_head or _told(reply)) else ""
    if problem and not crowd.journal.calendar.excuses(began, time.monotonic()).away:
        crowd.journal.violate("hostile", problem, f"after {time.monotonic() - began:.0f} s")


async def _last_words(port: int, data: bytes, limit: float) -> bytes:
    """Return what comes before the server ends a connection. Raises ``TimeoutError`` if it does not."""
    async with asyncio.timeout(limit):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


def _told(reply: bytes) -> bool:
    """Whether the server has told a client that nothing more of its request has come."""
    return reply.startswith(b"HTTP/1.1 408")


async def storm(crowd: Crowd, connections: int) -> None:
    """Ask with hundreds of connections at once, some of which never say anything."""
    mute = [asyncio.create_task(_mute(crowd.server.port)) for _ in range(connections // 4)]
    try:
        await asyncio.gather(*(crowd.ask(crowd.any_question()) for _ in range(connections)))
    finally:
        for task in mute:
            task.cancel()
        await asyncio.gather(*mute, return_exceptions=True)


async def _mute(port: int) -> None:
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.sleep(HANG)
        finally:
            writer.close()
