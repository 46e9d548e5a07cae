"""From llama.cpp's notation for grammars, GBNF, to that of llguidance, a dialect of Lark.

A GBNF grammar is about single characters. llguidance has a lexer, which goes on with a lexeme for as long as it can and
never tries to end it earlier. A grammar without recursion becomes a single lexeme, where that makes no difference. For
other ones lexemes are chosen with which it makes none either. They are as large as possible: inside of strings, masks
are computed a hundred times faster than character by character. Knows the two notations, and nothing of vocabularies or
of how llguidance is called.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import operator
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

_MAX_LENGTH = 1 << 18  # characters of a grammar
_MAX_COUNT = 1_000_000  # of a repetition
_MAX_DEPTH = 500  # rules and groups in one another; at 2,500 llguidance ends the process, its stack being full
_MAX_REGEX = 200_000  # characters of a grammar that becomes a single lexeme; at a million llguidance refuses it

# To choose lexemes for a recursive grammar; where these don't suffice, they are single characters
_MAX_WORK = 300_000  # steps, of a few microseconds each
_MAX_ROUNDS = 50  # attempts
_MAX_LEXEMES = 5_000
_MAX_LEXEME = 30_000  # steps to read one
_MAX_ITEMS = 16  # of a sequence in one

Chars = tuple[tuple[int, int], ...]  # ranges of code points, in order and apart from each other

_TEXT: Chars = ((1, 0xD7FF), (0xE000, 0x10FFFF))  # what text consists of; llama.cpp lets no model write NUL either
# Else llguidance reads ahead text that must come, for up to seconds, and prescribes the tokens that it consists of
_OPTIONS = '%llguidance {"no_forcing": true}'
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
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}
_REPETITIONS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class GrammarError(ValueError):
    """The grammar can't be used. Says why, and in which line."""


class Item(NamedTuple):
    """What a sequence is made of: a character, a text, or a rule by its number; and how often it comes."""

    symbol: Chars | str | int
    low: int = 1
    high: int | None = 1


Items = tuple[Item, ...]  # a sequence
Left = tuple[Items, Items]  # a lexeme that is being read, and what is left of it
Place = tuple[int, int, int]  # a rule, one of its alternatives and an item of that
Part = tuple[int, int, int | None]  # a rule, or a lexeme with its bits inverted; and how often it comes


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


def to_lark(grammar: str) -> str:
    """Return llguidance's notation for the texts that the grammar describes, exactly those."""
    parsed = _Parser(grammar).parse()
    sizes = _survey(parsed)
    if sizes.get(parsed.root, _MAX_REGEX) < _MAX_REGEX:
        lines = [f"start: T{parsed.root}", *_terminals(parsed.rules, [parsed.root])]
    else:
        lines = _Writer(parsed, sizes).write()
    return "\n".join([_OPTIONS, *lines, ""])


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
            items.append(Item(_one(text) if len(text) == 1 else text))
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
            return _REPETITIONS[character]
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
        chars = _ordered(ranges, inverted=inverted)
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


def _one(character: str) -> Chars:
    return ((ord(character), ord(character)),)


def _ordered(ranges: Iterable[tuple[int, int]], *, inverted: bool) -> Chars:
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
    return min(size, _MAX_REGEX)


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


def _terminals(rules: dict[int, Rule], wanted: Iterable[int]) -> Iterator[str]:
    """Yield the definitions of rules without recursion as parts of lexemes."""
    todo = list(wanted)
    known = set(todo)
    while todo:
        number = todo.pop()
        yield f"T{number}: " + " | ".join(map(_sequence, rules[number].alternatives))
        new = set(rules[number].references()) - known
        todo.extend(new)
        known |= new


def _sequence(items: Iterable[Item]) -> str:
    """Write a part of a lexeme."""
    return " ".join(_symbol(item.symbol) + _quantifier(item.low, item.high) for item in items) or '""'


def _symbol(symbol: Chars | str | int) -> str:
    if isinstance(symbol, int):
        return f"T{symbol}"
    if isinstance(symbol, str):
        return json.dumps(symbol, ensure_ascii=False).replace("\x7f", "\\u007f")
    ranges = (f"\\x{{{low:x}}}" if low == high else f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in symbol)
    return f"/[{''.join(ranges)}]/"


def _quantifier(low: int, high: int | None) -> str:
    if (low, high) == (1, 1):
        return ""
    for character, counts in _REPETITIONS.items():
        if (low, high) == counts:
            return character
    return f"{{{low},{'' if high is None else high}}}"


class _TooComplex(Exception):
    """Choosing lexemes takes too long."""


class _Reader:
    """Finds out how texts of lexemes go on, and gives up when that takes too long."""

    def __init__(self, rules: dict[int, Rule]) -> None:
        self._rules = rules
        self._starts: dict[Items, tuple[list[tuple[Chars, Items]], bool]] = {}
        self._readings: dict[frozenset[Items], list[tuple[set[Items], list[Left]]]] = {}
        self._work = _MAX_WORK
        self._least = 0

    def spend(self, work: int) -> None:
        """Count steps, and give up when there were too many."""
        self._work -= work
        if self._work < self._least:
            raise _TooComplex

    def is_small(self, lexeme: Items) -> bool:
        """Tell whether a lexeme has any characters, and can be read in few steps."""
        if (key := frozenset([lexeme])) not in self._readings:
            self._least = max(0, self._work - _MAX_LEXEME)
            try:
                self.read(key)
            except _TooComplex:
                self._readings[key] = []
            self._least = 0
        return bool(self._readings[key])

    def read(self, lexemes: frozenset[Items]) -> list[tuple[set[Items], list[Left]]]:
        """Read all texts of the lexemes at once. Return, wherever some have ended, those, and those that can go on."""
        if lexemes in self._readings:
            return self._readings[lexemes]
        found = []
        todo = [frozenset((lexeme, lexeme) for lexeme in lexemes)]
        known = set(todo)
        while todo:
            new = self._advance(todo.pop()) - known
            todo.extend(new)
            known |= new
            for lefts in new:
                ended = {lexeme for lexeme, left in lefts if self.start(left)[1]}
                if ended:
                    found.append((ended, [(lexeme, left) for lexeme, left in lefts if self.start(left)[0]]))
        self._readings[lexemes] = found
        return found

    def _advance(self, lefts: Iterable[Left]) -> set[frozenset[Left]]:
        """Return what may be left after one more character, for all characters that make a difference."""
        steps = [(chars, (lexeme, after)) for lexeme, left in lefts for chars, after in self.start(left)[0]]
        bounds = []
        for index, (chars, _) in enumerate(steps):
            for low, high in chars:
                bounds += [(low, True, index), (high + 1, False, index)]
        bounds.sort()
        results = set()
        current: set[int] = set()
        for place, (bound, begins, index) in enumerate(bounds):
            (current.add if begins else current.discard)(index)
            if current and bounds[place + 1][0] > bound:
                self.spend(len(current))
                results.add(frozenset(steps[index][1] for index in current))
        return results

    def start(self, items: Items) -> tuple[list[tuple[Chars, Items]], bool]:
        """Return what texts of these items may begin with, and what is left then; and whether one of them is empty."""
        if items in self._starts:
            return self._starts[items]
        steps = []
        todo = [items]
        known = {items}
        while todo:
            left = todo.pop()
            self.spend(1 + len(left) // 16)  # for the copies
            if not left:
                continue
            (symbol, low, high), rest = left[0], left[1:]
            again = Item(symbol, max(low - 1, 0), None if high is None else high - 1)
            after = rest if high == 1 else (again, *rest)
            branches = [] if low else [rest]
            if isinstance(symbol, int):
                branches += [(*branch, *after) for branch in self._rules[symbol].alternatives]
            elif isinstance(symbol, tuple):
                steps.append((symbol, after))
            else:
                self.spend(len(symbol) // 64)
                steps.append((_one(symbol[0]), (Item(symbol[1:]), *after) if len(symbol) > 1 else after))
            new = set(branches) - known
            todo.extend(new)
            known |= new
        self._starts[items] = found = steps, () in known
        return found


class _Writer:
    """Chooses lexemes for a grammar, and writes it with them.

    As much as possible is a lexeme at first. Then all that the lexer may expect is gone through, as if after a rule
    could come whatever comes after it anywhere. Where a lexeme has ended and another, or the same, can go on with the
    next character, the lexer goes on. That is right unless what comes after the first may begin with this character;
    then what goes on is divided.
    """

    def __init__(self, grammar: Grammar, regular: Container[int]) -> None:
        """``regular`` are the rules without recursion."""
        self._rules = grammar.rules
        self._root = grammar.root
        self._regular = regular
        self._reader = _Reader(grammar.rules)
        self._cuts: set[Place] = set()  # items that begin a new lexeme
        self._opened: Counter[Place] = Counter()  # items that are no lexeme: 1 with their repetition, 2 at all
        self._plain = False  # whether all lexemes are single characters
        self._lexemes: list[tuple[Items, Place]] = []
        self._plan: dict[int, list[list[Part]]] = {}  # the rules in use, made of these lexemes and of rules

    def write(self) -> list[str]:
        """Return the lines of the grammar."""
        with contextlib.suppress(_TooComplex):
            for _ in range(_MAX_ROUNDS):
                self._make_plan()
                if not self._divide():
                    return self._lines()
        self._plain = True
        self._make_plan()
        return self._lines()

    def _lines(self) -> list[str]:
        names = {items: f"l{number}" for number, items in enumerate(dict(self._lexemes))}
        lines = [f"start: r{self._root}"]
        for number, alternatives in self._plan.items():
            texts = []
            for parts in alternatives:
                symbols = (names[self._lexemes[~symbol][0]] if symbol < 0 else f"r{symbol}" for symbol, _, _ in parts)
                quantifiers = (_quantifier(low, high) for _, low, high in parts)
                texts.append(" ".join(map(operator.add, symbols, quantifiers)) or '""')
            lines.append(f"r{number}: " + " | ".join(texts))
        for items, name in names.items():  # in rules of their own, as llguidance counts every use of a lexeme
            lines += [f"{name}: {name.upper()}", f"{name.upper()}: {_sequence(items)}"]
        inner = {item.symbol: None for items in names for item in items if isinstance(item.symbol, int)}
        return [*lines, *_terminals(self._rules, inner)]

    def _make_plan(self) -> None:
        self._lexemes = []
        self._plan = {}
        todo = [self._root]
        while todo:
            number = todo.pop()
            if number not in self._plan:
                alternatives = enumerate(self._rules[number].alternatives)
                self._plan[number] = [list(self._parts(tuple(items), number, index)) for index, items in alternatives]
                todo.extend(symbol for parts in self._plan[number] for symbol, _, _ in parts if symbol >= 0)

    def _parts(self, items: Items, number: int, index: int) -> Iterator[Part]:
        at = 0
        while at < len(items):
            end = self._end(items, number, index, at)
            if end > at:
                yield self._add_lexeme(items[at:end], (number, index, at)), 1, 1
            else:
                yield from self._open(items[at], (number, index, at))
            at = max(end, at + 1)

    def _end(self, items: Items, number: int, index: int, at: int) -> int:
        """Return the end of the lexeme that begins at ``at``, or that again if none does."""
        limit = min(len(items), at + _MAX_ITEMS)
        end = at
        while end < limit and self._is_regular(items[end].symbol) and (number, index, end) not in self._opened:
            end += 1
            if (number, index, end) in self._cuts:
                break
        return next((found for found in (end, at + 1) if at < found <= end and self._is_small(items[at:found])), at)

    def _is_regular(self, symbol: Chars | str | int) -> bool:
        return not isinstance(symbol, int) or symbol in self._regular

    def _is_small(self, items: Items) -> bool:
        return not self._plain and self._reader.is_small(items)

    def _add_lexeme(self, items: Items, place: Place) -> int:
        self._lexemes.append((items, place))
        return ~(len(self._lexemes) - 1)

    def _open(self, item: Item, place: Place) -> Iterator[Part]:
        """Yield what an item is made of."""
        symbol, low, high = item
        if isinstance(symbol, str):
            for character in symbol:
                yield self._add_lexeme((Item(_one(character)),), place), 1, 1
        elif isinstance(symbol, tuple):
            yield self._add_lexeme((Item(symbol),), place), low, high
        else:
            once = (Item(symbol),)
            whole = symbol in self._regular and (low, high) != (1, 1) and self._opened[place] < 2
            yield self._add_lexeme(once, place) if whole and self._is_small(once) else symbol, low, high

    def _divide(self) -> bool:
        """Divide the lexemes that the lexer would go on with where it must not, and tell whether there were any."""
        if len(self._lexemes) > _MAX_LEXEMES:
            raise _TooComplex
        wrong: set[tuple[Place, Items, Items]] = set()
        first, empty = self._first()
        following = self._following(first, empty)
        beginnings: dict[int, Chars] = {}
        todo, known = [first[self._root]], {first[self._root]}
        while todo:
            expected: dict[Items, list[int]] = {}
            for number in _bits(todo.pop()):
                self._reader.spend(1)
                expected.setdefault(self._lexemes[number][0], []).append(number)
            for ended, going_on in self._reader.read(frozenset(expected)):
                after = 0
                for number in (number for items in ended for number in expected[items]):
                    self._reader.spend(1)
                    after |= following[~number]
                if after not in known:
                    known.add(after)
                    todo.append(after)
                if going_on and after not in beginnings:
                    beginnings[after] = self._beginnings(after)
                for items, left in going_on:
                    if any(_overlap(chars, beginnings[after]) for chars, _ in self._reader.start(left)[0]):
                        wrong.update((self._lexemes[number][1], items, left) for number in expected[items])
        self._opened.update({place for place, items, _ in wrong if len(items) == 1})
        self._cuts |= {_cut(place, items, left) for place, items, left in wrong if len(items) > 1}
        return bool(wrong)

    def _first(self) -> tuple[dict[int, int], set[int]]:
        """Return which lexemes come first in each rule, as bits, and which rules may be empty; the same for lexemes."""
        first = dict.fromkeys(self._plan, 0) | {~number: 1 << number for number in range(len(self._lexemes))}
        empty = {~number for number, (items, _) in enumerate(self._lexemes) if self._reader.start(items)[1]}
        changed = True
        while changed:
            changed = False
            for number, alternatives in self._plan.items():
                for parts in alternatives:
                    self._reader.spend(1 + len(parts))
                    found = first[number]
                    for symbol, low, _ in parts:
                        found |= first[symbol]
                        if low and symbol not in empty:
                            break
                    else:
                        changed |= number not in empty
                        empty.add(number)
                    changed |= found != first[number]
                    first[number] = found
        return first, empty

    def _following(self, first: dict[int, int], empty: set[int]) -> dict[int, int]:
        """Return which lexemes may come after each rule and each lexeme."""
        following = dict.fromkeys(first, 0)
        changed = True
        while changed:
            changed = False
            for number, alternatives in self._plan.items():
                for parts in alternatives:
                    self._reader.spend(1 + len(parts))
                    after = following[number]
                    for symbol, low, high in reversed(parts):
                        found = following[symbol] | after | (0 if high == 1 else first[symbol])
                        changed |= found != following[symbol]
                        following[symbol] = found
                        after = first[symbol] | (0 if low and symbol not in empty else after)
        return following

    def _beginnings(self, lexemes: int) -> Chars:
        """Return the characters that some of these lexemes begin with."""
        ranges: list[tuple[int, int]] = []
        for number in _bits(lexemes):
            for chars, _ in self._reader.start(self._lexemes[number][0])[0]:
                self._reader.spend(len(chars))
                ranges += chars
        return _ordered(ranges, inverted=False)


def _cut(place: Place, items: Items, left: Items) -> Place:
    """Return where to cut a lexeme of which only that should have been left, or of which it is left within an item."""
    number, index, at = place
    same = next((same for same in range(len(items) - 1, 1, -1) if items[-same:] == left[-same:]), 1)
    return number, index, at + len(items) - same


def _bits(number: int) -> Iterator[int]:
    """Yield which bits are set."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def _overlap(one: Chars, other: Chars) -> bool:
    for low, high in one:
        place = bisect.bisect_right(other, high, key=operator.itemgetter(0))
        if place and other[place - 1][1] >= low:
            return True
    return False
