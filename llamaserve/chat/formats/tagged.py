"""Calls whose arguments are written one by one, each in tags of its own, and texts among them without quotes.

``<parameter=city>Rome</parameter>`` is a text or not: the schema of the tool says which. The tags are what differs
between families. A text may be anything but what ends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from llamaserve.chat.formats.format import Rules, escaped, sequence
from llamaserve.chat.formats.parameters import Parameter, Parameters, Parts, Values
from llamaserve.chat.literals import as_json, inside, is_cut, quoted
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Incoming, Reading
from llamaserve.chat.tools import Tool
from llamaserve.engine.lark import string

_MAX_KEY = 1024  # characters
_MAX_ENDS = 100  # of what closes a value, inside one
_MAX_VALUE = 16 * 1024 * 1024  # characters of one that is no text, and so is read as a whole
_TAG = re.compile(r"<[^\s<>]+>")
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


@dataclass(frozen=True)
class TaggedCalls:
    """The texts around names and arguments: ``begin`` ( ``before`` name ``between`` parameters ``after`` ) ``end``,
    with ``separator`` between calls, and of each parameter: ``key`` name ``value`` value ``closing``. Line breaks at
    the end of ``value`` and at the start of ``closing`` are no part of the value.
    """

    name: str
    before: str
    between: str
    key: str
    value: str
    closing: str
    after: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    tools: Mapping[str, Parameters] = field(default_factory=dict)

    @cached_property
    def shown(self) -> tuple[str, ...]:
        """See ``CallFormat``. The tags of parameters are always text."""
        texts = (self.begin, self.before, self.after, self.end)
        return tuple(dict.fromkeys(tag for text in texts for tag in _TAG.findall(text) if tag != self._after_tag))

    @cached_property
    def marker(self) -> str:
        """See ``CallFormat``."""
        found = _TAG.match(self.begin + self.before)
        assert found is not None
        return found.group()

    @cached_property
    def _pad(self) -> str:
        return "\n" if self.value.endswith("\n") else ""

    @cached_property
    def _closing_tag(self) -> str:
        return self.closing.strip()

    @cached_property
    def _after_tag(self) -> str:
        """What comes next when there are no more parameters."""
        return self.after.split("\n")[0]

    def for_tools(self, tools: Sequence[Tool]) -> TaggedCalls:
        """See ``CallFormat``."""
        return replace(self, tools={tool.name: Parameters(tool) for tool in tools})

    def rules(self, tools: Sequence[Tool], *, several: bool) -> Rules:
        """See ``CallFormat``."""
        parts = Parts()
        more = f"({self._rule(self.separator)} call)* " if several else ""
        rest = f"{more}{self._rule(self.end)}"
        if self.begin:
            begin = self._rule(self.begin.removeprefix(self.marker))
            lines = [f"rest: {begin} call {rest}", "call: body"]
            before = self.before
        else:
            lines = [f"rest: body {rest}", "call: marker0 body"]
            before = self.before.removeprefix(self.marker)
        called = " | ".join(f"call{number}" for number in range(len(tools)))
        lines += ["calls: marker0 rest", f"body: {self._rule(before)} ({called}) {self._rule(self.after)}"]
        for number, tool in enumerate(tools):
            lines += self._rules_of(tool, number, parts)
        return Rules("\n".join(dict.fromkeys(lines)), parts=tuple(parts.constraints))

    def _rules_of(self, tool: Tool, number: int, parts: Parts) -> Iterator[str]:
        """Yield the rules of a call of one tool."""
        listed = Parameters(tool).listed(self._is_writable)
        names = [f"parameter{number}_{i}{'' if each.required else '?'}" for i, each in enumerate(listed)]
        yield " ".join([f"call{number}: {self._rule(tool.name + self.between)}", *names])
        for i, each in enumerate(listed):
            begin, end = string(self.key + each.name + self.value), string(self.closing)
            if not each.values.plain:
                yield f"parameter{number}_{i}: {begin} {parts.rule(each.schema, each.place)} {end}"
                continue
            rest = string(self.closing.lstrip()[len(self._closing_tag) :])
            yield f"parameter{number}_{i}: {begin} {self._text_rule(each.values)} {rest}"
            yield from self._text_lines(each.values)

    def _text_rule(self, values: Values) -> str:
        """Return the rule of a text and of what closes it."""
        texts = values.texts
        if texts.listed is not None:
            ending = self._pad + self._closing_tag
            return f"({' | '.join(string(text + ending) for text in self._choices(values))})"
        return "value" if (texts.shortest, texts.longest) == (0, None) else f"value{texts.shortest}_{texts.longest}"

    def _text_lines(self, values: Values) -> Iterator[str]:
        """Yield what the rule of a text refers to. Such a lexeme ends where it can for the first time."""
        texts, name = values.texts, self._text_rule(values)
        if texts.listed is not None:
            return
        closing = escaped(self._closing_tag)
        if name == "value":
            yield from ("value[lazy]: VALUE", f"VALUE: /(?s:.*){closing}/")
            return
        longest = "" if texts.longest is None else texts.longest
        length = f"(?s:.){{{texts.shortest},{longest}}}"
        if texts.shortest:  # else a line break before the tag counts as text: llguidance can't count far up to one
            length += escaped(self._pad)
        yield f"{name}[lazy]: {name.upper()}"
        yield f"{name.upper()}: (/{length}/ & ~/(?s:.*){closing}(?s:.*)/) /{closing}/"

    def _is_writable(self, parameter: Parameter) -> bool:
        """Say whether a parameter can be told from what stands around it."""
        name, values = parameter.name, parameter.values
        stop = self.value.strip()
        if not name or name != name.strip() or stop[:1] in name or len(name) + len(stop) > _MAX_KEY:
            return False
        return not values.plain or values.texts.listed is None or bool(self._choices(values))

    def _choices(self, values: Values) -> list[str]:
        texts = [text for text in values.texts.listed or () if self._closing_tag not in text]
        return texts + ["null"] * ("null" in values.types and "null" not in texts)

    def _rule(self, text: str) -> str:
        return sequence(text, self.shown)

    def read(self, text: Incoming, names: frozenset[str]) -> Reading[bool]:
        """See ``CallFormat``."""
        if not (yield from self._call(text, names, self.begin + self.before)):
            return False
        while not text.starved:
            if not (yield from text.attempt(self._call(text, names, self.separator + self.before))):
                break
        if not text.starved:
            yield from text.close(text.take_loosely(self.end))
        return True

    def _call(self, text: Incoming, names: frozenset[str], before: str) -> Reading[bool]:
        """Read one call, if it is one."""
        if not (yield from text.take_loosely(before)):
            return False
        yield from text.skip_space()
        name = yield from text.take(*names)
        if name is None or not (yield from text.take_loosely(self.between)):
            return False
        yield from text.skip_space()
        if (yield from text.next_is(self.key, self._after_tag)) is None:
            return False
        yield CallBegins(name)
        yield Arguments("{")
        yield from self._parameters(text, name)
        return True

    def _parameters(self, text: Incoming, tool: str) -> Reading[None]:
        before = ""
        while (key := (yield from text.attempt(self._key(text)))) is not None:
            yield Arguments(f"{before}{quoted(key)}: ")
            values = self.tools[tool].values(key) if tool in self.tools else Values()
            if not (yield from self._value(text, values)):
                return
            before = ", "
        if (yield from text.close(text.take_loosely(self.after))) or not text.starved:
            yield Arguments("}")
            yield CallEnds()

    def _key(self, text: Incoming) -> Reading[str | None]:
        """Pass the name of a parameter and what stands around it, and return it."""
        yield from text.skip_space()
        if (yield from text.take(self.key)) is None:
            return None
        key = yield from text.collect(self.value.strip()[:1], limit=_MAX_KEY)
        if key is None or not (yield from text.take_loosely(self.value)):
            return None
        if self._pad:
            yield from text.take(self._pad)
        return key.strip()

    def _value(self, text: Incoming, values: Values) -> Reading[bool]:
        """Yield a value, and pass what closes it; False if nothing does."""
        ends = tuple(dict.fromkeys((self._pad + self._closing_tag, self._closing_tag)))
        if values.plain and not ("null" in values.types and (yield from text.attempt(self._is_null(text, ends)))):
            yield Arguments('"')
            end = yield from text.up_to(ends, inside)
            if end is None:
                return False
            yield Arguments('"')
            yield from text.take(end)
            return True
        if values.plain:
            yield Arguments("null")
        else:
            value = yield from text.attempt(self._whole_value(text, ends))
            if value is None:
                value = yield from text.collect(*ends, limit=_MAX_VALUE)
            if value is None:
                return False
            yield Arguments(_as_json(value, values))
        yield from text.take(*ends)
        return True

    def _whole_value(self, text: Incoming, ends: tuple[str, ...]) -> Reading[str | None]:
        """Pass a value, and return it; None if it has no end. What closes it may also be in texts inside it."""
        value = ""
        for _ in range(_MAX_ENDS):
            piece = yield from text.collect(*ends, limit=_MAX_VALUE)
            if piece is None:
                return None
            value += piece
            if not is_cut(value):
                return value
            value += (yield from text.take(*ends)) or ""
        return None

    def _is_null(self, text: Incoming, ends: tuple[str, ...]) -> Reading[bool]:
        return bool((yield from text.take("null")) and (yield from text.next_is(*ends)))


def _as_json(value: str, values: Values) -> str:
    """Return a value that may be more than a text as JSON."""
    if "string" not in values.types:
        return as_json(value) or quoted(value.strip())
    plain = value.strip()
    plain = {"True": "true", "False": "false", "None": "null"}.get(plain, plain)
    try:
        read = json.loads(plain, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return quoted(value)
    fits = ("null" if read is None else _TYPES[type(read)]) in values.types
    return plain if fits else quoted(value)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
