"""Reads a value as JSON, as Python or as Gemma writes it, and yields it as JSON.

JSON is passed on as it is. Of what is not, some can only have been meant in one way: ``True``, a string in single
quotes, a key without quotes, a word. Knows nothing of calls.
"""

from __future__ import annotations

import json
import math
import re
import sys

from llamaserve.chat.reading import Arguments, Incoming, Reading

_DEPTH = 64  # values inside each other
_MAX_WORD = 400  # characters; Python reads integers of some 4,300 digits at most

_PLAIN = {'"': re.compile(r'[^"\\\x00-\x1f]+'), "'": re.compile(r"[^'\"\\\x00-\x1f]+")}
_WORD = re.compile(r"[^\s\"'`\\,:;=()\[\]{}<>]+")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_HEX = re.compile(r"[0-9A-Fa-f]+")
_WORDS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}
_SPACE = " \t\n\r"  # JSON's

_QUOTES = ('"""', "'''", '"', "'")
_CLOSE = {"{": "}", "[": "]", "(": ")"}
_BRACKETS = {"(": "[", ")": "]"}
_DIGITS = {"x": 2, "u": 4, "U": 8}  # of an escaped character
_MAX_ESCAPED = 0xFFFF  # what JSON can escape
_ESCAPES = {"'": "'", "a": "\\u0007", "v": "\\u000b", "0": "\\u0000", "\n": ""}  # what only Python has


def json_object(text: Incoming) -> Reading[bool]:
    """Yield an object; False if none begins here, or if it is cut or wrong."""
    if (yield from text.next_is("{")) is None:
        return False
    return (yield from literal(text))


def literal(text: Incoming, raw: str = "", depth: int = 0) -> Reading[bool]:
    """Yield a value as ``Arguments``; False if it is cut or wrong. ``raw`` is what stands around text that is written
    without escapes.
    """
    opened = yield from text.take(*_QUOTES, *_CLOSE, *filter(None, [raw]))
    if opened is None:
        word = yield from _word(text)
        if word:
            yield Arguments(_from_word(word))
        return bool(word)
    if opened not in _CLOSE:
        return (yield from _string(text, opened, raw))
    if depth == _DEPTH:
        return False
    yield Arguments(_BRACKETS.get(opened, opened))
    return (yield from _members(text, _CLOSE[opened], raw, depth + 1))


def as_json(text: str) -> str | None:
    """Return a value as JSON; None if it is not one from beginning to end."""
    incoming, found = _read(text)
    return found if incoming.exhausted else None


def is_cut(text: str) -> bool:
    """Say whether a text is the beginning of a value."""
    incoming, found = _read(text)
    return found is None and incoming.starved


def _read(text: str) -> tuple[Incoming, str | None]:
    """Read a value, and return what is left, and the value if it is complete."""
    incoming = Incoming()
    incoming.push(text.strip())
    incoming.end()
    found: list[str] = []

    def collect() -> Reading[None]:
        complete = yield from literal(incoming)
        if not complete:
            found.clear()

    found.extend(part.text for part in collect() if isinstance(part, Arguments))
    return incoming, "".join(found) or None


def is_word(text: str) -> bool:
    """Say whether a name can be read without quotes."""
    return len(text) <= _MAX_WORD and _WORD.fullmatch(text) is not None


def quoted(text: str) -> str:
    """Return a text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def inside(text: str) -> Arguments:
    """Return a piece of a text as a piece of a JSON string."""
    return Arguments(quoted(text)[1:-1])


def _members(text: Incoming, close: str, raw: str, depth: int) -> Reading[bool]:
    """Yield what is in brackets, and the bracket that closes them."""
    before = ""
    while True:
        before += yield from _space(text)
        if (yield from text.take(close)):
            yield Arguments(before.removeprefix(",") + _BRACKETS.get(close, close))
            return True
        if before:
            yield Arguments(before)
        if close == "}" and not (yield from _key(text, raw)):
            return False
        if not (yield from literal(text, raw, depth)):
            return False
        after = yield from _space(text)
        if after:
            yield Arguments(after)
        if (yield from text.take(",")):
            before = ","
        elif (yield from text.next_is(close)):
            before = ""
        else:
            return False


def _key(text: Incoming, raw: str) -> Reading[bool]:
    """Yield the name of a member, and the colon after it."""
    opened = yield from text.take(*_QUOTES, *filter(None, [raw]))
    if opened is None:
        word = yield from _word(text)
        if not word:
            return False
        yield Arguments(quoted(word))
    elif not (yield from _string(text, opened, raw)):
        return False
    space = yield from _space(text)
    if not (yield from text.take(":")):
        return False
    yield Arguments(f"{space}:{(yield from _space(text))}")
    return True


def _space(text: Incoming) -> Reading[str]:
    space = yield from text.skip_space()
    return "".join(letter for letter in space if letter in _SPACE)


def _word(text: Incoming) -> Reading[str]:
    """Pass a number or a word, and return it; nothing if there is none, or if it is endless."""
    word = ""
    while (yield from text.letter()) and len(word) <= _MAX_WORD:
        piece = text.run(_WORD)
        if not piece:
            break
        word += piece
    return word if len(word) <= _MAX_WORD else ""


def _from_word(word: str) -> str:
    if word in _WORDS or _NUMBER.fullmatch(word):
        return _WORDS.get(word, word)
    try:
        return str(int(word, 0))
    except ValueError:
        pass
    try:
        number = float(word)
    except ValueError:
        return quoted(word)
    return repr(number) if math.isfinite(number) else quoted(word)


def _string(text: Incoming, quote: str, raw: str) -> Reading[bool]:
    """Yield a string of which the first quote has been passed."""
    yield Arguments('"')
    closed = yield from (_raw(text, quote) if quote == raw else _escaped(text, quote))
    if closed:
        yield Arguments('"')
    return closed


def _raw(text: Incoming, quote: str) -> Reading[bool]:
    yield from text.up_to((quote,), inside)
    return (yield from text.take(quote)) is not None


def _escaped(text: Incoming, quote: str) -> Reading[bool]:
    plain = _PLAIN[quote[0]]
    while True:
        if piece := text.run(plain):
            yield Arguments(piece)
        letter = yield from text.letter()
        if not letter:
            return False
        if (yield from text.take(quote)):
            return True
        if (yield from text.take("\\")):
            yield from _escape(text)
        elif (yield from text.take(letter)):
            yield inside(letter)


def _escape(text: Incoming) -> Reading[None]:
    """Yield an escaped character."""
    letter = yield from text.letter()
    if not letter:
        return
    yield from text.take(letter)
    if letter in '"\\/bfnrt':
        yield Arguments(f"\\{letter}")
    elif letter in _DIGITS:
        yield from _numbered(text, letter)
    elif letter in _ESCAPES:
        yield Arguments(_ESCAPES[letter])
    else:
        yield inside(f"\\{letter}")


def _numbered(text: Incoming, kind: str) -> Reading[None]:
    """Yield a character that is given by its number, or what stands there if it is no number."""
    digits, wanted = "", _DIGITS[kind]
    while len(digits) < wanted:
        letter = yield from text.letter()
        if not letter or not _HEX.match(letter):
            break
        yield from text.take(letter)
        digits += letter
    number = int(digits, 16) if len(digits) == wanted else math.inf
    if number <= _MAX_ESCAPED:
        yield Arguments(f"\\u{digits[-4:]:0>4}")
    else:
        yield inside(chr(int(number)) if number <= sys.maxunicode else f"\\{kind}{digits}")
