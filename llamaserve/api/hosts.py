"""For which hosts requests may be, and which web pages may make them.

A page on the web can have its own name lead to this machine (DNS rebinding), and a browser then takes what it fetches
here for its own; but it sends that name as the host. It can also just send requests across origins, of which a browser
says so. Both are refused before anything is looked at. Knows nothing of keys, but that a server which needs one need
not care who asks.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from typing import Final

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from llamaserve.api.middleware import refuse
from llamaserve.errors import HostNotAllowed, LlamaserveError, OriginNotAllowed

_AUTHORITY: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d{1,5})?", re.IGNORECASE)
_PATTERN: Final = re.compile(r"(\*\.)?[a-z0-9._-]+", re.IGNORECASE)
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9.*_-]*)(:(\d{1,5}|\*))?", re.IGNORECASE)
_LOCAL_ORIGIN: Final = re.compile(
    r"https?://(localhost|[a-z0-9-]+\.localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?"
    r"|(?!https?:)[a-z][a-z0-9+.-]*://.*",  # programs with a browser inside, such as app:// and vscode-webview://
    re.IGNORECASE,
)
# What virtual machines and containers call the machine that they run on; no name server on the internet knows these.
_OUTER: Final = ("localhost", "host.docker.internal", "host.containers.internal", "host.lima.internal")
_SHOWN: Final = 100  # characters of what a request says


def host_problem(pattern: str) -> str | None:
    """Return why this can't be among the allowed hosts; None if it can."""
    if pattern == "*" or _PATTERN.fullmatch(pattern):
        return None
    return "is no host name; give one without scheme and port, such as llama.example.com or *.example.com"


def origin_problem(origin: str) -> str | None:
    """Return why this can't be among the allowed origins; None if it can."""
    if origin in ("*", "null") or _ORIGIN.fullmatch(origin):
        return None
    return "is no origin, such as https://chat.example.com or http://localhost:*, without a path or slash behind it"


class Hosts:
    """The names by which clients may call this machine: its own, any address, and those that are ``allowed`` beside."""

    def __init__(self, allowed: Sequence[str]) -> None:
        own = socket.gethostname().lower().rstrip(".")
        self._names = {*_OUTER, own, f"{own.partition('.')[0]}.local"}
        self._suffixes = [".localhost"]
        self._all = "*" in allowed
        for pattern in map(str.lower, allowed):
            if pattern.startswith("*."):
                self._suffixes.append(pattern[1:])
            else:
                self._names.add(pattern.rstrip("."))

    def allow(self, host: str) -> bool:
        """Whether requests may be for a host, as their header has it."""
        found = _AUTHORITY.fullmatch(host)
        if found is None:
            return False
        name = found[1].lower().removesuffix(".")
        return self._all or name in self._names or name.endswith(tuple(self._suffixes)) or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class Origins:
    """The web pages that may call the API: those that are ``allowed``; by default all if a key is ``needed``, which
    they would have to know, and else those of this machine and of programs with a browser inside.
    """

    def __init__(self, allowed: Sequence[str] | None, needed: Callable[[], bool]) -> None:
        self._needed = needed
        self._patterns = None if allowed is None else [_compiled(origin) for origin in allowed]

    def allow(self, origin: str) -> bool:
        """Whether pages of an origin may call."""
        if self._patterns is not None:
            return any(pattern.fullmatch(origin) for pattern in self._patterns)
        return self._needed() or _LOCAL_ORIGIN.fullmatch(origin) is not None


def _compiled(origin: str) -> re.Pattern[str]:
    if origin == "*":
        return re.compile(".*")
    host, any_port, _ = origin.partition(":*")
    pattern = r"[a-z0-9.-]*".join(map(re.escape, host.split("*")))
    return re.compile(pattern + (r":\d{1,5}" if any_port else ""), re.IGNORECASE)


class HostGate:
    """Refuses requests for other hosts, and those of web pages that may not make any, before they are looked at."""

    def __init__(self, app: ASGIApp, hosts: Hosts, origins: Origins, refused: Counter) -> None:
        self._app = app
        self._refused = refused
        self._hosts = hosts
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] == "http" and (error := self._refusal(Headers(scope=scope))) is not None:
            self._refused.labels(error.code).inc()
            await refuse(scope, receive, send, error)
            return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> LlamaserveError | None:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if len(hosts) != 1 or not self._hosts.allow(hosts[0]):
            shown = ", ".join(hosts)[:_SHOWN] or "(none)"
            return HostNotAllowed(
                f"the request is for the host {shown}, which this server does not go by; if it should, start it with "
                "--allowed-host and that name, or add it to LLAMASERVE_ALLOWED_HOSTS"
            )
        for origin in origins:
            if origin.partition("://")[2].lower() != hosts[0].lower() and not self._origins.allow(origin):
                return OriginNotAllowed(
                    f"pages of {origin[:_SHOWN]} may not call this server; if they should, start it with --cors-origin "
                    "and that origin, or add it to LLAMASERVE_CORS_ORIGINS, or have it need a key"
                )
        return None


class OriginHeaders(CORSMiddleware):
    """Tells browsers which origins may read answers, never together with credentials."""

    def __init__(self, app: ASGIApp, origins: Origins, expose_headers: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=expose_headers,
        )
        self._origins = origins

    def is_allowed_origin(self, origin: str) -> bool:
        """Whether pages of an origin may call."""
        return self._origins.allow(origin)
