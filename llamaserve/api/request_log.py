"""An id for each request, and a line in the log once it is over: the id is the client's own ``x-request-id``, or a new
one, and is in the answer and wherever else is told of the request. Of prompts and answers nothing is logged here.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llamaserve import logs

logger = logging.getLogger("llamaserve.access")

HEADER: Final = "x-request-id"
_PLAIN: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # what can do no harm in a log
_POLLED: Final = ("/health", "/v1/internal/health", "/metrics")  # whose lines would be most of a log
_PICTURES: Final = "/v1/images/files/"
_SHOWN: Final = 200  # characters of a path
_CLIENT_CLOSED: Final = 499


class RequestLog:
    """Gives each request its id, which is ``scope["state"]["request_id"]``, and logs how it ended. What others know of
    it they put into ``scope["state"]["facts"]``.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _PLAIN.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        logs.request_id.set(request_id)
        facts: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "request_id": request_id, "facts": facts}
        began, status = time.monotonic(), _CLIENT_CLOSED

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message["headers"])[HEADER] = request_id
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            _log(scope, status, time.monotonic() - began, facts)


def _log(scope: Scope, status: int, seconds: float, facts: dict[str, Any]) -> None:
    level = logging.DEBUG if scope["path"].rstrip("/") in _POLLED and status < 400 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    path = _path(scope)
    host = scope["client"][0] if scope.get("client") else None
    more = logs.facts(method=scope["method"], path=path, status=status, seconds=round(seconds, 4), client=host, **facts)
    logger.log(level, "%s %s %d", scope["method"], path, status, extra=more)


def _path(scope: Scope) -> str:
    """Return the path as it was sent, without what is nobody's business: its query, and the name of a picture, which
    everybody may see who knows it.
    """
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    path = raw.partition(b"?")[0][:_SHOWN].decode("ascii", "backslashreplace")
    return f"{_PICTURES}…" if path.startswith(_PICTURES) else path
