"""Writes the rules that a constraint's text may use for its markers: texts, or control tokens, with a meaning.

Tokens that are no part of any text are never in a lexeme for llguidance, so text ends where one comes. A lazy lexeme
ends as soon as it can, which is where the marker in it is complete for the first time. Knows llguidance's notation and
nothing of what markers are for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from llamaserve.engine.lark import string

Controls = Callable[[str], int | None]  # the control token of a name, if there is one

_MAX_MARKERS = 32
_MAX_MARKER = 128  # characters
_ANY = "/(?s:.*)/"
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)

# Else llguidance prescribes the tokens that text consists of which must come
_OPTIONS = '%llguidance {"no_forcing": true}'


def no_controls(name: str) -> None:
    """Return no token for any name."""


def prelude(markers: Sequence[str], text: str, controls: Controls) -> str:
    """Return the rules for the markers, as far as a text uses them, and the options. Raises ``ValueError`` for markers
    that can't be any.

    A marker that another one begins with is found before that.
    """
    if len(markers) > _MAX_MARKERS or len(set(markers)) < len(markers):
        raise ValueError(f"there must be at most {_MAX_MARKERS} markers, all different")
    if not all(0 < len(marker) <= _MAX_MARKER for marker in markers):
        raise ValueError(f"a marker must have at least one character and at most {_MAX_MARKER}")
    used = set(_NAME.findall(text))
    lines = [_OPTIONS, "TEXT: " + _without(markers)]
    for number, marker in enumerate(markers):
        token = controls(marker)
        rules = {
            "marker": _marker(number, marker, token),
            "until": _until(number, markers, token),
            "through": _through(number, marker, token),
        }
        for name, written in rules.items():
            if f"{name}{number}" in used:
                lines += written
    return "\n".join(lines)


def _marker(number: int, marker: str, token: int | None) -> Iterator[str]:
    literal = string(marker)
    yield f"marker{number}: {literal}" if token is None else f"marker{number}: <[{token}]> | {literal}"


def _until(number: int, markers: Sequence[str], token: int | None) -> Iterator[str]:
    """Yield the rules for text without any marker, and then one."""
    marker = markers[number]
    inside = [each for each in markers if each in marker and each != marker]
    others = [each for each in markers if each not in marker]
    before = f"({_without(inside)}) " if inside else f"{_ANY} "
    lazy = f"{before}{_pattern(marker)}"
    if others:
        lazy = f"({lazy}) & {_without(others)}"
    yield from _rules("until", number, "TEXT", lazy, token)


def _through(number: int, marker: str, token: int | None) -> Iterator[str]:
    """Yield the rules for text with other markers in it, and then this one."""
    if token is not None:
        yield f"BUT{number}: " + _without([marker])
    yield from _rules("through", number, f"BUT{number}", f"{_ANY} {_pattern(marker)}", token)


def _rules(name: str, number: int, text: str, lazy: str, token: int | None) -> Iterator[str]:
    """Yield the rules for some text and then a marker: as a token, or as the end of a lexeme."""
    choices = f"{name}{number}_text" if token is None else f"{text} <[{token}]> | {name}{number}_text"
    yield f"{name}{number}: {choices}"
    yield f"{name}{number}_text[lazy]: {name.upper()}{number}"
    yield f"{name.upper()}{number}: {lazy}"


def _without(markers: Sequence[str]) -> str:
    """Write the lexeme of texts in which none of the markers is."""
    if not markers:
        return _ANY
    return f"{_ANY} & ~/(?s:.*)({'|'.join(map(_escape, markers))})(?s:.*)/"


def _pattern(text: str) -> str:
    return f"/{_escape(text)}/"


def _escape(text: str) -> str:
    """Write a text as a part of a regular expression."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
