"""Whose request this is. Knows nothing of HTTP, or of how that was found out."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Caller:
    """Who sends a request: the name of the key, None if it has none, and whether it may change the server. One without
    a name that may not is a stranger, to whom next to nothing is told.
    """

    name: str | None
    admin: bool

    @property
    def is_stranger(self) -> bool:
        """Whether the server has keys, and this request none of them."""
        return self.name is None and not self.admin


EVERYBODY: Final = Caller(None, admin=True)  # where there are no keys
current: ContextVar[Caller] = ContextVar("caller", default=EVERYBODY)


def caller() -> Caller:
    """Return who has sent the request that is being answered."""
    return current.get()
