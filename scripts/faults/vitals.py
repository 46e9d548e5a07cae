"""The processes of a server: how many of each kind, their memory and open files, and whether each stays as it was once.

Linux tells all of it through ``/proc``. Knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

API, FORK_SERVER, MODEL, OTHER = "api", "fork server", "model", "other"
RENDERER, GRAMMARS, AUDIO = "renderer", "grammars", "audio decoder"
GROWTH = 30.0  # MiB that a process may grow by after its warm-up
FILES_MORE = 8  # open files that may be more: connections that were just closed, helpers that have come meanwhile

_MODULES = {
    "llamaserve.worker.fork_server_main": FORK_SERVER,
    "llamaserve.worker.host": MODEL,
    "llamaserve.chat.renderer": RENDERER,
    "llamaserve.worker.grammar_check_main": GRAMMARS,
    "llamaserve.speech.audio_main": AUDIO,
}
# The renderers are those of models and those of guests.
_MOST = {API: 1, FORK_SERVER: 1, RENDERER: 4, GRAMMARS: 2, AUDIO: 2}
_SPARE = 1  # process that waits for a model
_WARM_UP = 2  # readings of a process at least, after the last of which it may not grow by much
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Process:
    """A process of the server at one moment. ``memory`` is resident MiB, ``began`` tells it from others that have had
    its number.
    """

    pid: int
    role: str
    memory: float
    files: int
    began: float = 0.0


@dataclass(frozen=True)
class Vitals:
    """All processes of a server; ``models`` has those that run one by the model's name."""

    processes: Sequence[Process]
    models: Mapping[str, Process]

    @property
    def counts(self) -> Counter[str]:
        """How many processes of each role there are."""
        return Counter(process.role for process in self.processes)

    @property
    def lasting(self) -> Iterator[tuple[str, Process]]:
        """Processes that are to stay as they are, with what each is: a model's name or a role. A spare is none."""
        yield from self.models.items()
        yield from ((each.role, each) for each in self.processes if each.role in _MOST)


@dataclass(frozen=True)
class Reading:
    """How a process was at a moment of the monotonic clock."""

    at: float
    memory: float
    files: int


@dataclass
class Life:
    """What was read of one process, in the order of time. Its warm-up takes ``warm_up`` readings."""

    name: str
    pid: int
    readings: list[Reading] = field(default_factory=list)
    warm_up: int = _WARM_UP
    warmed: bool = False  # all that a process needs once was asked of it

    @property
    def minutes(self) -> float:
        """From the first reading to the last."""
        return (self.readings[-1].at - self.readings[0].at) / 60

    @property
    def warm(self) -> Reading | None:
        """How it was after its warm-up; None: that is not over."""
        return self.readings[self.warm_up - 1] if len(self.readings) >= self.warm_up else None


class Lives:
    """The history of all processes that last."""

    def __init__(self) -> None:
        self._lives: dict[tuple[str, int, float], Life] = {}

    def take(self, now: Vitals, at: float) -> None:
        """Add what is now."""
        for name, process in now.lasting:
            key = (name, process.pid, process.began)
            life = self._lives.setdefault(key, Life(name, process.pid))
            life.readings.append(Reading(at, process.memory, process.files))

    def warm_up(self, now: Vitals) -> None:
        """Take note that all that a process needs once is asked of those that are here ``now``: their warm-up is over
        with their next reading. Those of which it was asked before get no warmer.
        """
        for name, process in now.lasting:
            life = self._lives[name, process.pid, process.began]
            if not life.warmed:
                life.warm_up, life.warmed = len(life.readings) + 1, True

    def longest(self) -> Mapping[str, Life]:
        """Return the longest life of each kind."""
        found: dict[str, Life] = {}
        for life in self._lives.values():
            if life.name not in found or life.minutes > found[life.name].minutes:
                found[life.name] = life
        return found

    def open_files(self, now: Vitals) -> list[str]:
        """Return which processes have more files open than they may."""
        return [
            f"{name} ({process.pid}) has {process.files} files open, and had {warm.files} after its warm-up"
            for name, process, warm in self._warm(now)
            if process.files > warm.files + FILES_MORE
        ]

    def growth(self, now: Vitals) -> list[str]:
        """Return which processes have grown by more than they may."""
        return [
            f"{name} ({process.pid}) takes {process.memory:.0f} MiB, and took {warm.memory:.0f} MiB after its warm-up"
            for name, process, warm in self._warm(now)
            if process.memory > warm.memory + GROWTH
        ]

    def _warm(self, now: Vitals) -> Iterator[tuple[str, Process, Reading]]:
        for name, process in now.lasting:
            life = self._lives.get((name, process.pid, process.began))
            if life is not None and life.warm is not None:
                yield name, process, life.warm


def session(leader: int) -> Iterator[psutil.Process]:
    """Yield the processes of a session that are alive, zombies too: nobody has seen their end."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                yield process


def unborn(leader: int) -> list[int]:
    """Return the processes that the first one has forked, and that have not become what they are to be."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        words = psutil.Process(leader).cmdline()
        for process in session(leader):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid != leader and process.cmdline() == words:
                    found.append(process.pid)
    return found


def role_of(process: psutil.Process, leader: int) -> str:
    """Return what a process is for."""
    if process.pid == leader:
        return API
    words = process.cmdline()
    role = next((role for module, role in _MODULES.items() if module in words), OTHER)
    # A fork of the fork server has its command line.
    return MODEL if role == FORK_SERVER and process.ppid() != leader else role


def look(leader: int, pids: Mapping[str, int]) -> Vitals:
    """Return how the server is whose first process is ``leader``; ``pids`` are those of loaded models by name."""
    found = []
    for process in session(leader):
        with contextlib.suppress(psutil.NoSuchProcess):
            with process.oneshot():
                role, began = role_of(process, leader), process.create_time()
                zombie = process.status() == psutil.STATUS_ZOMBIE
                memory, files = (0.0, 0) if zombie else (process.memory_info().rss / _MIB, process.num_fds())
            found.append(Process(process.pid, "zombie" if zombie else role, memory, files, began))
    by_pid = {process.pid: process for process in found}
    return Vitals(found, {name: by_pid[pid] for name, pid in pids.items() if pid in by_pid})


def superfluous(now: Vitals) -> list[str]:
    """Return of which kind there are more processes than there should be."""
    found = []
    for role, count in now.counts.items():
        most = {MODEL: len(now.models) + _SPARE, **_MOST}.get(role, 0)
        if count > most:
            pids = [process.pid for process in now.processes if process.role == role]
            found.append(f"there are {count} processes ({role}), and should be {most} at most: {pids}")
    return found


def files_in(folder: Path) -> list[str]:
    """Return the files that lie in a folder, however deep."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
