"""Which processes run a model or wait for one."""

from __future__ import annotations

import contextlib
import os

import psutil

_FORK_SERVER = "llamaserve.worker.fork_server_main"
_PROGRAM = "llamaserve.worker.host"


def model_processes(pid: int | None = None) -> set[int]:
    """Return those below a process, this one unless another is named. The fork server is none, but what it forks are,
    which look like it.
    """
    top = psutil.Process(os.getpid() if pid is None else pid)
    found = set()
    for process in top.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
            above = process.parent()
            if _is(process, _PROGRAM) or (
                _is(process, _FORK_SERVER) and above is not None and _is(above, _FORK_SERVER)
            ):
                found.add(process.pid)
    return found


def _is(process: psutil.Process, module: str) -> bool:
    return module in process.cmdline()
