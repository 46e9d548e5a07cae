"""From llama.cpp's notation for grammars, GBNF, to that of llguidance, a dialect of Lark.

A GBNF grammar is about single characters. llguidance has a lexer, which takes the longest text that matches one of the
lexemes it may expect, and never tries a shorter one; so lexemes are chosen here that leave nothing to choose. A grammar
without recursion becomes a single lexeme. In other ones, no text that matches a lexeme is the beginning of a longer
text that matches the same lexeme or another. Single characters are always such lexemes; words and strings in quotation
marks mostly are, and masks are computed a hundred times faster with them. Knows the two notations, and nothing of
vocabularies or of how llguidance is called.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn

_MAX_LENGTH = 1 << 18  # characters of a grammar
_MAX_COUNT = 1_000_000  # of a repetition
_MAX_DEPTH = 500  # rules and groups in one another; at 2,500 llguidance ends the process, its stack being full
_MAX_REGEX = 200_000  # characters of a grammar that becomes a single lexeme; at a million llguidance refuses it
_MAX_WORK = 500_000  # steps to choose lexemes for a recursive grammar, about a microsecond each
_MAX_LEXEME = 50_000  # of these steps to see whether something can be a lexeme
_MAX_ITEMS = 16  # items of a sequence in a lexeme
_MAX_ROUNDS = 20  # attempts at choosing them
_WIDE = 26  # characters of a range that many tokens consist of

Chars = tuple[tuple[int, int], ...]  # ranges of code points, in order and apart from each other

_TEXT: Chars = ((1, 0xD7FF), (0xE000, 0x10FFFF))  # what text consists of; llama.cpp lets no model write NUL either
_OPTIONS = '%llguidance {"no_forcing": true}'  # else it leaves a model no choice how text that must come is tokenised
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


Items = tuple[Item, ...]


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
    return " ".join(_symbol(item.symbol) + _quantifier(item) for item in items) or '""'


def _symbol(symbol: Chars | str | int) -> str:
    if isinstance(symbol, int):
        return f"T{symbol}"
    if isinstance(symbol, str):
        return json.dumps(symbol, ensure_ascii=False).replace("\x7f", "\\u007f")
    ranges = (f"\\x{{{low:x}}}" if low == high else f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in symbol)
    return f"/[{''.join(ranges)}]/"


def _quantifier(item: Item) -> str:
    if (item.low, item.high) == (1, 1):
        return ""
    for character, counts in _REPETITIONS.items():
        if (item.low, item.high) == counts:
            return character
    return f"{{{item.low},{'' if item.high is None else item.high}}}"


class _TooComplex(Exception):
    """Choosing lexemes takes too long."""


Part = tuple[Items | int, str]  # a lexeme or a rule, and how often it comes
Left = tuple[int, Items]  # which lexeme is being read, and what is left of it


class _Writer:
    """Chooses lexemes for a grammar, and writes it with them.

    A lexeme is one item, or some more where most tokens would have to be read character by character otherwise. As long
    as a text of one is the beginning of a longer text of another, one of both is changed.
    """

    def __init__(self, grammar: Grammar, regular: Container[int]) -> None:
        """``regular`` are the rules without recursion."""
        self._rules = grammar.rules
        self._root = grammar.root
        self._regular = regular
        self._can_be: dict[Items, bool] = {}  # a lexeme, if it were the only one
        self._too_short: set[Items] = set()
        self._too_long: set[Items] = set()
        self._plain = False  # whether all lexemes are single characters
        self._steps: dict[Items, tuple[list[tuple[Chars, Items]], bool]] = {}  # see _next
        self._work = _MAX_WORK
        self._least_work = 0

    def write(self) -> list[str]:
        """Return the lines of the grammar."""
        with contextlib.suppress(_TooComplex):
            for _ in range(_MAX_ROUNDS):
                plan, lexemes = self._choose()
                conflicts = self._conflicts(lexemes)
                if not conflicts:
                    return self._lines(plan, lexemes)
                self._too_long |= {long for short, long, wide in conflicts if not wide or short in self._too_short}
                self._too_short |= {short for short, _, wide in conflicts if wide}
        self._plain = True
        return self._lines(*self._choose())

    def _lines(self, plan: dict[int, list[list[Part]]], lexemes: list[Items]) -> list[str]:
        names: dict[Items | int, str] = {lexeme: f"l{number}" for number, lexeme in enumerate(lexemes)}
        names |= {number: f"r{number}" for number in plan}
        lines = [f"start: r{self._root}"]
        for number, alternatives in plan.items():
            texts = (" ".join(names[symbol] + times for symbol, times in parts) for parts in alternatives)
            lines.append(f"r{number}: " + " | ".join(text or '""' for text in texts))
        for number, lexeme in enumerate(lexemes):  # in rules of their own, as llguidance counts every use of a lexeme
            lines += [f"l{number}: L{number}", f"L{number}: {_sequence(lexeme)}"]
        inner = {item.symbol: None for lexeme in lexemes for item in lexeme if isinstance(item.symbol, int)}
        return [*lines, *_terminals(self._rules, inner)]

    def _choose(self) -> tuple[dict[int, list[list[Part]]], list[Items]]:
        """Return the rules in use, cut into lexemes and other rules, and those lexemes."""
        plan: dict[int, list[list[Part]]] = {}
        lexemes: dict[Items, None] = {}
        todo = [self._root]
        while todo:
            number = todo.pop()
            if number in plan:
                continue
            plan[number] = [list(self._cut(tuple(items))) for items in self._rules[number].alternatives]
            for symbol in (symbol for parts in plan[number] for symbol, _ in parts):
                if isinstance(symbol, int):
                    todo.append(symbol)
                else:
                    lexemes[symbol] = None
        return plan, list(lexemes)

    def _cut(self, items: Items) -> Iterator[Part]:
        at = 0
        while at < len(items):
            end = self._end(items, at)
            if end > at:
                yield items[at:end], ""
            else:
                yield from self._take_apart(items[at])
            at = max(end, at + 1)

    def _end(self, items: Items, at: int) -> int:
        """Return the end of the lexeme that begins at ``at``, or that again if none does."""
        stop, limit = at, min(at + _MAX_ITEMS, len(items))
        while stop < limit and self._is_regular(items[stop].symbol):
            stop += 1
        end = at + 1
        if self._plain or end > stop or not (self._begins_wide(items[at:end]) or self._is_lexeme(items[at:end])):
            return at
        while end < stop and (self._begins_wide(items[end : end + 1]) or not self._is_lexeme(items[at:end])):
            end += 1
        if items[at:end] in self._too_short:
            end = next((longer for longer in range(stop, end, -1) if self._is_lexeme(items[at:longer])), end)
        for found in (end, at + 1):
            if items[at:found] not in self._too_long and self._is_lexeme(items[at:found]):
                return found
        return at

    def _take_apart(self, item: Item) -> Iterator[Part]:
        symbol = item.symbol
        if isinstance(symbol, str):
            for character in symbol:
                yield (Item(_one(character)),), ""
        elif isinstance(symbol, int) and not self._end((Item(symbol),), 0):
            yield symbol, _quantifier(item)
        else:
            yield (Item(symbol),), _quantifier(item)

    def _is_regular(self, symbol: Chars | str | int) -> bool:
        return not isinstance(symbol, int) or symbol in self._regular

    def _begins_wide(self, items: Items) -> bool:
        """Tell whether so many characters can come first that many tokens begin with one."""
        self._spend(1)
        return any(high - low + 1 >= _WIDE for chars, _ in self._next(items)[0] for low, high in chars)

    def _is_lexeme(self, items: Items) -> bool:
        """Tell whether no text of these items is empty or the beginning of a longer one."""
        self._spend(len(items))
        if items not in self._can_be:
            self._least_work = max(0, self._work - _MAX_LEXEME)
            try:
                self._can_be[items] = not self._next(items)[1] and not self._conflicts([items])
            except _TooComplex:
                self._can_be[items] = False
            self._least_work = 0
        return self._can_be[items]

    def _conflicts(self, lexemes: Sequence[Items]) -> set[tuple[Items, Items, bool]]:
        """Read all texts of the lexemes at once. Return pairs of them where a text of the first is the beginning of a
        longer text of the second, and whether many tokens could follow it there.
        """
        found: set[tuple[Items, Items, bool]] = set()
        todo = [frozenset(enumerate(lexemes))]
        known = set(todo)
        while todo:
            for left in self._read(todo.pop()):
                ended = [lexemes[number] for number, items in left if self._next(items)[1]]
                going_on = [(lexemes[number], items) for number, items in left if self._next(items)[0]]
                for long, items in going_on if ended else ():
                    wide = self._begins_wide(items)
                    found.update((short, long, wide) for short in ended)
                if left not in known:
                    known.add(left)
                    todo.append(left)
        return found

    def _read(self, expected: Iterable[Left]) -> set[frozenset[Left]]:
        """Return what may be left after one more character, for all characters that make a difference."""
        steps = [(chars, (number, after)) for number, items in expected for chars, after in self._next(items)[0]]
        bounds = []
        for index, (chars, _) in enumerate(steps):
            for low, high in chars:
                bounds += [(low, True, index), (high + 1, False, index)]
        bounds.sort()
        results = set()
        reading: set[int] = set()
        for place, (bound, begins, index) in enumerate(bounds):
            (reading.add if begins else reading.discard)(index)
            if reading and bounds[place + 1][0] > bound:
                self._spend(len(reading))
                results.add(frozenset(steps[index][1] for index in reading))
        return results

    def _next(self, items: Items) -> tuple[list[tuple[Chars, Items]], bool]:
        """Return the characters that the texts of these items can begin with, each with the items that are left then;
        and whether one of the texts is empty.
        """
        if items in self._steps:
            return self._steps[items]
        steps = []
        todo = [items]
        known = {items}
        while todo:
            left = todo.pop()
            self._spend(1 + len(left))
            if not left:
                continue
            (symbol, low, high), rest = left[0], left[1:]
            once = high == 1
            after = rest if once else (Item(symbol, max(low - 1, 0), None if high is None else high - 1), *rest)
            branches = [] if low else [rest]
            if isinstance(symbol, int):
                branches += [(*branch, *after) for branch in self._rules[symbol].alternatives]
            elif isinstance(symbol, tuple):
                steps.append((symbol, after))
            else:
                self._spend(len(symbol))
                steps.append((_one(symbol[0]), (Item(symbol[1:]), *after) if len(symbol) > 1 else after))
            new = set(branches) - known
            todo.extend(new)
            known |= new
        self._steps[items] = found = steps, () in known
        return found

    def _spend(self, work: int) -> None:
        self._work -= work
        if self._work < self._least_work:
            raise _TooComplex
