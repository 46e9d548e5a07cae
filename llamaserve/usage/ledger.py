"""The ledger: takes the records of requests from the event loop, and has a thread of its own write them to the file.

Whoever records waits until the row is committed; all that wait are written in one transaction. Where that can't be
done, because the disk is full or the file is locked, damaged or out of reach, nobody waits: records stay in memory
until it can. This module knows nothing of HTTP, and of SQL nothing at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Final, Self

from llamaserve.errors import LedgerUnavailable
from llamaserve.usage.backlog import Backlog
from llamaserve.usage.damage import remedy, what_is_wrong
from llamaserve.usage.database import Database
from llamaserve.usage.record import UsageRecord
from llamaserve.usage.retention import BATCH, Retention

logger = logging.getLogger(__name__)

_AT_ONCE: Final = 1000  # records in a transaction
_RETRY: Final = 3.0  # seconds between two attempts while there is a problem
_PATIENCE: Final = 2.0  # seconds that a request waits for its record, such as for a disk that does not answer
_CLOSE_LIMIT: Final = 3.0  # seconds for what is pending when the ledger is closed

_Waiter = asyncio.Future[None]


class Ledger:
    """The ledger of one server, for one event loop: ``async with Ledger(path, 400) as ledger``.

    ``retention_days`` is how long rows are kept; None: for ever. The clocks are in seconds.
    """

    def __init__(
        self,
        path: Path,
        retention_days: int | None,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._retention = None if retention_days is None else Retention(retention_days, wall, monotonic)
        self._monotonic = monotonic
        self._backlog: Backlog[_Waiter] = Backlog()
        self._retry_at = 0.0
        self._database: Database | None = None  # the thread's alone
        self._thread: Thread | None = None

    @property
    def problem(self) -> str | None:
        """What keeps records from being written; None where nothing does."""
        return self._backlog.problem

    @property
    def pending(self) -> int:
        """How many records wait in memory."""
        return len(self._backlog)

    @property
    def lost(self) -> int:
        """How many records will never be written."""
        return self._backlog.lost

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Begin to write. Whether the file can be written shows later, in ``problem``."""
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._thread = Thread(target=self._run, name="usage ledger", daemon=True)
        self._thread.start()

    async def aclose(self) -> None:
        """Write what is pending; what can't be written now is lost, and logged."""
        self._backlog.close()
        if self._thread is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _CLOSE_LIMIT)
                self._thread.join()  # it has done all it had to
        _end(self._backlog.abandon())

    async def record(self, record: UsageRecord) -> None:
        """Return when the record is committed; at once where that can't be done now, which raises nothing."""
        loop = asyncio.get_running_loop()
        waiter: _Waiter = loop.create_future()
        if not self._backlog.add(record, waiter):
            return
        patience = loop.call_later(_PATIENCE, self._lose_patience, waiter)
        try:
            await waiter
        finally:
            patience.cancel()

    def _lose_patience(self, waiter: _Waiter) -> None:
        if not waiter.done():
            _end(self._backlog.hold_up(f"{self._path} has not answered for {_PATIENCE:g} seconds"))

    def _run(self) -> None:
        """Write what comes, in the thread, until all is over."""
        try:
            self._attempt(())  # so that a problem is known before the first request is over
            going_on = True
            while going_on:
                records = self._next()
                succeeded = self._attempt(records)
                going_on = not self._backlog.closed or (succeeded and self.pending > 0)
        finally:
            self._close_database()
            self._in_loop(self._ended.set)

    def _next(self) -> list[UsageRecord]:
        """Wait until there is something to do, and return the records that are to be written."""
        with self._backlog.changed:
            while not self._backlog.closed and ((pause := self._pause()) is None or pause > 0):
                self._backlog.changed.wait(pause)
            return self._backlog.take(_AT_ONCE)

    def _pause(self) -> float | None:
        """Return the seconds until there is something to do; None: nothing unless a record comes."""
        if self._backlog.problem is not None:
            return self._retry_at - self._monotonic()
        if len(self._backlog):
            return 0.0
        return None if self._retention is None else self._retention.pause

    def _attempt(self, records: Sequence[UsageRecord]) -> bool:
        """Write records, and delete what is too old. Returns whether that succeeded."""
        try:
            database = self._open_database()
            if records:
                self._tell(self._backlog.written(database.insert(records)))
            if self._retention is not None and self._retention.pause <= 0 and not self._backlog.closed:
                self._retention.deleted(database.delete_before(self._retention.cutoff, BATCH))
        except Exception as error:  # noqa: BLE001 - what nobody foresaw must not end the thread
            self._close_database()
            self._retry_at = self._monotonic() + _RETRY
            self._tell(self._backlog.failed(self._described(error)))
            return False
        self._backlog.go_on()
        return True

    def _open_database(self) -> Database:
        if self._database is not None and not self._database.in_place:
            self._close_database()
        if self._database is None:
            self._database = Database(self._path)
        return self._database

    def _close_database(self) -> None:
        if self._database is not None:
            self._database.close()
        self._database = None

    def _described(self, error: Exception) -> str:
        if isinstance(error, LedgerUnavailable):
            return error.message
        if not isinstance(error, sqlite3.Error | OSError):
            problem = f"{self._path} can't be written: {error!r}"
            if self.problem != problem:  # it may be so at each attempt
                logger.error("a bug keeps usage from being recorded", exc_info=error)
            return problem
        return f"{self._path} can't be written: {what_is_wrong(error)}; try: {remedy(error, self._path)}"

    def _tell(self, waiters: Sequence[_Waiter]) -> None:
        if waiters:
            self._in_loop(lambda: _end(waiters))

    def _in_loop(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(call)


def _end(waiters: Sequence[_Waiter]) -> None:
    for waiter in waiters:
        if not waiter.done():  # whoever waited may have been cancelled
            waiter.set_result(None)
