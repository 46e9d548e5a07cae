"""Turns at what only one can use at a time: they go round the shares of those who wait, and within a share those who
came first are first. Knows nothing of what is used.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from llamaserve.engine.rounds import Queues


class Turns:
    """Who has the turn, and who waits for it."""

    def __init__(self) -> None:
        self.taken = False
        self._waiting: Queues[asyncio.Future[None]] = Queues()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def turn(self, share: str = "") -> AsyncIterator[None]:
        """Wait until nobody else has the turn, and have it within a ``with`` block."""
        await self._wait(share)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, share: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.add(turn, share)
        if not self.taken:
            self._pass_on()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.discard(turn, share)
            else:  # it was given the turn just before
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Give the turn to the next one who waits, so that nobody can come before it."""
        self.taken = False
        while self._waiting and not self.taken:
            turn, share = self._waiting.next
            if turn.cancelled():  # and is about to hear of it
                self._waiting.discard(turn, share)
            else:
                self._waiting.take()
                turn.set_result(None)
                self.taken = True
