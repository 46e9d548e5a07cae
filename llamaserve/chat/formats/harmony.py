"""Harmony, in which gpt-oss writes the whole of an answer: messages in channels, with a header each.

``<|channel|>analysis<|message|>…<|end|>`` are thoughts; the next message follows ``<|start|>assistant``. One in the
``final`` channel is the answer proper. One in the ``commentary`` channel that is ``to=functions.NAME`` is a call, and
any other there a preamble, which is for the user to see. A call ends the answer, so there is one at most. Models also
write headers that are not quite right: what they say is not lost because of that.

Sources: docs/format.md of openai/harmony, and the chat template of openai/gpt-oss-20b.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from llamaserve.chat.formats.format import sequence
from llamaserve.chat.literals import json_object
from llamaserve.chat.reading import CallBegins, CallEnds, Content, Incoming, Reading, Reasoning
from llamaserve.chat.tools import Tool
from llamaserve.errors import ChatTemplateError

START, CHANNEL, CONSTRAIN, MESSAGE, END = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"
SHOWN = (START, CHANNEL, CONSTRAIN, MESSAGE, END)  # control tokens; also the markers of ``lark``'s rules
THOUGHTS = (f"{CHANNEL}analysis{MESSAGE}", END)  # what stands before and after them

_ROLE = "assistant"
_CHANNELS = ("analysis", "commentary", "final")
_IN_HEADERS = (START, CHANNEL, CONSTRAIN, MESSAGE)
_ENDS = (END, "<|return|>", "<|call|>")  # the last two end an answer, and only come where all tokens are shown
_AFTER_TEXT = (START, CHANNEL, *_ENDS)
_ALL = (*_IN_HEADERS, *_ENDS)
_KINDS = (f" {CONSTRAIN}json", f"{CONSTRAIN}json", " json", "")  # how a header may say that a call's message is JSON
_NOBODY = frozenset({"assistant", "user", "all"})  # recipients that are no tools
_RECIPIENTS = ("to=functions.", "to=browser.", "to=python")  # how those begin that models know
_MAX_HEADER = 1024  # characters between two markers
_MAX_ODD = 2  # words that are none of a header, in what is one nevertheless
_BETWEEN = "\n\n"  # two messages of a kind

_Kind = type[Content] | type[Reasoning]

_OTHER_ROLE = re.compile(rf"<\|start\|>\s*(?!to=|{_ROLE}\b)[^\s<]")
_CHANNEL_OF = re.compile(rf"<\|channel\|>\s*({'|'.join(_CHANNELS)})")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_WORD = re.compile(r"<\|[a-z]+\|>|(?:(?!<\|[a-z]+\|>)\S)+")
_MARKUP = re.compile(
    rf"((\s*({'|'.join(map(re.escape, _IN_HEADERS))}|({'|'.join((_ROLE, *_CHANNELS))})(?![a-z])))+\s*)?"
)
_HEADER_WORDS = (*_IN_HEADERS, _ROLE, *_CHANNELS, "json", "code", *_RECIPIENTS)


def matches(template: str) -> bool:
    """Say whether the model of a chat template writes like this."""
    return all(marker in template for marker in (START, CHANNEL, MESSAGE))


def begun(prompt: str) -> str:
    """Return what a prompt has of the answer's first header, after ``<|start|>assistant``. ``read_answer`` wants it
    before the answer's text.
    """
    _, start, message = prompt.rpartition(START + _ROLE)
    if not start or any(marker in message for marker in (START, *_ENDS)):
        return ""
    header, end, _ = message.partition(MESSAGE)
    return f"{header}{end}" if header.strip() or end else ""


def lark(
    tools: Sequence[Tool], *, forced: bool, calls: bool, body: bool, begun: str = "", limited: bool = False
) -> str:
    """Return the rules of a ``lark`` constraint for an answer with the markers ``SHOWN``. The arguments of tool *i* are
    ``part{i}``, and with ``body`` the text of the answer is the part after those.

    An answer may think first. Then comes its text, or a call, if there may be ``calls``; ``forced`` it is a call. Where
    any text will do, preambles may come before. ``begun`` is what the prompt has of the answer's first header. Raises
    ``ChatTemplateError`` if no answer could go on from there.

    ``limited``: it may only think in its first message, since what counts its thoughts takes them to be over then.
    """
    channels = [] if limited else ['"analysis"']
    channels += ['"commentary"'] if calls and not forced and not body else []
    last = ([] if forced else ["final"]) + [f"call{i}" for i in range(len(tools)) if calls]
    lines = [
        f"answer: {'thought? ' if limited else ''}rest",
        f"rest: {'before* ' if channels else ''}last",
        'thought: marker1 "analysis" marker3 more',
        f"before: marker1 ({' | '.join(channels)}) marker3 more" if channels else "",
        f"more: until4 marker0 {sequence(_ROLE, SHOWN)}",
        f"last: {' | '.join(last)}",
        'final: marker1 "final" marker3 text',
        f"text: part{len(tools)}" if body else "text: TEXT",
        "kind: " + " | ".join(sequence(kind, SHOWN) for kind in _KINDS),
    ]
    for i, tool in enumerate(tools if calls else ()):
        heads = " | ".join(sequence(head, SHOWN) for head in _heads(tool))
        lines.append(f"call{i}: ({heads}) kind marker3 part{i}")
    if not begun:
        return "\n".join(["start: answer", *lines])
    rests = [
        " ".join((sequence(head.removeprefix(begun), SHOWN), rule))
        for head, rule in _messages(tools, forced=forced, calls=calls, body=body)
        if head.startswith(begun)
    ]
    if not rests:
        raise ChatTemplateError(
            "the prompt begins a message of the answer that can't become what the request asks for", param="messages"
        )
    return "\n".join([f"start: {' | '.join(rests)}", *lines])


def _heads(tool: Tool) -> tuple[str, str]:
    """Return how a header begins that calls a tool: with its name before the channel's name, or after it."""
    return f" to=functions.{tool.name}{CHANNEL}commentary", f"{CHANNEL}commentary to=functions.{tool.name}"


def _messages(tools: Sequence[Tool], *, forced: bool, calls: bool, body: bool) -> Iterator[tuple[str, str]]:
    """Yield the headers an answer may begin with, and the rule of what follows each of them."""
    yield THOUGHTS[0], "more rest"
    if not forced:
        yield f"{CHANNEL}final{MESSAGE}", "text"
    if not calls:
        return
    if not forced and not body:
        yield f"{CHANNEL}commentary{MESSAGE}", "more rest"
    for i, tool in enumerate(tools):
        yield from ((f"{head}{kind}{MESSAGE}", f"part{i}") for head in _heads(tool) for kind in _KINDS)


def read_answer(text: Incoming, names: frozenset[str], raw_thoughts: bool = False) -> Reading[None]:
    """Yield the parts of an answer to a prompt that ends in ``<|start|>assistant``, in which tools of these names may
    be called. What the prompt has ``begun`` comes first in the text.

    What is in no channel, or in one that is not known, is content. So is a call of a tool that is not known, with its
    header, or reasoning if it is in the analysis channel, where models call the tools that they were trained with. A
    message that calls but is empty, and the last one, has no ``CallEnds``.

    The white space around thoughts and before later messages is left out, and messages of a kind are parted by an
    empty line. ``raw_thoughts`` are content instead, as they are, between the marks around them.
    """
    yield from _Answer(text, names, raw_thoughts).read()


class _Answer:
    def __init__(self, text: Incoming, names: frozenset[str], raw_thoughts: bool) -> None:
        self._text = text
        self._names = names
        self._raw_thoughts = raw_thoughts
        self._first = True  # whether it is the first message
        self._said: set[_Kind] = set()

    def read(self) -> Reading[None]:
        while True:
            space = yield from self._text.skip_space()
            if (yield from self._text.at_end()):
                if space and self._first:
                    yield Content(space)
                return
            header = yield from self._header(space)
            if header is None:
                yield from self._say(Content, space if self._first else "")
            elif header.endswith(MESSAGE):
                yield from self._message(header)
            else:
                yield from self._without_message(header)
            self._first = False
            yield from self._text.skip_space()
            yield from self._text.take(*_ENDS)

    def _header(self, space: str) -> Reading[str | None]:
        """Pass a header, as far as it is one, and return it; None if none begins here. Some ``space`` was before it."""
        marker = yield from self._text.take(*_IN_HEADERS)
        if marker is None and not (self._first and (yield from self._text.next_is("to="))):
            return None
        pieces = [marker or space]
        while marker != MESSAGE:
            words = yield from self._text.collect(*_ALL, limit=_MAX_HEADER)
            if words is None:
                break
            marker = yield from self._text.take(*_IN_HEADERS[1:])
            pieces += [words, marker or ""]
            if marker is None:
                break
        return "".join(pieces)

    def _message(self, header: str) -> Reading[None]:
        """Read what follows a header."""
        part = _kind(header)
        if _OTHER_ROLE.match(header):
            yield from self._say(Content, header)
            return
        recipient = _recipient(header)
        shown = header.removeprefix(START + _ROLE).lstrip()
        name = next((each for each in (recipient.removeprefix("functions."), recipient) if each in self._names), None)
        if name is not None:
            space = yield from self._text.skip_space()
            if (yield from self._text.next_is("{")) or (yield from self._text.at_end()):
                yield from self._call(name)
            elif self._is_raw(header):
                yield from self._say_as_it_is(shown + space)
            else:
                yield from self._say(part, shown + space)
        elif self._is_raw(header):
            yield from self._say_as_it_is(shown)
        else:
            yield from self._say(part, shown if recipient or _is_prose(header) else "")

    def _call(self, name: str) -> Reading[None]:
        """Read a call's arguments. What follows them in the message is text."""
        yield CallBegins(name)
        if (yield from json_object(self._text)):
            yield CallEnds()
        self._first = False
        yield from self._say(Content)

    def _without_message(self, header: str) -> Reading[None]:
        """Read on where a header turned out to be none. What in it is no markup is text."""
        if self._text.starved:
            header += self._rest()
            if all(map(_may_be_markup, _WORD.findall(header))):
                return
        if self._is_raw(header):
            yield from self._say_as_it_is(header.removeprefix(START + _ROLE).lstrip())
            return
        text = _MARKUP.sub("", header, count=1)
        yield from self._say(_kind(header.removesuffix(text)), text)

    def _rest(self) -> str:
        """Pass all that is left of a text that has ended, and return it."""
        return "".join(part.text for part in self._text.up_to((), Content) if isinstance(part, Content))

    def _is_raw(self, header: str) -> bool:
        return self._raw_thoughts and _kind(header) is Reasoning

    def _say_as_it_is(self, header: str) -> Reading[None]:
        """Read a message to its end, which is part of it, as its header is."""
        yield Content(f"{_BETWEEN}{header}" if Content in self._said else header)
        yield from self._text.up_to(_AFTER_TEXT, Content)
        if (yield from self._text.take(END)):
            yield Content(END)

    def _say(self, part: _Kind, begins: str = "") -> Reading[None]:
        """Read a text to the end of its message. It ``begins`` with what has been passed already."""
        if not begins:
            space = yield from self._text.skip_space()
            begins = space if self._first and part is Content else ""
        if begins or not ((yield from self._text.next_is(*_AFTER_TEXT)) or (yield from self._text.at_end())):
            if part in self._said:
                yield part(_BETWEEN)
            self._said.add(part)
        if begins:
            yield part(begins)
        yield from self._text.up_to(_AFTER_TEXT, part, trim=part is Reasoning)


def _kind(header: str) -> _Kind:
    return Reasoning if _CHANNEL_OF.findall(header)[-1:] == ["analysis"] else Content


def _recipient(header: str) -> str:
    """Return which tool a message is to, or nothing."""
    return next((each for each in reversed(_RECIPIENT.findall(header)) if each not in _NOBODY), "")


def _is_prose(header: str) -> bool:
    """Say whether a header has so many words that are none of a header that the model must mean something by them."""
    return sum(not _may_be_markup(word) for word in _WORD.findall(header)) > _MAX_ODD


def _may_be_markup(word: str) -> bool:
    """Say whether a word, of which the end may be missing, is one of a header."""
    return word.startswith(_RECIPIENTS) or any(known.startswith(word) for known in _HEADER_WORDS)
