"""Who may call what: the key of a request, and the routes that are for those who run the server.

A key comes as ``Authorization: Bearer``, ``x-api-key`` or ``api-key``, whichever a client knows; one good key is
enough. Where the server has no keys, everybody may do everything. Knows nothing of what a request is about.
"""

from __future__ import annotations

import re
from typing import Final

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llamaserve.api.caller import EVERYBODY, STRANGER, Caller, caller, current
from llamaserve.api.middleware import refuse
from llamaserve.errors import AdminKeyRequired, Unauthenticated
from llamaserve.keys.watched import WatchedKeys

_HEALTH: Final = ("/health", "/v1/internal/health")
_LINK: Final = re.compile(r"/v1/images/files/[\w.-]+")  # whose name nobody can guess: whoever has it may follow it
_MOST: Final = 4  # keys in one request, each of which is compared with all that the server has
_NAMES: Final = ("x-api-key", "api-key")


async def admin() -> None:
    """Let whoever runs the server pass. The routers of routes that change the server, or show what others do, depend on
    this; every other route is for everybody with a key.
    """
    if not caller().admin:
        raise AdminKeyRequired("this needs an admin key; the one that came is for ordinary requests")


class KeyGate:
    """Refuses requests without a good key, before they are looked at, if the server has keys; health is open to all."""

    def __init__(self, app: ASGIApp, keys: WatchedKeys, refused: Counter) -> None:
        self._app = app
        self._refused = refused
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        found = self._caller(scope)
        if isinstance(found, Unauthenticated):
            self._refused.labels(found.code).inc()
            await refuse(scope, receive, send, found, {"www-authenticate": "Bearer"})
            return
        current.set(found)
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller | Unauthenticated:
        if not self._keys.needed:
            return EVERYBODY
        secrets = _presented(Headers(scope=scope))
        keyring = self._keys.keyring
        for secret in secrets:
            if (key := keyring.find(secret)) is not None:
                return Caller(key, admin=key.admin)
        if scope["method"] in ("GET", "HEAD") and _is_open(scope["path"]):
            return STRANGER
        return Unauthenticated(
            "this is none of the server's keys"
            if secrets
            else "the server needs a key: send it as `Authorization: Bearer KEY`, `x-api-key` or `api-key`"
        )


def _presented(headers: Headers) -> list[bytes]:
    """Return what a request brings as keys, as far as it is looked at."""
    secrets = [value for name in _NAMES for value in headers.getlist(name)]
    for value in headers.getlist("authorization"):
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() == "bearer":
            secrets.append(credentials)
    return [secret.strip().encode("latin-1") for secret in secrets if secret.strip()][:_MOST]


def _is_open(path: str) -> bool:
    path = path.rstrip("/")
    return path in _HEALTH or _LINK.fullmatch(path) is not None
