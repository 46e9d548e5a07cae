"""Totals: what a ledger adds up to, beside a server that writes it."""

from __future__ import annotations

import math
import os
import sqlite3
from contextlib import closing
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies as st
from usage_records import made

from llamaserve.errors import LedgerUnavailable
from llamaserve.usage.database import Database
from llamaserve.usage.record import UsageRecord
from llamaserve.usage.totals import ALL, GROUPS, NUMBERS, OUTCOMES, Group, Total, day_of, first_and_last, totals

DAY = 86400
NAMES = st.sampled_from([None, "ann", "a'; DROP TABLE requests; --", "", "Ann"])
# Moments around midnights, at which SQLite's own dates are rounded to the wrong day.
MIDNIGHTS = st.integers(20_000, 20_003).map(lambda day: float(day * DAY))
MOMENTS = st.one_of(MIDNIGHTS, MIDNIGHTS.map(lambda at: math.nextafter(at, 0)), st.floats(20_000 * DAY, 20_003 * DAY))
RECORDS = st.builds(
    made,
    at=MOMENTS,
    key=NAMES,
    model=NAMES,
    endpoint=st.sampled_from(["/v1/embeddings", "/v1/completions"]),
    prompt_tokens=st.integers(0, 10**9),
    cached_tokens=st.integers(0, 100),
    completion_tokens=st.integers(0, 10**6),
    audio_seconds=st.integers(0, 1000).map(lambda number: number / 8),
    images=st.integers(0, 4),
    outcome=st.sampled_from(OUTCOMES),
)


def written(path: Path, *records: UsageRecord) -> Path:
    with Database(path) as database:
        database.insert(records)
    return path


def value(record: UsageRecord, group: Group) -> str | None:
    if group == "day":
        return (date(1970, 1, 1) + timedelta(days=int(record.at // DAY))).isoformat()
    found: str | None = getattr(record, group)
    return found


def number(record: UsageRecord, name: str) -> float:
    match name:
        case "requests":
            return 1
        case "total_tokens":
            return record.prompt_tokens + record.completion_tokens
    found: float = getattr(record, name)
    return found


def summed(records: list[UsageRecord], groups: list[Group]) -> dict[tuple[str | None, ...], list[float]]:
    """Return the numbers of each group, added up one by one."""
    sums: dict[tuple[str | None, ...], list[float]] = {}
    for record in records:
        row = sums.setdefault(tuple(value(record, group) for group in groups), [0] * len(NUMBERS))
        row[:] = [before + number(record, name) for before, name in zip(row, NUMBERS, strict=True)]
    return sums


@settings(max_examples=60)
@given(
    records=st.lists(RECORDS, max_size=25),
    groups=st.lists(st.sampled_from(GROUPS), unique=True),
    key=st.one_of(st.just(ALL), NAMES),
    outcomes=st.one_of(st.none(), st.lists(st.sampled_from(OUTCOMES), unique=True)),
    start=st.one_of(st.none(), MOMENTS),
    end=st.one_of(st.none(), MOMENTS),
)
def test_the_totals_are_the_sums_of_the_records(
    records: list[UsageRecord],
    groups: list[Group],
    key: Any,
    outcomes: Any,
    start: float | None,
    end: float | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = written(tmp_path_factory.mktemp("totals") / "a.sqlite3", *records)
    found = totals(path, start=start, end=end, group_by=groups, key=key, outcomes=outcomes)
    counted = OUTCOMES if outcomes is None and "outcome" in groups else ("answered",) if outcomes is None else outcomes
    chosen = [
        each
        for each in records
        if (start is None or each.at >= start)
        and (end is None or each.at < end)
        and (key is ALL or each.key == key)
        and each.outcome in counted
    ]
    expected = summed(chosen, groups) or ({} if groups else {(): [0] * len(NUMBERS)})
    rows = [
        (tuple(getattr(each, group) for group in groups), [getattr(each, name) for name in NUMBERS]) for each in found
    ]
    assert dict(rows) == expected
    assert len(rows) == len(expected)
    orders = [[(name is not None, name or "") for name in names] for names, _ in rows]
    assert orders == sorted(orders)
    for each in found:
        assert {group for group in GROUPS if getattr(each, group) is not msgspec.UNSET} == set(groups)


def test_only_what_was_answered_counts_unless_others_are_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.sqlite3", *(made(outcome=outcome, prompt_tokens=10) for outcome in OUTCOMES))
    assert [each.prompt_tokens for each in totals(path)] == [10]
    assert [each.outcome for each in totals(path, group_by=["outcome"])] == sorted(OUTCOMES)
    assert [each.prompt_tokens for each in totals(path, outcomes=["failed", "cancelled"])] == [20]
    assert totals(path, outcomes=[]) == [Total()]


def test_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a.sqlite3"
    assert totals(path) == [Total()]
    assert totals(path, group_by=["day"]) == []
    assert first_and_last(path) is None
    assert not path.parent.exists()


def test_a_file_in_which_nothing_is_yet_is_like_none(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    path.touch()
    assert totals(path) == [Total()]
    written(path)
    assert totals(path, group_by=["model"]) == []
    assert first_and_last(path) is None


@pytest.mark.parametrize("name", ["a b", "a?mode=rwc", "a#b", "100%41", "näme", "';--", "a&b=c"])
def test_it_is_read_whatever_its_name_is(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name / f"{name}.sqlite3", made(at=5.0), made(at=7.5))
    assert totals(path)[0].requests == 2
    assert first_and_last(path) == (5.0, 7.5)


def test_a_name_that_is_no_utf_8_is_read(tmp_path: Path) -> None:
    path = written(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.sqlite3")), made())
    assert totals(path)[0].requests == 1


def test_reading_goes_on_beside_a_server_that_writes_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite3"
    with Database(path) as database, closing(sqlite3.connect(path, isolation_level=None)) as other:
        database.insert([made()])
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM requests")
        before = {each.name: each.read_bytes() for each in tmp_path.iterdir() if not each.name.endswith("-shm")}
        assert totals(path)[0].requests == 1
        assert {each.name: each.read_bytes() for each in tmp_path.iterdir() if each.name in before} == before
        other.execute("ROLLBACK")


def test_a_file_that_can_not_be_read_is_an_error_with_the_next_command(tmp_path: Path) -> None:
    damaged = tmp_path / "usage.sqlite3"
    damaged.write_bytes(b"no database at all" * 300)
    with pytest.raises(LedgerUnavailable, match="is damaged") as raised:
        totals(damaged)
    assert raised.value.hint == f"mkdir -p {tmp_path}/damaged && mv {damaged} {tmp_path}/damaged"
    (tmp_path / "file").touch()
    with pytest.raises(LedgerUnavailable, match="Not a directory"):
        totals(tmp_path / "file" / "usage.sqlite3")
    with pytest.raises(LedgerUnavailable, match="can't be read"):
        totals(tmp_path)


def test_a_file_of_the_future_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "a.sqlite3", made())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerUnavailable, match="newer"):
        totals(path)


def test_names_that_there_are_not_are_refused(tmp_path: Path) -> None:
    unknown: Any = "answered; DROP TABLE requests"
    with pytest.raises(ValueError, match="is none of day, model, key, endpoint, outcome"):
        totals(tmp_path / "a", group_by=[unknown])
    with pytest.raises(ValueError, match="is none of answered, refused, cancelled, failed"):
        totals(tmp_path / "a", outcomes=[unknown])


def test_days_are_those_of_utc(tmp_path: Path) -> None:
    midnights = [float(day * DAY) for day in range(20_000, 20_010)]
    moments = [moment for midnight in midnights for moment in (math.nextafter(midnight, 0), midnight)]
    path = written(tmp_path / "a.sqlite3", *(made(at=moment) for moment in moments))
    found = totals(path, group_by=["day"])
    assert [each.requests for each in found] == [1, *[2] * 9, 1]
    assert found[-1].day == (date(1970, 1, 1) + timedelta(days=20_009)).isoformat()
    assert day_of(1_767_225_600.0) == "2026-01-01"
    assert day_of(math.nextafter(1_767_225_600.0, 0)) == "2025-12-31"


def test_a_total_is_json_with_its_groups_only(tmp_path: Path) -> None:
    path = written(tmp_path / "a.sqlite3", made())
    (total,) = totals(path, group_by=["key", "day"])
    assert msgspec.to_builtins(total) == {
        "day": "2026-01-01",
        "key": None,
        "requests": 1,
        "prompt_tokens": 20,
        "cached_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 27,
        "audio_seconds": 0.0,
        "images": 0,
    }
