"""The sockets on which the server listens: on this machine only, unless it is said otherwise. Knows nothing of HTTP."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import resource
import socket
from collections.abc import Sequence
from typing import Final

from llamaserve.errors import KeysError, LlamaserveError

logger = logging.getLogger(__name__)

_LOOPBACK: Final = ("127.0.0.1", "::1")  # both, since `localhost` means the one to some clients and the other to others
_NO_SUCH_ADDRESS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # a machine without IPv6
_BACKLOG: Final = 2048
_OPEN_FILES: Final = 65536  # of which a connection is one; some systems begin with 256
_SILENCE: Final = 120  # seconds after which a client that confirms nothing of what it is sent is gone
# Of a client to which nothing is sent: after how many seconds of silence it is asked whether it is still there, after
# how many it is asked again, and how often.
_PROBES: Final = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


def listen(host: str | None, port: int) -> list[socket.socket]:
    """Return listening sockets: on ``host``, or on the IPv4 and IPv6 loopback addresses, all with the same port."""
    sockets: list[socket.socket] = []
    for address in (host,) if host else _LOOPBACK:
        try:
            sockets.append(_listen_on(address, sockets[0].getsockname()[1] if sockets else port))
        except OSError as error:
            if sockets and error.errno in _NO_SUCH_ADDRESS:
                logger.debug("not listening on %s: %s", address, error)
                continue
            for sock in sockets:
                sock.close()
            if sockets and port == 0:
                return listen(host, port)  # the free port of one address is taken on the other
            raise _cannot_listen(address, port, error) from error
    return sockets


def _listen_on(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.create_server((address, port), family=family, backlog=_BACKLOG)
    sock.setblocking(False)
    _notice_who_is_gone(sock)
    return sock


def _notice_who_is_gone(sock: socket.socket) -> None:
    """Have connections end whose client's machine is switched off or out of reach; they inherit this."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {**_PROBES, "TCP_USER_TIMEOUT": _SILENCE * 1000}.items():
        if (option := getattr(socket, name, None)) is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _cannot_listen(address: str, port: int, error: OSError) -> LlamaserveError:
    if error.errno == errno.EADDRINUSE:
        return LlamaserveError(
            f"port {port} on {address} is taken by another program", hint=f"choose another one: --port {port + 1}"
        )
    return LlamaserveError(f"cannot listen on {address}, port {port}: {error.strerror or error}")


def refuse_the_world(sockets: Sequence[socket.socket]) -> None:
    """Raise ``KeysError`` if other machines could reach a socket."""
    for sock in sockets:
        address = sock.getsockname()[0]
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            raise KeysError(
                f"{address} can be reached from other machines, and the server has no key: everybody could use it",
                hint="llamaserve keys create NAME (or --insecure, if everybody shall)",
            )


def raise_limit_of_open_files() -> None:
    """Have as many files and connections open as the system lets a user have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has another limit beside this one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def base_url(sock: socket.socket, *, tls: bool = False) -> str:
    """Return the URL by which clients on this machine reach the socket."""
    address, port = sock.getsockname()[:2]
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - compared, not bound
    return f"{'https' if tls else 'http'}://{f'[{address}]' if ':' in address else address}:{port}"
