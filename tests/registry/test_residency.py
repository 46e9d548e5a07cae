"""Who may be in memory: doubles of models that take a while to come and go, on one event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

import pytest

from llamaserve.engine.params import Footprint
from llamaserve.errors import Unavailable
from llamaserve.registry.residency import Residency

_clock = count(1)


class Tenant:
    """A model as the residency sees it. ``in_use`` is set by the test."""

    def __init__(self, name: str, residency: Residency, need: int, wish: int = 0) -> None:
        self.name = name
        self.last_used = 0.0
        self.need = Footprint(need)
        self.wish = wish
        self.loaded = False
        self.users = 0
        self.waiting = 0
        self.arriving = 0
        self.vacated = 0
        self.spill: list[int] = []
        self.loads = 0
        self._residency = residency
        self._coming: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return self.users > 0 or self.arriving > 0 or self._coming is not None

    @property
    def wanted(self) -> bool:
        return self.waiting > 0

    @property
    def leaving(self) -> bool:
        return self._leaving is not None

    def leave(self) -> asyncio.Task[None]:
        """Begin to leave, because of somebody else or of its own accord."""
        if self._leaving is None:
            assert not self.users, "a model that is in use was unloaded"
            self._leaving = asyncio.create_task(self._leave())
        return self._leaving

    async def _leave(self) -> None:
        await asyncio.sleep(0.001)
        self.loaded = False
        self.vacated += 1
        self._leaving = None
        self._residency.left(self)

    async def vacate(self) -> None:
        await asyncio.shield(self.leave())

    async def limit_spill(self, size: int) -> None:
        self.spill.append(size)
        await asyncio.sleep(0)

    async def _come(self) -> None:
        self.spill.append(await self._residency.enter(self, self.need, self.wish))
        try:
            await asyncio.sleep(0.001)
            self.loaded = True
            self.loads += 1
        except asyncio.CancelledError:
            self._residency.left(self)
            raise

    async def _arrive(self) -> None:
        try:
            await self._come()
        finally:
            self._coming = None
            self._residency.wake()

    async def use(self, work: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Be used by one request: load if need be, work, leave."""
        self.waiting += 1
        try:
            while not (self.loaded and not self.leaving and self._residency.admits(self)):
                if self._leaving is not None:
                    await asyncio.shield(self._leaving)
                    continue
                if self.loaded:
                    await self._residency.wait_turn(self)
                    continue
                if self._coming is None:
                    self._coming = asyncio.create_task(self._arrive())
                self.arriving += 1
                try:
                    await asyncio.shield(self._coming)
                    break
                finally:
                    self.arriving -= 1
        except BaseException:
            self.waiting -= 1
            self._residency.wake()
            raise
        self.waiting -= 1
        self.users += 1
        try:
            assert self._residency.claimed.fits(self._residency.budget)
            await (work or (lambda: asyncio.sleep(0)))()
        finally:
            self.users -= 1
            self.last_used = next(_clock)
            self._residency.wake()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_three_take_turns_where_two_fit_and_the_one_unused_longest_goes() -> None:
    async def work() -> None:
        residency = Residency(Footprint(20))
        a, b, c = (Tenant(name, residency, 10) for name in "abc")
        for tenant, loaded in [(a, "a"), (b, "ab"), (c, "bc"), (a, "ac"), (b, "ab"), (a, "ab"), (c, "ac")]:
            await tenant.use()
            assert {each.name for each in (a, b, c) if each.loaded} == set(loaded)

    run(work())


def test_many_requests_for_a_cold_model_load_it_once() -> None:
    async def work() -> None:
        residency = Residency(Footprint(10))
        a = Tenant("a", residency, 10)
        await asyncio.gather(*(a.use() for _ in range(20)))
        assert a.loads == 1

    run(work())


def test_a_model_in_use_is_waited_for_and_gets_no_new_requests() -> None:
    async def work() -> None:
        residency = Residency(Footprint(10))
        a, b = Tenant("a", residency, 10), Tenant("b", residency, 10)
        done = asyncio.Event()
        order: list[str] = []

        async def note(name: str) -> None:
            order.append(name)

        async def long() -> None:
            await done.wait()
            await note("first a")

        first = asyncio.create_task(a.use(long))
        await asyncio.sleep(0.01)
        other = asyncio.create_task(b.use(lambda: note("b")))
        await asyncio.sleep(0.01)
        late = asyncio.create_task(a.use(lambda: note("late a")))  # would keep b out for ever if it were let in
        await asyncio.sleep(0.01)
        assert a.loaded
        assert not b.loaded
        done.set()
        await asyncio.gather(first, other, late)
        assert order == ["first a", "b", "late a"]

    run(work())


def test_spill_shrinks_before_anybody_has_to_go_and_comes_back() -> None:
    async def work() -> None:
        residency = Residency(Footprint(30))
        a, b = Tenant("a", residency, 10, wish=15), Tenant("b", residency, 10, wish=100)
        await a.use()
        assert a.spill == [15]
        await b.use()
        assert a.spill == [15, 10]
        assert b.spill == [0]
        assert not a.vacated
        await b.vacate()
        await asyncio.sleep(0.01)
        assert a.spill == [15, 10, 15]
        assert residency.claimed == Footprint(25)

    run(work())


def test_gpu_memory_counts_for_itself() -> None:
    async def work() -> None:
        residency = Residency(Footprint(100, 10))
        a, b = Tenant("a", residency, 0), Tenant("b", residency, 0)
        a.need = b.need = Footprint(10, 8)
        await a.use()
        await b.use()
        assert a.vacated == 1
        assert residency.claimed == Footprint(10, 8)

    run(work())


def test_who_gives_up_waiting_lets_the_next_one_in() -> None:
    async def work() -> None:
        residency = Residency(Footprint(20))
        a, b, c = Tenant("a", residency, 15), Tenant("b", residency, 15), Tenant("c", residency, 5)
        done = asyncio.Event()
        first = asyncio.create_task(a.use(lambda: _until(done)))
        await asyncio.sleep(0.01)
        impatient = asyncio.create_task(b.use())
        await asyncio.sleep(0.01)
        behind = asyncio.create_task(c.use())
        await asyncio.sleep(0.01)
        assert not behind.done()
        impatient.cancel()
        await behind
        assert (a.loaded, b.loaded, c.loaded) == (True, False, True)
        assert residency.claimed == Footprint(20)
        done.set()
        await first

    run(work())


async def _until(done: asyncio.Event) -> None:
    await done.wait()


def test_a_model_that_takes_more_than_planned_has_idle_ones_make_room() -> None:
    async def work() -> None:
        residency = Residency(Footprint(30))
        a, b, c = (Tenant(name, residency, 10) for name in "abc")
        for tenant in (a, b, c):
            await tenant.use()
        await residency.settle(c, Footprint(12))
        assert (a.vacated, b.vacated, c.vacated) == (1, 0, 0)
        assert residency.claimed == Footprint(22)

    run(work())


def test_those_in_use_when_a_model_takes_more_than_planned_make_room_as_soon_as_they_are_not() -> None:
    async def work() -> None:
        residency = Residency(Footprint(30))
        a, b, c, d = (Tenant(name, residency, 7) for name in "abcd")
        done = asyncio.Event()
        uses = [asyncio.create_task(each.use(lambda: _until(done))) for each in (a, b, c)]
        await asyncio.sleep(0.01)
        await d.use()
        d.users += 1
        await residency.settle(d, Footprint(15))
        assert residency.claimed == Footprint(36)
        done.set()
        await asyncio.gather(*uses)
        await asyncio.sleep(0.01)
        assert (a.loaded, b.loaded, c.loaded, d.loaded) == (False, True, True, True)
        assert residency.claimed == Footprint(29)

    run(work())


def test_a_model_that_takes_more_than_planned_does_not_leave_itself() -> None:
    async def work() -> None:
        residency = Residency(Footprint(30))
        a, b, c = (Tenant(name, residency, 10) for name in "abc")
        for tenant in (a, b, c):
            await tenant.use()
        await residency.settle(a, Footprint(12))
        assert (a.loaded, b.loaded, c.loaded) == (True, False, True)

    run(work())


def test_a_model_that_takes_more_than_the_budget_stays_when_it_is_alone() -> None:
    async def work() -> None:
        residency = Residency(Footprint(30))
        a, b = Tenant("a", residency, 25), Tenant("b", residency, 5)
        await b.use()
        await a.use()
        await residency.settle(a, Footprint(32))
        residency.wake()
        await asyncio.sleep(0.01)
        assert (a.loaded, b.loaded) == (True, False)

    run(work())


def test_what_a_model_could_take_is_what_those_in_use_leave() -> None:
    async def work() -> None:
        residency = Residency(Footprint(30))
        a, b, c = (Tenant(name, residency, 8) for name in "abc")
        for tenant in (a, b, c):
            await tenant.use()
        a.users += 1
        assert residency.could_take(c, Footprint(22))
        assert not residency.could_take(c, Footprint(23))
        assert residency.could_take(a, Footprint(30))
        assert (a.vacated, b.vacated, c.vacated) == (0, 0, 0)

    run(work())


@pytest.mark.parametrize(("room", "stays"), [(20, True), (18, False)])
def test_nobody_has_to_go_when_those_that_are_leaving_leave_enough_room(room: int, stays: bool) -> None:
    async def work() -> None:
        residency = Residency(Footprint(room))
        a, b, c = Tenant("a", residency, 10), Tenant("b", residency, 8), Tenant("c", residency, 10)
        await a.use()
        await b.use()
        b.leave()
        await c.use()
        assert (a.loaded, b.loaded, c.loaded) == (stays, False, True)

    run(work())


def test_those_that_are_leaving_count_when_a_model_takes_more_than_planned() -> None:
    async def work() -> None:
        residency = Residency(Footprint(30))
        a, b, c = (Tenant(name, residency, 10) for name in "abc")
        for tenant in (a, b, c):
            await tenant.use()
        b.leave()
        await residency.settle(c, Footprint(18))
        assert (a.loaded, b.loaded, c.loaded) == (True, False, True)

    run(work())


def test_a_model_that_has_become_busy_meanwhile_is_not_unloaded_to_settle() -> None:
    async def work() -> None:
        residency = Residency(Footprint(30))
        a, b, c = (Tenant(name, residency, 10) for name in "abc")
        for tenant in (a, b, c):
            await tenant.use()

        async def vacate() -> None:
            b.users += 1
            a.loaded = False
            residency.left(a)

        a.vacate = vacate  # type: ignore[method-assign]
        await residency.settle(c, Footprint(25))  # more than a alone can make room for
        assert b.loaded
        assert not b.vacated

    run(work())


def test_who_gives_up_in_the_middle_of_an_eviction_leaves_no_memory_uncounted() -> None:
    async def work() -> None:
        residency = Residency(Footprint(10))
        a, b = Tenant("a", residency, 10), Tenant("b", residency, 10)
        await a.use()
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def leave() -> None:
            begun.set()
            await go_on.wait()
            a.loaded = False
            residency.left(a)

        leaving: list[asyncio.Task[None]] = []

        async def vacate() -> None:
            leaving.append(asyncio.create_task(leave()))
            await asyncio.shield(leaving[0])

        a.vacate = vacate  # type: ignore[method-assign]
        b.waiting = 1
        entering = asyncio.create_task(residency.enter(b, b.need, 0))
        await begun.wait()
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        assert residency.claimed == Footprint(10)
        go_on.set()
        await leaving[0]
        assert residency.claimed == Footprint()

    run(work())


def test_a_load_that_nobody_waits_for_any_more_is_not_begun() -> None:
    async def work() -> None:
        residency = Residency(Footprint(10))
        a = Tenant("a", residency, 10)
        b = Tenant("b", residency, 10)
        done = asyncio.Event()
        first = asyncio.create_task(a.use(lambda: _until(done)))
        await asyncio.sleep(0.01)
        b.waiting = 1
        entering = asyncio.create_task(residency.enter(b, b.need, 0))
        await asyncio.sleep(0)
        b.waiting = 0
        residency.wake()
        with pytest.raises(Unavailable):
            await entering
        assert a.loaded
        done.set()
        await first

    run(work())


def test_nobody_has_to_go_for_a_load_that_nobody_waits_for() -> None:
    async def work() -> None:
        residency = Residency(Footprint(10))
        a, b = Tenant("a", residency, 10), Tenant("b", residency, 10)
        await a.use()
        with pytest.raises(Unavailable):
            await residency.enter(b, b.need, 0)
        assert a.loaded
        assert not residency.waits(b)

    run(work())


def test_nobody_else_has_to_go_for_a_load_that_is_given_up() -> None:
    async def work() -> None:
        residency = Residency(Footprint(20))
        a, b, c = Tenant("a", residency, 10), Tenant("b", residency, 10), Tenant("c", residency, 20)
        await a.use()
        await b.use()
        c.waiting = 1
        entering = asyncio.create_task(residency.enter(c, c.need, 0))
        await asyncio.sleep(0)
        assert a.leaving
        c.waiting = 0
        with pytest.raises(Unavailable):
            await entering
        assert (a.loaded, b.loaded) == (False, True)

    run(work())


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_the_budget_holds_and_everybody_is_served(seed: int) -> None:
    async def work() -> None:
        dice = random.Random(seed)
        residency = Residency(Footprint(25))
        tenants = [Tenant(str(number), residency, dice.randint(3, 25), dice.randint(0, 20)) for number in range(5)]
        served = 0

        async def client(number: int) -> None:
            nonlocal served
            mine = random.Random(seed * 100 + number)
            for _ in range(15):
                seconds = mine.random() * 0.003
                use = asyncio.create_task(mine.choice(tenants).use(lambda seconds=seconds: asyncio.sleep(seconds)))
                if mine.random() < 0.2:  # one that gives up
                    await asyncio.sleep(mine.random() * 0.003)
                    use.cancel()
                    await asyncio.gather(use, return_exceptions=True)
                else:
                    await use
                    served += 1
                tenant = mine.choice(tenants)
                if mine.random() < 0.1 and tenant.loaded and not tenant.busy:
                    tenant.leave()  # of its own accord
                assert residency.claimed.fits(residency.budget)

        await asyncio.gather(*(client(number) for number in range(8)))
        assert served > 50
        await asyncio.sleep(0.05)  # a load whose last client has just given up comes to its end
        assert residency.claimed == sum(
            (residency.claim_of(each) or Footprint() for each in tenants if each.loaded), Footprint()
        )

    run(work())
