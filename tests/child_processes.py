"""Which processes run a model or wait for one."""

from __future__ import annotations

import contextlib

import psutil

_FORK_SERVER = "llamaserve.worker.fork_server_main"
_PROGRAM = "llamaserve.worker.host"


def model_processes(pid: int | None = None) -> set[int]:
    """Return those of a process, this one unless another is named: its own children, and those that its fork server has
    forked. Those of other servers that it has started are not among them.
    """
    found = set()
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
            if _PROGRAM in child.cmdline():
                found.add(child.pid)
            elif _FORK_SERVER in child.cmdline():
                found |= {fork.pid for fork in child.children()}
    return found
