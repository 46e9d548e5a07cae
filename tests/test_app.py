"""What goes on beside requests: it ends with the application, and nothing of it fails without a word."""

from __future__ import annotations

import asyncio

import pytest

from llamaserve.app import _going_on
from llamaserve.errors import Unavailable


def test_what_goes_on_ends_with_its_block() -> None:
    ended: list[bool] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def run() -> None:
        async with _going_on(work(), work()):
            await asyncio.sleep(0)
            assert not ended

    asyncio.run(run())
    assert ended == [True, True]


def test_what_fails_beside_requests_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def watch_keys() -> None:
        raise RuntimeError("a bug")

    async def warm() -> None:
        raise Unavailable("the renderer could not be started")

    async def done() -> None:
        pass

    async def run() -> None:
        async with _going_on(watch_keys(), warm(), done()):
            await asyncio.sleep(0.01)

    asyncio.run(run())
    bug, foreseen = caplog.records
    assert "watch_keys" in bug.getMessage()
    assert bug.exc_info is not None
    assert foreseen.getMessage() == "the renderer could not be started"
    assert foreseen.exc_info is None
