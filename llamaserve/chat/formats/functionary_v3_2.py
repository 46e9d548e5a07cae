"""Functionary 3.2, which says first who each of its messages is to.

``>>>all`` comes before a text for the user on the next lines, and ``>>>`` with the name of a tool before its arguments.
The first ``>>>`` is in the prompt. An answer is kept to one call, and read with any number of them.

Source: the chat template of meetkai/functionary-medium-v3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llamaserve.chat.formats.format import escaped
from llamaserve.chat.literals import json_object
from llamaserve.chat.reading import CallBegins, CallEnds, Content, Incoming, Reading
from llamaserve.chat.tools import Tool
from llamaserve.engine.lark import string
from llamaserve.errors import InvalidRequest

SHOWN: tuple[str, ...] = ()  # there are no control tokens in it
THOUGHTS = None  # nor thoughts

_TO, _USER = ">>>", "all"


def matches(template: str) -> bool:
    """Say whether the model of a chat template writes like this."""
    return f"{_TO}{_USER}" in template


def begun(prompt: str) -> str:
    """Return what a prompt has of the answer. ``read_answer`` wants it before the answer's text."""
    return _TO if prompt.endswith(_TO) else ""


def lark(
    tools: Sequence[Tool],
    *,
    forced: bool,
    calls: bool,
    body: bool,
    begun: str = "",
    limited: bool = False,  # noqa: ARG001 (there are no thoughts)
) -> str:
    """Return the rules of a ``lark`` constraint for an answer to a prompt that has ``begun`` it, or not. The arguments
    of tool *i* are ``part{i}``, and with ``body`` the text of the answer is the part after those. Raises
    ``InvalidRequest`` for a tool that has the user's name.
    """
    for tool in tools:
        if tool.name == _USER:
            place = f"{tool.place}.name"
            raise InvalidRequest(f"{place}: this model calls the user {_USER}", param=place)
    offered = tools if calls else ()
    text = f"part{len(tools)}" if body else "text"
    choices = ([] if forced else [f"{_line(_USER)} {text}"]) + [f"call{i}" for i in range(len(offered))]
    lines = ["start: " + ("" if begun else f"{string(_TO)} ") + "answer", "answer: " + " | ".join(choices)]
    lines += [f"call{i}: {_line(tool.name)} part{i}" for i, tool in enumerate(offered)]
    if not body:
        lines += _text_and_call(offered)
    return "\n".join(lines)


def _text_and_call(tools: Sequence[Tool]) -> Iterator[str]:
    """Yield the rules of a text after which a tool may be called. Behind each ``>>>`` in it comes a call, or what
    begins like no tool's name: so no lexeme needs to tell a name from all the others, and the rules stay short.
    """
    no_head = f" & ~/(?s:.*){escaped(_TO)}(?s:.*)/" if tools else ""
    yield f"PIECE: /(?s:.*)/{no_head}"
    if not tools:
        yield "text: PIECE"
        return
    other = f"/[^{escaped(''.join(sorted({tool.name[0] for tool in tools})))}](?s:.*)/"
    yield "text: PIECE | head next"
    yield "next: " + " | ".join([*(f"call{i}" for i in range(len(tools))), "OTHER", "other_head next", '""'])
    yield "head[lazy]: HEAD"
    yield f"HEAD: /(?s:.*){escaped(_TO)}/"
    yield f"OTHER: {other}{no_head}"
    yield "other_head[lazy]: OTHER_HEAD"
    yield f"OTHER_HEAD: /(?s:.*){escaped(_TO)}/ & {other}"


def _line(recipient: str) -> str:
    return string(f"{recipient}\n")


def read_answer(
    text: Incoming,
    names: frozenset[str],
    raw_thoughts: bool = False,  # noqa: ARG001 (there are none)
) -> Reading[None]:
    """Yield the parts of an answer, in which tools of these names may be called. What a prompt has ``begun`` comes
    first in the text. A message to somebody who is not known is content, as is one that begins in no such way.
    """
    if not (yield from text.attempt(_spaced_message(text, names))) and not (yield from text.next_is(_TO)):
        yield from text.attempt(_to_user(text))
    while (yield from text.up_to((_TO,), Content, trim=True)) is not None:
        if not (yield from text.close(_spaced_message(text, names))) and not text.starved:
            space = yield from text.skip_space()
            yield from text.take(_TO)
            yield Content(space + _TO)


def _spaced_message(text: Incoming, names: frozenset[str]) -> Reading[bool]:
    """Read a call, or what stands before a text."""
    yield from text.skip_space()
    if (yield from text.take(_TO)) is None:
        return False
    return (yield from text.attempt(_call(text, names))) or (yield from _to_user(text))


def _to_user(text: Incoming) -> Reading[bool]:
    yield from text.skip_space()
    if (yield from text.take(_USER)) is None:
        return False
    return (yield from text.take("\n")) is not None


def _call(text: Incoming, names: frozenset[str]) -> Reading[bool]:
    name = yield from text.take(*names)
    if name is None:
        return False
    yield from text.skip_space()
    if (yield from text.next_is("{")) is None:
        return False
    yield CallBegins(name)
    if (yield from json_object(text)):
        yield CallEnds()
    return True
