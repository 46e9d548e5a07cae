"""What the sandbox promises to whoever uses it. Its processes' limits and ends are tried in chat/test_renderer.py."""

from __future__ import annotations

import asyncio
import os

import pytest

from llamaserve import sandbox
from llamaserve.errors import Unavailable
from llamaserve.sandbox import Ended, OutOfMemory, Sandbox


def pool(module: str = "sandbox_child") -> Sandbox:
    return Sandbox(module, "the test's sandbox", size=1, time_limit=5)


@pytest.mark.parametrize("size", [0, 1, 20_000_000])
def test_a_job_and_its_answer_may_be_any_bytes(size: int) -> None:
    async def scenario() -> None:
        async with pool() as box:
            content = os.urandom(size)
            assert await box.ask(b"echo " + content) == content

    asyncio.run(scenario())


def test_a_spent_process_answers_and_takes_no_more_jobs() -> None:
    async def scenario() -> None:
        async with pool() as box:
            first = await box.ask(b"pid")
            assert await box.ask(b"pid") == first
            assert await box.ask(b"last one") == b"one"
            assert not box.pids
            assert await box.ask(b"pid") != first

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("order", "kind", "message"),
    [(b"exit 7", Ended, "exit status 7"), (b"exit 0", Ended, "exit status 0"), (b"forget", OutOfMemory, "status 3")],
)
def test_an_end_without_an_answer_has_its_status(order: bytes, kind: type[Ended], message: str) -> None:
    async def scenario() -> None:
        async with pool() as box:
            with pytest.raises(Ended, match=message) as caught:
                await box.ask(order)
            assert type(caught.value) is kind
            assert await box.ask(b"echo on") == b"on"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("module", "limit", "why"), [("no_such_module", 30, "the process ended"), ("sandbox_child", 0, "no answer")]
)
def test_processes_that_never_are_ready(monkeypatch: pytest.MonkeyPatch, module: str, limit: int, why: str) -> None:
    monkeypatch.setattr(sandbox, "START_LIMIT", limit)

    async def scenario() -> None:
        async with pool(module) as box:
            with pytest.raises(Unavailable, match=f"the test's sandbox could not be started: {why}"):
                await box.ask(b"echo")
            assert not box.pids

    asyncio.run(scenario())
