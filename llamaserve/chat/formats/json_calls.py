"""Calls whose arguments are written as JSON, with texts around them: most families' format.

The texts are what differs: ``<tool_call>{"name": "f", "arguments": {}}</tool_call>`` has the name in a JSON object,
``[TOOL_CALLS]f[ARGS]{}`` before it. They are what a chat template writes, so they can be found out from one that nobody
has heard of. An answer is kept to them as they are; it is read whatever white space there is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llamaserve.chat.formats.format import Rules, escaped, one_of, sequence
from llamaserve.chat.literals import json_object
from llamaserve.chat.reading import CallBegins, CallEnds, Incoming, Reading
from llamaserve.chat.tools import Tool
from llamaserve.engine.lark import string

ID = "\0"  # in a text: where the call's id is
_MAX_ID = 256  # characters
_MARKER = re.compile(r"<[^\s<>]+>|<function=|\[/?[A-Z][A-Z_]+\]")


@dataclass(frozen=True)
class JsonCalls:
    """The texts around names and arguments: ``begin`` ( ``before`` name ``between`` arguments ``after`` ) ``end``, with
    ``separator`` between calls. Where a call begins, there is no white space first. An ``ID`` stands for a call's id.

    ``lone``: an answer has one call at most. ``id`` is a regular expression of ids. ``prefix`` is a token that calls
    may begin with.
    """

    name: str
    before: str
    between: str
    after: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    lone: bool = False
    id: str = "[A-Za-z0-9]{9}"  # Mistral's wants exactly so many
    prefix: str = ""

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """See ``CallFormat``."""
        texts = (self.begin, self.before, self.between, self.after, self.separator, self.end, self.prefix)
        return tuple(dict.fromkeys(marker for text in texts for marker in _MARKER.findall(text)))

    @cached_property
    def marker(self) -> str | None:
        """See ``CallFormat``."""
        found = _MARKER.match(self.begin + self.before)
        return found.group() if found is not None else None

    def for_tools(self, tools: Sequence[Tool]) -> JsonCalls:  # noqa: ARG002
        """See ``CallFormat``."""
        return self

    def rules(self, tools: Sequence[Tool], *, several: bool) -> Rules:
        """See ``CallFormat``."""
        more = f"({self._rule(self.separator)} call)* " if several and not self.lone else ""
        rest = f"{more}{self._rule(self.end)}"
        if self.marker is None:
            return self._rules_without_marker(tools, rest)
        begin, before = self.begin, self.before
        if begin:
            begin = begin.removeprefix(self.marker)
            lines = [f"rest: {self._rule(begin)} call {rest}", "calls: marker0 rest", "call: body"]
        else:
            before = before.removeprefix(self.marker)
            lines = [f"rest: body {rest}", "calls: marker0 rest", "call: marker0 body"]
        called = " | ".join(f"call{number}" for number in range(len(tools)))
        lines.append(f"body: {self._rule(before)} ({called}) {self._rule(self.after)}")
        lines += [f"call{i}: {self._rule(tool.name + self.between)} part{i}" for i, tool in enumerate(tools)]
        return Rules("\n".join(lines))

    def _rules_without_marker(self, tools: Sequence[Tool], rest: str) -> Rules:
        """The first lexeme of an answer is as long as there could still be a text instead of it: llguidance could not
        go back to a shorter one.
        """
        first, calls = (" | ".join(f"{kind}{i}" for i in range(len(tools))) for kind in ("first", "call"))
        lines = [f"calls: ({first}) {self._rule(self.after)} {rest}", f"call: ({calls}) {self._rule(self.after)}"]
        spaces = len(self.between) - len(self.between.lstrip())
        stop = self.between[: spaces + 1]
        for i, tool in enumerate(tools):
            begin = self.begin + self.before + tool.name
            head = string(begin + stop) if ID not in begin + stop else self._rule(begin + stop)
            lines.append(f"first{i}: {head} {self._rule(self.between.removeprefix(stop))} part{i}")
            lines.append(f"call{i}: {self._rule(self.before + tool.name + self.between)} part{i}")
        return Rules("\n".join(lines), self._looks_like_a_call(tools))

    def _rule(self, text: str) -> str:
        parts = text.split(ID)
        return f" /{self.id}/ ".join(sequence(part, self.shown) for part in parts)

    def _looks_like_a_call(self, tools: Sequence[Tool]) -> str:
        """Return a regular expression of how a call begins, whatever white space there is."""
        before = "".join(f"\\s*{escaped(letter)}" for letter in self.begin + self.before if not letter.isspace())
        return f"{before}\\s*{one_of(tool.name for tool in tools)}\\s*{escaped(self.between.strip()[:1])}"

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Return some calls, by name and JSON arguments, as an answer has them. Calls of which ids are part can't be
        written.
        """
        each = [self.before + name + self.between + arguments + self.after for name, arguments in calls]
        return self.begin + self.separator.join(each) + self.end

    def read(self, text: Incoming, names: frozenset[str]) -> Reading[bool]:
        """See ``CallFormat``."""
        if self.prefix and (yield from text.take(self.prefix)):
            yield from text.skip_space()
        if not (yield from self._call(text, names, self.begin + self.before)):
            return False
        while not self.lone and not text.starved:
            if not (yield from text.attempt(self._call(text, names, self.separator + self.before))):
                break
        if not text.starved:
            yield from text.close(text.take_loosely(self.end))
        return True

    def _call(self, text: Incoming, names: frozenset[str], before: str) -> Reading[bool]:
        """Read one call, if it is one."""
        if not (yield from self._pass(text, before)):
            return False
        yield from text.skip_space()
        name = yield from text.take(*names)
        if name is None or not (yield from self._pass(text, self.between)):
            return False
        yield from text.skip_space()
        if (yield from text.next_is("{")) is None:
            return False
        yield CallBegins(name)
        if (yield from json_object(text)):
            yield CallEnds()
            yield from text.close(self._pass(text, self.after))
        return True

    def _pass(self, text: Incoming, markup: str) -> Reading[bool]:
        """Pass a text around calls, with whatever id is in it."""
        parts = markup.split(ID)
        for number, part in enumerate(parts):
            if number:
                stop = part.strip()[:1]
                found = (yield from text.collect(stop, limit=_MAX_ID)) if stop else ""
                if found is None:
                    return False
            if not (yield from text.take_loosely(part)):
                return False
        return True
