"""Server-sent events as OpenAI's clients expect them: one JSON object an event, errors in-band, ``[DONE]`` at the end,
and comment lines that keep the connection alive. A bug becomes a logged error event, never a bare disconnect. Knows
nothing of what the events mean.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from llamaserve.api.handlers import server_bug
from llamaserve.errors import LlamaserveError

logger = logging.getLogger(__name__)

_json = msgspec.json.Encoder()


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + _json.encode(body) + b"\n\n"


async def _stream(chunks: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except LlamaserveError as error:
        yield _event(error.body())
    except Exception:
        logger.exception("a stream failed")
        yield _event(server_bug().body())
    yield b"data: [DONE]\n\n"


class EventStream(EventSourceResponse):
    """A streamed answer. ``close`` is called when the response is over, however it ended and even if it never began.

    ``phase`` says in a word or two what is going on; it becomes the text of the comment lines sent every ``heartbeat``
    seconds.
    """

    def __init__(
        self,
        chunks: AsyncIterator[Mapping[str, Any]],
        *,
        close: Callable[[], None],
        phase: Callable[[], str],
        heartbeat: float,
        headers: Mapping[str, str],
    ) -> None:
        def comment() -> ServerSentEvent:
            return ServerSentEvent(comment=phase(), sep="\n")

        super().__init__(_stream(chunks), headers=headers, ping=heartbeat, ping_message_factory=comment, sep="\n")
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, and clean up whatever happens."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()
