"""What happens to a request before it is routed: size limit, trailing slash, content type; and how one is refused."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaserve.api.handlers import BodyRefused, error_response, server_bug
from llamaserve.errors import BodyTooLarge, InvalidRequest, LlamaserveError, QueueFull, RequestTimeout

logger = logging.getLogger(__name__)

_UPLOADS: Final = ("/v1/audio/", "/v1/images/edits", "/v1/images/variations")  # where the paths begin that take files
PATIENCE: Final = 60.0  # seconds in which a client must send something
SILENT: Final = f"nothing more of the request has come for {PATIENCE:g} seconds"
_BODIES_AT_ONCE: Final = 16  # the largest ones that are kept in memory at once
_RETRY_AFTER: Final = 10.0  # seconds, for who comes when there is no room for a body
_DRAIN_FACTOR = 8  # read and drop up to this many times the limit, so that the client gets to see the answer
_STRANGERS_BODY: Final = 1024 * 1024  # bytes that are read and dropped of those who are refused before that
_STRANGERS_PATIENCE: Final = 5.0  # seconds for each piece
_STRANGERS_TIME: Final = 15.0  # seconds for all of it


class RequestGate:
    """Refuses bodies over ``max_body`` bytes, and forms with files over ``max_upload``, with 413 before they are kept,
    and with 429 those for which there is no room: the bodies of all requests that are being answered may take sixteen
    times ``max_body``. (Files are let in elsewhere.) Takes a path with or without its trailing slash, and reads any
    body that is not a form as JSON, whatever its content type says (curl's default, or none).
    """

    def __init__(self, app: ASGIApp, max_body: int, max_upload: int) -> None:
        self._app = app
        self._max_body = max_body
        self._max_upload = max_upload
        self._room = _Room(max_body * _BODIES_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(raw=list(scope["headers"]))
        is_form = headers.get("content-type", "").lower().startswith("multipart/")
        if scope["method"] == "POST" and not is_form:
            headers["content-type"] = "application/json"
        takes_files = is_form and scope["path"].startswith(_UPLOADS)
        limit = self._max_upload if takes_files else self._max_body
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await _drain(receive, limit * _DRAIN_FACTOR, PATIENCE)
            await refuse(scope, receive, send, _too_large(limit), drain=False)
            return
        scope = {**scope, "path": scope["path"].rstrip("/") or "/", "headers": headers.raw}
        if scope["path"].endswith("\n"):  # before which the pattern of a route may end
            await refuse(scope, receive, send, InvalidRequest("the path ends with a line break"))
            return
        body = _Body(receive, limit, None if takes_files else self._room)
        try:
            await _or_say_so(self._app, scope, body, send)
        finally:
            body.forget()


async def _or_say_so(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run an application; a bug in it is logged and answered, as long as no answer has begun."""
    begun = False

    async def noted(message: Message) -> None:
        nonlocal begun
        begun = True
        await send(message)

    try:
        await app(scope, receive, noted)
    except Exception:
        if begun:
            raise
        logger.exception("%s %s failed", scope["method"], scope["path"])
        await error_response(scope["path"], server_bug())(scope, receive, send)


async def refuse(
    scope: Scope,
    receive: Receive,
    send: Send,
    error: LlamaserveError,
    headers: Mapping[str, str] | None = None,
    *,
    drain: bool = True,
) -> None:
    """Answer a request with an error, and close the connection. What is on its way of the body is read first: some
    clients don't see an answer that comes before they have sent all.
    """
    if drain and "expect" not in Headers(scope=scope):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STRANGERS_TIME):
                await _drain(receive, _STRANGERS_BODY, _STRANGERS_PATIENCE)
    response = error_response(scope["path"], error)
    response.headers.update({"connection": "close", **(headers or {})})
    await response(scope, receive, send)


async def _drain(receive: Receive, size: int, patience: float) -> None:
    """Read and drop a body: at most about so many bytes, and no longer than so many seconds for each piece."""
    with contextlib.suppress(TimeoutError):
        while size > 0:
            async with asyncio.timeout(patience):
                message = await receive()
            size -= len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body"):
                return


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {limit} bytes")


class _Room:
    """How many bytes more of bodies there may be in memory."""

    def __init__(self, size: int) -> None:
        self.left = size


class _Body:
    """Counts a body's bytes as they come, for bodies that don't tell their length, and does not wait for ever for the
    next ones. They are in memory until it is told to forget them, if there is a ``room``.
    """

    def __init__(self, receive: Receive, limit: int, room: _Room | None) -> None:
        self._receive = receive
        self._limit = limit
        self._room = room
        self._size = 0
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:  # what comes now is that the client leaves
            return await self._receive()
        try:
            async with asyncio.timeout(PATIENCE):
                message = await self._receive()
        except TimeoutError:
            raise BodyRefused(RequestTimeout(SILENT)) from None
        self._whole = not message.get("more_body")
        self._keep(len(message.get("body", b"")))
        return message

    def _keep(self, size: int) -> None:
        if self._size + size > self._limit:
            raise BodyRefused(_too_large(self._limit))
        if self._room is not None:
            if size > self._room.left:
                raise BodyRefused(QueueFull("the bodies of other requests take all the room", retry_after=_RETRY_AFTER))
            self._room.left -= size
        self._size += size

    def forget(self) -> None:
        """Give its room back."""
        if self._room is not None:
            self._room.left += self._size
