"""Whose request this is. Knows nothing of HTTP, or of how that was found out."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from llamaserve.keys.keyring import Key


@dataclass(frozen=True)
class Caller:
    """Who sends a request: the key, if it has one, and whether it may change the server. One without a key that may not
    is a stranger, to whom next to nothing is told.
    """

    key: Key | None
    admin: bool

    @property
    def name(self) -> str | None:
        """The name of the key."""
        return None if self.key is None else self.key.name

    @property
    def is_stranger(self) -> bool:
        """Whether the server has keys, and this request none of them."""
        return self.key is None and not self.admin


EVERYBODY: Final = Caller(None, admin=True)  # where there are no keys
STRANGER: Final = Caller(None, admin=False)
current: ContextVar[Caller] = ContextVar("caller", default=STRANGER)


def caller() -> Caller:
    """Return who has sent the request that is being answered."""
    return current.get()
