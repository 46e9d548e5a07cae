"""The file of the ledger, open for writing: an SQLite database with a write-ahead log, which other servers may write
at the same time. What is committed outlives the process, however that ends.

For one thread, which is not that of the event loop. What is wrong with the file or its folder is raised as
``sqlite3.Error``, ``OSError`` or ``LedgerUnavailable``; nothing is deleted or replaced. This module knows nothing of
who waits for a row, and when rows are too old.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

from llamaserve.usage.migrations import migrate, require_known
from llamaserve.usage.record import UsageRecord

log = logging.getLogger(__name__)

COLUMNS: Final = UsageRecord.__struct_fields__
LONGEST: Final = 256  # characters of a text: some of them come from clients
_BUSY_SECONDS: Final = 1.0  # that another process may take to write
_POLL_SECONDS: Final = 0.01
_ROWS: Final = 60  # in a statement: SQLite before 3.32 takes 999 values

# What is wrong with a row rather than with the file.
_UNSTORABLE = (sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError)

_Row = tuple[str | int | float | None, ...]


class Database:
    """An open ledger."""

    def __init__(self, path: Path) -> None:
        """Open the file, after making it and its folder if they are missing; nobody else may read them."""
        self._path = path.absolute()
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Only if it is new: to close a file that this process has open as a database would end SQLite's locks on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        self._connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            self._identity = self._file()
            require_known(self._connection, self._path)
            self._begin_log()
            self._connection.execute("PRAGMA synchronous = NORMAL")
            migrate(self._connection)
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    @property
    def in_place(self) -> bool:
        """Whether the open file is still the one that has its name; rows for one that was deleted would be lost."""
        return self._identity is not None and self._file() == self._identity

    def insert(self, records: Sequence[UsageRecord]) -> int:
        """Write records in one transaction, and return how many of them can never be stored, such as one with a number
        that is none.
        """
        lost = 0
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            require_known(self._connection, self._path)  # a newer server may have come meanwhile
            for start in range(0, len(records), _ROWS):
                lost += self._insert_some([_row(record) for record in records[start : start + _ROWS]])
            self._connection.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        return lost

    def delete_before(self, moment: float, most: int) -> int:
        """Delete rows of requests that came before a moment, so many at most, and return how many were deleted."""
        statement = (
            "DELETE FROM requests WHERE id IN (SELECT id FROM requests WHERE at < :moment ORDER BY at LIMIT :most)"
        )
        return self._connection.execute(statement, {"moment": moment, "most": most}).rowcount

    def _insert_some(self, rows: Sequence[_Row]) -> int:
        """Write rows in one statement: each one gives the interpreter's lock up, and has to wait for it."""
        try:
            self._execute_insert(rows)
        except (*_UNSTORABLE, OverflowError) as error:
            if len(rows) > 1:
                return sum(self._insert_some([row]) for row in rows)
            log.error("usage of a request can't be stored: %s: %r", error, rows[0])
            return 1
        return 0

    def _execute_insert(self, rows: Sequence[_Row]) -> None:
        values = ", ".join([f"({', '.join('?' * len(COLUMNS))})"] * len(rows))
        statement = f"INSERT INTO requests ({', '.join(COLUMNS)}) VALUES {values}"  # noqa: S608 - nothing from outside
        self._connection.execute(statement, [value for row in rows for value in row])

    def _begin_log(self) -> None:
        """Have a write-ahead log. SQLite does not wait where several processes do this at once."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                (mode,) = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_SECONDS)
            else:
                break
        if mode != "wal":
            raise OSError(errno.ENOTSUP, "its file system can't hold a write-ahead log")

    def _roll_back(self) -> None:
        if self._connection.in_transaction:  # SQLite has done so itself where a disk is full
            self._connection.execute("ROLLBACK")

    def _file(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino


def _row(record: UsageRecord) -> _Row:
    values = msgspec.structs.astuple(record)
    return tuple(_stored(value) if isinstance(value, str) else value for value in values)


def _stored(text: str) -> str:
    """Return a text as it is stored: cut if it is very long, and with question marks for what is no character."""
    return text[:LONGEST].encode("utf-8", "replace").decode()
