"""The file of the ledger: who may read it, what gets into it, and what is never done to it."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from usage_records import ids, made, stored

from llamaserve.errors import LedgerUnavailable
from llamaserve.usage import database
from llamaserve.usage.database import COLUMNS, LONGEST, Database
from llamaserve.usage.record import UsageRecord


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "usage.sqlite3"


def test_a_record_is_stored_field_by_field(path: Path) -> None:
    record = made(at=1.5, key="ann", audio_seconds=0.1, images=2, first_token=None, outcome="cancelled")
    with Database(path) as opened:
        assert opened.insert([record, made()]) == 0
    first, _ = stored(path, ", ".join(COLUMNS))
    assert UsageRecord(**dict(zip(COLUMNS, first, strict=True))) == record


def test_nobody_else_may_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        with Database(path) as opened:
            opened.insert([made()])
            modes = {each.name: each.stat().st_mode & 0o777 for each in (path.parent, *path.parent.iterdir())}
    finally:
        os.umask(before)
    files = ("usage.sqlite3", "usage.sqlite3-wal", "usage.sqlite3-shm")
    assert modes == {"state": 0o700, **dict.fromkeys(files, 0o600)}


def test_a_folder_that_is_there_stays_as_it_is(path: Path) -> None:
    path.parent.mkdir(mode=0o750)
    Database(path).close()
    assert path.parent.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    "bad",
    [made(audio_seconds=float("nan")), made(images=1 << 70), made(endpoint=None), made(outcome=["answered"])],
    ids=["no number", "too large", "missing", "another type"],
)
def test_a_record_that_can_not_be_stored_does_not_keep_others_from_being_so(
    path: Path, bad: UsageRecord, caplog: pytest.LogCaptureFixture
) -> None:
    with Database(path) as opened:
        many = [made(request_id=f"{number}") for number in range(200)]
        assert opened.insert([*many[:100], bad, *many[100:]]) == 1
    assert ids(path) == [f"{number}" for number in range(200)]
    assert [record.message.partition(":")[0] for record in caplog.records] == ["usage of a request can't be stored"]


@given(text=st.text(st.characters(exclude_categories=())))
def test_any_text_is_stored_cut_to_a_length(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "a.sqlite3"
    with Database(path) as opened:
        assert opened.insert([made(model=text), made(model=text * 300)]) == 0
    readable = text.encode("utf-8", "replace").decode()
    assert stored(path, "model") == [(readable[:LONGEST],), ((readable * 300)[:LONGEST],)]


def test_what_fails_half_way_is_not_there_at_all(path: Path) -> None:
    with Database(path) as opened:
        opened.insert([made(request_id="before")])
        opened._connection.execute("PRAGMA max_page_count = 20")
        many = [made(request_id=f"{number}", model="m" * LONGEST) for number in range(1000)]
        with pytest.raises(sqlite3.OperationalError, match="full"):
            opened.insert(many)
        opened.insert([made(request_id="after")])
    assert ids(path) == ["before", "after"]


def test_old_rows_are_deleted_in_batches(path: Path) -> None:
    with Database(path) as opened:
        opened.insert([made(request_id=f"{number}", at=float(number)) for number in reversed(range(1000))])
        assert [opened.delete_before(700.0, 300) for _ in range(4)] == [300, 300, 100, 0]
        assert opened.delete_before(701.0, 300) == 1
    assert sorted(map(int, ids(path))) == [*range(701, 1000)]


def test_a_database_of_the_future_is_not_touched(path: Path) -> None:
    Database(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LedgerUnavailable, match="newer"):
        Database(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database at all" * 300, b"SQLite format 3\0" + b"\xff" * 5000])
def test_a_damaged_file_is_not_touched(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(sqlite3.DatabaseError):
        Database(path)
    assert path.read_bytes() == content
    assert [*path.parent.iterdir()] == [path]


def test_an_open_file_that_was_deleted_or_replaced_is_noticed(path: Path) -> None:
    with Database(path) as opened:
        assert opened.in_place
        path.unlink()
        assert not opened.in_place
        with Database(path) as other:
            assert other.in_place
            assert not opened.in_place


def _open_and_write(path: Path, together: Barrier, process: int) -> None:
    together.wait()
    with Database(path) as opened:
        for number in range(20):
            opened.insert([made(request_id=f"{process} {number}")])


def test_many_processes_may_make_and_write_the_file_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_SECONDS", 20.0)
    context = multiprocessing.get_context("fork")
    for attempt in range(10):
        path, together = tmp_path / f"{attempt}" / "a.sqlite3", context.Barrier(4)
        started = [context.Process(target=_open_and_write, args=(path, together, each)) for each in range(4)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        assert [process.exitcode for process in started] == [0] * 4
        assert sorted(ids(path)) == sorted(f"{process} {number}" for process in range(4) for number in range(20))
