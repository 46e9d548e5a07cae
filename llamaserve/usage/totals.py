"""What the ledger adds up to: requests and what they used, of a period, in groups.

Reads the file beside a server that writes it, and changes nothing in it. A call takes as long as it takes to read the
rows of the period, so it is nothing for the thread of an event loop. This module knows nothing of dates as people
write them.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, get_args
from urllib.parse import quote

import msgspec

from llamaserve.errors import LedgerUnavailable
from llamaserve.usage.damage import remedy, what_is_wrong
from llamaserve.usage.migrations import require_known, version
from llamaserve.usage.record import Outcome

Group = Literal["day", "model", "key", "endpoint", "outcome"]
GROUPS: Final[tuple[Group, ...]] = get_args(Group)
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
DAY: Final = 86400
_BUSY_SECONDS: Final = 5.0  # that a server may take to set the file up


class AllKeys(enum.Enum):
    """The type of ``ALL``."""

    ALL = enum.auto()


ALL: Final = AllKeys.ALL  # requests with whatever key, or none; None means those with none

# Days are counted: SQLite's own dates are rounded to milliseconds, and so up to the next day.
_EXPRESSIONS: Final[dict[Group, str]] = {
    "day": f"CAST(at AS INTEGER) / {DAY}",
    "model": "model",
    "key": "key",
    "endpoint": "endpoint",
    "outcome": "outcome",
}
_SUMS: Final = (
    "COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(cached_tokens), 0), COALESCE(SUM(completion_tokens), 0), "
    "COALESCE(SUM(prompt_tokens + completion_tokens), 0), COALESCE(SUM(audio_seconds), 0.0), COALESCE(SUM(images), 0)"
)


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of one group used. Of the first five fields those are set that requests are grouped by: ``day``
    is a date of UTC such as 2026-01-31; where ``model`` or ``key`` is None, there was none. ``cached_tokens`` are a
    part of ``prompt_tokens``.
    """

    day: str | msgspec.UnsetType = msgspec.UNSET
    model: str | msgspec.UnsetType | None = msgspec.UNSET
    key: str | msgspec.UnsetType | None = msgspec.UNSET
    endpoint: str | msgspec.UnsetType = msgspec.UNSET
    outcome: Outcome | msgspec.UnsetType = msgspec.UNSET
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    audio_seconds: float = 0.0
    images: int = 0


NUMBERS: Final = tuple(name for name in Total.__struct_fields__ if name not in GROUPS)


def totals(
    path: Path,
    *,
    start: float | None = None,
    end: float | None = None,
    group_by: Sequence[Group] = (),
    key: str | AllKeys | None = ALL,
    outcomes: Collection[Outcome] | None = None,
) -> list[Total]:
    """Return what requests used that came from ``start`` on and before ``end`` (Unix seconds), in the order of what
    they are grouped by; without groups one total, of zeros if there was nothing. Without a file there is nothing.

    Only answered requests count, so that the sum is that of the ``usage`` that clients were sent; ``outcomes`` chooses
    others, and all count where they are grouped by outcome. ``key`` chooses those with the key of this name.

    Raises:
        LedgerUnavailable: the file can't be read, is damaged, or is of a newer program.
        ValueError: a group or an outcome that there isn't.
    """
    if outcomes is None:
        outcomes = OUTCOMES if "outcome" in group_by else ("answered",)
    _require_known_names(group_by, GROUPS)
    _require_known_names(outcomes, OUTCOMES)
    grouped = tuple(dict.fromkeys(group_by))
    where, values = _condition(start, end, key, outcomes)
    groups = ", ".join(_EXPRESSIONS[group] for group in grouped)
    query = f"SELECT {groups + ', ' if groups else ''}{_SUMS} FROM requests WHERE {where}"  # noqa: S608 - a closed set
    query += f" GROUP BY {groups} ORDER BY {groups}" if groups else ""
    rows = _read(path, query, values)
    if not rows and not grouped:
        return [Total()]
    return [_total(grouped, row) for row in rows]


def answered(found: Iterable[Total]) -> list[Total]:
    """Return those totals of answered requests, of some that are grouped by the outcome beside others."""
    return [msgspec.structs.replace(total, outcome=msgspec.UNSET) for total in found if total.outcome == "answered"]


def by_outcome(found: Sequence[Total]) -> list[Total]:
    """Return the sums of totals that are grouped by the outcome beside others, for each outcome that there is."""
    outcomes = [outcome for outcome in sorted(OUTCOMES) if any(total.outcome == outcome for total in found)]
    return [
        msgspec.structs.replace(added(total for total in found if total.outcome == outcome), outcome=outcome)
        for outcome in outcomes
    ]


def added(found: Iterable[Total]) -> Total:
    """Return the sum of some totals, without what they were grouped by."""
    each = list(found)
    return Total(**{name: sum(getattr(total, name) for total in each) for name in NUMBERS})


def first_and_last(path: Path) -> tuple[float, float] | None:
    """Return when the first and the last request came that the ledger knows; None where it knows none. Raises as
    ``totals`` does.
    """
    rows = _read(path, "SELECT MIN(at), MAX(at) FROM requests", ())
    return rows[0] if rows and rows[0][0] is not None else None


def day_of(moment: float) -> str:
    """Return the date of a moment, in UTC."""
    return datetime.fromtimestamp(int(moment), UTC).date().isoformat()


def _require_known_names(names: Collection[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")


def _condition(
    start: float | None, end: float | None, key: str | AllKeys | None, outcomes: Collection[Outcome]
) -> tuple[str, list[float | str]]:
    conditions: list[str] = [f"outcome IN ({', '.join('?' * len(outcomes))})"]
    values: list[float | str] = [*outcomes]
    if start is not None:
        conditions.append("at >= ?")
        values.append(start)
    if end is not None:
        conditions.append("at < ?")
        values.append(end)
    if key is None:
        conditions.append("key IS NULL")
    elif key is not ALL:
        conditions.append("key = ?")
        values.append(key)
    return " AND ".join(conditions), values


def _total(groups: Sequence[Group], row: Sequence[object]) -> Total:
    values = dict(zip((*groups, *NUMBERS), row, strict=True))
    if isinstance(day := values.get("day"), int):
        values["day"] = day_of(day * DAY)
    return msgspec.convert(values, Total)


def _read(path: Path, query: str, values: Sequence[float | str]) -> list[tuple[Any, ...]]:
    """Return the rows of a query; none where there is no file, or nothing in it yet."""
    try:
        path.stat()
        with _opened(path) as connection:
            require_known(connection, path)
            return connection.execute(query, values).fetchall() if version(connection) else []
    except FileNotFoundError:
        return []
    except (OSError, sqlite3.Error) as error:
        raise LedgerUnavailable(f"{path} can't be read: {what_is_wrong(error)}", hint=remedy(error, path)) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    uri = f"file:{quote(os.fsencode(path.absolute()))}?mode=ro"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()
