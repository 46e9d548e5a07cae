"""Periods as they are written."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, strategies as st

from llamaserve.usage.period import parse_moment, parse_period

NEW_YEAR = 1_767_225_600.0  # 2026-01-01 in UTC
HOUR, DAY = 3600, 86400


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-01", NEW_YEAR),
        (" 2026-01-01 ", NEW_YEAR),
        ("2026-01-01T00:00:00Z", NEW_YEAR),
        ("2026-01-01 00:00", NEW_YEAR),
        ("2026-01-01T00:00:00.250", NEW_YEAR + 0.25),
        ("2026-01-01T00:00:00+02:00", NEW_YEAR - 2 * HOUR),
        ("2025-12-31T23:30-00:30", NEW_YEAR),
        ("1767225600", NEW_YEAR),
        ("1767225600.5", NEW_YEAR + 0.5),
        ("0", 0),
    ],
)
def test_dates_date_times_and_seconds_are_read(text: str, moment: float) -> None:
    assert parse_moment(text) == moment


def test_a_date_means_all_of_its_day() -> None:
    assert parse_period("2026-01-01", "2026-01-01") == (NEW_YEAR, NEW_YEAR + DAY)
    assert parse_period(None, "2999-12-31")[1] == datetime(3000, 1, 1, tzinfo=UTC).timestamp()
    assert parse_period("2026-01-01T12:00Z", "2026-01-01T12:00Z") == (NEW_YEAR + DAY / 2, NEW_YEAR + DAY / 2)
    assert parse_period(None, None) == (None, None)


@pytest.mark.parametrize(
    "text",
    [
        *("", "yesterday", "nan", "NaN", "inf", "-1", "1e9", "0x10", "1_000_000_000", "12.", "26-01-01", "2026-1-1"),
        *(
            "20260101",
            "20260101T000000",
            "2026-W01",
            "2026-W01-1",
            "2026-001",
            "2026-01",
            "2026-01-01T",
            "2026-01-01T1",
        ),
        *("2026-01-01T00:00:00+2", "2026-01-01T00:00:00 02:00", "2026-01-01TT00:00", "2026-01-01T00:00:00+02:00Z"),
        *(
            "\u0662\u0660\u0662\u0666-\u0660\u0661-\u0660\u0661",
            "\u0661\u0667\u0666\u0667\u0662\u0662\u0665\u0666",
            "2026-01-01\x00",
            "9" * 400,
            "2026-01-01; DROP TABLE requests",
        ),
    ],
)
def test_anything_else_is_refused_with_what_it_should_be(text: str) -> None:
    with pytest.raises(ValueError, match="should be a date such as 2026-01-31"):
        parse_moment(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2026-02-30", "day"),
        ("2026-13-01", "month must be in 1..12"),
        ("2026-01-01T24:30Z", "hour"),
        ("2026-01-01T00:00+25:00", "'2026-01-01T00:00+25:00' is no moment"),
        ("0000-01-01", "year"),
        ("0001-01-01", "the year should be from 1970 to 2999"),
        ("1969-12-31", "the year should be from 1970 to 2999"),
        ("9999-12-31", "the year should be from 1970 to 2999"),
        ("0001-01-01T00:00+14:00", "the year should be from 1970 to 2999"),
        ("1767225600000", "are these milliseconds?"),
    ],
)
def test_days_that_there_are_not_and_absurd_years_are_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("+", r"\+")):
        parse_moment(text, end=True)


def test_a_period_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ends \(2026-01-01\) before it begins \(2026-01-03\)"):
        parse_period("2026-01-03", "2026-01-01")


@given(st.datetimes(datetime(1970, 1, 2), datetime(2999, 12, 30), timezones=st.just(UTC)), st.integers(-840, 840))
def test_every_moment_is_read_as_it_is_written(moment: datetime, minutes: int) -> None:
    assert parse_moment(moment.isoformat()) == moment.timestamp()
    assert parse_moment(moment.isoformat(" ")) == moment.timestamp()
    assert parse_moment(moment.replace(tzinfo=None).isoformat()) == moment.timestamp()
    sign, (hours, rest) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
    there = (moment + timedelta(minutes=minutes)).replace(tzinfo=None)
    assert parse_moment(f"{there.isoformat()}{sign}{hours:02}:{rest:02}") == moment.timestamp()
    day = parse_period(moment.date().isoformat(), moment.date().isoformat())
    assert day[0] is not None
    assert day[1] is not None
    assert day[0] <= moment.timestamp() < day[1] == day[0] + DAY


@given(st.text())
def test_any_text_is_a_moment_or_refused(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert 0 <= parse_moment(text) < 1e11
