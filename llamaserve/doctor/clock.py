"""The clock, and the way to the Hugging Face Hub: a clock that is wrong makes secure connections fail."""

from __future__ import annotations

import email.utils
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, command, note, ok, problem, warning
from llamaserve.doctor.machine import Machine

_FIRST_YEAR, _LAST_YEAR = 2025, 2100
_SKEW = 60.0  # seconds; certificates and tokens bear some minutes
_ASKING = 2.0  # seconds for the hub to answer
_HUB = "https://huggingface.co"


def ask_date(url: str) -> str | None:
    """Return the Date header that a server answers with, whatever else it says. Sends no token.

    Raises ``OSError`` when it can't be reached.
    """
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "llamaserve-doctor"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_ASKING) as answer:  # noqa: S310 - the scheme was checked
            found: str | None = answer.headers["Date"]
    except urllib.error.HTTPError as error:
        found = error.headers["Date"]
    except http.client.HTTPException as error:
        raise OSError(str(error) or type(error).__name__) from error
    return found


def clock(case: Case, ask: Callable[[str], str | None] = ask_date, now: float | None = None) -> Iterator[Finding]:
    """Examine the clock. ``ask`` returns a server's date; ``now`` is the time as this machine has it."""
    now = time.time() if now is None else now
    local = datetime.fromtimestamp(now).astimezone()
    set_clock = _set_clock(case.machine)
    if not _FIRST_YEAR <= local.year < _LAST_YEAR:
        yield problem("clock", f"it says that it is {local:%Y-%m-%d %H:%M}", set_clock)
    else:
        yield ok("clock", f"{local:%Y-%m-%d %H:%M}, time zone {local.tzname()}")
    if case.machine.ask("timedatectl", "show", "--property=NTPSynchronized", "--value") == "no":
        yield note("clock", "it is not kept right over the network", set_clock)
    yield from _hub(case, ask, now)


def _set_clock(machine: Machine) -> str:
    if machine.is_mac:
        return machine.as_root("sntp -sS time.apple.com")
    return machine.as_root("timedatectl set-ntp true")


def _hub(case: Case, ask: Callable[[str], str | None], now: float) -> Iterator[Finding]:
    environment = case.machine.environment
    endpoint = _without_password(environment.get("HF_ENDPOINT") or _HUB)
    if endpoint is None:
        yield problem("hub", "HF_ENDPOINT is no address", "unset HF_ENDPOINT")
        return
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield note("hub", "HF_HUB_OFFLINE is set: models of the hub can't be fetched", "unset HF_HUB_OFFLINE")
        return
    try:
        date = ask(endpoint)
    except OSError as error:
        yield _unreachable(case.machine, endpoint, error)
        return
    yield ok("hub", f"{endpoint} answers; {_token(case.machine)}")
    yield from _skew(case.machine, date, now)


def _unreachable(machine: Machine, endpoint: str, error: OSError) -> Finding:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        why = reason.verify_message
        if "expired" in why or "not yet valid" in why:
            return problem("hub", f"{endpoint}: {why}; the clock of this machine may be wrong", _set_clock(machine))
        return problem(
            "hub",
            f"{endpoint}: {why}; where a proxy reads all connections, its certificate is needed in a file",
            'export SSL_CERT_FILE="$HOME/proxy-ca.pem"',
        )
    why = "no answer within 2 s" if isinstance(reason, TimeoutError) else str(reason)
    message = f"{endpoint} can't be reached ({why}; {_token(machine)}): models that are here work without it"
    return note("hub", message, command("curl", "-sSIL", endpoint))


def _skew(machine: Machine, date: str | None, now: float) -> Iterator[Finding]:
    try:
        theirs = email.utils.parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return
    away = now - theirs
    if abs(away) > _SKEW:
        told = f"{datetime.fromtimestamp(theirs, UTC):%Y-%m-%d %H:%M} UTC"
        way = "ahead" if away > 0 else "behind"
        message = f"it is {abs(away):.0f} s {way}: the hub says that it is {told}"
        yield warning("clock", message, _set_clock(machine))


def _token(machine: Machine) -> str:
    """Say whether there is a token, and never which."""
    environment = machine.environment
    if environment.get("HF_TOKEN") or environment.get("HUGGING_FACE_HUB_TOKEN"):
        return "HF_TOKEN is set"
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    file = Path(environment.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    return "a token is stored" if file.is_file() else "no token is set, which only gated models need"


def _without_password(url: str) -> str | None:
    """Return an address without the user's name and password in it; None for what is no address of a server, which is
    not shown anywhere, since nobody knows what in it is secret.
    """
    try:
        parts = urlsplit(url)
        port = parts.port  # which is looked at only now
    except ValueError:
        return None
    place = parts.netloc.rpartition("@")[2]
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or "@" in parts.path:
        return None
    return parts._replace(netloc=place, query="", fragment="").geturl()
