"""Which processes run a model or wait for one, and which render templates; and one that listens."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import psutil

_FORK_SERVER = "llamaserve.worker.fork_server_main"
_PROGRAM = "llamaserve.worker.host"
_RENDERER = "llamaserve.chat.renderer"
_LISTEN = """
import socket, sys
families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in sys.argv[2:]]
sockets = [socket.create_server((a, int(sys.argv[1])), family=f) for a, f in zip(sys.argv[2:], families)]
print("listening", flush=True)
sys.stdin.read()
"""


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


@contextlib.contextmanager
def listening(port: int, *addresses: str) -> Iterator[int]:
    """Have a process of its own listen at a port, and give its pid: this one may listen for other tests."""
    command = [sys.executable, "-I", "-c", _LISTEN, str(port), *addresses]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"listening\n"
        yield process.pid
        process.stdin.close()


def _children(pid: int | None, module: str) -> Iterator[psutil.Process]:
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie: a child may end at any moment
            if module in child.cmdline():
                yield child
