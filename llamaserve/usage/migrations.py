"""The ledger's schema, as the steps that lead to it. Each is one transaction, and ``PRAGMA user_version`` counts them.

A step that was released is never changed; what is to be different is another step at the end. This module knows nothing
of records.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from llamaserve.errors import LedgerUnavailable

Migration = Callable[[sqlite3.Connection], None]


def m001_requests(connection: sqlite3.Connection) -> None:
    """One row for each request."""
    connection.execute(
        """
        CREATE TABLE requests (
            id INTEGER PRIMARY KEY,
            request_id TEXT NOT NULL,
            at REAL NOT NULL,
            key TEXT,
            endpoint TEXT NOT NULL,
            model TEXT,
            prompt_tokens INTEGER NOT NULL,
            cached_tokens INTEGER NOT NULL,
            completion_tokens INTEGER NOT NULL,
            audio_seconds REAL NOT NULL,
            images INTEGER NOT NULL,
            first_token REAL,
            seconds REAL NOT NULL,
            streamed INTEGER NOT NULL,
            status INTEGER NOT NULL,
            outcome TEXT NOT NULL
        )
        """
    )
    connection.execute("CREATE INDEX requests_at ON requests (at)")


MIGRATIONS: Final[Sequence[Migration]] = (m001_requests,)


def version(connection: sqlite3.Connection) -> int:
    """Return how many steps a database has taken."""
    (taken,) = connection.execute("PRAGMA user_version").fetchone()
    return int(taken)


def require_known(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Raise ``LedgerUnavailable`` for a database of a newer program, of which nothing may be taken for granted."""
    taken = version(connection)
    if taken > len(migrations):
        raise LedgerUnavailable(
            f"{path} is of a newer llamaserve: it has version {taken}, and this program knows none after "
            f"{len(migrations)}",
            hint="Update llamaserve, or have another folder with LLAMASERVE_STATE_DIR",
        )


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Take the steps that a database lacks. The connection must be in autocommit mode. Another process may do the same
    at the same time.
    """
    while version(connection) < len(migrations):
        connection.execute("BEGIN IMMEDIATE")
        try:
            taken = version(connection)  # once more: another process may have taken the step meanwhile
            if taken < len(migrations):
                migrations[taken](connection)
                connection.execute(f"PRAGMA user_version = {taken + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # SQLite rolls back itself where a disk is full
                connection.execute("ROLLBACK")
            raise
