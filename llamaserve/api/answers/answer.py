"""How an answer is described: its schema as a struct, examples, and the headers and errors that may come with it.

Structs, since they cost next to nothing when they are not used, as in a server that nobody asks for its document. A
field whose default is ``UNSET`` is not in every answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
FORM: Final = "multipart/form-data"

OK: Final = "OK"


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """Base of all that is in an answer."""


@dataclass(frozen=True)
class Content:
    """One form of an answer. ``types`` are what msgspec can make schemas of, one or several; of a stream they are those
    of an event's data.
    """

    types: Any
    examples: Mapping[str, Any]
    media_type: str = JSON
    done: bool = True  # whether the last event of a stream is ``[DONE]``

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types of which the answer has one."""
        return self.types if isinstance(self.types, tuple) else (self.types,)


@dataclass(frozen=True)
class Documented:
    """What the document says of a route beside what its function and its fields say. ``errors`` are the statuses beside
    those that every route has, ``requests`` examples of bodies, ``headers`` those that a good answer may have.
    """

    answers: tuple[Content, ...]
    errors: tuple[int, ...] = ()
    requests: Mapping[str, Any] = field(default_factory=dict)
    headers: tuple[str, ...] = ()
