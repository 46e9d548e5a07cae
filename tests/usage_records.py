"""Records of requests that never were, and what is in a ledger's file."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from llamaserve.usage.record import UsageRecord

_RECORD = UsageRecord(
    request_id="req_1",
    at=1_767_225_600.0,  # 2026-01-01
    key=None,
    endpoint="/v1/chat/completions",
    model="qwen3-4b",
    prompt_tokens=20,
    cached_tokens=5,
    completion_tokens=7,
    first_token=0.25,
    seconds=1.5,
    streamed=True,
    status=200,
    outcome="answered",
)


def made(**fields: Any) -> UsageRecord:
    """Return a record with some fields as given."""
    return msgspec.structs.replace(_RECORD, **fields)


def stored(path: Path, columns: str = "request_id") -> list[tuple[Any, ...]]:
    """Return what is in a ledger's file, in the order in which it was written."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(f"SELECT {columns} FROM requests ORDER BY id").fetchall()


def ids(path: Path) -> list[str]:
    return [row[0] for row in stored(path)]


async def until(condition: Callable[[], bool], limit: float = 20.0) -> None:
    """Return as soon as the condition holds; fail when it does not in time."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)
