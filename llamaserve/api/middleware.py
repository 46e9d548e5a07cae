"""What happens to a request before it is routed: size limit, trailing slash, content type; and how one is refused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaserve.api.bodies import Body, BodyAdmission, drain, drop, too_large
from llamaserve.api.caller import caller
from llamaserve.api.handlers import error_response, server_bug
from llamaserve.errors import InvalidRequest, LlamaserveError

logger = logging.getLogger(__name__)

_UPLOADS: Final = ("/v1/audio/", "/v1/images/edits", "/v1/images/variations")  # where the paths begin that take files
_BODIES_AT_ONCE: Final = 8  # as many of the largest ones may be in memory
_STRANGERS_BODY: Final = 1024 * 1024  # bytes that are read and dropped of those who are refused before that
_STRANGERS_TIME: Final = 15.0  # seconds for that


class RequestGate:
    """Refuses bodies over ``max_body`` bytes, and forms with files over ``max_upload``, with 413 before they are kept,
    and with 429 those for which there is no room: all requests that are being answered may have bodies of eight times
    ``max_body``, and each key its share of that. (Files are let in elsewhere.) Takes a path with or without its
    trailing slash, and reads any body that is not a form as JSON, whatever its content type says (curl's default, or
    none).
    """

    def __init__(self, app: ASGIApp, max_body: int, max_upload: int, refused: Counter) -> None:
        self._app = app
        self._max_body = max_body
        self._max_upload = max_upload
        self._admission = BodyAdmission(max_body * _BODIES_AT_ONCE)
        self._refused = refused

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
        said = headers.get("content-length", "")
        length = int(said) if said.isdecimal() else 0
        if length > limit:
            await drain(receive, limit)
            error = too_large(limit)
            self._refused.labels(error.code).inc()
            await refuse(scope, receive, send, error, read_on=False)
            return
        scope = {**scope, "path": scope["path"].rstrip("/") or "/", "headers": headers.raw}
        if scope["path"].endswith("\n"):  # before which the pattern of a route may end
            await refuse(scope, receive, send, InvalidRequest("the path ends with a line break"))
            return
        admission = None if takes_files else self._admission
        body = Body(receive, limit, admission, length=length, share=caller().name or "")
        try:
            await _or_say_so(self._app, scope, body, send)
        finally:
            body.close()
            if body.refusal is not None:
                self._refused.labels(body.refusal.error.code).inc()


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
    read_on: bool = True,
) -> None:
    """Answer a request with an error, and close the connection. What is on its way of the body is read first: some
    clients don't see an answer that comes before they have sent all.
    """
    if read_on and "expect" not in Headers(scope=scope):
        await drop(receive, _STRANGERS_BODY, _STRANGERS_TIME)
    response = error_response(scope["path"], error)
    response.headers.update({"connection": "close", **(headers or {})})
    await response(scope, receive, send)
