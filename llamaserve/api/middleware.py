"""What happens to a request before it is routed: size limit, trailing slash, content type."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaserve.api.handlers import error_body
from llamaserve.errors import BodyTooLarge

_UPLOADS: Final = ("/v1/audio/", "/v1/images/edits", "/v1/images/variations")  # where the paths begin that take files
PATIENCE: Final = 60.0  # seconds in which a client must send something
_DRAIN_FACTOR = 8  # read and drop up to this many times the limit, so that the client gets to see the answer


class RequestGate:
    """Refuses bodies over ``max_body`` bytes, and forms with files over ``max_upload``, with 413 before they are kept.
    Takes a path with or without its trailing slash, and reads any body that is not a form as JSON, whatever its content
    type says (curl's default, or none).
    """

    def __init__(self, app: ASGIApp, max_body: int, max_upload: int) -> None:
        self._app = app
        self._max_body = max_body
        self._max_upload = max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(raw=list(scope["headers"]))
        is_form = headers.get("content-type", "").lower().startswith("multipart/")
        if scope["method"] == "POST" and not is_form:
            headers["content-type"] = "application/json"
        limit = self._max_upload if is_form and scope["path"].startswith(_UPLOADS) else self._max_body
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            await self._refuse(scope["path"], limit, receive, send)
            return
        scope = {**scope, "path": scope["path"].rstrip("/") or "/", "headers": headers.raw}
        await self._app(scope, _Counted(receive, limit), send)

    async def _refuse(self, path: str, limit: int, receive: Receive, send: Send) -> None:
        left = limit * _DRAIN_FACTOR
        with contextlib.suppress(TimeoutError):
            while left > 0:
                async with asyncio.timeout(PATIENCE):
                    message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    break
        error = _too_large(limit)
        body = json.dumps(error_body(path, error)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the request body is larger than {limit} bytes")


class _Counted:
    """Counts the body's bytes as they come, for bodies that don't tell their length."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._left = limit

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            error = _too_large(self._limit)
            raise HTTPException(error.status, error.message)  # the only kind that FastAPI lets through
        return message
