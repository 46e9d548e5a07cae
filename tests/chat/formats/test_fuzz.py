"""Any text, in every format: nothing fails, nothing depends on the pieces, and nothing is lost or read twice."""

from __future__ import annotations

import json
import re

from golden import FORMATS, FUNCTIONARY_32, GOLDEN, NAMES, merged, read, reader
from hypothesis import given, settings, strategies as st

from llamaserve.chat.answer import THINKING_TAGS, AnswerReader
from llamaserve.chat.formats import known
from llamaserve.chat.formats.gemma import GemmaCalls
from llamaserve.chat.formats.json_calls import ID, JsonCalls
from llamaserve.chat.formats.python_calls import PythonCalls
from llamaserve.chat.formats.tagged import TaggedCalls
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Content, Part, Reasoning

_BITS = [
    *sorted(NAMES), *"{}[]()<>\"'\\:=, ", "\n", "{}", '{"a": 1}', '"arguments": ', "null", "True", "x", "é", "\ud800",
    "city", "days", "</", "<|", ">>>", "all\n", "<think>", "</think>", "12", "functions.", "a=", "[get(", "id",
]  # fmt: skip
_FIRST_KEY = re.compile(r"""\([^()\[\]{}"'=,\n]+=$""")  # it shows that a call in Python is one
_TAGS = [tag for tags in THINKING_TAGS for tag in (tags.start, tags.end, tags.answer) if tag]


def _markup(name: str) -> list[str]:
    """Return the texts of which a format's markup consists."""
    calls = known.by_name(name)
    if calls is None:
        return [">>>", "all\n"]
    texts = [*calls.shown]
    if isinstance(calls, JsonCalls | TaggedCalls):
        texts += [calls.begin, calls.before, calls.between, calls.after, calls.separator, calls.end]
    if isinstance(calls, TaggedCalls):
        texts += [calls.key, calls.value, calls.closing]
    if isinstance(calls, PythonCalls):
        texts += ["[", "]", ",", "(", "="]
    if isinstance(calls, GemmaCalls):
        texts += ["call:"]
    return [piece for text in texts for piece in text.split(ID) if piece]


def _texts(name: str) -> st.SearchStrategy[str]:
    golden = [text for each, text, _ in GOLDEN if each == name]
    parts = [text[start:end] for text in golden for start in range(0, len(text), 7) for end in (start + 9, start + 40)]
    bit = st.sampled_from([*_BITS, *_markup(name), *parts, *golden])
    return st.lists(bit | st.text(max_size=4), max_size=12).map("".join)


@st.composite
def _answers(draw: st.DrawFn) -> tuple[str, str, list[str], bool]:
    name = draw(st.sampled_from(FORMATS))
    text = draw(_texts(name))
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    return name, text, pieces, draw(st.booleans())


@settings(max_examples=600, deadline=None)
@given(_answers())
def test_pieces_make_no_difference(answer: tuple[str, str, list[str], bool]) -> None:
    name, text, pieces, cut = answer
    whole = read(name, text, cut=cut, thinking=True)
    assert read(name, *pieces, cut=cut, thinking=True) == whole
    assert read(name, *text, cut=cut, thinking=True) == whole


@settings(max_examples=600, deadline=None)
@given(_answers())
def test_arguments_are_json_when_a_call_has_ended(answer: tuple[str, str, list[str], bool]) -> None:
    name, text, _, cut = answer
    called = None
    for part in read(name, text, cut=cut):
        match part:
            case CallBegins():
                called = ""
                assert part.name in NAMES
            case Arguments():
                assert called is not None
                called += part.text
            case CallEnds():
                assert isinstance(json.loads(called or ""), dict)
                called = None
            case _:
                called = None


def _traced(answer: AnswerReader, text: str, *, cut: bool) -> list[tuple[Part | None, int]]:
    """Return the parts of an answer, and how much of its text had been passed when each of them came."""
    incoming = answer._text
    found: list[tuple[Part | None, int]] = []
    for step in range(2):
        if step == 0:
            incoming.push(text)
        else:
            answer._cut = cut
            incoming.end()
        for part in answer._parts:
            if part is None:
                break
            found.append((part, len(text) - len(incoming._text) + incoming._at))
    found.append((None, len(text) - len(incoming._text) + incoming._at))
    return found


def _is_markup(silent: str, name: str) -> bool:
    """Say whether a text without white space is made of markup, names and ids; its end may be missing."""
    pieces = {"".join(piece.split()) for piece in [*_markup(name), *_TAGS, *NAMES]} - {""}
    whole = "|".join(sorted(map(re.escape, pieces), key=len, reverse=True))
    silent = _FIRST_KEY.sub("(", silent)
    beginnings = "|".join(re.escape(piece[:end]) for piece in pieces for end in range(len(piece)))
    return re.fullmatch(f"(?:{whole}|[A-Za-z0-9]+)*(?:{beginnings})", "".join(silent.split())) is not None


@settings(max_examples=600, deadline=None)
@given(_answers())
def test_no_text_is_lost_or_read_twice(answer: tuple[str, str, list[str], bool]) -> None:
    name, text, _, cut = answer
    last, in_call = 0, False
    for part, passed in _traced(reader(name, thinking=True), text, cut=cut):
        assert passed >= last
        match part:
            case Content() | Reasoning():
                start = passed - len(part.text)
                assert text[start:passed] == part.text
                assert start >= last
                silent = text[last:start]
            case Arguments():
                assert in_call
                silent = ""
            case _:
                silent = text[last:passed]
        if not in_call and not (part is None and cut):
            assert _is_markup(silent, name), (silent, part)
        in_call = isinstance(part, CallBegins | Arguments) or (in_call and part is None)
        last = passed
    assert last == len(text) or cut  # what may be the beginning of a call is no text then


@settings(max_examples=300, deadline=None)
@given(st.text() | st.lists(st.sampled_from(_BITS)).map("".join), st.booleans())
def test_without_tools_everything_is_text(text: str, cut: bool) -> None:
    answer = AnswerReader()
    assert merged([*answer.push(text), *answer.finish(cut=cut)]) == ([Content(text)] if text else [])


@settings(max_examples=200, deadline=None)
@given(_answers())
def test_without_names_nothing_is_a_call(answer: tuple[str, str, list[str], bool]) -> None:
    name, text, _, _ = answer
    calls = known.by_name(name)
    if name != FUNCTIONARY_32:
        without = AnswerReader(calls=calls)
        said = merged([*without.push(text), *without.finish()])
        assert said == ([Content(text)] if text else [])
