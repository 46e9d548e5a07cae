"""Connections that don't wait for ever for the head of a request, or take one of any length; uvicorn's own do.

A client that opens connections and sends next to nothing would otherwise use up all that the server may have open.
"""

from __future__ import annotations

import asyncio
import importlib.util
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING or importlib.util.find_spec("httptools") is None:
    from uvicorn.protocols.http.h11_impl import H11Protocol as UvicornProtocol
else:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as UvicornProtocol

HEAD_LIMIT: Final = 30.0  # seconds from the first byte of a request, or from the beginning, to the end of its head
LONGEST_HEAD: Final = 64 * 1024  # bytes


class Connection(UvicornProtocol):
    """One connection of a client."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._timer: asyncio.TimerHandle | None = None
        self._head = 0  # bytes of a head that is not complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Take what comes; what does not complete a head must do so soon."""
        super().data_received(data)
        if self._answers:
            self._forget()
            return
        self._head += len(data)
        if self._head > LONGEST_HEAD:
            self.transport.abort()
        elif self._timer is None:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        self._forget()
        super().connection_lost(exc)

    def abandon(self) -> None:
        """Let go of a client that has still not sent all of its request: nobody will read it any more."""
        if self._answers and self.cycle.more_body:
            self.transport.abort()

    @property
    def _answers(self) -> bool:
        """Whether a request is being answered, of which the head has come."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect(self) -> None:
        self._timer = self.loop.call_later(HEAD_LIMIT, self._give_up)

    def _forget(self) -> None:
        self._head = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if not self._answers:
            self.transport.abort()
