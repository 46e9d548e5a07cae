"""Reading an answer that arrives in pieces: what it is made of, and the text that is read.

What reads is a generator: it yields parts of the answer, or None while it waits for more text, and so is written from
top to bottom as if all of the text were there. What it yields does not depend on how the text was cut. Knows nothing of
any format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer proper."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of what the model thinks first."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """The model calls a tool of this name. What follows, up to ``CallEnds``, are the call's arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text of a call's arguments."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """The arguments are complete; without it the answer was cut."""


Part = Content | Reasoning | CallBegins | Arguments | CallEnds
Reading = Generator[Part | None, None, T]

_FEW = 2  # characters that are no beginning of a word yet
_SPACE = re.compile(r"\s+")


@lru_cache(maxsize=256)
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern that finds the first of some words, and the longest of those that begin there."""
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")


class Incoming:
    """Text of which the beginning is there. All methods that are ``Reading``s wait until they can tell."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # where reading has come to in it
        self._kept = 0  # how many readers may want to go back
        self._ended = False
        self._cut = False
        self.starved = False  # whether the end came where more was wanted

    def push(self, text: str) -> None:
        """Take more text."""
        if self._kept:
            self._text += text
        else:
            self._text = self._text[self._at :] + text
            self._at = 0

    def end(self, *, cut: bool = False) -> None:
        """No more text comes. ``cut``: there could have been more."""
        self._ended = True
        self._cut = cut

    @property
    def cut(self) -> bool:
        """Whether more would have been wanted of a text that was cut."""
        return self._cut and self.starved

    def attempt(self, reading: Reading[T]) -> Reading[T]:
        """Read, and go back to where it began if what reads says False or None. It must not have yielded parts then."""
        start = self._at
        self._kept += 1
        try:
            read = yield from reading
        finally:
            self._kept -= 1
        if read is None or read is False:
            self._at = start
        return read

    def close(self, reading: Reading[bool]) -> Reading[bool]:
        """Read like ``attempt`` what closes something. What there is of it is passed if the text ends in it."""
        read = yield from self.attempt(reading)
        if not read and self.starved:
            self._at = len(self._text)
        return read

    def wait(self) -> Reading[bool]:
        """Wait for more text, and say whether some may have come."""
        if self._ended:
            self.starved = True
            return False
        yield None
        return True

    def at_end(self) -> Reading[bool]:
        """Say whether there is no text left."""
        while self._at == len(self._text):
            if self._ended:
                return True
            yield None
        return False

    def whole(self) -> Reading[str]:
        """Wait for the end, and return all that is left. It is not passed."""
        while not self._ended:
            yield None
        return self._text[self._at :]

    @property
    def exhausted(self) -> bool:
        """Whether all of the text that is there has been passed."""
        return self._at == len(self._text)

    def letter(self) -> Reading[str]:
        """Return the next character, which is not passed; nothing if the text has ended."""
        while self._at == len(self._text):
            if not (yield from self.wait()):
                return ""
        return self._text[self._at]

    def run(self, letters: re.Pattern[str]) -> str:
        """Pass characters of a kind, of those that are there, and return them. ``letters`` matches one or more."""
        found = letters.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found.group()

    def next_is(self, *words: str) -> Reading[str | None]:
        """Return the longest of the words that comes next, or None. It is not passed."""
        while True:
            rest = self._text[self._at : self._at + max(map(len, words), default=0)]
            longer = any(len(word) > len(rest) and word.startswith(rest) for word in words)
            if not longer or not (yield from self.wait()):
                return max((word for word in words if rest.startswith(word)), key=len, default=None)

    def take(self, *words: str) -> Reading[str | None]:
        """Pass the longest of the words that comes next, and return it; None if there is none."""
        word = yield from self.next_is(*words)
        self._at += len(word or "")
        return word

    def take_loosely(self, word: str) -> Reading[bool]:
        """Pass a word if it comes next, whatever white space it or the text has; there may be some before it, too."""
        for letter in word:
            if letter.isspace():
                continue
            yield from self.skip_space()
            if (yield from self.take(letter)) is None:
                return False
        return True

    def skip_space(self) -> Reading[str]:
        """Pass white space, and return it."""
        start = self._at
        self._kept += 1
        try:
            while True:
                self.run(_SPACE)
                if self._at < len(self._text) or self._ended:
                    return self._text[start : self._at]
                yield None
        finally:
            self._kept -= 1

    def up_to(self, words: tuple[str, ...], part: Callable[[str], Part], *, trim: bool = False) -> Reading[str | None]:
        """Yield the text before the first of some words in parts, and return that word, which is not passed; None if
        none comes. With ``trim``, neither is white space before the word. A word of which only the beginning was there
        when the text was cut is no text; a single letter is.
        """
        while True:
            place, word = self._first(words, self._at, sure=self._ended)
            if self._ended and word is None:
                yield from self._rest(words, part, trim=trim)
                return None
            text = self._text[self._at : place]
            if trim:
                text = text.rstrip()
            if text:
                self._at += len(text)
                yield part(text)
            if word is not None:
                return word
            yield None

    def _rest(self, words: tuple[str, ...], part: Callable[[str], Part], *, trim: bool) -> Reading[None]:
        """Yield all that is left of a text that has ended, without the beginning of a word in which it was cut."""
        place = self._first(words, self._at, sure=False)[0] if self._cut else len(self._text)
        if len(self._text) - place < _FEW:
            place = len(self._text)
        text = self._text[self._at : place]
        if trim and place < len(self._text):
            text = text.rstrip()
        self._at = len(self._text)
        if text:
            yield part(text)

    def collect(self, *words: str, limit: int) -> Reading[str | None]:
        """Pass the text before the first of some words, and return it; None if none comes within ``limit`` characters,
        or at all.
        """
        start = looked = self._at
        self._kept += 1
        try:
            while True:
                enough = len(self._text) - start >= limit
                looked, word = self._first(words, looked, start + limit, sure=enough or self._ended)
                if word is not None:
                    self._at = looked
                    return self._text[start:looked]
                if enough or not (yield from self.wait()):
                    return None
        finally:
            self._kept -= 1

    def _first(
        self, words: tuple[str, ...], start: int, end: int | None = None, *, sure: bool
    ) -> tuple[int, str | None]:
        """Return where the first of some words begins, and the longest of those that begin there. None if it is not
        ``sure``, as more may come, whether one begins there.
        """
        found = _any_of(words).search(self._text, start, len(self._text) if end is None else end)
        place, word = (len(self._text), None) if found is None else (found.start(), found.group())
        if sure:
            return place, word
        longest = max(map(len, words), default=0)
        for at in range(max(start, len(self._text) - longest + 1), min(place + 1, len(self._text))):
            rest = self._text[at:]
            if any(len(each) > len(rest) and each.startswith(rest) for each in words):
                return at, None
        return place, word
