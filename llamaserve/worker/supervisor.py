"""Keeps one model's child process available: starts it when it is needed, once, and again after a crash.

After a crash the next request starts a new child; after a second one it waits out a pause first; after a third within
ten minutes the model is quarantined. A model that could not be loaded is not tried again at once. Knows nothing of
where models come from, or whether there is room for them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context
from enum import StrEnum
from typing import Protocol

from llamaserve.engine.events import Occupancy
from llamaserve.errors import (
    EngineCrashed,
    InsufficientMemory,
    LlamaserveError,
    ModelQuarantined,
    Unavailable,
    from_value,
    to_value,
)
from llamaserve.worker.process import WorkerProcess
from llamaserve.worker.protocol import ModelParams
from llamaserve.worker.spare import Spares

logger = logging.getLogger(__name__)

CRASHES_TO_QUARANTINE = 3
CRASH_WINDOW = 600.0  # seconds
_PAUSES = (0.0, 5.0)  # seconds after the first and the second crash
_FAILED_LOAD_PAUSE = 10.0  # seconds in which a failed load is not repeated, only its error


class Status(StrEnum):
    """What a client sees of a model, in llama-server's words where it has one."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    QUARANTINED = "quarantined"


class Listener(Protocol):
    """Who is told what becomes of a model."""

    def loading(self, fraction: float) -> None:
        """So much of it is loaded, from 0 to 1."""

    def loaded(self, worker: WorkerProcess, seconds: float) -> None:
        """A child has it, after so many seconds."""

    def failed(self, error: LlamaserveError) -> None:
        """It could not be loaded."""

    def crashed(self, error: LlamaserveError, *, quarantined: bool) -> None:
        """Its child ended, loaded or not, without being told to."""


class Supervisor:
    """The life of one model over any number of child processes.

    ``prepare`` is called before each load; it checks the file and returns how to load it, or raises. ``spares`` may
    have a child that is started already.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[[], Awaitable[ModelParams]],
        listener: Listener | None = None,
        spares: Spares | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._name = name
        self._prepare = prepare
        self._listener = listener
        self._spares = spares
        self._clock = clock
        self._sleep = sleep
        self._worker: WorkerProcess | None = None
        self._loading: asyncio.Task[WorkerProcess] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._crashes: deque[float] = deque(maxlen=CRASHES_TO_QUARANTINE)
        self._failure: tuple[float, LlamaserveError] | None = None
        self.progress = 0.0  # of the current load, from 0 to 1

    @property
    def status(self) -> Status:
        """Where the model stands now."""
        if self.live_worker:
            return Status.LOADED
        if self._loading:
            return Status.LOADING
        return Status.QUARANTINED if self._quarantined else Status.UNLOADED

    @property
    def occupancy(self) -> Occupancy:
        """How busy the model is."""
        return self._worker.occupancy if self._worker else Occupancy()

    @property
    def live_worker(self) -> WorkerProcess | None:
        """The child that has the model, if there is one."""
        return self._worker if self._worker and not self._worker.ended.is_set() else None

    async def worker(self) -> WorkerProcess:
        """Return the loaded child, loading it first if need be. Any number of callers share one load, and a caller that
        gives up does not stop it for the others.
        """
        if (worker := self.live_worker) is not None:
            return worker
        if self._loading is None:
            self._refuse_in_vain()
            self._loading = asyncio.create_task(self._load(self._pause()), context=Context())
            self._loading.add_done_callback(_mark_retrieved)
        loading = self._loading
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            if loading.cancelled():  # not the caller was, but the load: the supervisor is closed
                raise Unavailable(f"{self._name} is being unloaded") from None
            raise

    def stop_all(self) -> None:
        """End all requests with a normal finish."""
        if self._worker:
            self._worker.stop_all()

    def forgive(self) -> None:
        """Forget crashes and failures, because somebody wants the model tried again now."""
        self._crashes.clear()
        self._failure = None

    def retry(self) -> None:
        """Forget that a load has failed, because its reason may be gone."""
        self._failure = None

    async def aclose(self) -> None:
        """End the child, whatever it is doing; the model can be loaded again after that."""
        if self._loading:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
            self._loading = None
        if self._watcher:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        if self._worker:
            await self._worker.aclose()
            self._worker = None

    @property
    def _recent_crashes(self) -> list[float]:
        return [crash for crash in self._crashes if self._clock() - crash < CRASH_WINDOW]

    @property
    def _quarantined(self) -> bool:
        return len(self._recent_crashes) >= CRASHES_TO_QUARANTINE

    def _pause(self) -> float:
        """Return the seconds to wait before the next start."""
        recent = self._recent_crashes
        return max(0.0, recent[-1] + _PAUSES[len(recent) - 1] - self._clock()) if recent else 0.0

    def _refuse_in_vain(self) -> None:
        """Refuse a start that would not help."""
        if self._quarantined:
            raise ModelQuarantined(
                f"{self._name} crashed {CRASHES_TO_QUARANTINE} times within {CRASH_WINDOW / 60:.0f} minutes and is not "
                "started again; the server's log has the reasons. Load it by hand to try once more: "
                "POST /v1/internal/model/load"
            )
        if self._failure and self._clock() < self._failure[0]:
            raise from_value(to_value(self._failure[1]))

    async def _load(self, pause: float) -> WorkerProcess:
        self.progress = 0.0
        try:
            await self._sleep(pause)
            params = await self._prepare()
            logger.info("loading %s from %s", self._name, params.path)
            started = self._clock()
            worker = await WorkerProcess.start(self._name, params, self._on_progress, self._spares)
        except EngineCrashed as crash:
            logger.error("%s", crash.message)
            self._note_crash(crash)
            raise
        except LlamaserveError as error:
            self._note_failure(error)
            raise
        except Exception:
            if self._listener:
                message = f"the server failed to load {self._name}; its log has the details"
                self._listener.failed(LlamaserveError(message))
            raise
        finally:
            self._loading = None
        self._failure = None
        self._worker = worker
        self._watcher = asyncio.create_task(self._watch(worker), context=Context())
        logger.info("%s is loaded on the %s (process %d)", self._name, "GPU" if worker.gpu else "CPU", worker.pid)
        if self._listener:
            self._listener.loaded(worker, self._clock() - started)
        return worker

    def _on_progress(self, fraction: float) -> None:
        self.progress = fraction
        if self._listener:
            self._listener.loading(fraction)

    def _note_failure(self, error: LlamaserveError) -> None:
        """Take note of a load that failed; a later one may do better where nothing but the moment was wrong."""
        if not isinstance(error, Unavailable) or isinstance(error, InsufficientMemory):
            logger.error("%s", error.message)
            self._failure = (self._clock() + _FAILED_LOAD_PAUSE, error)
        if self._listener:
            self._listener.failed(error)

    def _note_crash(self, crash: LlamaserveError) -> None:
        self._crashes.append(self._clock())
        if self._listener:
            self._listener.crashed(crash, quarantined=self._quarantined)

    async def _watch(self, worker: WorkerProcess) -> None:
        await worker.ended.wait()
        self._note_crash(worker.crash())


def _mark_retrieved(load: asyncio.Task[WorkerProcess]) -> None:
    """Keep asyncio from complaining about a failed load when everybody who waited for it has left."""
    if not load.cancelled():
        load.exception()
