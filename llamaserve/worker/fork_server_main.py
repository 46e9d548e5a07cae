"""The fork server: a process that has imported all that one with a model needs, and forks one when it is told to.

It stays as it is after the imports: one thread, no model, no GPU ever touched. What it forks is what
``llamaserve.worker.host`` would be.

Run as ``python -m llamaserve.worker.fork_server_main FD`` with a connected socket at that file descriptor; it ends when
the socket closes. ``fork_server`` is the other side.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import selectors
import signal
import socket
import sys

from llamaserve.worker import host
from llamaserve.worker.fork_server import NUMBER

_DESCRIPTORS = 3  # that come with each command: the fork's link, its standard error, its channel
_STANDARD_ERROR = 2
_PR_SET_PDEATHSIG = 1


class _ForkServer:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._forks: dict[int, socket.socket] = {}  # the channel of each process id
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._woken, self._waking = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waking, False)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def serve(self) -> socket.socket | None:
        """Fork, until the control socket closes. Returns None then, with all forks gone, and in each forked process its
        link.
        """
        signal.set_wakeup_fd(self._waking, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    message, descriptors, _, _ = socket.recv_fds(self._control, 1, _DESCRIPTORS)
                    if not message:
                        self._end_all()
                        return None
                    if len(descriptors) < _DESCRIPTORS:  # this process may have no more; who waits hears of it
                        for descriptor in descriptors:
                            os.close(descriptor)
                    elif (link := self._fork(*descriptors)) is not None:
                        return link
                elif key.fileobj == self._woken:
                    self._reap()
                else:
                    self._kill(key.data)

    def _fork(self, link: int, standard_error: int, its_channel: int) -> socket.socket | None:
        """Fork, and return the link in the new process."""
        channel = socket.socket(fileno=its_channel)
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            _say(channel, -(error.errno or errno.EAGAIN))
            pid = -1
        if pid == 0:
            channel.close()
            self._leave()
            os.dup2(standard_error, _STANDARD_ERROR)
            os.close(standard_error)
            _end_with(parent)
            return socket.socket(fileno=link)
        os.close(link)
        os.close(standard_error)
        if pid < 0:
            channel.close()
            return None
        self._forks[pid] = channel
        self._selector.register(channel, selectors.EVENT_READ, pid)
        _say(channel, pid)
        return None

    def _leave(self) -> None:
        """In a new process: let go of what is the fork server's."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._control.close()
        for channel in self._forks.values():
            channel.close()
        os.close(self._woken)
        os.close(self._waking)

    def _kill(self, pid: int) -> None:
        """End a fork of which nothing more is wanted, unless it has been reaped: the number may be another's then."""
        if (channel := self._forks.get(pid)) is not None:
            self._selector.unregister(channel)
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        """Say of all forks that have ended how they did."""
        os.read(self._woken, 4096)
        while self._forks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            channel = self._forks.pop(pid)
            if channel in self._selector.get_map():
                self._selector.unregister(channel)
            _say(channel, os.waitstatus_to_exitcode(status))
            channel.close()

    def _end_all(self) -> None:
        """End the forks that are left, and wait until they are gone."""
        for pid in self._forks:
            os.kill(pid, signal.SIGKILL)
        for pid in self._forks:
            os.waitpid(pid, 0)


def _say(channel: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
        channel.sendall(NUMBER.pack(number))


def _end_with(parent: int) -> None:
    """Have the kernel end this process with the fork server, without which nobody would know how it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Be the fork server, or in a forked process serve its link."""
    host.heed_no_signals()
    gc.collect()
    gc.freeze()  # a collection in a fork would write to, and so copy, what all of them share
    if (link := _ForkServer(socket.socket(fileno=int(sys.argv[1]))).serve()) is not None:
        host.serve(link)


if __name__ == "__main__":
    main()
