"""What a format of tool calls is: rules that keep an answer to it, and a reader of the calls in an answer.

A format begins its calls with a marker, a text that does not come up in an answer otherwise; or calls are the whole
answer, and it shows only in how it begins that it is no text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llamaserve.chat.reading import Incoming, Reading
from llamaserve.chat.tools import Tool
from llamaserve.engine.lark import string
from llamaserve.engine.params import Constraint

_SPECIAL = re.compile(r"[\\/.^$|?*+(){}\[\]#&~-]")


@dataclass(frozen=True)
class Rules:
    """Rules of a ``lark`` constraint (``engine.params.Constraint``): ``calls`` is one or more calls. They are for the
    markers that the format has ``shown``, in that order, and for the ``parts``. If these are None, ``part{i}`` is the
    arguments of tool *i*.

    Of a format with a marker, ``rest`` is what follows the first marker. Of one without, ``plain`` is a regular
    expression of how text that is no call does not begin.
    """

    lark: str
    plain: str = ""
    parts: tuple[Constraint, ...] | None = None


class CallFormat(Protocol):
    """How a family of models writes tool calls."""

    @property
    def name(self) -> str:
        """The family's name."""

    @property
    def marker(self) -> str | None:
        """What calls begin with, if nothing else does. It is the first one ``shown``."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The texts in the calls' markup that are control tokens in some vocabularies."""

    def for_tools(self, tools: Sequence[Tool]) -> CallFormat:
        """Return the same for an answer that may call these tools: how a value is read depends on its schema."""

    def rules(self, tools: Sequence[Tool], *, several: bool) -> Rules:
        """Return the rules of calls of these tools: one call, or ``several``. Raises ``InvalidRequest`` for a tool that
        can't be called in this format.
        """

    def read(self, text: Incoming, names: frozenset[str]) -> Reading[bool]:
        """Yield the calls that begin here; False, and nothing yielded, when it is no call of one of the names."""


class AnswerFormat(Protocol):
    """How a family of models writes all of an answer: thoughts, text and calls. Modules may be one."""

    @property
    def SHOWN(self) -> tuple[str, ...]:  # noqa: N802 (a constant of a module)
        """The control tokens in the markup, and the markers of the rules."""

    @property
    def THOUGHTS(self) -> tuple[str, str] | None:  # noqa: N802
        """What stands before and after thoughts, if there are any."""

    def lark(self, tools: Sequence[Tool], *, forced: bool, calls: bool, body: bool, begun: str, limited: bool) -> str:
        """Return the rules of a constraint for an answer. The arguments of tool *i* are ``part{i}``, and with ``body``
        the answer's text is the part after those. It may have ``calls``, or is ``forced`` to. Where thinking is
        ``limited``, there is one row of thoughts at most.
        """

    def begun(self, prompt: str) -> str:
        """Return what a prompt has of the answer's markup already, which is to be read before the answer."""

    def read_answer(self, text: Incoming, names: frozenset[str], raw_thoughts: bool) -> Reading[None]:
        """Yield the parts of an answer. ``raw_thoughts`` leaves thoughts in the text as they are."""


def sequence(text: str, markers: Sequence[str]) -> str:
    """Return a text as the rules of a constraint write it, with its markers as such."""
    return " ".join(_items(text, markers)) or '""'


def _items(text: str, markers: Sequence[str]) -> Iterator[str]:
    at = 0
    for found in re.finditer("|".join(map(re.escape, sorted(markers, key=len, reverse=True))) or r"(?!)", text):
        if at < found.start():
            yield string(text[at : found.start()])
        yield f"marker{markers.index(found.group())}"
        at = found.end()
    if at < len(text):
        yield string(text[at:])


def escaped(text: str) -> str:
    """Return a text as part of a regular expression between slashes."""
    return "".join(_escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    if _SPECIAL.match(letter):
        return f"\\{letter}"
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(letter, letter)


def one_of(texts: Iterable[str]) -> str:
    """Return a regular expression, between slashes, of some texts."""
    return f"({'|'.join(map(escaped, texts))})"
