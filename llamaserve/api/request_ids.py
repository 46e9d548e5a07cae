"""An id for each request: the client's own ``x-request-id``, or a new one. It is in every answer, and wherever is told
of the request. Knows nothing else of requests.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER: Final = "x-request-id"
_PLAIN: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # what can do no harm in a log


class RequestIds:
    """Gives each request its id, which is ``scope["state"]["request_id"]``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _PLAIN.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"])[HEADER] = request_id
            await send(message)

        await self._app(scope, receive, named)
