"""How the service is: what its manager says of it, and what its process and its port say."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil

from llamaserve.service.health import healthy_at, url
from llamaserve.service.manager import Manager

RUNNING, NOT_RUNNING, NOT_INSTALLED = 0, 3, 4  # exit statuses, as of init scripts in the Linux Standard Base
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound


class Status(msgspec.Struct, frozen=True):
    """The state of the service. ``since`` is when its process began, ``url`` where it listens, if it does already, and
    ``healthy`` whether it answers there.
    """

    installed: bool
    enabled: bool
    running: bool
    state: str
    file: Path
    pid: int | None = None
    since: datetime | None = None
    url: str | None = None
    healthy: bool = False

    @property
    def exit_status(self) -> int:
        """The status with which a command that asked for it ends."""
        if not self.installed:
            return NOT_INSTALLED
        return RUNNING if self.running else NOT_RUNNING


def status_of(manager: Manager) -> Status:
    """Return how the service is. Its port is asked for its health."""
    state = manager.state()
    since, address = (None, None) if state.pid is None else _process(state.pid)
    healthy = None if address is None else healthy_at(*address)
    return Status(
        state.installed,
        state.enabled,
        state.running,
        state.words,
        manager.file,
        state.pid,
        since,
        healthy or (None if address is None else url("http", *address)),
        healthy is not None,
    )


def _process(pid: int) -> tuple[datetime | None, tuple[str, int] | None]:
    """Return since when a process runs, and the address and port at which it listens, of IPv4 if it does."""
    try:
        process = psutil.Process(pid)
        since = datetime.fromtimestamp(int(process.create_time()), UTC)
        listening = [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    except psutil.Error:  # it has just ended, or is not ours to look at
        return None, None
    addresses = [(_EVERYWHERE.get(address.ip, address.ip), address.port) for address in listening]
    return since, min(addresses, default=None, key=lambda address: ":" in address[0])
