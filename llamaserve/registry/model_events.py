"""What happens to models, told to whoever listens: loads with their progress, unloads, crashes, downloads, reloads.

A listener that is slow loses the oldest of what it has not taken, is told so, and holds up nobody. Knows nothing of
what the events mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

import msgspec

MAX_UNTAKEN: Final = 1000  # events of one listener


class ModelEvent(msgspec.Struct, frozen=True):
    """Something happened to a model, or to the list of models; ``at`` is in seconds since 1970."""

    kind: str
    model: str | None
    at: float
    data: dict[str, Any]


class Subscription:
    """The events from now on that one listener has not taken yet."""

    def __init__(self) -> None:
        self._events: deque[ModelEvent] = deque()
        self._arrived = asyncio.Event()
        self._missed = 0
        self._ended = False

    def put(self, event: ModelEvent) -> None:
        """Add an event. Of a progress that nobody has taken only the latest counts."""
        if self._events and event.kind.endswith("progress"):
            last = self._events[-1]
            if (last.kind, last.model) == (event.kind, event.model):
                self._events.pop()
        if len(self._events) >= MAX_UNTAKEN:
            self._events.popleft()
            self._missed += 1
        self._events.append(event)
        self._arrived.set()

    def end(self) -> None:
        """Have what has not been taken yet be the last."""
        self._ended = True
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[ModelEvent]:
        while self._events or not self._ended:
            await self._arrived.wait()
            self._arrived.clear()
            if self._missed:
                missed, self._missed = self._missed, 0
                yield ModelEvent("missed", None, time.time(), {"events": missed})
            while self._events:
                yield self._events.popleft()


class ModelEvents:
    """Where events are published; only from the event loop's thread."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()
        self._witnesses: list[Callable[[ModelEvent], None]] = []
        self._ended = False

    def witness(self, call: Callable[[ModelEvent], None]) -> None:
        """Have a function called with each event, at once."""
        self._witnesses.append(call)

    def publish(self, kind: str, model: str | None = None, **data: Any) -> None:
        """Tell all listeners."""
        if self._subscriptions or self._witnesses:
            event = ModelEvent(kind, model, time.time(), data)
            for call in self._witnesses:
                call(event)
            for subscription in self._subscriptions:
                subscription.put(event)

    def end(self) -> None:
        """Let listeners go once they have taken what there is."""
        self._ended = True
        for subscription in self._subscriptions:
            subscription.end()

    @contextlib.contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Listen within a ``with`` block."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        if self._ended:
            subscription.end()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
