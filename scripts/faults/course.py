"""The course of a run: start, references, warm-up, then three acts. Each has rounds of disorder that end in peace, in
which everything is counted. In the first act all faults come, in the second none that ends the server, in the third
none that ends a model's process either: what leaks slowly shows only in a process that lives for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmark.histogram import histogram, percentile

from faults import hostile, mischief, recording
from faults.calendar import Calendar
from faults.clients import HANG, Crowd
from faults.journal import Journal
from faults.mischief import ACTS, LASTING, Act, Dice, World
from faults.questions import questions
from faults.rows import check_rows, check_sums, read_rows
from faults.server import ENDED, Server
from faults.vitals import API, Lives, Vitals, files_in, look, superfluous

_SETTLING = 90.0  # seconds in which everything must be as it was
_MINUTE = 60.0
_SILENT = 2  # clients that send half a request


@dataclass(frozen=True)
class Plan:
    """How long and how much. Times are in seconds."""

    seed: int
    seconds: float  # of all acts
    warm_up: float = 30.0
    round: float = 60.0
    clients: int = 8
    hands: int = 2  # that make faults
    storm: int = 500  # connections at once


@dataclass
class Findings:
    """What is reported beside violations."""

    lives: Lives = field(default_factory=Lives)
    last: Vitals | None = None
    rounds: int = 0
    lag: float = math.nan  # seconds by which the event loop was late at most in 99 of 100 cases, in the longest life
    memory: list[dict[str, float]] = field(default_factory=list)  # MiB of each process that lasts, after each round


class Course:
    """A run."""

    def __init__(self, server: Server, plan: Plan, say: Callable[[str], None]) -> None:
        self.server = server
        self.plan = plan
        self.findings = Findings()
        dice = random.Random(plan.seed)  # noqa: S311 - it shall be repeatable
        self.journal = Journal(f"chaos-{plan.seed}", Calendar())
        asked = questions(recording.speech() if server.weights.speech is not None else None)
        self.crowd = Crowd(server, self.journal, asked, random.Random(dice.random()))  # noqa: S311
        self.world = World(server, self.crowd, self.journal, random.Random(dice.random()), plan.storm)  # noqa: S311
        self._dice = random.Random(dice.random())  # noqa: S311
        self._say = say
        self._told = self.journal.started

    async def run(self) -> None:
        """Run it all. Raises ``RuntimeError`` where it can't begin."""
        skipped = self.journal.calendar.skipped
        skipped |= {fault.__name__: why for fault, why in mischief.impossible(self.server).items()}
        if self.server.weights.speech is None:
            skipped["transcriptions"] = "the packages for speech are not installed"
        for what, why in skipped.items():
            self._say(f"not tried: {what}: {why}")
        try:
            await self.server.start()
            self.journal.references = await self.crowd.references()
            async with self._silence():
                await self._round(self.plan.warm_up, self._warm_up)
                for act in ACTS:
                    await self._act(act)
        except asyncio.CancelledError:
            self.journal.over = True
            raise
        finally:
            await self._end()

    async def _act(self, act: Act) -> None:
        self._say(f"act {act!r}")
        if act != ACTS[0]:
            assert self.findings.last is not None
            self.findings.lives.warm_up(self.findings.last)
            await self._round(0.0, self._warm_up)
        dice, deadline = Dice(self.server, self._dice, act), time.monotonic() + self.plan.seconds / len(ACTS)
        while (left := deadline - time.monotonic()) > 0:
            lasting = self._lasting()
            await self._round(min(left, self.plan.round), partial(self._disorder, dice))
            if act == "wear" and self._lasting() != lasting:
                what = f"a model's process ended though nothing has ended it: {lasting}, then {self._lasting()}"
                self.journal.violate("lives", what, f"in round {self.findings.rounds}")

    def _lasting(self) -> dict[str, int]:
        """Return the processes of the models that nothing may end in the last act."""
        assert self.findings.last is not None
        return {name: process.pid for name, process in self.findings.last.models.items() if name in LASTING}

    async def _warm_up(self, until: float) -> None:
        await mischief.warm(self.world)
        await asyncio.sleep(max(0.0, until - time.monotonic()))

    async def _disorder(self, dice: Dice, until: float) -> None:
        """Make faults, several at once, until a moment; what is begun is ended."""
        await asyncio.gather(*(self._hand(dice, until) for _ in range(self.plan.hands)))

    async def _hand(self, dice: Dice, until: float) -> None:
        while time.monotonic() < until:
            await mischief.make(self.world, dice.next())
            self._tell_each_minute()
            await asyncio.sleep(self.world.random.uniform(0.1, 1.5))

    async def _round(self, seconds: float, disorder: Callable[[float], Any]) -> None:
        """Have clients ask while there is disorder, then have peace, and look at everything."""
        self.crowd.stop.clear()
        clients = [asyncio.create_task(self.crowd.client()) for _ in range(self.plan.clients)]
        try:
            await disorder(time.monotonic() + seconds)
        except asyncio.CancelledError:
            self.journal.over = True
            for task in clients:
                task.cancel()
            raise
        finally:
            self.crowd.stop.set()
            _, hanging = await asyncio.wait(clients, timeout=HANG + 30)
            for task in hanging:
                self.journal.violate("clients", "a client did not come to its end", repr(task.get_stack(limit=4)))
                task.cancel()
        for task in clients:
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        await self._settle()

    @contextlib.asynccontextmanager
    async def _silence(self) -> AsyncIterator[None]:
        """Have clients that send half a request, and wait, within an ``async with`` block."""
        tasks = [asyncio.create_task(self._silent()) for _ in range(_SILENT)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for found in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(found, Exception):
                    raise found

    async def _silent(self) -> None:
        while True:
            await hostile.silent(self.crowd)
            await asyncio.sleep(0.2)

    async def _settle(self) -> None:
        """Have peace, and check what must hold in it: first of all that every question is answered right."""
        self.findings.rounds += 1
        if (status := self.server.ended) is not None:
            words = "\n".join(list(self.server.words)[-5:])
            self.journal.violate(
                "end", f"the server ended by itself with {status} in round {self.findings.rounds}", words
            )
            await self.server.kill()
            await self.server.start()
        await mischief.forgive(self.world)
        self.journal.calendar.settled()
        await asyncio.gather(*(self.crowd.ask(question) for question in self.crowd.asked if not question.is_long))
        deadline = time.monotonic() + _SETTLING
        while (problems := await self._unrest()) and time.monotonic() < deadline:
            await asyncio.sleep(0.25)
            await mischief.forgive(self.world)  # a change of models.yaml that is seen late has unloaded one
        for problem in problems:
            self.journal.violate("leaks", problem, f"{_SETTLING:g} seconds after round {self.findings.rounds}")
        assert self.findings.last is not None
        self.findings.memory.append({name: round(process.memory, 1) for name, process in self.findings.last.lasting})
        for problem in self.findings.lives.growth(self.findings.last):
            self.journal.violate("memory", problem, f"after round {self.findings.rounds}")
        self.findings.lives.take(self.findings.last, time.monotonic())
        await self._check_books()
        await self._note_lag()
        self._check_log()
        self._tell()

    async def _unrest(self) -> list[str]:
        """Return what is not as it should be when nobody asks for anything."""
        status = await self.server.ask("GET", "/v1/internal/status")
        pids = {model["name"]: model["pid"] for model in status["models"] if "pid" in model}
        self.findings.last = look(self.server.pid, pids)
        found = superfluous(self.findings.last) + self.findings.lives.open_files(self.findings.last)
        for what in ("running", "waiting"):
            if status[what]:
                found.append(f"{status[what]} sequences are {what}")
        for model in status["models"]:
            if model.get("requests_open"):
                found.append(f"{model['name']} has {model['requests_open']} open requests")
        if status["usage"]["problem"] or status["usage"]["pending"] or status["usage"]["lost"]:
            found.append(f"the ledger is not in order: {status['usage']}")
        if missing := set(self.server.models) - pids.keys():
            found.append(f"models that were loaded are not: {sorted(missing)}")
        if files := files_in(self.server.folders.temporary):
            found.append(f"there are temporary files: {files[:5]}")
        return found

    async def _check_books(self) -> None:
        rows = read_rows(self.server.folders.ledger)
        check_rows(self.journal, rows)
        check_sums(self.journal, rows, await self.server.ask("GET", "/v1/billing/usage"))

    async def _note_lag(self) -> None:
        if self.findings.lives.longest()[API].pid == self.server.pid:
            counts = histogram(await self.server.ask("GET", "/metrics"), "llamaserve_event_loop_lag_seconds")
            self.findings.lag = percentile(counts, 0.99)

    def _check_log(self) -> None:
        for bug in self.server.bugs:
            self.journal.violate("log", "the log tells of an error that nobody foresaw", bug)
        self.server.bugs.clear()

    async def _end(self) -> None:
        try:
            status, left = await self.server.stop()
        except AssertionError:  # it has never started
            return
        self._check_log()
        if status not in ENDED or left:
            words = " / ".join(list(self.server.words)[-3:])
            self.journal.violate("end", f"the server ended with {status}, and left the processes {left}", words)
        if self.journal.references:
            check_rows(self.journal, read_rows(self.server.folders.ledger))

    def _tell_each_minute(self) -> None:
        if time.monotonic() - self._told >= _MINUTE:
            self._tell()

    def _tell(self) -> None:
        """Say in a line how it goes."""
        self._told = time.monotonic()
        seconds = self._told - self.journal.started
        outcomes, faults = self.journal.outcomes, self.journal.calendar.counts
        memory = self.findings.memory[-1] if self.findings.memory else {}
        answered = outcomes["answered"]
        parts = [f"{seconds / 60:5.1f} min", f"{answered} answered ({answered / seconds:.1f}/s)"]
        parts += [f"{sum(n for what, n in outcomes.items() if what.startswith('error'))} errors"]
        parts += [f"{outcomes['hung up']} hung up", f"{outcomes['broken']} broken", f"{faults.total()} faults"]
        parts += ["MiB: " + " ".join(f"{name} {value:.0f}" for name, value in memory.items())]
        self._say(", ".join([*parts, f"{outcomes['violations']} violations"]))
