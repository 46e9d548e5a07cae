"""The faults: what can go wrong with processes, commands, files, disks, clocks and keys, made to go wrong.

Each is a function that makes one fault, has it last for a moment, and undoes it. What it excuses is in the calendar
before it begins. Knows nothing of what clients make of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil

from faults import hostile
from faults.calendar import NOTHING, Excuses
from faults.clients import Crowd
from faults.journal import Journal
from faults.questions import CHAT_MODEL, HUGE_MODEL, SMALL_MODEL, VECTOR_MODEL, Question
from faults.server import ENDED, Down, Refused, Server, models_text
from faults.vitals import AUDIO, FORK_SERVER, GRAMMARS, MODEL, RENDERER, role_of, session, unborn
from llamaserve.errors import KeysError
from llamaserve.keys.key_file import create_key, revoke_key
from llamaserve.keys.keyring import Limits

_CRASH = Excuses(frozenset({"engine_crashed", "model_quarantined"}))
_HELPER_GONE = Excuses(frozenset({"chat_template_error", "unavailable", None}))  # None: a grammar was refused
_NO_LEDGER = Excuses(frozenset({"ledger_unavailable"}))
_ENDING = Excuses(frozenset({"unavailable", "model_not_loaded"}), ending=True)
_LONGEST_STOP = 5.0  # seconds for which a process stands still
_DISK_SECONDS = 4.0  # more than the ledger waits between two attempts
_JUMPS, _CLOCK_SECONDS = 3, 3.0  # how often, and for how long each; libfaketime looks once a second
_FORK_SECONDS = 2.0  # a fork becomes another program within milliseconds
_STUCK = "fork that libfaketime held up"
_KEY_SECONDS = 30.0  # until a key must count, or count no more
_SMALL_FILE = 4096  # bytes
_ATTEMPTS = 20  # to lock a file that is written all the time

Act = Literal["ends", "crashes", "wear"]
ACTS: Sequence[Act] = ("ends", "crashes", "wear")
LASTING = (SMALL_MODEL, VECTOR_MODEL)  # models whose processes nothing ends in the last act


class NotNow(Exception):
    """A fault can't be made at the moment."""


@dataclass
class World:
    """What faults are made with."""

    server: Server
    crowd: Crowd
    journal: Journal
    random: random.Random
    connections: int  # of a storm
    steady: asyncio.Lock = field(default_factory=asyncio.Lock)  # of who ends the server, or what must not meet that

    def at_work(self, fault: str, excuses: Excuses = NOTHING) -> contextlib.AbstractContextManager[None]:
        """See ``Calendar.at_work``."""
        return self.journal.calendar.at_work(fault, excuses)

    def violate(self, what: str, evidence: str = "") -> None:
        """Take note of a fault that the server did not take as it should."""
        self.journal.violate("faults", what, evidence)

    def mind(self, error: Down, fault: str) -> None:
        """Take note of a server that lives and does not answer, where no fault explains that."""
        if self.server.lives and not self.journal.calendar.excuses(error.began, time.monotonic()).away:
            self.violate("the server lives, and does not answer", f"{error}, while there was a fault ({fault})")

    def pause(self, longest: float) -> Awaitable[None]:
        """Wait for a moment."""
        return asyncio.sleep(self.random.uniform(0.2, longest))

    async def model_pids(self) -> dict[str, int]:
        """Return the processes of loaded models by name. Raises ``Down``."""
        status = await self.server.ask("GET", "/v1/internal/status")
        return {model["name"]: model["pid"] for model in status["models"] if "pid" in model}

    def helpers(self, *roles: str) -> list[int]:
        """Return the server's processes with these roles. Raises ``Down``."""
        found, leader = [], self.server.pid
        for process in session(leader):
            with contextlib.suppress(psutil.NoSuchProcess):
                if role_of(process, leader) in roles:
                    found.append(process.pid)
        return found


Fault = Callable[[World], Awaitable[None]]


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _one(world: World, pids: Sequence[int]) -> int:
    if not pids:
        raise NotNow
    return world.random.choice(pids)


async def _stand_still(world: World, pid: int, longest: float) -> None:
    _signal(pid, signal.SIGSTOP)
    try:
        await world.pause(longest)
    finally:
        _signal(pid, signal.SIGCONT)


async def kill_model(world: World) -> None:
    """Kill a model's process; mostly have the model forgiven, or it will be in quarantine soon."""
    name, pid = world.random.choice(list((await world.model_pids()).items()) or [("", 0)])
    if not pid:
        raise NotNow
    with world.at_work("model killed", _CRASH):
        _signal(pid, signal.SIGKILL)
        await world.pause(2)
        if world.random.random() < 0.7:
            await world.server.ask("POST", "/v1/internal/model/load", {"model_name": name})


async def stop_model(world: World) -> None:
    """Have a model's process stand still."""
    pid = _one(world, list((await world.model_pids()).values()))
    with world.at_work("model stopped"):
        await _stand_still(world, pid, _LONGEST_STOP)


async def kill_fork_server(world: World) -> None:
    """Kill the process that forks those of the models; they end with it."""
    pid = _one(world, world.helpers(FORK_SERVER))
    with world.at_work("fork server killed", _CRASH):
        _signal(pid, signal.SIGKILL)
        await world.pause(2)
        await forgive(world)


async def stop_fork_server(world: World) -> None:
    """Have it stand still, while a model is loaded."""
    pid = _one(world, world.helpers(FORK_SERVER))
    with world.at_work("fork server stopped"):
        loading = asyncio.ensure_future(_load_other_context(world))
        try:
            await _stand_still(world, pid, _LONGEST_STOP)
        finally:
            await loading


async def kill_helper(world: World) -> None:
    """Kill a process that renders templates or tries grammars."""
    pid = _one(world, world.helpers(RENDERER, GRAMMARS))
    with world.at_work("helper killed", _HELPER_GONE):
        _signal(pid, signal.SIGKILL)
        await world.pause(1)


async def stop_helper(world: World) -> None:
    """Have one stand still, for longer than it may take for its work: that is no reason to refuse anything."""
    pid = _one(world, world.helpers(RENDERER, GRAMMARS))
    with world.at_work("helper stopped"):
        await _stand_still(world, pid, 2 * _LONGEST_STOP)


async def forgive(world: World) -> None:
    """Have all models loaded as models.yaml says, those in quarantine, too."""
    for name in world.server.models:
        await _load(world, name)


async def _load(world: World, name: str, **args: int) -> None:
    body = {"model_name": name, "args": args}
    try:
        await world.server.ask("POST", "/v1/internal/model/load", body, limit=120)
    except Refused as error:  # its process may have been killed while it was loaded
        if error.status != 503:
            world.violate(f"a load of {name} with {args} was refused", str(error))


async def unload(world: World) -> None:
    """Unload a model, or all, by command."""
    name = world.random.choice([*world.server.models, None])
    with world.at_work("unloaded", Excuses(frozenset({"unavailable"}))):
        body = {} if name is None else {"model_name": name}
        await world.server.ask("POST", "/v1/internal/model/unload", body, limit=120)


async def load(world: World) -> None:
    """Load a model by command with another context: it gets another process beside the one that works."""
    with world.at_work("loaded by command"):
        await _load_other_context(world)


async def _load_other_context(world: World) -> None:
    await _load(world, CHAT_MODEL, ctx_size=world.random.choice((768, 1024, 1280)))


async def load_too_much(world: World) -> None:
    """Ask for more memory than there is, by command or with a request; nothing else may change."""
    with world.at_work("load too large"):
        try:
            if world.random.random() < 0.5:
                await world.server.ask("POST", "/v1/internal/model/load", {"model_name": HUGE_MODEL}, limit=120)
            else:
                body = {"model": HUGE_MODEL, "prompt": "Hello", "max_tokens": 1}
                await world.server.ask("POST", "/v1/completions", body, limit=120)
        except Refused as error:
            if error.status != 507:
                world.violate("a load that is too large was not refused with 507", str(error))
        else:
            world.violate("a load that is too large was not refused")


async def edit_models(world: World) -> None:
    """Change models.yaml: to what is right, to nonsense, or not at all; a signal may ask for it to be read."""
    path, kind = world.server.folders.models_file, world.random.choice(("valid", "invalid", "touched"))
    plain = models_text(world.server.weights)
    async with world.steady if kind == "invalid" else contextlib.nullcontext():  # with that, it would not start
        with world.at_work(f"models.yaml {kind}"):
            try:
                if kind == "touched":
                    path.touch()
                elif kind == "invalid":
                    half = plain[: plain.index("source") + 3]
                    path.write_text(world.random.choice(("models: [", "models: {talk: {source: 7}}", "\0\0", half)))
                else:
                    context = world.random.choice((768, 1024, 1280))
                    path.write_text(models_text(world.server.weights, context=context, queue=65))
                if world.random.random() < 0.5:
                    _signal(world.server.pid, signal.SIGHUP)
                await world.pause(5)
            finally:
                if kind != "touched":
                    path.write_text(plain)


async def hang_up(world: World) -> None:
    """Have models.yaml read again, several times at once."""
    with world.at_work("SIGHUP"):
        for _ in range(5):
            _signal(world.server.pid, signal.SIGHUP)
            await asyncio.sleep(0)
        await world.pause(1)


async def full_disk(world: World) -> None:
    """Have no file of the server grow, as when the disk is full."""
    async with world.steady:
        process = psutil.Process(world.server.pid)
        with world.at_work("disk full", _NO_LEDGER | Excuses(frozenset({"unavailable"}))):  # no place for an upload
            soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
            process.rlimit(psutil.RLIMIT_FSIZE, (_SMALL_FILE, hard))
            try:
                await _noticed(world)
            finally:
                for pid in (process.pid, *world.helpers(FORK_SERVER, MODEL, RENDERER, GRAMMARS, AUDIO)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
            await _recorded(world)


async def lock_ledger(world: World) -> None:
    """Have another program keep the ledger locked."""
    async with world.steady:
        with world.at_work("ledger locked", _NO_LEDGER):
            connection = sqlite3.connect(world.server.folders.ledger, timeout=0, isolation_level=None)
            try:
                await _lock(connection)
                await _noticed(world)
            finally:
                connection.close()
            await _recorded(world)


async def _lock(connection: sqlite3.Connection) -> None:
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(sqlite3.OperationalError):  # somebody writes just now
            connection.execute("BEGIN IMMEDIATE")
            return
        await asyncio.sleep(0.05)
    raise NotNow


async def lose_state_folder(world: World) -> None:
    """Have a file where the folder of the ledger should be, as when a volume is not mounted."""
    folder = world.server.folders.state
    away = folder.with_name("state-away")
    async with world.steady:
        with world.at_work("state folder away", _NO_LEDGER):
            folder.rename(away)
            try:
                folder.touch()
                await _noticed(world)
            finally:
                folder.unlink()
                away.rename(folder)
            await _recorded(world)


async def lock_state_folder(world: World) -> None:
    """Start the server when it has no right to write into the folder of the ledger and its files."""
    folder = world.server.folders.state
    async with _ledger_in_order(world):
        with world.at_work("state folder read-only", _NO_LEDGER):
            try:
                async with _ended(world):
                    for path, mode in ((folder, 0o500), *((file, 0o400) for file in folder.iterdir())):
                        path.chmod(mode)
                await _noticed(world)
            finally:
                for path, mode in ((folder, 0o700), *((file, 0o600) for file in folder.iterdir())):
                    path.chmod(mode)
            await _recorded(world)


async def _noticed(world: World) -> None:
    """Have what keeps rows from being written last for a while, and until a request is over; the server must notice, if
    there was one to record.
    """
    began, noticed = time.monotonic(), False
    asking = asyncio.ensure_future(world.crowd.ask(_brief_question(world)))
    try:
        while time.monotonic() < began + _DISK_SECONDS or not asking.done():
            await asyncio.sleep(0.2)
            noticed = noticed or (await _usage(world))["problem"] is not None
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    if not noticed and world.journal.answered_since(began):
        world.violate("usage can't be recorded, and /v1/internal/status does not tell", str(await _usage(world)))


async def _usage(world: World) -> Mapping[str, Any]:
    """Return how the ledger is."""
    usage: Mapping[str, Any] = (await world.server.ask("GET", "/v1/internal/status"))["usage"]
    return usage


async def _recorded(world: World) -> None:
    """Return when nothing keeps rows from being written any more."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        usage = await _usage(world)
        if usage["problem"] is None:
            return
        await asyncio.sleep(0.2)
    world.violate("usage is still not recorded a minute after its fault", str(usage))


async def restart(world: World) -> None:
    """End the server as its user does, and start it again."""
    async with _ledger_in_order(world):
        await _restart(world)


async def _restart(world: World, *, false_clock: bool = False) -> None:
    async with _ended(world, false_clock=false_clock):
        pass


@contextlib.asynccontextmanager
async def _ended(world: World, *, false_clock: bool = False) -> AsyncIterator[None]:
    """Have the server end for the time of an ``async with`` block."""
    with world.at_work("SIGTERM", _ENDING):
        status, left = await world.server.stop()
        if status not in ENDED:
            world.violate(f"SIGTERM ended the server with {status}", " / ".join(list(world.server.words)[-5:]))
        if left:
            world.violate(f"SIGTERM left processes of the server: {left}")
        yield
        await world.server.start(false_clock=false_clock)


async def kill_server(world: World) -> None:
    """Kill the server, and start it again."""
    async with _ledger_in_order(world):
        with world.at_work("SIGKILL", Excuses(frozenset({"unavailable"}), down=True)):
            if left := await world.server.kill():
                world.violate(f"processes outlived the server by far: {left}")
            for path in world.server.folders.temporary.rglob("*"):  # nobody is left who could delete them
                if not path.is_dir():
                    path.unlink()
            await world.server.start()


@contextlib.asynccontextmanager
async def _ledger_in_order(world: World) -> AsyncIterator[None]:
    """Rows that a full disk keeps in memory are lost with the server, which is no violation: so that is not tried."""
    async with world.steady:
        if (await _usage(world))["problem"] is not None:
            raise NotNow
        yield


async def jump(world: World) -> None:
    """Have a server whose clock goes wrong by up to years, again and again; the monotonic one goes on. It is one of its
    own, since a false clock makes it several times slower.
    """
    async with _ledger_in_order(world):
        stuck, helping = world.journal.calendar.counts[_STUCK], asyncio.create_task(_end_stuck_forks(world))
        try:
            try:
                await _restart(world, false_clock=True)
            except RuntimeError:
                if world.journal.calendar.counts[_STUCK] == stuck:
                    raise
                with world.at_work("SIGTERM", _ENDING):
                    await world.server.start()
                return
            for _ in range(_JUMPS):
                with world.at_work("clock jump"):
                    seconds = world.random.choice((-1, 1)) * math.exp(world.random.uniform(0, 18))
                    world.server.folders.clock.write_text(f"{seconds:+.0f}")
                    await asyncio.sleep(_CLOCK_SECONDS)
            world.server.folders.clock.write_text("+0")
            await asyncio.sleep(_CLOCK_SECONDS)
            await _restart(world)
        finally:
            world.server.folders.clock.write_text("+0")
            helping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await helping


async def _end_stuck_forks(world: World) -> None:
    """End forks of the server that libfaketime keeps from becoming other programs: it waits in them for a lock that
    another thread had, for ever, and the server waits for them.
    """
    before: set[int] = set()
    while True:
        await asyncio.sleep(_FORK_SECONDS)
        leader = world.server.leader
        stuck = set(unborn(leader)) if leader is not None and world.server.false_clock else set()
        for pid in stuck & before:
            with world.at_work(_STUCK, Excuses(frozenset({"unavailable", "engine_crashed", "model_quarantined"}))):
                _signal(pid, signal.SIGKILL)
                await asyncio.sleep(0.1)
        before = stuck


async def change_keys(world: World) -> None:
    """Make a key, use it, and revoke it; before and after, it must be worth nothing."""
    path, name = world.server.folders.keys_file, f"guest-{world.journal.calendar.counts['key made and revoked']}"
    with world.at_work("key made and revoked"):
        try:
            secret = create_key(path, name, Limits(), admin=False)
        except KeysError as error:
            world.violate("a key could not be made", error.message)
            return
        world.server.secrets[name] = secret
        await _until_key(world, secret, 200)
        await world.crowd.ask(_brief_question(world), key=name)
        revoke_key(path, name)
        await _until_key(world, secret, 401)


def _brief_question(world: World) -> Question:
    return next(each for each in world.crowd.asked if each.name == f"{SMALL_MODEL}/completion/0")


async def _until_key(world: World, secret: str, status: int) -> None:
    """Return when a key is good, or is none any more."""
    began = time.monotonic()
    while (found := await _status_for(world, secret)) != status:
        now = time.monotonic()
        if now > began + _KEY_SECONDS and not world.journal.calendar.excuses(began, now).away:
            world.violate(f"a changed key is answered with {found}, not {status}, after {_KEY_SECONDS:g} seconds")
            return
        await asyncio.sleep(0.2)


async def _status_for(world: World, secret: str) -> int:
    """Return the status with which a key's owner is answered; 0 if that is not possible now."""
    try:
        await world.server.ask("GET", "/v1/models", key=secret)
    except Refused as error:
        return error.status
    except Down as error:
        world.mind(error, change_keys.__name__)
        return 0
    return 200


async def storm(world: World) -> None:
    """Have hundreds of clients come at once."""
    with world.at_work("storm", Excuses(frozenset({"queue_full"}))):
        await hostile.storm(world.crowd, world.connections)


async def malformed(world: World) -> None:
    """Have clients come that speak no HTTP."""
    with world.at_work("malformed HTTP"):
        await hostile.malformed(world.crowd)


async def odd_bodies(world: World) -> None:
    """Have clients come with odd JSON, grammars and templates."""
    with world.at_work("odd bodies"):
        await hostile.odd_bodies(world.crowd)


_FAULTS: Sequence[tuple[Fault, int]] = (  # and how often each comes, compared with others
    (kill_model, 4),
    (stop_model, 4),
    (kill_fork_server, 1),
    (stop_fork_server, 2),
    (kill_helper, 3),
    (stop_helper, 2),
    (unload, 3),
    (load, 3),
    (load_too_much, 3),
    (edit_models, 5),
    (hang_up, 1),
    (full_disk, 2),
    (lock_ledger, 2),
    (lose_state_folder, 2),
    (lock_state_folder, 1),
    (restart, 2),
    (kill_server, 3),
    (jump, 1),
    (change_keys, 2),
    (storm, 1),
    (malformed, 3),
    (odd_bodies, 4),
)
# Made at once, some after the others: a process is warm when it has been through the second ones.
_REPLACING: Sequence[Fault] = (edit_models, load, load_too_much)
_WARMING: Sequence[Fault] = (change_keys, odd_bodies, malformed, storm, odd_bodies)
_ENDS: frozenset[Fault] = frozenset({restart, kill_server, jump, lock_state_folder})  # the server
_CRASHES: frozenset[Fault] = frozenset({kill_model, kill_fork_server, unload})  # a model's process
_OWN: Mapping[Act, frozenset[Fault]] = {"ends": _ENDS, "crashes": _CRASHES, "wear": frozenset()}
_SPARED: Mapping[Act, frozenset[Fault]] = {"ends": frozenset(), "crashes": _ENDS, "wear": _ENDS | _CRASHES}


def impossible(server: Server) -> dict[Fault, str]:
    """Return the faults that can't be made on this machine, and why."""
    found: dict[Fault, str] = {}
    if server.faketime is None:
        found[jump] = "libfaketime is not here (Debian's package libfaketime, or --faketime FILE)"
    if os.geteuid() == 0 and not server.humble:
        found[lock_state_folder] = (
            "root may write into any folder, and there is no setpriv to take that from the server"
        )
    if sys.platform != "linux":
        found[full_disk] = "only Linux can limit the files of another process"
    return found


class Dice:
    """Decides which fault of an act comes next: first each comes once, in any order but for the very first, which is
    one that the acts after this don't have.
    """

    def __init__(self, server: Server, dice: random.Random, act: Act) -> None:
        without = impossible(server).keys() | _SPARED[act]
        self._random = dice
        self.faults = [(fault, weight) for fault, weight in _FAULTS if fault not in without]
        self._first = [fault for fault, _ in self.faults]
        self._random.shuffle(self._first)
        for fault in [each for each in self._first if each in _OWN[act]][:1]:
            self._first.remove(fault)
            self._first.append(fault)

    def next(self) -> Fault:
        """Return the next fault."""
        if self._first:
            return self._first.pop()
        return self._random.choices([fault for fault, _ in self.faults], [weight for _, weight in self.faults])[0]


async def make(world: World, fault: Fault) -> None:
    """Make a fault, if that is possible just now."""
    with contextlib.suppress(NotNow, psutil.NoSuchProcess):
        try:
            await fault(world)
        except Down as error:
            world.mind(error, fault.__name__)
        except Refused as error:
            if error.status != 503:
                world.violate(f"a command was refused while there was a fault ({fault.__name__})", str(error))


async def warm(world: World) -> None:
    """Make the faults that leave all processes alive: what they need once is not taken for a leak later."""
    for faults in (_REPLACING, _WARMING):
        await asyncio.gather(*(make(world, fault) for fault in faults))
