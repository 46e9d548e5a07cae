"""Calls as Python writes them: ``[f(a=1, b="x"), g()]``.

An answer is kept to Python, with ``True`` and ``None``, in values, lists and objects of the usual types; what only its
JSON schema can describe is written as JSON. Both are read, also mixed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from llamaserve.chat.formats.format import Rules, escaped, one_of, sequence
from llamaserve.chat.formats.notation import Notation, ValueRules
from llamaserve.chat.formats.parameters import Parameter, Parameters, Parts, Schemas
from llamaserve.chat.literals import literal, quoted
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Incoming, Reading
from llamaserve.chat.tools import Tool
from llamaserve.engine.lark import string

_MAX_KEY = 1024  # characters
_KEY = re.compile(r"""[^()\[\]{}"'=,\n]+""")
_TAG = re.compile(r"<[^\s<>]+>")
_PYTHON = Notation(("True", "False", "None"), ", ", lambda key: f"{quoted(key)}: ")


@dataclass(frozen=True)
class PythonCalls:
    """A list of calls, with ``begin`` before its bracket and ``end`` after it. Where these are tokens that some models
    leave out they are ``optional``: they are read, but an answer is kept to the list only.
    """

    name: str
    begin: str = ""
    end: str = ""
    optional: bool = False

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """See ``CallFormat``."""
        return tuple(dict.fromkeys(_TAG.findall(self.begin + self.end)))

    @property
    def marker(self) -> str | None:
        """See ``CallFormat``."""
        return None if self.optional or not self.begin else self.begin

    def for_tools(self, tools: Sequence[Tool]) -> PythonCalls:  # noqa: ARG002
        """See ``CallFormat``."""
        return self

    def rules(self, tools: Sequence[Tool], *, several: bool) -> Rules:
        """See ``CallFormat``."""
        parts = Parts()
        more = '(", " call)*' if several else ""
        end = "" if self.marker is None else sequence(self.end, self.shown)
        first, calls = (" | ".join(f"{kind}{i}" for i in range(len(tools))) for kind in ("first", "call"))
        lines = [
            f'rest: ({first}) {more} "]" {end}',
            "calls: rest" if self.marker is None else "calls: marker0 rest",
            f"call: {calls}",
        ]
        for number, tool in enumerate(tools):
            lines += self._rules_of(tool, number, parts)
        plain = "" if self.marker is not None else self._looks_like_a_call(tools)
        return Rules("\n".join(lines), plain, tuple(parts.constraints))

    def _rules_of(self, tool: Tool, number: int, parts: Parts) -> Iterator[str]:
        """Yield the rules of a call of one tool. The first lexeme of an answer is as long as there could still be a
        text instead of it: llguidance could not go back to a shorter one.
        """
        rules = ValueRules(_PYTHON, f"value{number}", Schemas(tool.parameters), parts, f"{tool.place}.parameters")
        members = [
            (f"{each.name}=", rules.value(each.schema), each.required) for each in Parameters(tool).listed(_is_writable)
        ]
        yield f"first{number}: {string(f'[{tool.name}(')} arguments{number}"
        yield f"call{number}: {string(f'{tool.name}(')} arguments{number}"
        yield f'arguments{number}: {rules.members(members)} ")"'
        yield from rules.lines

    def _looks_like_a_call(self, tools: Sequence[Tool]) -> str:
        """Return a regular expression of how calls begin, whatever white space there is."""
        begin = f"({escaped(self.begin)})?" if self.begin else ""
        return f"\\s*{begin}\\s*\\[\\s*{one_of(tool.name for tool in tools)}\\s*\\("

    def read(self, text: Incoming, names: frozenset[str]) -> Reading[bool]:
        """See ``CallFormat``."""
        if self.begin and (yield from text.take(self.begin)) is None and not self.optional:
            return False
        if not (yield from text.take_loosely("[")) or not (yield from self._call(text, names)):
            return False
        while not text.starved and (yield from text.attempt(self._next_call(text, names))):
            pass
        if not text.starved and (yield from text.close(text.take_loosely("]"))):
            yield from text.close(text.take_loosely(self.end))
        return True

    def _next_call(self, text: Incoming, names: frozenset[str]) -> Reading[bool]:
        return (yield from text.take_loosely(",")) and (yield from self._call(text, names))

    def _call(self, text: Incoming, names: frozenset[str]) -> Reading[bool]:
        """Read one call, if it is one."""
        yield from text.skip_space()
        name = yield from text.take(*names)
        if name is None or not (yield from text.take_loosely("(")):
            return False
        yield from text.skip_space()
        key = None if (yield from text.next_is(")")) else (yield from self._key(text))
        if key is None and (yield from text.next_is(")")) is None:
            return False
        yield CallBegins(name)
        yield Arguments("{")
        yield from self._arguments(text, key)
        return True

    def _arguments(self, text: Incoming, key: str | None) -> Reading[None]:
        """Read arguments from the value of the first one on, if there is one."""
        before = ""
        while key is not None:
            yield Arguments(f"{before}{quoted(key)}: ")
            yield from text.skip_space()
            if not (yield from literal(text)):
                return
            before = ", "
            key = yield from text.attempt(self._next_key(text))
        yield from text.attempt(text.take_loosely(","))
        if (yield from text.take_loosely(")")):
            yield Arguments("}")
            yield CallEnds()

    def _next_key(self, text: Incoming) -> Reading[str | None]:
        return (yield from self._key(text)) if (yield from text.take_loosely(",")) else None

    def _key(self, text: Incoming) -> Reading[str | None]:
        """Pass the name of an argument and what follows it, and return it."""
        yield from text.skip_space()
        key = ""
        while (yield from text.letter()) and len(key) <= _MAX_KEY and (piece := text.run(_KEY)):
            key += piece
        return key.strip() if key and (yield from text.take("=")) else None


def _is_writable(parameter: Parameter) -> bool:
    """Say whether a parameter's name can be told from what stands around it."""
    name = parameter.name
    return name == name.strip() and len(name) <= _MAX_KEY and _KEY.fullmatch(name) is not None
