"""Listening on sockets and running the application on them with uvicorn, and the pool of models that the settings want.
Knows nothing of terminals.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI

from llamaserve.app import create_app
from llamaserve.errors import LlamaserveError
from llamaserve.registry.budget import memory_budget
from llamaserve.registry.folder import folder_in_use
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.saved_prefixes import SavedPrefixes, saved_prefixes_folder
from llamaserve.registry.spec import Registry
from llamaserve.service.notify import Notifier
from llamaserve.settings import Settings, parse_size

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "::1")  # both, since `localhost` means the one to some clients and the other to others
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # a machine without IPv6
_BACKLOG = 2048
_STOP_LIMIT = 5  # seconds for answers under way when the server stops
_EVENTS_LIMIT = 3  # seconds of these in which listeners hear how models leave, for which saving may take longer


def make_pool(settings: Settings, registry: Registry, references: Sequence[str]) -> ModelPool:
    """Return the pool of models that the settings want. What an earlier server has saved of prefixes is removed if none
    are to be kept. Raises what the command line should say of its references.
    """
    size = parse_size(settings.saved_prefixes)(0)
    saved = SavedPrefixes(saved_prefixes_folder(), size)
    if not size:
        saved.prune()
    return ModelPool(
        registry,
        references,
        budget=memory_budget(settings.memory, settings.gpu_memory),
        folder=folder_in_use(settings.models_dir),
        saved=saved if size else None,
    )


def serve_forever(settings: Settings, pool: ModelPool, beside: Callable[[str], Awaitable[None]]) -> None:
    """Serve until a signal comes. ``beside`` runs as soon as requests are taken, with the base URL's beginning, such as
    ``http://127.0.0.1:5000``; an error that it raises ends the server and is raised here.
    """
    notifier = Notifier.of(os.environ)
    sockets = listen(settings.host, settings.port)
    try:
        app = create_app(settings, pool)
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP_LIMIT,
        )
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            server = _Server(config, app, pool, notifier)
            runner.run(_serve(server, sockets, beside(base_url(sockets[0])), notifier.stay_in_touch()))
    finally:
        for sock in sockets:
            sock.close()


class _Server(uvicorn.Server):
    """Has requests come to their end when a signal comes, rather than waiting for it; a second one ends all at once."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, pool: ModelPool, notifier: Notifier) -> None:
        super().__init__(config)
        self._app = app
        self._pool = pool
        self._notifier = notifier

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)  # our processes end when they don't hear from us any more
            os._exit(128 + sig)  # the first process of a container does not get such a signal
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections from now on."""
        await super().startup(sockets)
        if sockets:
            self._notifier.tell("READY=1", f"STATUS=listening at {base_url(sockets[0])}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and end all requests, models and listeners."""
        self._notifier.tell("STOPPING=1")
        closing = asyncio.gather(self._pool.aclose(), self._app.state.services.audio.aclose())
        asyncio.get_running_loop().call_later(_EVENTS_LIMIT, self._pool.events.end)
        await super().shutdown(sockets)
        await closing


async def _serve(
    server: uvicorn.Server, sockets: list[socket.socket], beside: Awaitable[None], signs_of_life: Awaitable[None]
) -> None:
    serving = asyncio.ensure_future(server.serve(sockets))
    companion = asyncio.ensure_future(beside)
    alive = asyncio.ensure_future(signs_of_life)
    await asyncio.wait({serving, companion}, return_when=asyncio.FIRST_COMPLETED)
    failed = companion.done() and not companion.cancelled() and companion.exception() is not None
    if failed:
        server.should_exit = True
    try:
        await serving
    finally:
        companion.cancel()
        alive.cancel()
        await asyncio.gather(companion, alive, return_exceptions=True)
    if failed:
        companion.result()


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
    return sock


def _cannot_listen(address: str, port: int, error: OSError) -> LlamaserveError:
    if error.errno == errno.EADDRINUSE:
        return LlamaserveError(
            f"port {port} on {address} is taken by another program", hint=f"choose another one: --port {port + 1}"
        )
    return LlamaserveError(f"cannot listen on {address}, port {port}: {error.strerror or error}")


def base_url(sock: socket.socket) -> str:
    """Return the URL by which clients on this machine reach the socket."""
    address, port = sock.getsockname()[:2]
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - compared, not bound
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
