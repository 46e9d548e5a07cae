"""A spare child: started ahead of time, it has imported everything and waits to be given a model.

So a load need not wait for that, and what the machine has for GPUs is known before any load. There is never more than
one. It is started some time after the loads are over, since it would take a core from them, and from the first answers
for which they were made: right after a load, these came 0.3 s later. Whether to keep one is the pool's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator

from llamaserve.engine.events import Device
from llamaserve.errors import EngineCrashed, Unavailable
from llamaserve.worker.child import Child

logger = logging.getLogger(__name__)

_NAME = "spare process"
_PAUSE = 1.0  # seconds between a load and the start of a spare
_PAUSE_AFTER_DEATH = 1.0  # seconds, and twice as many with each spare in turn that ends by itself
_LONGEST_PAUSE = 300.0  # seconds


class Spares:
    """Keeps at most one child that is nobody's yet. It must be closed."""

    def __init__(self, start: Callable[[str], Awaitable[Child]] = Child.start) -> None:
        self._start = start
        self._child: Child | None = None
        self._coming: asyncio.Task[None] | None = None  # the pause before a start, and the start
        self._watcher: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # all that may not have ended
        self._starting = asyncio.Lock()
        self._keep = False
        self._closed = False
        self._loads = 0
        self._deaths = 0  # of spares, since the last one that was of use
        self.devices: list[Device] | None = None  # the GPUs, as the last spare has found them; None: none was up yet

    @property
    def pid(self) -> int | None:
        """Process id of the spare, if there is one."""
        return self._child.pid if self._child is not None else None

    @property
    def keep(self) -> bool:
        """Whether a new spare is started after loads. A change takes effect at once."""
        return self._keep

    @keep.setter
    def keep(self, keep: bool) -> None:
        self._keep = keep = keep and not self._closed
        if keep:
            self._refill()
        else:
            self._drop()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Start no spare while a model is being loaded, but some time after it."""
        self._loads += 1
        self._cancel_coming()
        try:
            yield
        finally:
            self._loads -= 1
            self._refill()

    async def take(self, name: str) -> Child:
        """Return a child for the model of this name: the spare, or a new one when there is none, or it does not come
        up. The caller closes it. When this is cancelled, it is closed.
        """
        spare = self._release()
        if spare is None:
            return await self._start(name)
        spare.name = name
        try:
            if await spare.up() and not spare.ended:
                self._deaths, self.devices = 0, spare.devices
                return spare
        except BaseException:
            await asyncio.shield(spare.aclose())
            raise
        await spare.aclose()
        return await self._start(name)

    async def hardware(self) -> list[Device]:
        """Return the GPUs; where they are not known yet, a child is started to ask, which is a spare then. Raises
        ``EngineCrashed`` when it does not come up.
        """
        if self.devices is None:
            async with self._starting:
                if self._child is not None and self._child.ended:
                    self._drop()
                child = self._child or await self._begin()
            if not await child.up():
                raise EngineCrashed(f"the process that was to look for GPUs {child.end}")
            self.devices = child.devices
        return self.devices

    async def aclose(self) -> None:
        """End the spare, if there is one; there will be no other."""
        self._closed = True
        self.keep = False
        async with self._starting:
            self._drop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _refill(self) -> None:
        """Have a spare after a while, if one is wanted and there is none."""
        if self._keep and not self._loads and self._child is None and self._coming is None:
            self._coming = self._do(self._come(self._pause))

    @property
    def _pause(self) -> float:
        return min(_PAUSE_AFTER_DEATH * 2 ** (self._deaths - 1), _LONGEST_PAUSE) if self._deaths else _PAUSE

    async def _come(self, pause: float) -> None:
        await asyncio.sleep(pause)
        async with self._starting:
            try:
                if self._child is None:
                    await self._begin()
            except (OSError, EngineCrashed) as error:
                logger.error("no %s can be started: %s", _NAME, error)
                self._deaths += 1
        self._coming = None
        self._refill()

    async def _begin(self) -> Child:
        if self._closed:
            raise Unavailable("the server is being shut down")
        self._child = child = await self._start(_NAME)
        self._watcher = self._do(self._watch(child))
        return child

    async def _watch(self, child: Child) -> None:
        """Wait for the end of a spare that nobody has taken, and have another one after a while."""
        if await child.up():
            self.devices = child.devices
            await child.closed()
        self._child = None
        self._deaths += 1
        logger.error("the %s %s", _NAME, child.end)
        await child.aclose()
        self._refill()

    def _release(self) -> Child | None:
        """Give the spare out of this object's care, if there is one."""
        self._cancel_coming()
        child, self._child = self._child, None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        return child

    def _drop(self) -> None:
        if (child := self._release()) is not None:
            self._do(child.aclose())

    def _cancel_coming(self) -> None:
        if self._coming is not None:
            self._coming.cancel()
            self._coming = None

    def _do(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
