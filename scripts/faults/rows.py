"""The ledger's rows against what clients saw, and the server's own sums against the rows. Reads the file as SQL, and
knows nothing of how it is written.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.journal import Entry, Journal

_TEXTS = "request_id, key, endpoint, model"
_COLUMNS = f"{_TEXTS}, prompt_tokens, cached_tokens, completion_tokens, streamed, status, outcome"
_PARTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(frozen=True)
class Row:
    """A row, as far as it is compared."""

    request_id: str
    key: str | None
    endpoint: str
    model: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    streamed: int
    status: int
    outcome: str


def read_rows(path: Path) -> list[Row]:
    """Return all rows."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return [Row(*values) for values in connection.execute(f"SELECT {_COLUMNS} FROM requests")]  # noqa: S608 - ours


def check_rows(journal: Journal, rows: Iterable[Row]) -> None:
    """Compare the rows with the requests that are over."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.request_id.startswith(journal.prefix):
            found[row.request_id].append(row)
    for unknown in sorted(found.keys() - journal.entries.keys()):
        journal.violate("ledger", "a row is of a request that nobody has sent", str(found[unknown]))
    for entry in journal.entries.values():
        if entry.answer is not None:
            for problem in _problems(entry, found.get(entry.id, [])):
                journal.violate("ledger", problem, f"{entry.id}: {entry.question.name}, {found.get(entry.id)}")


def _problems(entry: Entry, rows: list[Row]) -> Iterator[str]:
    assert entry.answer is not None
    if len(rows) > 1:
        yield f"a request has {len(rows)} rows"
    elif entry.answered and not rows:
        yield "an answered request has no row"
    elif rows and entry.answered:
        yield from _differences(entry, rows[0])
    elif rows and not entry.left and (failure := entry.answer.failure) is not None:
        expected = "refused" if 400 <= failure.status < 500 else "failed"
        if rows[0].outcome != expected:
            yield f"a request that was told {failure.status} {failure.code} is {rows[0].outcome}, not {expected}"


def _differences(entry: Entry, row: Row) -> Iterator[str]:
    assert entry.answer is not None
    expected: dict[str, Any] = {"outcome": "answered", "status": 200, "key": entry.key, "endpoint": entry.question.path}
    expected |= {"streamed": int(entry.question.streamed)}
    if entry.question.kind != "odd":
        expected["model"] = entry.question.body["model"]
    if (usage := entry.answer.usage) is not None:
        expected |= {"prompt_tokens": usage.prompt, "cached_tokens": usage.cached}
        expected |= {"completion_tokens": usage.completion}
    for column, value in expected.items():
        if getattr(row, column) != value:
            yield f"{column} of an answered request is {getattr(row, column)!r}, not {value!r}"


def check_sums(journal: Journal, rows: Iterable[Row], billing: Mapping[str, Any]) -> None:
    """Compare what ``GET /v1/billing/usage`` says of everything with the rows there are."""
    sums: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_PARTS, 0))
    for row in rows:
        group = sums[row.outcome]
        group["requests"] += 1
        for part in _PARTS[1:]:
            group[part] += getattr(row, part)
    told = {"answered": billing, **{each["outcome"]: each for each in billing["unanswered"]}}
    for outcome in sorted(sums.keys() | told.keys()):
        for part in _PARTS:
            theirs = told.get(outcome, {}).get(part, 0)
            if theirs != sums[outcome][part]:
                what = f"billing says {theirs} {part} of {outcome} requests, and the ledger has {sums[outcome][part]}"
                journal.violate("billing", what)
