"""The server's log: lines for people, or JSON objects for programs, each with the id of the request that it is about.

Where the lines go, and how long they are kept, is the platform's business: they are written to the standard error.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Any, Final, Literal

Format = Literal["human", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

_FACTS: Final = "facts"  # the attribute of a record that has what can be told apart from its words
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_HUMAN: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up(level: str, form: Format) -> None:
    """Have all that is logged from now on written in this form, from this level on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if form == "json" else HumanLines(_HUMAN))
    handler.addFilter(_with_request)
    logging.basicConfig(level=level.upper(), handlers=[handler])


def facts(**values: object) -> dict[str, Any]:
    """Return what to give to a logging function as ``extra``: values that can be told apart from the words."""
    return {_FACTS: {name: value for name, value in values.items() if value is not None}}


def _with_request(record: logging.LogRecord) -> bool:
    record.request_id = request_id.get()
    return True


class HumanLines(logging.Formatter):
    """A line for people: the facts follow the words, and a line break in either can't begin a line of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        values = dict(getattr(record, _FACTS, {}))
        if (name := getattr(record, "request_id", None)) is not None:
            values["request_id"] = name
        line = super().format(record)
        head, *rest = line.split("\n", 1)
        return "\n".join([" ".join([head, *(f"{name}={_plain(value)}" for name, value in values.items())]), *rest])

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - its name there
        """See ``logging.Formatter``."""
        return _CONTROL.sub(lambda found: repr(found[0])[1:-1], super().formatMessage(record))


def _plain(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if text.isprintable() and " " not in text else repr(text)


class JsonLines(logging.Formatter):
    """A JSON object on one line: ``time``, ``level``, ``logger``, ``message``, the facts, and what went wrong."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (name := getattr(record, "request_id", None)) is not None:
            line["request_id"] = name
        line |= getattr(record, _FACTS, {})
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)
