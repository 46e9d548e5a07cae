"""The ledger: what is recorded is there whatever happens to the process, and requests never wait for a bad disk."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from usage_records import ids, made, until

from llamaserve.usage import backlog, database, ledger as ledger_module
from llamaserve.usage.database import Database
from llamaserve.usage.ledger import Ledger
from llamaserve.usage.record import UsageRecord
from llamaserve.usage.retention import DAY, SETTLING
from llamaserve.usage.totals import totals

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "usage.sqlite3"


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what is waited for, so that tests are quick."""
    monkeypatch.setattr(ledger_module, "_RETRY", 0.02)
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.05)


def numbered(count: int, prefix: str = "") -> list[UsageRecord]:
    return [made(request_id=f"{prefix}{number}") for number in range(count)]


def test_a_record_is_there_when_recording_returns(path: Path) -> None:
    async def run() -> None:
        async with Ledger(path, None) as ledger:
            for number in range(20):
                await ledger.record(made(request_id=f"{number}"))
                assert ids(path)[-1] == f"{number}"
            assert (ledger.pending, ledger.lost, ledger.problem) == (0, 0, None)

    asyncio.run(run())


def test_many_that_record_at_the_same_time_are_written_together_each_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    insert = Database.insert

    def counted(opened: Database, records: Sequence[UsageRecord]) -> int:
        batches.append(len(records))
        return insert(opened, records)

    monkeypatch.setattr(Database, "insert", counted)

    async def client(ledger: Ledger, name: int) -> None:
        for record in numbered(20, f"{name} "):
            await ledger.record(record)

    async def run() -> None:
        async with Ledger(path, 400) as ledger:
            await asyncio.gather(*(client(ledger, name) for name in range(100)))
            assert sorted(ids(path)) == sorted(
                record.request_id for n in range(100) for record in numbered(20, f"{n} ")
            )

    asyncio.run(run())
    assert len(batches) < 1000
    assert max(batches) > 10


def test_a_request_id_may_be_used_again(path: Path) -> None:
    async def run() -> None:
        async with Ledger(path, None) as ledger:
            await asyncio.gather(*(ledger.record(made(request_id="mine")) for _ in range(3)))

    asyncio.run(run())
    assert totals(path)[0].requests == 3


def test_a_record_whose_request_was_cancelled_meanwhile_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stuck(monkeypatch) as disk:

        async def run() -> None:
            async with Ledger(path, None) as ledger:
                recording = asyncio.create_task(ledger.record(made()))
                await until(disk.busy.is_set)
                recording.cancel()
                await asyncio.wait([recording])
                assert recording.cancelled()
                disk.go_on.set()
                await ledger.record(made(request_id="next"))

        asyncio.run(run())
    assert ids(path) == ["req_1", "next"]


_KILLED = """
import asyncio, sys
from pathlib import Path
from usage_records import made
from llamaserve.usage.ledger import Ledger

async def client(ledger, name):
    number = 0
    while True:
        number += 1
        await ledger.record(made(request_id=f"{name} {number}"))
        sys.stdout.write(f"{name} {number}\\n")
        sys.stdout.flush()

async def main():
    async with Ledger(Path(sys.argv[1]), 400) as ledger:
        await asyncio.gather(*(client(ledger, name) for name in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("lines", [1, 100, 3000])
def test_what_was_recorded_outlives_a_process_that_is_killed(path: Path, lines: int) -> None:
    process = script(_KILLED, path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        told = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        told += [line for line in process.stdout if line.endswith("\n")]
    assert process.returncode == -signal.SIGKILL
    there = ids(path)
    assert {line.rstrip() for line in told} <= set(there)
    assert len(set(there)) == len(there)
    assert totals(path)[0].requests == len(there)


def script(text: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), *filter(None, sys.path)))}
    command = [sys.executable, "-W", "error", "-c", text, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **options)


_FULL = """
import asyncio, resource, sys
from pathlib import Path
from usage_records import ids, made, until
from llamaserve.usage import ledger as ledger_module
from llamaserve.usage.ledger import Ledger

ledger_module._RETRY = 0.02
path = Path(sys.argv[1])

async def main():
    async with Ledger(path, 400) as ledger:
        await ledger.record(made(request_id="before"))
        most = path.with_name(path.name + "-wal").stat().st_size + 4096
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        number = 0
        while ledger.problem is None:
            number += 1
            await ledger.record(made(request_id=f"{number}", model="m" * 200))
        print(ledger.problem)
        await asyncio.gather(*(ledger.record(made(request_id=f"later {each}")) for each in range(50)))
        assert ledger.pending > 50, ledger.pending
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        await until(lambda: ledger.problem is None and ledger.pending == 0)
        await ledger.record(made(request_id="after"))
        meanwhile = [*(f"{each + 1}" for each in range(number)), *(f"later {each}" for each in range(50))]
        expected = ["before", *meanwhile, "after"]
        assert ids(path) == expected, ids(path)
        assert ledger.lost == 0

asyncio.run(main())
"""


def test_a_full_disk_holds_up_no_request_and_loses_nothing(path: Path) -> None:
    process = script(_FULL, path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.startswith(f"{path} can't be written: ")
    assert re.search("disk I/O error|is full", output)


class Disk:
    """A disk that does not answer once it is written to."""

    def __init__(self) -> None:
        self.ready = threading.Event()  # the file is open, and nothing is wrong so far
        self.busy = threading.Event()
        self.go_on = threading.Event()


@contextmanager
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Have a disk not answer when records are to be written, until it may go on."""
    disk, insert, go_on = Disk(), Database.insert, backlog.Backlog.go_on

    def tell(waiting: backlog.Backlog[Any]) -> None:
        go_on(waiting)
        disk.ready.set()

    def hang(opened: Database, records: Sequence[UsageRecord]) -> int:
        disk.busy.set()
        disk.go_on.wait()
        return insert(opened, records)

    monkeypatch.setattr(Database, "insert", hang)
    monkeypatch.setattr(backlog.Backlog, "go_on", tell)
    try:
        yield disk
    finally:
        disk.go_on.set()


def test_nobody_waits_long_for_a_disk_that_does_not_answer(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "_PATIENCE", 0.05)
    caplog.set_level(logging.INFO)

    async def run() -> None:
        with stuck(monkeypatch) as disk:
            async with Ledger(path, None) as ledger:
                await until(disk.ready.is_set)
                await asyncio.gather(*map(ledger.record, numbered(5)))
                assert ledger.problem == f"{path} has not answered for 0.05 seconds"
                monkeypatch.setattr(ledger_module, "_PATIENCE", 1e6)
                await asyncio.gather(*map(ledger.record, numbered(5, "more ")))
                assert ledger.pending == 10
                disk.go_on.set()
                await until(lambda: ledger.problem is None and not ledger.pending)

    asyncio.run(run())
    assert ids(path) == [record.request_id for record in (*numbered(5), *numbered(5, "more "))]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]


def test_a_disk_that_never_answers_does_not_keep_a_server_from_ending(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "_PATIENCE", 0.02)
    monkeypatch.setattr(ledger_module, "_CLOSE_LIMIT", 0.05)

    async def run(disk: Disk) -> None:
        async with Ledger(path, None) as ledger:
            await until(disk.ready.is_set)
            await ledger.record(made())
        assert (ledger.pending, ledger.lost) == (0, 1)

    with stuck(monkeypatch) as disk:
        asyncio.run(run(disk))
    assert caplog.records[-1].message == f"usage of 1 requests is lost: {path} has not answered for 0.02 seconds"
    (thread,) = (each for each in threading.enumerate() if each.name == "usage ledger")
    thread.join(20)
    assert not thread.is_alive()


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Have a file where the folder should be."""
    path.parent.touch()
    yield
    path.parent.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    Database(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Have a file that is no database, and do what the problem says in the end."""
    path.parent.mkdir()
    path.write_bytes(b"no database at all" * 300)
    yield
    assert path.read_bytes() == b"no database at all" * 300
    subprocess.run(["bash", "-c", f"mkdir -p {path.parent}/damaged && mv {path} {path.parent}/damaged"], check=True)


def set_version(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {version}")


@contextmanager
def of_the_future(path: Path) -> Iterator[None]:
    Database(path).close()
    set_version(path, 99)
    before = path.read_bytes()
    yield
    assert path.read_bytes() == before
    set_version(path, 1)


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (unwritable, "{path} can't be written: File exists; try: ls -la {folder}"),
        (locked, "{path} can't be written: database is locked; try: ls -la {folder}"),
        (
            damaged,
            (
                "{path} can't be written: it is damaged (file is not a database); "
                "try: mkdir -p {folder}/damaged && mv {path} {folder}/damaged"
            ),
        ),
        (of_the_future, "{path} is of a newer llamaserve: it has version 99, and this program knows none after 1"),
    ],
)
def test_while_the_file_can_not_be_written_records_wait_in_memory_and_requests_do_not(
    trouble: Callable[[Path], Any], told: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    problem = told.format(path=path, folder=path.parent)

    async def run() -> None:
        with ExitStack() as troubles:
            troubles.enter_context(trouble(path))
            async with Ledger(path, 400) as ledger:
                await ledger.record(made(request_id="first"))
                assert ledger.problem == problem
                await asyncio.gather(*map(ledger.record, numbered(2500)))
                assert ledger.pending == 2501
                troubles.close()
                await until(lambda: ledger.problem is None and not ledger.pending)
                await ledger.record(made(request_id="last"))
                assert ids(path) == ["first", *(f"{number}" for number in range(2500)), "last"]
                assert ledger.lost == 0

    asyncio.run(run())
    assert [(record.levelname, record.message.partition(":")[0]) for record in caplog.records] == [
        ("ERROR", "usage is not recorded, but kept in memory, for the time being"),
        ("INFO", "usage is recorded again; requests of which it was lost since the start"),
    ]


def test_what_waits_is_written_when_the_ledger_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "_RETRY", 1e6)

    async def run() -> Ledger:
        with unwritable(path):
            ledger = Ledger(path, None)
            await ledger.start()
            await asyncio.gather(*map(ledger.record, numbered(3000)))
            assert ledger.pending == 3000
        await ledger.aclose()
        return ledger

    ledger = asyncio.run(run())
    assert len(ids(path)) == 3000
    assert (ledger.pending, ledger.lost, ledger.problem) == (0, 0, None)


def test_what_can_not_be_written_at_the_end_is_lost_and_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with unwritable(path):
            async with Ledger(path, None) as ledger:
                await asyncio.gather(*map(ledger.record, numbered(3)))
            assert (ledger.pending, ledger.lost) == (0, 3)
            await ledger.record(made(request_id="late"))
            await ledger.aclose()
            assert (ledger.pending, ledger.lost) == (0, 4)

    asyncio.run(run())
    last = [record.message for record in caplog.records][-2:]
    assert last[0].startswith(f"usage of 3 requests is lost: {path} can't be written: File exists")
    assert last[1] == "usage of the request late is lost: the ledger is closed"


def test_memory_has_a_bound(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "Backlog", lambda: backlog.Backlog[Any](100))

    async def run() -> None:
        with ExitStack() as trouble:
            trouble.enter_context(unwritable(path))
            async with Ledger(path, None) as ledger:
                for record in numbered(250):
                    await ledger.record(record)
                assert (ledger.pending, ledger.lost) == (100, 150)
                trouble.close()
                await until(lambda: ledger.problem is None and not ledger.pending)

    asyncio.run(run())
    assert ids(path) == [f"{number}" for number in range(150, 250)]


def test_a_file_that_is_deleted_is_begun_anew(path: Path) -> None:
    async def run() -> None:
        async with Ledger(path, None) as ledger:
            await ledger.record(made(request_id="deleted"))
            for each in path.parent.iterdir():
                each.unlink()
            path.parent.rmdir()
            await ledger.record(made(request_id="kept"))
            assert ids(path) == ["kept"]

    asyncio.run(run())


def test_two_ledgers_share_a_file(path: Path) -> None:
    async def run() -> None:
        async with Ledger(path, 400) as one, Ledger(path, 400) as other:
            await asyncio.gather(
                *(one.record(record) for record in numbered(300, "one ")),
                *(other.record(record) for record in numbered(300, "other ")),
            )
            await until(lambda: not one.pending and not other.pending)
            assert (one.lost, other.lost) == (0, 0)

    asyncio.run(run())
    expected = [record.request_id for name in ("one ", "other ") for record in numbered(300, name)]
    assert sorted(ids(path)) == sorted(expected)


def test_an_error_that_nobody_foresaw_is_told_and_does_not_end_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    insert, failures = Database.insert, [MemoryError("no room"), KeyError("what")]

    def fail_at_first(opened: Database, records: Sequence[UsageRecord]) -> int:
        if failures:
            raise failures.pop()
        return insert(opened, records)

    monkeypatch.setattr(Database, "insert", fail_at_first)
    monkeypatch.setattr(ledger_module, "_RETRY", 0.05)

    async def run() -> None:
        async with Ledger(path, None) as ledger:
            await ledger.record(made(request_id="kept"))
            assert "KeyError('what')" in str(ledger.problem)
            await until(lambda: ledger.problem is None)
            assert ledger.lost == 0

    asyncio.run(run())
    assert ids(path) == ["kept"]
    assert "Traceback" in caplog.text


def test_old_rows_are_deleted_after_the_start_and_records_come_between(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_800_000_000.0
    with Database(path) as opened:
        opened.insert(
            [made(request_id="old", at=now - 11 * DAY)] * 1200 + [made(request_id="new", at=now - 9 * DAY)] * 5
        )
    events: list[str] = []
    delete, insert = Database.delete_before, Database.insert

    async def run() -> None:
        loop, waited = asyncio.get_running_loop(), [0.0]
        ledger = Ledger(path, 10, wall=lambda: now, monotonic=lambda: time.monotonic() + waited[0])
        waited[0] = SETTLING

        def delete_and_record(opened: Database, moment: float, most: int) -> int:
            deleted = delete(opened, moment, most)
            events.append(f"deleted {deleted}")
            if len(events) == 1:
                recording = asyncio.run_coroutine_threadsafe(ledger.record(made(request_id="between", at=now)), loop)
                recording.add_done_callback(lambda _: events.append("recorded"))
                while not ledger.pending:
                    threading.Event().wait(0.001)
            return deleted

        def insert_and_tell(opened: Database, records: Sequence[UsageRecord]) -> int:
            events.append("inserted")
            return insert(opened, records)

        monkeypatch.setattr(Database, "delete_before", delete_and_record)
        monkeypatch.setattr(Database, "insert", insert_and_tell)
        async with ledger:
            await until(lambda: "deleted 200" in events)

    asyncio.run(run())
    assert [event for event in events if event != "recorded"] == [
        "deleted 500",
        "inserted",
        "deleted 500",
        "deleted 200",
    ]
    assert events.index("recorded") < len(events) - 1
    assert ids(path) == ["new"] * 5 + ["between"]


def test_a_wall_clock_that_jumps_deletes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wall, monotonic, looked = [1_800_000_000.0], [0.0], list[float]()
    delete = Database.delete_before

    def delete_and_tell(opened: Database, moment: float, most: int) -> int:
        looked.append(moment)
        return delete(opened, moment, most)

    monkeypatch.setattr(Database, "delete_before", delete_and_tell)

    async def run() -> None:
        async with Ledger(path, 10, wall=lambda: wall[0], monotonic=lambda: monotonic[0]) as ledger:
            await ledger.record(made(at=wall[0]))
            assert not looked
            monotonic[0] += SETTLING
            await ledger.record(made(at=wall[0]))
            await until(lambda: len(looked) == 1)
            wall[0] += 5000 * DAY
            await ledger.record(made(at=wall[0]))
            assert len(looked) == 1
            monotonic[0] += DAY
            await ledger.record(made(at=wall[0]))
            await until(lambda: len(looked) == 2)

    asyncio.run(run())
    assert looked == [1_800_000_000.0 - 10 * DAY, 1_800_000_000.0 + SETTLING - 9 * DAY]
    assert len(ids(path)) == 4


def test_without_retention_nothing_is_deleted(path: Path) -> None:
    async def run() -> None:
        async with Ledger(path, None) as ledger:
            await ledger.record(made(at=0.0))
            await ledger.record(made(at=1.0))

    asyncio.run(run())
    assert len(ids(path)) == 2


def test_a_ledger_that_nothing_is_written_to_ends_at_once(path: Path) -> None:
    async def run() -> None:
        async with Ledger(path, 400) as ledger:
            await until(path.exists)
            assert ledger.pending == 0

    asyncio.run(run())
    assert not [each for each in threading.enumerate() if each.name == "usage ledger"]


def test_a_problem_is_known_from_the_start_and_over_without_a_request(path: Path) -> None:
    async def run() -> None:
        with ExitStack() as trouble:
            trouble.enter_context(unwritable(path))
            async with Ledger(path, None) as ledger:
                await until(lambda: ledger.problem is not None)
                trouble.close()
                await until(lambda: ledger.problem is None)

    asyncio.run(run())
    assert ids(path) == []


def test_a_newer_server_that_comes_meanwhile_is_noticed(path: Path) -> None:
    async def run() -> None:
        async with Ledger(path, None) as ledger:
            await ledger.record(made(request_id="before"))
            set_version(path, 99)
            await ledger.record(made(request_id="meanwhile"))
            assert ledger.problem is not None
            assert "is of a newer llamaserve" in ledger.problem
            assert ids(path) == ["before"]
            set_version(path, 1)
            await until(lambda: ledger.problem is None and not ledger.pending)

    asyncio.run(run())
    assert ids(path) == ["before", "meanwhile"]
