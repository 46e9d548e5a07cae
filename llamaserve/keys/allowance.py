"""What a key has used of its limits, and when there is more.

What is a minute's worth comes back steadily, and not all at once. A request is let in as long as anything is left,
since nobody knows beforehand how many tokens it will take; what it takes beyond that has to come back before the next.
Knows nothing of HTTP, of whose the key is or of what a request asks for.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from llamaserve.errors import RateLimitExceeded
from llamaserve.keys.keyring import Key, Limits

QUEUE: Final = 64  # requests that may wait for those at work, where nothing else is said
_RECORDED: Final = 60  # refusals a minute
_MINUTE: Final = 60.0  # seconds
_SOON: Final = 1.0  # seconds after which somebody who waits may have gone


class Bucket:
    """So many of something a minute: it is full at first, and what is taken flows back."""

    def __init__(self, size: int, clock: Callable[[], float]) -> None:
        self.size = size
        self._clock = clock
        self._level = float(size)
        self._looked = clock()

    @property
    def level(self) -> float:
        """How many are left; less than 0 when more was taken than there was."""
        now = self._clock()
        self._level = min(self._level + max(0.0, now - self._looked) * self.size / _MINUTE, float(self.size))
        self._looked = now
        return self._level

    def take(self, amount: float) -> None:
        """Take so many, whether they are there or not."""
        self._level = self.level - amount

    def resize(self, size: int) -> None:
        """Let there be so many a minute from now on; what was taken stays taken."""
        self._level = self.level + size - self.size
        self.size = size

    def seconds_until(self, level: float) -> float:
        """Return how long it takes until so many are left."""
        return max(0.0, level - self.level) * _MINUTE / self.size


class Allowance:
    """What is left to one key."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._name = key.name
        self.limits = Limits()
        self.requests: Bucket | None = None
        self.tokens: Bucket | None = None
        self._refusals = Bucket(_RECORDED, clock)
        self._open = 0  # requests
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.limit(key.limits)

    def limit(self, limits: Limits) -> None:
        """Set other limits; what was used stays used."""
        if limits == self.limits:
            return
        self.limits = limits
        self.requests = self._bucket(self.requests, limits.requests_per_minute)
        self.tokens = self._bucket(self.tokens, limits.tokens_per_minute)
        self._let_in()

    def _bucket(self, former: Bucket | None, size: int | None) -> Bucket | None:
        if size is None or former is None:
            return None if size is None else Bucket(size, self._clock)
        former.resize(size)
        return former

    @property
    def idle(self) -> bool:
        """Whether nothing would be lost with it."""
        buckets = [bucket for bucket in (self.requests, self.tokens) if bucket is not None]
        return not self._open and all(bucket.level == bucket.size for bucket in buckets)

    def enter(self) -> None:
        """Let a request in, which must ``leave``. Raises ``RateLimitExceeded``."""
        limits = self.limits
        if limits.concurrent is not None:
            most = limits.concurrent + (QUEUE if limits.queue is None else limits.queue)
            if self._open >= most:
                raise self._refusal(f"has {most} requests under way or waiting, which is as many as it may", _SOON)
        if self.requests is not None and self.requests.level < 1:
            what = f"has made its {self.requests.size} requests a minute"
            raise self._refusal(what, self.requests.seconds_until(1))
        if self.tokens is not None and self.tokens.level <= 0:
            what = f"has used up its {self.tokens.size} tokens a minute"
            raise self._refusal(what, self.tokens.seconds_until(1))
        if self.requests is not None:
            self.requests.take(1)
        self._open += 1

    def _refusal(self, what: str, seconds: float) -> RateLimitExceeded:
        wait = max(1, math.ceil(seconds))
        return RateLimitExceeded(f"the key {self._name} {what}; try again in {wait} s", retry_after=wait)

    def records_refusal(self) -> bool:
        """Tell whether a refusal is worth a record: a client that does not hear would fill the disk with them."""
        if self._refusals.level < 1:
            return False
        self._refusals.take(1)
        return True

    async def turn(self) -> None:
        """Wait until the request may be worked on, since others of the key are; those who came first are first. It must
        be given back with ``end_turn``, unless this is cancelled.
        """
        if not self._waiting and self._has_room:
            self._running += 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it had just been let in
                self.end_turn()
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
            raise

    def end_turn(self) -> None:
        """Let another request have its turn."""
        self._running -= 1
        self._let_in()

    def leave(self) -> None:
        """A request is over."""
        self._open -= 1

    def spend(self, tokens: int) -> None:
        """Take note that tokens have been used."""
        if self.tokens is not None:
            self.tokens.take(tokens)

    @property
    def _has_room(self) -> bool:
        return self.limits.concurrent is None or self._running < self.limits.concurrent

    def _let_in(self) -> None:
        while self._waiting and self._has_room:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._running += 1
                waiter.set_result(None)


class Allowances:
    """What is left to each key, by its name."""

    _MOST: Final = 2000  # names, of which those that are idle are forgotten

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, Allowance] = {}

    def of(self, key: Key) -> Allowance:
        """Return what is left to a key."""
        found = self._known.get(key.name)
        if found is None:
            if len(self._known) >= self._MOST:
                self._known = {name: each for name, each in self._known.items() if not each.idle}
            found = self._known[key.name] = Allowance(key, self._clock)
        found.limit(key.limits)
        return found
