"""Reads grammars in llama.cpp's notation, GBNF, and refuses those that describe no text or are too deep.

Knows nothing of what becomes of a grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

_MAX_LENGTH = 1 << 18  # characters of a grammar
_MAX_COUNT = 1_000_000  # of a repetition
MOST_COUNTED = 1_000_000  # characters of a rule
_MAX_DEPTH = 500  # rules and groups in one another; at 2,500 llguidance ends the process, its stack being full

Chars = tuple[tuple[int, int], ...]  # ranges of code points, in order and apart from each other

_TEXT: Chars = ((1, 0xD7FF), (0xE000, 0x10FFFF))  # what text consists of; llama.cpp lets no model write NUL either
_SPACE = re.compile(r"(?:[ \t]+|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*)*")
_LINE_END = re.compile(r"\r\n?|\n")
_NAME = re.compile(r"[a-zA-Z0-9_-]+")
_COUNT = re.compile(r"[0-9]+")
_PLAIN_TEXT = re.compile(r'[^"\\\ud800-\udfff]+')
_CHARACTER = re.compile(
    r"""\\(?: x([0-9a-fA-F]{2}) | u([0-9a-fA-F]{4}) | U([0-9a-fA-F]{8}) | ([nrt\\"\[\]-]) ) | ([^\\])""",
    re.VERBOSE | re.DOTALL,
)
REPETITIONS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}  # counts by their signs
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}


class GrammarError(ValueError):
    """The grammar can't be used. Says why, and in which line."""


class Item(NamedTuple):
    """What a sequence is made of: a character, a text, or a rule by its number; and how often it comes."""

    symbol: Chars | str | int
    low: int = 1
    high: int | None = 1


Items = tuple[Item, ...]  # a sequence


@dataclass(slots=True)
class Rule:
    """A rule, or a group in one. ``at`` is its place in the grammar's text."""

    name: str
    at: int
    alternatives: list[list[Item]] = field(default_factory=lambda: [[]])

    def references(self) -> Iterator[int]:
        """Yield the rules in it, in order."""
        return (item.symbol for items in self.alternatives for item in items if isinstance(item.symbol, int))


@dataclass(slots=True)
class Grammar:
    """Rules by number, of which the one called root describes the whole text."""

    text: str
    rules: dict[int, Rule]
    root: int


def read(text: str) -> tuple[Grammar, dict[int, int]]:
    """Return a grammar, and the sizes in characters, all included, of those rules in use that are not recursive. Raises
    ``GrammarError``.
    """
    grammar = _Parser(text).parse()
    return grammar, _survey(grammar)


def _error(text: str, at: int, message: str) -> GrammarError:
    return GrammarError(f"line {len(_LINE_END.findall(text, 0, at)) + 1}: {message}")


class _Parser:
    """Reads a grammar as llama.cpp does. Every group becomes a rule of its own."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._numbers: dict[str, int] = {}
        self._mentions: list[tuple[str, int]] = []  # of each rule: its name, and where that is first
        self._rules: dict[int, Rule] = {}

    def parse(self) -> Grammar:
        """Return the grammar. Of rules with the same name, the last one counts."""
        if len(self._text) > _MAX_LENGTH:
            raise GrammarError(f"the grammar is longer than {_MAX_LENGTH} characters")
        if "\0" in self._text:
            self._fail("there is a NUL character", self._text.index("\0"))
        self._skip(lines=True)
        while self._at < len(self._text):
            self._rule()
        for rule in self._rules.values():
            for number in rule.references():
                if number not in self._rules:
                    name, at = self._mentions[number]
                    self._fail(f'there is no rule "{name}"', at)
        for rule in self._rules.values():
            rule.alternatives = [
                [item for item in items if item.symbol != "" and item.high != 0] for items in rule.alternatives
            ]
        if "root" not in self._numbers:
            raise GrammarError('there is no rule "root"')
        return Grammar(self._text, self._rules, self._numbers["root"])

    def _fail(self, message: str, at: int | None = None) -> NoReturn:
        raise _error(self._text, self._at if at is None else at, message)

    def _unexpected(self, wanted: str) -> NoReturn:
        self._fail(f"{wanted} is expected, and not {repr(self._peek()) if self._peek() else 'the end'}")

    def _peek(self, ahead: int = 0) -> str:
        """Return the next character, or nothing at the end."""
        return self._text[self._at + ahead : self._at + ahead + 1]

    def _skip(self, *, lines: bool) -> None:
        """Go past blanks and comments, and past the ends of lines if ``lines``."""
        found = (_SPACE_AND_LINES if lines else _SPACE).match(self._text, self._at)
        self._at = found.end() if found else self._at

    def _take(self, pattern: re.Pattern[str], what: str) -> re.Match[str]:
        found = pattern.match(self._text, self._at)
        if not found:
            self._unexpected(what)
        self._at = found.end()
        return found

    def _number(self, name: str, at: int) -> int:
        """Return the number of the rule of that name."""
        number = self._numbers.setdefault(name, len(self._mentions))
        if number == len(self._mentions):
            self._mentions.append((name, at))
        return number

    def _add_group(self, group: Rule) -> int:
        """Take in a rule that has no name of its own, and return its number."""
        number = len(self._mentions)
        self._mentions.append((group.name, group.at))
        self._rules[number] = group
        return number

    def _rule(self) -> None:
        at = self._at
        name = self._take(_NAME, "the name of a rule")[0]
        self._skip(lines=False)
        if not self._text.startswith("::=", self._at):
            self._unexpected('"::="')
        self._at += 3
        self._skip(lines=True)
        number = self._number(name, at)
        self._rules[number] = rule = Rule(name, at)
        self._alternatives(rule)
        if self._peek() not in ("", "\r", "\n"):
            self._unexpected("the end of the line")
        self._skip(lines=True)

    def _alternatives(self, rule: Rule) -> None:
        """Read all that is after ``::=``."""
        unclosed = [rule]  # and the groups in it
        while character := self._peek():
            at = self._at
            items = unclosed[-1].alternatives[-1]
            if character == "|":
                self._at += 1
                unclosed[-1].alternatives.append([])
            elif character == "(":
                self._at += 1
                unclosed.append(Rule(rule.name, at))
            elif character == ")" and len(unclosed) > 1:
                self._at += 1
                number = self._add_group(unclosed.pop())
                unclosed[-1].alternatives[-1].append(Item(number))
            elif character in "*+?{":
                self._repeat(items, Rule(rule.name, at))
            elif not self._symbol(items):
                break
            self._skip(lines=character in "|(" or len(unclosed) > 1)
        if len(unclosed) > 1:
            line = len(_LINE_END.findall(self._text, 0, unclosed[-1].at)) + 1
            self._unexpected(f'")" for the "(" in line {line}')

    def _symbol(self, items: list[Item]) -> bool:
        """Read a string, a class, a dot or the name of a rule, and tell whether there was one."""
        character = self._peek()
        if character == '"':
            text = self._string()
            items.append(Item(one(text) if len(text) == 1 else text))
        elif character == "[":
            items.append(Item(self._class()))
        elif character == ".":
            self._at += 1
            items.append(Item(_TEXT))
        elif character in "<!":
            self._fail("tokens, such as <think> or <[1]>, can't be used in a grammar here; write text")
        elif found := _NAME.match(self._text, self._at):
            items.append(Item(self._number(found[0], self._at)))
            self._at = found.end()
        else:
            return False
        return True

    def _repeat(self, items: list[Item], group: Rule) -> None:
        """Read how often the last item comes. A text, and what is repeated already, is made a group for it."""
        if not items:
            self._fail(f'there is nothing that "{self._peek()}" could repeat')
        low, high = self._counts()
        item = items.pop()
        if isinstance(item.symbol, str) or (item.low, item.high) != (1, 1):
            group.alternatives = [[item]]
            item = Item(self._add_group(group))
        items.append(Item(item.symbol, low, high))

    def _counts(self) -> tuple[int, int | None]:
        character = self._peek()
        self._at += 1
        if character != "{":
            return REPETITIONS[character]
        self._skip(lines=True)
        low = self._count()
        high: int | None = low
        if self._peek() == ",":
            self._at += 1
            self._skip(lines=True)
            high = None if self._peek() == "}" else self._count()
        if self._peek() != "}":
            self._unexpected('"}"')
        if high is not None and high < low:
            self._fail(f"the repetition {{{low},{high}}} ends before it begins")
        self._at += 1
        return low, high

    def _count(self) -> int:
        digits = self._take(_COUNT, "a number")[0].lstrip("0")
        if len(digits) > len(str(_MAX_COUNT)) or int(digits or "0") > _MAX_COUNT:
            self._fail(f"a repetition can't be of more than {_MAX_COUNT}")
        self._skip(lines=True)
        return int(digits or "0")

    def _string(self) -> str:
        start = self._at
        self._at += 1
        text = ""
        while self._peek() != '"':
            if found := _PLAIN_TEXT.match(self._text, self._at):
                text += found[0]
                self._at = found.end()
                continue
            at = self._at
            code = self._code("string", start)
            if not any(low <= code <= high for low, high in _TEXT):
                self._fail(f"U+{code:04X} is no character of text", at)
            text += chr(code)
        self._at += 1
        return text

    def _class(self) -> Chars:
        start = self._at
        self._at += 1
        inverted = self._peek() == "^"
        self._at += inverted
        ranges = []
        while self._peek() != "]":
            low = high = self._code("class", start)
            if self._peek() == "-" and self._peek(1) != "]":
                self._at += 1
                high = self._code("class", start)
            if high < low:
                self._fail("a range in the class ends before it begins")
            ranges.append((low, high))
        self._at += 1
        chars = ordered(ranges, inverted=inverted)
        if not ranges or not chars:
            self._fail("the class has no characters", start)
        return chars

    def _code(self, what: str, start: int) -> int:
        """Read a character, or an escape that stands for one, and return its code point."""
        if self._at == len(self._text):
            self._fail(f"the {what} is not closed", start)
        found = _CHARACTER.match(self._text, self._at)
        if not found:
            self._fail(f"\\{self._peek(1)} is no escape, or its digits are missing")
        self._at = found.end()
        two, four, eight, escaped, plain = found.groups()
        if digits := two or four or eight:
            return int(digits, 16)
        return ord(_CONTROLS.get(escaped, escaped) if escaped else plain)


def one(character: str) -> Chars:
    return ((ord(character), ord(character)),)


def ordered(ranges: Iterable[tuple[int, int]], *, inverted: bool) -> Chars:
    """Return the characters of text that are in some of the ranges, or, if ``inverted``, those that are in none."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    if inverted:
        starts = [0, *(high + 1 for _, high in merged)]
        ends = [*(low - 1 for low, _ in merged), _TEXT[-1][1]]
        merged = list(zip(starts, ends, strict=True))
    cut = [(max(low, first), min(high, last)) for low, high in merged for first, last in _TEXT]
    return tuple((low, high) for low, high in cut if low <= high)


def _survey(grammar: Grammar) -> dict[int, int]:
    """Return the sizes in characters, all included, of those rules in use that are not recursive. Refuses rules that
    never end, and rules too deep in one another for llguidance, which visits them in the same order.
    """
    rules = grammar.rules
    sizes: dict[int, int] = {}
    heights: dict[int, int] = {}
    recursive: set[int] = set()
    path = [grammar.root]
    entered = {grammar.root}
    rests = [rules[grammar.root].references()]
    while path:
        number = path[-1]
        for child in rests[-1]:
            if child not in entered:
                path.append(child)
                entered.add(child)
                rests.append(rules[child].references())
                break
            if child not in sizes:  # it is in the path, or refers to a rule that was when it was visited
                recursive.add(number)
        else:
            path.pop()
            rests.pop()
            if number not in recursive:
                sizes[number] = _size(rules[number], sizes)
                heights[number] = 1 + max((heights[child] for child in rules[number].references()), default=0)
            elif path:
                recursive.add(path[-1])
        if len(path) > _MAX_DEPTH or heights.get(number, 0) > _MAX_DEPTH:
            _refuse(grammar, number, f"has more than {_MAX_DEPTH} rules and groups in one another")
    endless = _endless(rules, entered)
    if endless:
        _refuse(grammar, min(endless, key=lambda number: rules[number].at), "never ends")
    return sizes


def _refuse(grammar: Grammar, number: int, message: str) -> NoReturn:
    rule = grammar.rules[number]
    raise _error(grammar.text, rule.at, f'the rule "{rule.name}" {message}')


def _size(rule: Rule, sizes: dict[int, int]) -> int:
    """Return how many characters a rule has, up to a limit, repetitions not counted."""
    size = 0
    for items in rule.alternatives:
        for item in items:
            symbol = item.symbol
            size += sizes[symbol] if isinstance(symbol, int) else len(symbol) if isinstance(symbol, str) else 1
    return min(size, MOST_COUNTED)


def _endless(rules: dict[int, Rule], used: Iterable[int]) -> set[int]:
    """Return the rules that describe no text at all, because each of their alternatives has such a rule in it."""
    endless = set(used)
    users: dict[int, list[tuple[int, set[int]]]] = {number: [] for number in endless}
    ready = []
    for number in endless:
        for items in rules[number].alternatives:
            needed = {item.symbol for item in items if isinstance(item.symbol, int) and item.low}
            for child in needed:
                users[child].append((number, needed))
            if not needed:
                ready.append(number)
    while ready:
        number = ready.pop()
        if number in endless:
            endless.remove(number)
            for user, needed in users[number]:
                needed.remove(number)
                if not needed:
                    ready.append(user)
    return endless
