"""What the sandbox promises to whoever uses it. Its processes' limits and ends are tried in chat/test_renderer.py."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import pytest

from llamaserve import sandbox
from llamaserve.errors import Unavailable
from llamaserve.frames import FrameSocket
from llamaserve.sandbox import ORPHAN_LIMIT, Ended, OutOfMemory, Sandbox


def pool(module: str = "sandbox_child", *, size: int = 1, idle_limit: float | None = None) -> Sandbox:
    return Sandbox(module, "the test's sandbox", size=size, time_limit=5, idle_limit=idle_limit)


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


def test_a_process_without_work_ends_after_a_while() -> None:
    async def scenario() -> None:
        async with pool(size=2, idle_limit=0.5) as box:
            await asyncio.gather(box.warm(), box.warm())
            assert len(box.pids) == 2
            first = await box.ask(b"pid")
            for _ in range(8):  # of two processes one is enough, and works again before its time is up
                await asyncio.sleep(0.1)
                assert await box.ask(b"pid") == first
            assert box.pids == {int(first)}
            await asyncio.sleep(0.8)
            assert not box.pids
            assert await box.ask(b"pid") != first

    asyncio.run(scenario())


def test_a_process_that_works_is_not_without_work() -> None:
    async def scenario() -> None:
        async with pool(idle_limit=0.2) as box:
            await box.warm()
            assert await box.ask(b"sleep 0.5") == b"0.5"
            assert box.pids

    asyncio.run(scenario())


@pytest.mark.parametrize(("time_limit", "patience"), [(0, ORPHAN_LIMIT), (119.5, 120 + ORPHAN_LIMIT)])
def test_a_job_may_take_its_time_before_it_is_an_orphan(
    monkeypatch: pytest.MonkeyPatch, time_limit: float, patience: int
) -> None:
    alarms: list[int] = []
    monkeypatch.setattr(signal, "alarm", alarms.append)
    ours, theirs = map(FrameSocket, socket.socketpair())
    ours.write(b"job")
    sandbox.answer_jobs(theirs, lambda job: (job, True), time_limit)
    assert alarms == [patience, 0]
    ours.close()
    theirs.close()
