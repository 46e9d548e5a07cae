"""Periods as people and programs write them: dates, date-times and Unix seconds. Knows nothing of the ledger."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, timedelta
from typing import Final

_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DATE_TIME: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|[+-][0-9]{2}:[0-9]{2})?"
)
_SECONDS: Final = re.compile(r"[0-9]{1,15}(\.[0-9]{1,9})?")
_DIGITS_OF_A_DATE: Final = 8
_FIRST_YEAR, _LAST_YEAR = 1970, 2999
_DAY: Final = timedelta(days=1)


def parse_period(start: str | None, end: str | None) -> tuple[float | None, float | None]:
    """Return when a period begins and when it is over, in Unix seconds; None: not limited. A date means all of its day,
    so a period from a date to the same date is a day long.

    Raises:
        ValueError: a text is none of these, or the period ends before it begins; the message says which and why.
    """
    begins = None if start is None else parse_moment(start)
    ends = None if end is None else parse_moment(end, end=True)
    if begins is not None and ends is not None and (ends < begins or (ends == begins and start != end)):
        raise ValueError(f"the period ends ({end}) before it begins ({start})")
    return begins, ends


def parse_moment(text: str, *, end: bool = False) -> float:
    """Return the Unix seconds that a text means: a date (the beginning of this day of UTC, or the ``end`` of it), a
    date-time of ISO 8601 (of UTC unless it has an offset), or Unix seconds.

    Raises:
        ValueError: the text is nothing of the kind, or of another time than people can mean.
    """
    written = text.strip()
    try:
        if _DATE.fullmatch(written):
            day = datetime.combine(date.fromisoformat(written), datetime.min.time(), UTC)
            return (_sensible(day) + (_DAY if end else timedelta())).timestamp()
        if _DATE_TIME.fullmatch(written):
            moment = datetime.fromisoformat(written)
            return _sensible(moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        if _SECONDS.fullmatch(written) and len(written) != _DIGITS_OF_A_DATE:
            return _sensible_seconds(float(written))
    except ValueError as error:
        raise ValueError(f"{_shown(text)} is no moment: {error}") from None
    raise ValueError(
        f"{_shown(text)} should be a date such as 2026-01-31, a date-time such as 2026-01-31T12:00:00Z, or Unix seconds"
    )


def _sensible(moment: datetime) -> datetime:
    if not _FIRST_YEAR <= moment.year <= _LAST_YEAR:
        raise ValueError(f"the year should be from {_FIRST_YEAR} to {_LAST_YEAR}")
    return moment


def _sensible_seconds(seconds: float) -> float:
    if seconds >= datetime(_LAST_YEAR + 1, 1, 1, tzinfo=UTC).timestamp():
        raise ValueError(f"that is after the year {_LAST_YEAR}; are these milliseconds?")
    return seconds


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
