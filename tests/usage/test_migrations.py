"""The schema: an old database becomes what a fresh one is, a step at a time, and one of the future is left alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from llamaserve.errors import LedgerUnavailable
from llamaserve.usage.migrations import MIGRATIONS, Migration, migrate, require_known, version


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "a.sqlite3", isolation_level=None)) as opened:
        yield opened


def schema(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY name").fetchall()


def _m_color(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE requests ADD COLUMN colour TEXT")
    connection.execute("UPDATE requests SET colour = 'grey'")


def _m_index(connection: sqlite3.Connection) -> None:
    connection.execute("CREATE INDEX requests_colour ON requests (colour)")


LATER: tuple[Migration, ...] = (*MIGRATIONS, _m_color, _m_index)


@pytest.mark.parametrize("taken", range(len(LATER) + 1))
def test_an_old_database_that_is_migrated_is_as_a_fresh_one(connection: sqlite3.Connection, taken: int) -> None:
    migrate(connection, LATER[:taken])
    assert version(connection) == taken
    migrate(connection, LATER)
    assert version(connection) == len(LATER)
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        migrate(fresh, LATER)
        assert schema(connection) == schema(fresh)


def test_the_steps_are_numbered() -> None:
    assert [step.__name__[:5] for step in MIGRATIONS] == [f"m{number:03}_" for number in range(1, len(MIGRATIONS) + 1)]


def test_a_step_that_fails_leaves_the_database_as_it_was(connection: sqlite3.Connection) -> None:
    def failing(connection: sqlite3.Connection) -> None:
        _m_color(connection)
        connection.execute("CREATE TABLE requests (a)")

    migrate(connection)
    before = schema(connection)
    with pytest.raises(sqlite3.OperationalError, match="already exists"):
        migrate(connection, (*MIGRATIONS, failing))
    assert (schema(connection), version(connection), connection.in_transaction) == (before, len(MIGRATIONS), False)


def test_a_database_of_the_future_is_refused(connection: sqlite3.Connection, tmp_path: Path) -> None:
    migrate(connection, LATER)
    with pytest.raises(LedgerUnavailable, match=r"a.sqlite3 is of a newer llamaserve: it has version 3, and .* 1$"):
        require_known(connection, tmp_path / "a.sqlite3")
