"""FunctionGemma and Gemma 4: objects like JSON's, but with names without quotes and texts without escapes.

``<start_function_call>call:f{city:<escape>Rome<escape>,days:3}<end_function_call>`` is FunctionGemma's. An answer may
write as JSON what only its schema can describe, and JSON is read as well.

Sources: the chat template of google/gemma-4-31B-it, and FunctionGemma's formatting guide at ai.google.dev.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamaserve.chat.formats.format import Rules, sequence
from llamaserve.chat.formats.notation import JSON_WORDS, Notation, ValueRules
from llamaserve.chat.formats.parameters import Parameter, Parameters, Parts, Schemas
from llamaserve.chat.literals import is_word, literal
from llamaserve.chat.reading import CallBegins, CallEnds, Incoming, Reading
from llamaserve.chat.tools import Tool

_QUOTE = 1  # its number among the markers


@dataclass(frozen=True)
class GemmaCalls:
    """Calls between two tokens, and a token on both sides of a text."""

    name: str
    marker: str
    quote: str
    end: str

    @property
    def shown(self) -> tuple[str, ...]:
        """See ``CallFormat``."""
        return self.marker, self.quote, self.end

    def for_tools(self, tools: Sequence[Tool]) -> GemmaCalls:  # noqa: ARG002
        """See ``CallFormat``."""
        return self

    def rules(self, tools: Sequence[Tool], *, several: bool) -> Rules:
        """See ``CallFormat``."""
        parts = Parts()
        called = " | ".join(f"call{number}" for number in range(len(tools)))
        lines = [f"rest: body {'call*' if several else ''}", "calls: marker0 rest", "call: marker0 body"]
        lines.append(f'body: "call:" ({called}) marker2')
        for number, tool in enumerate(tools):
            lines += self._rules_of(tool, number, parts)
        return Rules("\n".join(lines), parts=tuple(parts.constraints))

    def _rules_of(self, tool: Tool, number: int, parts: Parts) -> Iterator[str]:
        notation = Notation(JSON_WORDS, ",", self._key, _QUOTE, self.quote)
        rules = ValueRules(notation, f"value{number}", Schemas(tool.parameters), parts, f"{tool.place}.parameters")
        members = [
            (self._key(each.name), rules.value(each.schema), each.required)
            for each in Parameters(tool).listed(self._is_writable)
        ]
        yield f'call{number}: {sequence(tool.name + "{", ())} {rules.members(members)} "}}"'
        yield from rules.lines

    def _key(self, name: str) -> str:
        return f"{name}:" if is_word(name) else f"{self.quote}{name}{self.quote}:"

    def _is_writable(self, parameter: Parameter) -> bool:
        return self.quote not in parameter.name

    def read(self, text: Incoming, names: frozenset[str]) -> Reading[bool]:
        """See ``CallFormat``."""
        if not (yield from self._call(text, names)):
            return False
        while not text.starved and (yield from text.attempt(self._call(text, names))):
            pass
        return True

    def _call(self, text: Incoming, names: frozenset[str]) -> Reading[bool]:
        """Read one call, if it is one."""
        if not (yield from text.take_loosely(f"{self.marker}call:")):
            return False
        yield from text.skip_space()
        name = yield from text.take(*names)
        if name is None:
            return False
        yield from text.skip_space()
        if (yield from text.next_is("{")) is None:
            return False
        yield CallBegins(name)
        if (yield from literal(text, self.quote)):
            yield CallEnds()
            yield from text.close(text.take_loosely(self.end))
        return True


FUNCTION_GEMMA = GemmaCalls("functiongemma", "<start_function_call>", "<escape>", "<end_function_call>")
GEMMA4 = GemmaCalls("gemma4", "<|tool_call>", '<|"|>', "<tool_call|>")
