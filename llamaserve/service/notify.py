"""Telling systemd that the server is up, that it is alive, and that it stops: the protocol of sd_notify(3).

Without a supervisor that asks for it nothing is sent. This module knows nothing of HTTP, nor of who runs the server.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import MutableMapping

from llamaserve.errors import LlamaserveError

logger = logging.getLogger(__name__)

_SEND_LIMIT = 1.0  # seconds; systemd takes its datagrams at once, and the event loop must not wait for it for long
_MARGIN = 4  # signs of life in the time after which systemd takes the server for dead


class Notifier:
    """The way to whoever started the server, if that wants to hear of it. ``address`` is that of a datagram socket: a
    path, or a name that begins with ``@`` for Linux's abstract ones. ``patience`` is the seconds after which a server
    that is silent is taken for dead.
    """

    def __init__(self, address: str | None = None, patience: float | None = None) -> None:
        if address is not None and not address.startswith(("/", "@")):
            raise LlamaserveError(f"NOTIFY_SOCKET={address} is neither a path nor an abstract socket")
        self._address = address
        self._patience = patience if address is not None else None

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> Notifier:
        """Return the notifier for what the environment names. The variables are taken out of it: they are meant for
        this process, not for those that it starts.
        """
        address = environment.pop("NOTIFY_SOCKET", None) or None
        patience = environment.pop("WATCHDOG_USEC", None)
        meant = environment.pop("WATCHDOG_PID", None)
        if patience is None or meant not in (None, str(os.getpid())):
            return cls(address)
        if not patience.isascii() or not patience.isdigit() or int(patience) == 0:
            raise LlamaserveError(f"WATCHDOG_USEC={patience} is no number of microseconds")
        return cls(address, int(patience) / 1e6)

    def tell(self, *news: str) -> None:
        """Send assignments such as ``READY=1``. What can't be sent is logged: the supervisor finds out in its way."""
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_LIMIT)
                sender.sendto("\n".join(news).encode(), address)
        except OSError as error:
            logger.warning("the service manager cannot be told %s: %s", news[0], error)

    async def stay_in_touch(self) -> None:
        """Send a sign of life again and again, for as long as this runs. It is the event loop that sends: if that
        hangs, no more come.
        """
        while self._patience is not None:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self._patience / _MARGIN)
