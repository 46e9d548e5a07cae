"""The processes of a server: how many of each kind, their memory and open files, and whether that is as it was once.

Linux tells all of it through ``/proc``. Knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

API, FORK_SERVER, MODEL, RENDERER, GRAMMARS, OTHER = "api", "fork server", "model", "renderer", "grammars", "other"
GROWTH = 30.0  # MiB that a process may grow by after the warm-up
FILES_MORE = 8  # open files that may be more: connections that were just closed, helpers that have come meanwhile

_MODULES = {
    "llamaserve.worker.fork_server_main": FORK_SERVER,
    "llamaserve.worker.host": MODEL,
    "llamaserve.chat.renderer": RENDERER,
    "llamaserve.worker.grammar_check_main": GRAMMARS,
}
_MOST = {API: 1, FORK_SERVER: 1, RENDERER: 4, GRAMMARS: 2}  # the renderers are those of models and those of guests
_SPARE = 1  # process that waits for a model
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Process:
    """A process of the server at one moment. ``memory`` is resident MiB."""

    pid: int
    role: str
    memory: float
    files: int


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
    def api(self) -> Process:
        """The process that answers."""
        return next(process for process in self.processes if process.role == API)

    @property
    def memory(self) -> Mapping[str, float]:
        """Resident MiB of the processes that last: of the models by name."""
        return {API: self.api.memory, **{name: process.memory for name, process in self.models.items()}}


def session(leader: int) -> Iterator[psutil.Process]:
    """Yield the processes of a session that are alive, zombies too: nobody has seen their end."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader:
                yield process


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
                role = role_of(process, leader)
                zombie = process.status() == psutil.STATUS_ZOMBIE
                memory, files = (0.0, 0) if zombie else (process.memory_info().rss / _MIB, process.num_fds())
            found.append(Process(process.pid, "zombie" if zombie else role, memory, files))
    by_pid = {process.pid: process for process in found}
    return Vitals(found, {name: by_pid[pid] for name, pid in pids.items() if pid in by_pid})


def leaks(now: Vitals, baseline: Vitals | None) -> list[str]:
    """Return what is more than there should be; without a baseline only what can be told without one."""
    found = []
    for role, count in now.counts.items():
        most = {MODEL: len(now.models) + _SPARE, **_MOST}.get(role, 0)
        if count > most:
            pids = [process.pid for process in now.processes if process.role == role]
            found.append(f"there are {count} processes ({role}), and should be {most} at most: {pids}")
    if baseline is None:
        return found
    if now.api.files > baseline.api.files + FILES_MORE:
        found.append(f"the server has {now.api.files} files open, and had {baseline.api.files} after the warm-up")
    for name, before in baseline.models.items():
        if name in now.models and now.models[name].files > before.files + FILES_MORE:
            found.append(f"{name} has {now.models[name].files} files open, and had {before.files} after the warm-up")
    return found


def growth(now: Vitals, baseline: Vitals) -> list[str]:
    """Return which processes have grown by more than they may."""
    return [
        f"{name} takes {memory:.0f} MiB, and took {baseline.memory[name]:.0f} MiB after the warm-up"
        for name, memory in now.memory.items()
        if name in baseline.memory and memory > baseline.memory[name] + GROWTH
    ]


def files_in(folder: Path) -> list[str]:
    """Return the files that lie in a folder, however deep."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
