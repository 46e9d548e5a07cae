"""What the sandbox promises to whoever uses it. Its processes' limits and ends are tried in chat/test_renderer.py."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest
import uvloop

from llamaserve import sandbox
from llamaserve.errors import Unavailable
from llamaserve.sandbox import Budget, Ended, OutOfMemory, Sandbox, TookTooLong


def pool(
    module: str = "sandbox_child", *, size: int = 1, time_limit: float = 5, idle_limit: float | None = None
) -> Sandbox:
    return Sandbox(module, "the test's sandbox", size=size, time_limit=time_limit, idle_limit=idle_limit)


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


def test_a_job_that_works_too_long_is_ended() -> None:
    async def scenario() -> None:
        async with pool(time_limit=0.3) as box:
            first = await box.ask(b"pid")
            with pytest.raises(TookTooLong, match=r"^longer than 0\.3 s$"):
                await box.ask(b"work 60")
            assert await box.ask(b"pid") != first

    asyncio.run(scenario())


def test_a_time_limit_holds_whatever_a_parent_does_with_its_signals() -> None:
    async def scenario() -> None:
        async with pool(time_limit=0.2) as box:
            with pytest.raises(TookTooLong):
                await box.ask(b"work 60")

    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
    try:
        asyncio.run(scenario())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
        signal.signal(signal.SIGPROF, before)


def test_time_in_which_a_job_does_not_work_is_none_of_its_time() -> None:
    async def scenario() -> None:
        async with pool(time_limit=0.2) as box:
            assert await box.ask(b"sleep 1") == b"1"
            (pid,) = box.pids
            asked = asyncio.create_task(box.ask(b"work 0.05"))
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.6)
            os.kill(pid, signal.SIGCONT)
            assert await asked == b"0.05"

    asyncio.run(scenario())


def test_a_job_is_not_to_blame_for_an_event_loop_that_stands_still() -> None:
    async def scenario() -> None:
        async with pool(time_limit=0.1) as box:
            await box.warm()
            asked = asyncio.create_task(box.ask(b"echo here"))
            for _ in range(3):
                await asyncio.sleep(0)
            time.sleep(0.5)  # noqa: ASYNC251 - that is the point
            assert await asked == b"here"

    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(scenario())


def test_a_job_that_does_not_get_on_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with pool(time_limit=0.2) as box:
            first = await box.ask(b"pid")
            with monkeypatch.context() as patched:
                patched.setattr(sandbox, "STALL_LIMIT", 0.2)
                with pytest.raises(Unavailable, match="the test's sandbox does not get on") as caught:
                    await box.ask(b"sleep 60")
            assert caught.value.retry_after
            assert await box.ask(b"pid") != first

    asyncio.run(scenario())


def test_a_budget_is_for_several_jobs() -> None:
    async def scenario() -> None:
        async with pool(time_limit=0.7) as box:
            budget = Budget(1, 30)
            await box.ask(b"sleep 0.5", budget)
            assert budget.left > 0.9
            await box.ask(b"work 0.4", budget)
            assert 0.3 < budget.left < 0.7
            with pytest.raises(TookTooLong, match=r"^longer than 1 s in all$"):
                await box.ask(b"work 60", budget)
            assert budget.left <= 0
            with pytest.raises(TookTooLong, match=r"^longer than 0\.7 s$"):
                await box.ask(b"work 60", Budget(1, 30))

    asyncio.run(scenario())


def test_a_turn_takes_nothing_of_a_budget_and_comes_within_its_limit() -> None:
    async def scenario() -> None:
        async with pool() as box:
            await box.warm()
            first = asyncio.create_task(box.ask(b"sleep 0.5"))
            await asyncio.sleep(0)
            patient, hasty = Budget(0.3, 30), Budget(0.3, 0.1)
            answers = await asyncio.gather(
                first, box.ask(b"sleep 0.2", patient), box.ask(b"echo", hasty), return_exceptions=True
            )
            assert answers[:2] == [b"0.5", b"0.2"]
            assert isinstance(answers[2], Unavailable)
            assert answers[2].message == "too much work waits for the test's sandbox"
            assert answers[2].retry_after
            assert patient.left > 0.2
            assert hasty.left == 0.3

    asyncio.run(scenario())


def test_what_a_child_says_of_its_time_is_not_believed_beyond_its_limit() -> None:
    async def scenario() -> None:
        for said in ("-100", "100", "nan"):
            async with pool(time_limit=0.3) as box:
                budget = Budget(1, 30)
                assert await box.ask(f"lie {said}".encode(), budget) == b"true"
                assert budget.left == 0.7

    asyncio.run(scenario())
