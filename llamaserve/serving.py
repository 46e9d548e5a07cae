"""Running the application with uvicorn, with the pool of models and the keys that the settings want. Knows nothing of
terminals.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from llamaserve.api.hosts import host_problem, origin_problem
from llamaserve.api.services import Services
from llamaserve.app import create_app
from llamaserve.connections import Connection
from llamaserve.errors import KeysError, LlamaserveError
from llamaserve.keys.keyring import given_keys, is_guessable
from llamaserve.keys.watched import WatchedKeys
from llamaserve.listening import base_url, listen, raise_limit_of_open_files, refuse_the_world
from llamaserve.registry.budget import memory_budget
from llamaserve.registry.folder import folder_in_use
from llamaserve.registry.pool import ModelPool
from llamaserve.registry.saved_prefixes import SavedPrefixes, saved_prefixes_folder
from llamaserve.registry.spec import Registry
from llamaserve.service.definition import STOP_LIMIT
from llamaserve.service.notify import Notifier
from llamaserve.settings import Settings, parse_size

logger = logging.getLogger(__name__)

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


def make_keys(settings: Settings) -> WatchedKeys:
    """Return the keys that the settings want. Raises ``KeysError`` for those that are no good."""
    api, admin = ([secret.get_secret_value() for secret in each] for each in (settings.api_key, settings.admin_key))
    if settings.keys_file is not None and not settings.keys_file.expanduser().is_file():
        raise KeysError(f"there is no file {settings.keys_file}", hint="llamaserve keys create NAME --keys-file FILE")
    if any(map(is_guessable, (*api, *admin))):
        logger.warning("a key of the command line or environment is so short that it could be guessed")
    return WatchedKeys(given_keys(api, admin), settings.keys_path)


def serve_forever(
    settings: Settings, pool: ModelPool, keys: WatchedKeys, beside: Callable[[str], Awaitable[None]]
) -> None:
    """Serve until a signal comes. ``beside`` runs as soon as requests are taken, with the base URL's beginning, such as
    ``http://127.0.0.1:5000``; an error that it raises ends the server and is raised here.
    """
    AppStatus.enable_automatic_graceful_drain = False  # streams end once we say so
    raise_limit_of_open_files()
    check_names(settings)
    tls = tls_context(settings)
    notifier = Notifier.of(os.environ)
    sockets = listen(settings.host, settings.port)
    try:
        if not keys.needed and not settings.insecure:
            refuse_the_world(sockets)
        app = create_app(settings, pool, keys)
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            http=Connection,
            ws="none",
            ssl_context_factory=None if tls is None else lambda *_: tls,
            timeout_graceful_shutdown=_STOP_LIMIT,
        )
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            server = _Server(config, app, pool, notifier)
            announcing = beside(base_url(sockets[0], tls=tls is not None))
            runner.run(_serve(server, sockets, announcing, notifier.stay_in_touch()))
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
            self._notifier.tell("READY=1", f"STATUS=listening at {base_url(sockets[0], tls=self.config.is_ssl)}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, let answers be finished, and end all requests, models and listeners."""
        patience = self._app.state.services.settings.shutdown_limit + STOP_LIMIT
        self._notifier.tell("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(patience * 1e6)}")
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()  # once its request is over, if it has one
        await self._let_finish()
        AppStatus.should_exit = True  # which ends streams
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.abandon_half_a_request()
        closing = asyncio.gather(self._pool.aclose(), self._app.state.services.audio.aclose())
        asyncio.get_running_loop().call_later(_EVENTS_LIMIT, self._pool.events.end)
        await super().shutdown(sockets)
        await closing

    async def _let_finish(self) -> None:
        """Wait until all answers are finished, or their time is up."""
        services: Services = self._app.state.services
        limit = services.settings.shutdown_limit
        if services.books.open and limit:
            logger.info(
                "ending: %d requests have %g seconds to be answered; a second signal ends them now",
                services.books.open,
                limit,
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await services.books.balanced.wait()


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


def check_names(settings: Settings) -> None:
    """Raise if a host or an origin that is allowed can't be one."""
    for setting, values, problem_of in (
        ("allowed_hosts", settings.allowed_hosts, host_problem),
        ("cors_origins", settings.cors_origins or [], origin_problem),
    ):
        for value in values:
            if (problem := problem_of(value)) is not None:
                raise LlamaserveError(f"setting {setting}: {value!r} {problem}", hint="llamaserve run --help")


def tls_context(settings: Settings) -> ssl.SSLContext | None:
    """Return what speaks TLS with the certificate of the settings, if they have one."""
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise LlamaserveError("there is a private key and no certificate", hint="--ssl-certfile FILE")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    paths = [None if path is None else path.expanduser() for path in (settings.ssl_certfile, settings.ssl_keyfile)]
    try:
        context.load_cert_chain(paths[0] or "", paths[1], password="")  # an encrypted key would be asked for otherwise
    except (OSError, ValueError) as error:  # of which ssl.SSLError is one
        files = " and ".join(str(path) for path in paths if path is not None)
        raise LlamaserveError(
            f"TLS can't be spoken with {files}: {error}",
            hint="give a certificate and its private key as PEM files, the key without a password",
        ) from error
    return context
