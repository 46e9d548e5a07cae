"""Turns at one thing: one at a time, round the shares, whoever gives up waiting."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from llamaserve.registry.turns import Turns


class Desk:
    """Some who want turns, and who had them in which order."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.had: list[str] = []
        self.having = 0
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def _work(self, name: str, done: asyncio.Event) -> None:
        async with self.turns.turn(name[0]):
            assert not self.having, "two at a time"
            assert self.turns.taken
            self.having += 1
            self.had.append(name)
            try:
                await done.wait()
            finally:
                self.having -= 1

    async def come(self, *names: str, done: asyncio.Event | None = None) -> None:
        """Let them come one after the other, each for the share that its name begins with."""
        ready = asyncio.Event()
        ready.set()
        for name in names:
            self.tasks[name] = asyncio.create_task(self._work(name, done or ready))
            await asyncio.sleep(0)

    async def end(self) -> None:
        """Wait until all had their turns, and look whether it is free again."""
        results = await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        assert not self.turns.taken
        assert self.turns.waiting == 0


def run(test: Callable[[Desk], Awaitable[None]]) -> None:
    async def work() -> None:
        desk = Desk()
        await test(desk)
        await desk.end()

    asyncio.run(asyncio.wait_for(work(), 30))


def test_of_one_share_those_who_came_first_are_first() -> None:
    async def test(desk: Desk) -> None:
        done = asyncio.Event()
        await desk.come("a1", done=done)
        await desk.come(*(f"a{number}" for number in range(2, 9)))
        assert (desk.turns.taken, desk.turns.waiting) == (True, 7)
        done.set()
        await desk.end()
        assert desk.had == [f"a{number}" for number in range(1, 9)]

    run(test)


def test_turns_go_round_the_shares() -> None:
    async def test(desk: Desk) -> None:
        done = asyncio.Event()
        await desk.come("a1", done=done)
        await desk.come("a2", "a3", "a4", "b1", "b2", "c1")
        done.set()
        await desk.end()
        assert desk.had == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]

    run(test)


def test_nobody_comes_between_the_end_of_a_turn_and_the_next() -> None:
    async def test(desk: Desk) -> None:
        done = asyncio.Event()
        await desk.come("a1", done=done)
        await desk.come("a2")
        done.set()
        while desk.having:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert desk.turns.taken
        await desk.come("a3", "b1")
        await desk.end()
        assert desk.had[:2] == ["a1", "a2"]

    run(test)


@pytest.mark.parametrize("given_up", ["a2", "a3", "b1", "c1"])
@pytest.mark.parametrize("late", [False, True])
def test_who_gives_up_changes_nothing_for_others(given_up: str, late: bool) -> None:
    """Before the turn before it ends, or just when it has ended."""

    async def test(desk: Desk) -> None:
        done = asyncio.Event()
        await desk.come("a1", done=done)
        await desk.come("a2", "a3", "b1", "b2", "c1")
        if late:
            done.set()
            desk.tasks[given_up].cancel()
        else:
            desk.tasks[given_up].cancel()
            await asyncio.sleep(0)
            assert desk.turns.waiting == 4
            done.set()
        await desk.end()
        expected = {
            "a2": ["a1", "b1", "c1", "a3", "b2"],
            "a3": ["a1", "b1", "c1", "a2", "b2"],
            "b1": ["a1", "b2", "c1", "a2", "a3"],
            "c1": ["a1", "b1", "a2", "b2", "a3"],
        }
        assert desk.had == expected[given_up]

    run(test)


def test_who_has_just_been_given_the_turn_and_is_cancelled_passes_it_on() -> None:
    async def test(desk: Desk) -> None:
        done = asyncio.Event()
        await desk.come("a1", done=done)
        await desk.come("b1", "c1")
        done.set()
        while desk.having:  # noqa: ASYNC110
            await asyncio.sleep(0)
        desk.tasks["b1"].cancel()
        await desk.end()
        assert desk.had == ["a1", "c1"]

    run(test)


@pytest.mark.parametrize("seed", range(20))
def test_at_any_time_of_giving_up_no_turn_is_lost(seed: int) -> None:
    async def test(desk: Desk) -> None:
        chance = random.Random(seed)
        for number in range(60):
            await desk.come(f"{chance.choice('abc')}{number}")
            for _ in range(chance.randrange(3)):
                await asyncio.sleep(0)
            if chance.random() < 0.4:
                chance.choice(list(desk.tasks.values())).cancel()
        await desk.end()
        assert set(desk.had) >= {name for name, task in desk.tasks.items() if not task.cancelled()}

    run(test)
