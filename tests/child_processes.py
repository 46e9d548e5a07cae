"""Which processes run a model or wait for one, and which render templates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil

_FORK_SERVER = "llamaserve.worker.fork_server_main"
_PROGRAM = "llamaserve.worker.host"
_RENDERER = "llamaserve.chat.renderer"


def model_processes(pid: int | None = None) -> set[int]:
    """Return those of a process, this one unless another is named: its own children, and those that its fork server has
    forked. Those of other servers that it has started are not among them.
    """
    found = {child.pid for child in _children(pid, _PROGRAM)}
    for fork_server in _children(pid, _FORK_SERVER):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {fork.pid for fork in fork_server.children()}
    return found


def renderers(pid: int) -> set[int]:
    """Return those children of a process that render chat templates."""
    return {child.pid for child in _children(pid, _RENDERER)}


def _children(pid: int | None, module: str) -> Iterator[psutil.Process]:
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie: a child may end at any moment
            if module in child.cmdline():
                yield child
