"""Connections that don't wait for ever for the head of a request, or for the rest of a body whose answer is sent, and
take none of any length; uvicorn's own do. And that are never upgraded, which some clients offer with every request.

A client that opens connections and sends next to nothing would otherwise use up all that the server may have open. How
long a body may take that is not answered yet is not known here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING or importlib.util.find_spec("httptools") is None:
    from uvicorn.protocols.http.h11_impl import H11Protocol as UvicornProtocol
else:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as UvicornProtocol

HEAD_LIMIT: Final = 30.0  # seconds from the first byte of a request, or from the beginning, to the end of its head
LONGEST_HEAD: Final = 64 * 1024  # bytes, but for what comes at once
REST_LIMIT: Final = 15.0  # seconds for what comes of a body after its answer,
LONGEST_REST: Final = 1024 * 1024  # and bytes
_HEAD_END: Final = re.compile(rb"\n\r?\n")
_BEGINNING: Final = re.compile(rb"[A-Z]{1,20}( |$)")  # of what may become a head
_UPGRADE: Final = re.compile(rb"^upgrade(?=[ \t]*:)", re.IGNORECASE | re.MULTILINE)
_TOO_LONG: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Connection(UvicornProtocol):
    """One connection of a client."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._head = b""  # what has come of one that is not complete
        self._rest = 0  # bytes of a body that have come after its answer
        self._in_body = False  # httptools says so

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._expect(HEAD_LIMIT)

    def data_received(self, data: bytes) -> None:
        """Take what comes; what does not complete a head must do so soon."""
        if self._head_is_due:
            self._take_head(data)
        else:
            super().data_received(data)
        if self._rest_is_due:
            self._rest += len(data)
            if self._rest > LONGEST_REST:
                self.transport.close()
            elif self._timer is None:
                self._expect(REST_LIMIT)
        elif not self._head_is_due:
            self._forget()
        elif self._timer is None:
            self._expect(HEAD_LIMIT)

    def _take_head(self, data: bytes) -> None:
        """Keep what comes until it is a whole head, or can't become one."""
        self._unset_keepalive_if_required()
        known = len(self._head)
        self._head += data
        end = _HEAD_END.search(self._head, max(0, known - 2))
        if end is not None:
            # The parser believes that a connection is upgraded which offers it, and would take no body.
            head, body, self._head = self._head[: end.end()], self._head[end.end() :], b""
            super().data_received(_UPGRADE.sub(b"x-upgrade", head) + body)
        elif len(self._head) > LONGEST_HEAD:
            self.transport.write(_TOO_LONG)
            self.transport.close()
        elif not _BEGINNING.match(self._head):
            data, self._head = self._head, b""
            super().data_received(data)  # which refuses it

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._forget()
        super().connection_lost(exc)

    def on_headers_complete(self) -> None:
        """Take note that what comes now is the body."""
        self._in_body = True
        super().on_headers_complete()  # type: ignore[misc]  # which is httptools'

    def on_message_complete(self) -> None:
        """Take note that what comes now is another request."""
        self._in_body = False
        self._forget()
        super().on_message_complete()  # type: ignore[misc]

    def abandon_half_a_request(self) -> None:
        """End the connection if the body of its request has not come yet, so that nobody waits for it."""
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body:
            self.transport.abort()

    @property
    def _head_is_due(self) -> bool:
        """Whether neither a request is being answered nor the rest of one is still coming."""
        if self.cycle is not None and not self.cycle.response_complete:
            return False
        conn = getattr(self, "conn", None)  # h11's
        return not self._in_body if conn is None else conn.their_state.__name__ == "IDLE"

    @property
    def _rest_is_due(self) -> bool:
        """Whether a request has been answered the rest of which is still coming."""
        return self.cycle is not None and self.cycle.response_complete and not self._head_is_due

    def _expect(self, limit: float) -> None:
        self._timer = self.loop.call_later(limit, self._give_up)

    def _forget(self) -> None:
        self._rest = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self._head_is_due or self._rest_is_due:
            self.transport.abort()
