from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from llamaserve.registry.model_events import MAX_UNTAKEN, ModelEvent, ModelEvents, Subscription


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


async def take(subscription: Subscription, count: int) -> list[ModelEvent]:
    events = []
    async for event in subscription:
        events.append(event)
        if len(events) == count:
            break
    return events


def test_each_listener_hears_everything_from_when_it_listens() -> None:
    async def work() -> None:
        events = ModelEvents()
        events.publish("loading", "a")
        with events.subscribe() as one:
            events.publish("loaded", "a", seconds=1.5)
            with events.subscribe() as other:
                events.publish("unloaded", "a", reason="idle")
                assert [event.kind for event in await take(one, 2)] == ["loaded", "unloaded"]
                (heard,) = await take(other, 1)
                assert (heard.kind, heard.model, heard.data) == ("unloaded", "a", {"reason": "idle"})

    run(work())


def test_only_the_latest_progress_waits_to_be_taken() -> None:
    async def work() -> None:
        events = ModelEvents()
        with events.subscribe() as listener:
            for percent in range(100):
                events.publish("load_progress", "a", percent=percent)
            events.publish("load_progress", "b", percent=1)
            events.publish("loaded", "a")
            heard = await take(listener, 3)
            assert [(event.model, event.data.get("percent")) for event in heard] == [("a", 99), ("b", 1), ("a", None)]

    run(work())


def test_a_slow_listener_is_told_what_it_has_missed_and_holds_up_nobody() -> None:
    async def work() -> None:
        events = ModelEvents()
        with events.subscribe() as listener:
            for number in range(MAX_UNTAKEN + 10):
                events.publish("loaded", str(number))
            first, second = await take(listener, 2)
            assert (first.kind, first.data) == ("missed", {"events": 10})
            assert second.model == "10"

    run(work())


def test_who_has_left_hears_nothing() -> None:
    async def work() -> None:
        events = ModelEvents()
        with events.subscribe() as listener:
            pass
        events.publish("loaded", "a")
        try:
            async with asyncio.timeout(0.05):
                await take(listener, 1)
        except TimeoutError:
            return
        raise AssertionError("an event came after the end")

    run(work())


def test_the_end_is_heard_by_all_once_they_have_taken_what_there_is() -> None:
    async def work() -> None:
        events = ModelEvents()
        with events.subscribe() as slow, events.subscribe() as waiting:
            hearing = asyncio.create_task(take(waiting, 2))
            await asyncio.sleep(0)
            events.publish("unloaded", "a", reason="shutdown")
            events.end()
            assert [event.kind for event in await take(slow, 2)] == ["unloaded"]
            assert [event.kind for event in await hearing] == ["unloaded"]
        with events.subscribe() as late:
            assert await take(late, 1) == []

    run(work())
