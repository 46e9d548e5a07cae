"""Downloads that a running server makes: each in a thread, with progress, and given up when that is asked for. A server
that ends does not wait long for a thread that is stuck in the network.

A source that is being fetched is fetched once, whoever asks for it. Requests may name models of models.yaml and ``hf:``
references only: nothing that leads to this machine's files. This module knows nothing of HTTP or of what becomes of a
model once it is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Final, TypeVar

import msgspec

from llamaserve import errors
from llamaserve.registry import deleting
from llamaserve.registry.deleting import Deleted
from llamaserve.registry.folder import named
from llamaserve.registry.lock_file import LockFile
from llamaserve.registry.pulling import pull
from llamaserve.registry.spec import ModelSpec, Registry

log = logging.getLogger(__name__)

_T = TypeVar("_T")

MAX_RUNNING: Final = 4
KEPT: Final = 50  # downloads that are over
REPORT_SECONDS: Final = 0.25  # between two reports of progress
LONGEST_REFERENCE: Final = 500  # characters
CLOSE_LIMIT: Final = 3.0  # seconds that downloads have to end when the server does


class State(StrEnum):
    """Where a download stands."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Download(msgspec.Struct):
    """One download: whether it looks for something newer, bytes that are here, bytes in all where that is known, and
    why it failed.
    """

    id: str
    model: str
    source: str
    update: bool = False
    state: State = State.RUNNING
    done: int = 0
    total: int | None = None
    path: str | None = None
    error: errors.ErrorValue | None = None
    started: float = 0.0  # seconds since 1970
    ended: float | None = None

    @property
    def percent(self) -> float | None:
        """How much is here, from 0 to 100; None where that is not known."""
        if self.state is State.DONE:
            return 100.0
        return round(100 * min(self.done / self.total, 1.0), 1) if self.total else None


class _Cancelled(Exception):
    """Raised in the thread to end it; of a kind that nothing on the way takes for an error of the network."""


class Downloads:
    """The downloads of one server, for one event loop; ``on_change`` hears of every change of one."""

    def __init__(self, on_change: Callable[[Download], None] = lambda _: None) -> None:
        self._on_change = on_change
        self._downloads: dict[str, Download] = {}  # oldest first
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, Event] = {}
        self._numbers = itertools.count(1)

    def listed(self) -> list[Download]:
        """Return all downloads that are remembered, the newest first."""
        return [*reversed(self._downloads.values())]

    def get(self, download_id: str) -> Download:
        """Return a download. Raises ``InvalidRequest`` when there is none, or no more."""
        if download_id not in self._downloads:
            raise errors.InvalidRequest(f"there is no download {download_id[:100]!r}", param="id")
        return self._downloads[download_id]

    def start(
        self,
        registry: Registry,
        reference: str,
        lock: LockFile,
        *,
        update: bool = False,
        param: str = "model_name",
    ) -> Download:
        """Begin to fetch a model, or return the download that does so already.

        Raises ``InvalidRequest`` for a reference that requests may not use and for an update of what is just being
        fetched without, ``ModelNotFound`` for an unknown name, and ``QueueFull`` when too many downloads run.
        """
        name, spec = resolve(registry, reference, param)
        running = [download for download in self._downloads.values() if download.state is State.RUNNING]
        for download in running:
            if download.source == spec.source:
                if update and not download.update:
                    raise errors.InvalidRequest(
                        f"{spec.source} is being fetched as models.lock says; wait for that, or cancel it first",
                        param="update",
                    )
                return download
        if len(running) >= MAX_RUNNING:
            raise errors.QueueFull(f"{len(running)} downloads run already; wait for one of them", retry_after=10.0)
        number = f"download-{next(self._numbers)}"
        download = Download(number, name, spec.source, update, started=time.time())
        self._downloads[download.id] = download
        cancelled = self._cancelled[download.id] = Event()
        progress = _Reporter(self, download, cancelled)
        work = partial(pull, registry, spec, lock, progress, update=update)
        self._tasks[download.id] = asyncio.create_task(self._run(download, work))
        self._on_change(download)
        return download

    def cancel(self, download_id: str) -> Download:
        """Give a download up. It is ``cancelled`` when its thread ends. What is here of a hub's file stays for the next
        attempt; a wheel is begun anew.
        """
        download = self.get(download_id)
        if download.state is State.RUNNING:
            self._cancelled[download_id].set()
        return download

    async def wait(self, download_id: str) -> Download:
        """Return a download when it is over. To give up waiting does not end it."""
        download = self.get(download_id)
        if (task := self._tasks.get(download_id)) is not None:
            await asyncio.shield(task)
        return download

    async def deletable(
        self, registry: Registry, spec: ModelSpec, folder: Path | None, *, param: str = "model_name"
    ) -> tuple[Path, ...]:
        """Return the files that ``delete`` would delete, and raise as it does."""
        if any(each.source == spec.source and each.state is State.RUNNING for each in self._downloads.values()):
            raise errors.InvalidRequest(f"{spec.source} is being fetched; cancel that first", param=param)
        return await _named_place(param, partial(deleting.deletable_with_others, registry, spec, folder))

    async def delete(
        self, registry: Registry, spec: ModelSpec, folder: Path | None, *, param: str = "model_name"
    ) -> Deleted:
        """Delete a model's files. Raises ``InvalidRequest`` when they are not ours to delete or just being fetched, and
        ``ModelFileMissing``.
        """
        await self.deletable(registry, spec, folder, param=param)
        return await _named_place(param, partial(deleting.delete_model, registry, spec, folder))

    async def aclose(self) -> None:
        """Give all downloads up, and wait until they have ended, but not for long."""
        for event in self._cancelled.values():
            event.set()
        tasks = [*self._tasks.values()]
        if not tasks:
            return
        _, stuck = await asyncio.wait(tasks, timeout=CLOSE_LIMIT)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, download: Download, work: Callable[[], Path]) -> None:
        try:
            download.path = str(await _in_thread(download.id, work))
            download.state = State.DONE
        except _Cancelled:
            download.state = State.CANCELLED
        except asyncio.CancelledError:  # the server ends, and the thread does not
            log.warning("%s is given up; its thread is left behind", download.source)
            download.state = State.CANCELLED
            raise
        except errors.LlamaserveError as error:
            log.warning("%s could not be fetched: %s", download.source, error.message)
            download.state, download.error = State.FAILED, errors.to_value(error)
        except OSError as error:
            log.warning("%s could not be fetched: %s", download.source, error)
            failure = errors.SourceError(f"{download.source} could not be fetched: {error}")
            download.state, download.error = State.FAILED, errors.to_value(failure)
        finally:
            self._end(download)

    def _end(self, download: Download) -> None:
        if download.state is State.RUNNING:  # an error that nobody foresaw, which the event loop logs
            failure = errors.SourceError(f"{download.source} could not be fetched; the log says why")
            download.state, download.error = State.FAILED, errors.to_value(failure)
        download.ended = time.time()
        del self._tasks[download.id], self._cancelled[download.id]
        over = [key for key, each in self._downloads.items() if each.state is not State.RUNNING]
        for key in over[:-KEPT]:
            del self._downloads[key]
        self._on_change(download)

    def report(self, download: Download, done: int, total: int | None) -> None:
        """Take note of progress, in the event loop."""
        if download.state is State.RUNNING:
            download.done, download.total = done, total
            self._on_change(download)


class _Reporter:
    """Takes the progress in the thread, passes it on from time to time, and ends the thread when that is asked for."""

    def __init__(self, downloads: Downloads, download: Download, cancelled: Event) -> None:
        self._downloads = downloads
        self._download = download
        self._cancelled = cancelled
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._told: tuple[int, int | None] | None = None

    def __call__(self, done: int, total: int | None) -> None:
        if self._cancelled.is_set():
            raise _Cancelled
        now = time.monotonic()
        if (done, total) != self._told and (now - self._last >= REPORT_SECONDS or done == total):
            self._last, self._told = now, (done, total)
            self._loop.call_soon_threadsafe(self._downloads.report, self._download, done, total)


def _in_thread(name: str, work: Callable[[], Path]) -> asyncio.Future[Path]:
    """Do work in a thread that does not keep the process alive, as those of the event loop's executor would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Path] = loop.create_future()

    def end(result: Path | None, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            failure = error
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(end, result, failure)

    Thread(target=run, name=name, daemon=True).start()
    return future


async def _named_place(param: str, work: Callable[[], _T]) -> _T:
    """Do work in a thread. What it says of a request is said of this place in it."""
    try:
        return await asyncio.to_thread(work)
    except errors.InvalidRequest as error:
        error.param = error.param or param
        raise


async def find(registry: Registry, name: str, folder: Path | None, param: str = "model_name") -> ModelSpec:
    """Return the model of models.yaml, of the models folder or of the hub that a request may name to have it deleted.
    Raises as ``resolve`` does.
    """
    if name not in registry.models and name not in registry.aliases and folder is not None:
        found = await asyncio.to_thread(named, folder, name)
        if found is not None:
            return ModelSpec(source=found.source)
    return resolve(registry, name, param)[1]


def resolve(registry: Registry, reference: str, param: str = "model_name") -> tuple[str, ModelSpec]:
    """Return the model that a request may name: one of models.yaml, or an ``hf:`` reference.

    Raises ``InvalidRequest`` for anything else, which may be a file of this machine's, and ``ModelNotFound``.
    """
    if reference in registry.models or reference in registry.aliases:
        return registry.resolve(reference)
    if len(reference) > LONGEST_REFERENCE:
        raise errors.InvalidRequest(f"the name is longer than {LONGEST_REFERENCE} characters", param=param)
    if not reference.startswith("hf:"):
        raise errors.InvalidRequest(
            f"{reference!r} is no model of models.yaml and no hf:OWNER/REPO:QUANT reference", param=param
        )
    try:
        return registry.resolve_reference(reference)
    except errors.RegistryError as error:
        raise errors.InvalidRequest(error.message, param=param) from error
