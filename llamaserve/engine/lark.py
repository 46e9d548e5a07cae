"""Writes grammars in llguidance's notation, a dialect of Lark.

A GBNF grammar is about single characters. llguidance has a lexer, which goes on with a lexeme for as long as it can and
never tries to end it earlier. A grammar without recursion becomes a single lexeme, where that makes no difference. For
other ones lexemes are chosen with which it makes none either. They are as large as possible: inside of strings, masks
are computed a hundred times faster than character by character. Knows the two notations, and nothing of vocabularies or
of how llguidance is called.
"""

from __future__ import annotations

import bisect
import contextlib
import operator
from collections import Counter
from collections.abc import Container, Iterable, Iterator

import msgspec

from llamaserve.engine.gbnf import REPETITIONS, Chars, Grammar, Item, Items, Rule, one, ordered, read

_MAX_REGEX = 200_000  # characters of a grammar that becomes a single lexeme; at a million llguidance refuses it

# To choose lexemes for a recursive grammar; where these don't suffice, they are single characters
_MAX_WORK = 300_000  # steps, of a few microseconds each
_MAX_ROUNDS = 50  # attempts
_MAX_LEXEMES = 5_000
_MAX_LEXEME = 30_000  # steps to read one
_MAX_ITEMS = 16  # of a sequence in one

# Else llguidance reads ahead text that must come, for up to seconds, and prescribes the tokens that it consists of
_OPTIONS = '%llguidance {"no_forcing": true}'

Left = tuple[Items, Items]  # a lexeme that is being read, and what is left of it
Place = tuple[int, int, int]  # a rule, one of its alternatives and an item of that
Part = tuple[int, int, int | None]  # a rule, or a lexeme with its bits inverted; and how often it comes


def from_gbnf(text: str) -> str:
    """Return the grammar of exactly the texts that a GBNF grammar describes. Raises ``GrammarError``."""
    grammar, sizes = read(text)
    if sizes.get(grammar.root, _MAX_REGEX) < _MAX_REGEX:
        lines = [f"start: T{grammar.root}", *_terminals(grammar.rules, [grammar.root])]
    else:
        lines = _Writer(grammar, sizes).write()
    return "\n".join([_OPTIONS, *lines, ""])


def from_choices(texts: Iterable[str]) -> str:
    """Return the grammar of some texts."""
    return "start: " + " | ".join(map(string, texts))


def string(text: str) -> str:
    """Return a text as Lark writes it."""
    return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")


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
        return string(symbol)
    ranges = (f"\\x{{{low:x}}}" if low == high else f"\\x{{{low:x}}}-\\x{{{high:x}}}" for low, high in symbol)
    return f"/[{''.join(ranges)}]/"


def _quantifier(low: int, high: int | None) -> str:
    if (low, high) == (1, 1):
        return ""
    for character, counts in REPETITIONS.items():
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
                steps.append((one(symbol[0]), (Item(symbol[1:]), *after) if len(symbol) > 1 else after))
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
                yield self._add_lexeme((Item(one(character)),), place), 1, 1
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
        return ordered(ranges, inverted=False)


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
