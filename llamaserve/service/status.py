"""How the service is: what its manager says of it, and what its process and its port say."""

from __future__ import annotations

import http.client
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import psutil

from llamaserve.service.manager import Manager

RUNNING, NOT_RUNNING, NOT_INSTALLED = 0, 3, 4  # exit statuses, as of init scripts in the Linux Standard Base
_ASKING = 5.0  # seconds for the server to answer
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
    since, url = (None, None) if state.pid is None else _process(state.pid)
    return Status(
        state.installed,
        state.enabled,
        state.running,
        state.words,
        manager.file,
        state.pid,
        since,
        url,
        url is not None and _answers(url),
    )


def _process(pid: int) -> tuple[datetime | None, str | None]:
    """Return since when a process runs, and the URL at which it listens."""
    try:
        process = psutil.Process(pid)
        since = datetime.fromtimestamp(int(process.create_time()), UTC)
        listening = [each.laddr for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    except psutil.Error:  # it has just ended, or is not ours to look at
        return None, None
    return since, min((_url(address.ip, address.port) for address in listening), default=None, key=lambda u: "[" in u)


def _url(address: str, port: int) -> str:
    address = _EVERYWHERE.get(address, address)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _answers(url: str) -> bool:
    place = urlsplit(url)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=_ASKING)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
