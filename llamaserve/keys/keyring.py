"""The keys that let somebody use the server: whose they are, what they allow, and whether a given one is among them.

Of a key only its SHA-256 is known here. That is enough for keys of 256 random bits, as ``new_secret`` makes them; one
that somebody thought up is never stored. Knows nothing of HTTP, of files or of what a request costs.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from llamaserve.errors import KeysError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_VISIBLE: Final = re.compile(r"[!-~]{1,512}")  # what a header can carry everywhere
_PREFIX: Final = "sk-"  # which some programs insist on
_GUESSABLE: Final = 16  # characters; whoever knows the server can try shorter ones out
_MOST: Final = 1_000_000_000

_Number = Annotated[int, Field(ge=1, le=_MOST, strict=True)]


class Limits(BaseModel):
    """What a key may use at most; None: as much as there is.

    ``concurrent`` requests are worked on at once and ``queue`` more (None: 64) may wait for that; of requests and of
    tokens (prompt and answer together) there may be so many a minute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    concurrent: _Number | None = None
    queue: Annotated[int, Field(ge=0, le=_MOST, strict=True)] | None = None
    requests_per_minute: _Number | None = None
    tokens_per_minute: _Number | None = None

    def over(self, defaults: Limits) -> Limits:
        """Return these limits, with the defaults where they say nothing."""
        return Limits(**(defaults.model_dump(exclude_none=True) | self.model_dump(exclude_none=True)))


@dataclass(frozen=True)
class Key:
    """A key: its name, the SHA-256 of its secret, whether its owner may change the server, and what it may use."""

    name: str
    digest: bytes = field(repr=False)
    admin: bool = False
    limits: Limits = field(default_factory=Limits)


def name_problem(name: str) -> str | None:
    """Return why a key can't have this name; None if it can."""
    if _NAME.fullmatch(name):
        return None
    return "a key's name has up to 64 letters, digits and . _ @ -, and starts with a letter or digit"


def new_secret() -> str:
    """Return a secret of 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: bytes) -> bytes:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret).digest()


def given_keys(api: Sequence[str], admin: Sequence[str]) -> list[Key]:
    """Return the keys of the command line or the environment, named ``api-key``, ``api-key-2``, … and ``admin-key``, ….
    Raises ``KeysError`` for what no header can carry.
    """
    return [
        _given(kind if number == 1 else f"{kind}-{number}", secret, admin=is_admin)
        for kind, secrets_of_kind, is_admin in (("api-key", api, False), ("admin-key", admin, True))
        for number, secret in enumerate(secrets_of_kind, 1)
    ]


def _given(name: str, secret: str, *, admin: bool) -> Key:
    if not _VISIBLE.fullmatch(secret):
        what = "is empty" if not secret else "must be of up to 512 visible ASCII characters, without spaces"
        raise KeysError(f"the {name} {what}", hint="llamaserve keys create NAME")
    return Key(name, digest_of(secret.encode()), admin)


def is_given_name(name: str) -> bool:
    """Whether keys of the command line may have this name."""
    return re.fullmatch(r"(api|admin)-key(-\d+)?", name) is not None


def is_guessable(secret: str) -> bool:
    """Whether a key is so short that it might be found out by trying."""
    return len(secret) < _GUESSABLE


class Keyring:
    """All keys of a server."""

    def __init__(self, given: Iterable[Key], listed: Iterable[Key] | None = None) -> None:
        """``given`` are those of the command line, ``listed`` those of a file, if there is one. Where there is none,
        and no given key is an admin's, all given ones are: which rights a key has never hangs on another one's being
        revoked. Raises ``KeysError`` if a secret occurs twice.
        """
        given = list(given)
        if listed is None and not any(key.admin for key in given):
            given = [Key(key.name, key.digest, admin=True, limits=key.limits) for key in given]
        self.keys: tuple[Key, ...] = (*given, *(listed or ()))
        first: dict[bytes, str] = {}
        for key in self.keys:
            if (other := first.setdefault(key.digest, key.name)) != key.name:
                raise KeysError(f"{other} and {key.name} are the same key", hint="give each its own")

    def find(self, secret: bytes) -> Key | None:
        """Return the key with this secret. All are compared, in a time that does not depend on where they differ."""
        digest, found = digest_of(secret), None
        for key in self.keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found
