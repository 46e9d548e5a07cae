"""The time that a request's templates may take: their own counts, waiting for others does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from llamaserve.chat import conversation
from llamaserve.chat.conversation import _Patience
from llamaserve.chat.template import RenderJob, TemplateRenderer
from llamaserve.errors import ChatTemplateError, Unavailable

JOB = RenderJob("{{ messages[0].content }}", [{"role": "user", "content": "Hello"}], "", "")


def takes(waiting: float, working: float) -> Callable[[Callable[[], None]], Awaitable[str]]:
    """Return work that waits for its turn, and then takes its time."""

    async def work(begun: Callable[[], None]) -> str:
        await asyncio.sleep(waiting)
        begun()
        await asyncio.sleep(working)
        return "done"

    return work


def test_waiting_for_a_turn_is_not_held_against_a_template() -> None:
    async def run() -> None:
        patience = _Patience(0.2)
        for _ in range(2):
            assert await patience.wait(takes(0.4, 0.0)) == "done"

    asyncio.run(run())


def test_what_templates_take_adds_up() -> None:
    async def run() -> None:
        patience = _Patience(3)
        assert await patience.wait(takes(0.0, 1.0)) == "done"
        before = time.monotonic()
        with pytest.raises(ChatTemplateError, match="took longer than 3 s in all"):
            await patience.wait(takes(0.0, 60.0))
        assert time.monotonic() - before < 3

    asyncio.run(run())


def test_a_turn_that_does_not_come_is_the_servers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "_TURN_LIMIT", 0.05)

    async def run() -> None:
        with pytest.raises(Unavailable) as error:
            await _Patience(10).wait(takes(5, 0))
        assert error.value.retry_after

    asyncio.run(run())


def test_a_job_begins_when_the_one_before_it_is_done() -> None:
    """The first one's process has to start, which takes longer than both jobs."""

    async def run() -> list[str]:
        happened: list[str] = []
        async with TemplateRenderer(1) as renderer:

            async def ask(name: str) -> None:
                assert await renderer.render(JOB, lambda: happened.append(f"{name} begins")) == "Hello"
                happened.append(f"{name} ends")

            await asyncio.gather(ask("first"), ask("second"))
        return happened

    happened = asyncio.run(run())
    assert happened.index("second begins") > happened.index("first begins")
    assert sorted(happened) == ["first begins", "first ends", "second begins", "second ends"]
