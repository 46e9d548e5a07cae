"""Who may be in memory: gives room to models that are to be loaded, and takes it from others when it is short.

Room is a budget of bytes, in main memory and on GPUs, that is never planned past. Models that want in stand in one
queue. For the first of it room is made in this order: less spill (prefixes in main memory, which cost time and nothing
else) for the models in memory, then unloading of those that nobody uses, the least recently used first, and if that is
not enough, no new requests for the least recently used of those in use until they are done. Requests for these stand
in the queue then, so that nobody waits for ever. Those that are leaving anyway are waited for before anybody else has
to go. Knows footprints and moments, not what a model is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

from llamaserve.engine.params import Footprint
from llamaserve.errors import Unavailable


class Occupant(Protocol):
    """Something that takes memory while it is loaded."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def busy(self) -> bool:
        """Whether somebody uses it, or it is being loaded. ``wake`` is called when it ceases to be."""

    @property
    def leaving(self) -> bool:
        """Whether it is giving its memory back, because of ``vacate`` or of its own accord, and lets no request in."""

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for it."""

    @property
    def last_used(self) -> float:
        """When it was last used, on any clock."""

    async def vacate(self) -> None:
        """Give all memory back, and say so with ``left``; if it is leaving already, wait for that."""

    async def limit_spill(self, size: int) -> None:
        """Keep at most so many bytes of prefixes in main memory."""


@dataclass
class _Claim:
    """What a model in memory takes: ``need`` as long as it is there, and ``spill`` of the ``wish`` it could use."""

    need: Footprint
    wish: int
    spill: int

    @property
    def total(self) -> Footprint:
        return self.need + Footprint(self.spill)


class Residency:
    """The models in memory and those that want in."""

    def __init__(self, budget: Footprint) -> None:
        self.budget = budget
        self._claims: dict[Occupant, _Claim] = {}
        self._queue: list[Occupant] = []
        self._draining: set[Occupant] = set()
        self._settling: set[Occupant] = set()
        self._change = asyncio.Event()
        self._returning: asyncio.Task[None] | None = None
        self._relieving: asyncio.Task[None] | None = None

    @property
    def claimed(self) -> Footprint:
        """What all models in memory take together. It is more than the budget only where a load has taken more than was
        planned, until nobody uses the others.
        """
        return sum((claim.total for claim in self._claims.values()), Footprint())

    def claim_of(self, occupant: Occupant) -> Footprint | None:
        """What one of them takes, spill included; None when it is not in memory."""
        claim = self._claims.get(occupant)
        return claim.total if claim else None

    def admits(self, occupant: Occupant) -> bool:
        """Whether new requests may use a model in memory: not while it has to make room for another."""
        return occupant in self._claims and occupant not in self._draining

    def waits(self, occupant: Occupant) -> bool:
        """Whether a model stands in the queue."""
        return occupant in self._queue

    @property
    def crowded(self) -> bool:
        """Whether models wait for room."""
        return bool(self._queue)

    def has_room_for(self, need: Footprint) -> bool:
        """Whether a model would get in now without anybody's leaving, were nobody in the queue."""
        return (self._needed() + need).fits(self.budget)

    def could_take(self, occupant: Occupant, need: Footprint) -> bool:
        """Whether a model in memory would have room for another ``need``, if all left that nobody uses."""
        idle = self._idle()
        busy = [claim.need for each, claim in self._claims.items() if each is not occupant and each not in idle]
        return sum(busy, need).fits(self.budget)

    async def enter(self, occupant: Occupant, need: Footprint, wish: int) -> int:
        """Wait until there is room, make some if need be, and claim it. Returns how many of the ``wish`` bytes of spill
        the model may have. The caller has made sure that ``need`` is within the budget, and calls this once at a time
        for each model, and for none that is in memory. Raises ``Unavailable`` when nobody wants the model any more.
        """
        self._queue.append(occupant)
        try:
            while True:
                if not occupant.wanted:
                    raise Unavailable(f"{occupant.name} is wanted by nobody any more")
                if self._queue[0] is occupant and (self.claimed + need).fits(self.budget):
                    break
                if self._queue[0] is not occupant or not await self._make_room(need):
                    await self._change.wait()
            left = self.budget - self.claimed - need
            claim = self._claims[occupant] = _Claim(need, wish, min(wish, left.host))
            return claim.spill
        finally:
            if self._queue[0] is occupant:
                self._draining.clear()
            self._queue.remove(occupant)
            self.wake()

    async def wait_turn(self, occupant: Occupant) -> None:
        """Wait until those who wanted in before have got in, and with that until it is decided whether a model that was
        to leave must do so.
        """
        self._queue.append(occupant)
        try:
            await asyncio.sleep(0)
            while self._queue[0] is not occupant:
                await self._change.wait()
        finally:
            self._queue.remove(occupant)
            self.wake()

    async def settle(self, occupant: Occupant, need: Footprint) -> None:
        """Take note of what a model really takes; if that is too much for all, others make room, those that are in use
        as soon as they are not.
        """
        claim = self._claims.get(occupant)
        if claim is None:
            return
        claim.need = need
        self._settling.add(occupant)
        try:
            await self._shrink_spills(Footprint())
            await self._relieve()
        finally:
            self._settling.discard(occupant)
            self.wake()

    def spill_of(self, occupant: Occupant) -> int:
        """Return how many bytes of spill a model may have now."""
        claim = self._claims.get(occupant)
        return claim.spill if claim else 0

    def left(self, occupant: Occupant) -> None:
        """Take note that a model takes no memory any more."""
        if self._claims.pop(occupant, None) is not None:
            self._draining.discard(occupant)
            self.wake()
            if self._returning is None or self._returning.done():
                self._returning = asyncio.create_task(self.return_spill())

    def wake(self) -> None:
        """Have those in the queue look again, because a model is not used any more. It has to leave itself where loads
        have taken more than was planned.
        """
        self._change.set()
        self._change = asyncio.Event()
        if not self.claimed.fits(self.budget) and (self._relieving is None or self._relieving.done()):
            self._relieving = asyncio.create_task(self._relieve())

    async def return_spill(self) -> None:
        """Let models in memory have the spill that others have left room for, those used last first. What waits in the
        queue comes before that.
        """
        await asyncio.sleep(0)
        for occupant in sorted(self._claims, key=lambda each: -each.last_used):
            claim = self._claims.get(occupant)
            if claim is None or self._queue:
                continue
            spill = min(claim.wish, claim.spill + (self.budget - self.claimed).host)
            if spill > claim.spill:
                claim.spill = spill
                await occupant.limit_spill(spill)

    def _needed(self) -> Footprint:
        return sum((claim.need for claim in self._claims.values()), Footprint())

    def _idle(self) -> list[Occupant]:
        """Return the models in memory that can leave: those that are leaving already, then those that nobody uses, the
        ones unused longest first.
        """
        idle = [each for each in self._claims if each.leaving or not (each.busy or each in self._settling)]
        return sorted(idle, key=lambda each: (not each.leaving, each.last_used))

    async def _make_room(self, need: Footprint) -> bool:
        """Make some room for a model; False when that takes until others are done."""
        if self.has_room_for(need):
            await self._shrink_spills(need)
        elif idle := self._idle():
            await idle[0].vacate()
        else:
            self._drain(need)
            return False
        return True

    def _drain(self, need: Footprint) -> None:
        """Let no new requests to the models in use that must go, those unused longest first."""
        rest = self._needed()
        self._draining.clear()
        for each in sorted(self._claims, key=lambda each: each.last_used):
            if (rest + need).fits(self.budget):
                return
            rest -= self._claims[each].need
            self._draining.add(each)

    async def _relieve(self) -> None:
        """Have models leave until the others are within the budget; one that is too large even alone stays."""
        while len(self._claims) > 1 and not self.claimed.fits(self.budget) and (idle := self._idle()):
            await idle[0].vacate()

    async def _shrink_spills(self, need: Footprint) -> None:
        """Take spill from models in memory until there is room, from those unused longest first."""
        for each in sorted(self._claims, key=lambda each: each.last_used):
            over = (self.claimed + need - self.budget).host
            claim = self._claims.get(each)
            if over <= 0:
                return
            if claim is not None and claim.spill:
                claim.spill -= min(claim.spill, over)
                await each.limit_spill(claim.spill)
