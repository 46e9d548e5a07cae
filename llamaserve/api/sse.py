"""Server-sent events as OpenAI's clients expect them: one JSON object an event, errors in-band, ``[DONE]`` at the end,
and comment lines that keep the connection alive. A bug becomes a logged error event, never a bare disconnect. Knows
nothing of what the events mean.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from llamaserve.api.accounting import account
from llamaserve.api.handlers import server_bug
from llamaserve.errors import LlamaserveError

logger = logging.getLogger(__name__)

# Seconds for streams to end by themselves once the server is told to end, before they are cut off. It is less than the
# server waits, so that it need not cancel what runs a request, which would log a traceback.
_GRACE = 4.0

_json = msgspec.json.Encoder()


def event(body: Mapping[str, Any]) -> bytes:
    """Return the event that carries this JSON object."""
    return b"data: " + _json.encode(body) + b"\n\n"


class TextEvent:
    """An event that is sent once a token and differs only in a text: all around the text is encoded just once."""

    def __init__(self, body: Callable[[str], Mapping[str, Any]]) -> None:
        mark = secrets.token_hex(16)
        self._before, self._after = event(body(mark)).split(_json.encode(mark))

    def __call__(self, text: str) -> bytes:
        """Return the event with this text."""
        return self._before + _json.encode(text) + self._after


async def _stream(events: AsyncIterator[bytes], close: Callable[[], None]) -> AsyncIterator[bytes]:
    failed: bytes | None = None
    try:
        async for some in events:
            yield some
    except LlamaserveError as error:
        failed = event(error.body())
    except Exception:
        logger.exception("a stream failed")
        failed = event(server_bug().body())
    if failed is not None:
        close()  # which counts what it has used until then
        await account().settle("failed")
        yield failed
    await account().settle("answered")
    yield b"data: [DONE]\n\n"


class EventStream(EventSourceResponse):
    """A streamed answer, made of pieces of one or more whole events. ``close`` is called when the response is over,
    however it ended and even if it never began, maybe more than once.

    ``phase`` says in a word or two what is going on; it becomes the text of the comment lines sent every ``heartbeat``
    seconds.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        close: Callable[[], None],
        phase: Callable[[], str],
        heartbeat: float,
        headers: Mapping[str, str],
    ) -> None:
        def comment() -> ServerSentEvent:
            return ServerSentEvent(comment=phase(), sep="\n")

        super().__init__(
            _stream(events, close),
            headers=headers,
            ping=heartbeat,
            ping_message_factory=comment,
            sep="\n",
            shutdown_grace_period=_GRACE,
        )
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, and clean up whatever happens."""
        account().streamed = True
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()

    async def _stream_response(self, send: Send) -> None:
        """Send piece by piece, without the base class's timeout around each, which isn't used here and took a sixth of
        this process's CPU time in a profile. Were this method not called, the base's own would do the same.
        """
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for some in self.body_iterator:
            await send({"type": "http.response.body", "body": some, "more_body": True})
        async with self._send_lock:
            self.active = False
            await send({"type": "http.response.body", "body": b"", "more_body": False})
