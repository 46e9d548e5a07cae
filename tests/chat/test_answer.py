"""Thoughts and text of an answer. The calls in it are read in ``formats/test_golden.py``."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from llamaserve.chat.answer import THINKING_TAGS, AnswerReader, ThinkingTags
from llamaserve.chat.formats.hermes import HERMES
from llamaserve.chat.reading import Arguments, CallBegins, CallEnds, Content, Part, Reasoning

_THINK = THINKING_TAGS[0]
_CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
_CALLED: list[Part] = [CallBegins("f"), Arguments("{}"), CallEnds()]
_TAGS = pytest.mark.parametrize("tags", THINKING_TAGS, ids=lambda tags: tags.start)


def _merged(parts: list[Part]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Content | Reasoning | Arguments) and type(last) is type(part):
            found[-1] = type(part)(last.text + part.text)
        else:
            found.append(part)
    return found


def _read(text: str, *, begun: ThinkingTags | None = None, cut: bool = False, calls: bool = True) -> list[Part]:
    """Return the parts of an answer, which must be the same however it comes."""

    def read(*pieces: str) -> list[Part]:
        answer = AnswerReader(
            thinking=THINKING_TAGS, begun=begun, calls=HERMES if calls else None, names=frozenset({"f"})
        )
        parts = [part for piece in pieces for part in answer.push(piece)]
        return _merged(parts + answer.finish(cut=cut))

    whole = read(text)
    assert read(*text) == whole
    for at in range(len(text)):
        assert read(text[:at], text[at:]) == whole
    return whole


@_TAGS
def test_an_answer_that_thinks_first(tags: ThinkingTags) -> None:
    for between in ("", "\n", "\n\n"):
        text = f"{between}{tags.start}{between}Hm, 1 < 2. \n Yes.{between}{tags.end}{between}{tags.answer}Two."
        assert _read(text) == [Reasoning("Hm, 1 < 2. \n Yes."), Content("Two.")]


@_TAGS
def test_thoughts_that_the_prompt_has_begun(tags: ThinkingTags) -> None:
    assert _read(f"\nHm{tags.end}\nTwo.", begun=tags) == [Reasoning("Hm"), Content("Two.")]
    assert _read("\nHm", begun=tags) == [Reasoning("Hm")]
    assert _read(f"\n{tags.end}Two.", begun=tags) == [Content("Two.")]


@_TAGS
def test_thoughts_without_an_end(tags: ThinkingTags) -> None:
    for end in range(len(tags.end)):
        thoughts = f"{tags.start}Hm {tags.end[:end]}"
        assert _read(thoughts)[0] == Reasoning(f"Hm {tags.end[:end]}")
        # Of a tag in which the answer was cut nothing is shown, as far as it can be told from text.
        assert _read(thoughts, cut=True)[0] == Reasoning("Hm" if end > 1 else f"Hm {tags.end[:end]}")


@_TAGS
def test_empty_thoughts(tags: ThinkingTags) -> None:
    for inside in ("", "\n\n"):
        assert _read(f"{tags.start}{inside}{tags.end}\n\nTwo.") == [Content("Two.")]
        assert _read(f"{tags.start}{inside}{tags.end}") == []


def test_an_answer_of_white_space_or_nothing() -> None:
    assert _read("") == []
    assert _read(" \n") == [Content(" \n")]


def test_an_answer_that_does_not_think_is_left_as_it_is() -> None:
    for text in ("Two.", "  Two. \n", "<thin", "<thinking>Hm</thinking>", "Two <think>Hm</think>", "</think>"):
        assert _read(text) == [Content(text)]


def test_thoughts_may_have_calls_in_them_that_are_none() -> None:
    assert _read(f"<think>{_CALL}</think>{_CALL}") == [Reasoning(_CALL), *_CALLED]
    assert _read(f"{_CALL}<think>Hm</think>") == [*_CALLED, Content("<think>Hm</think>")]


def test_without_calls_they_are_text() -> None:
    assert _read(f"<think>\nHm</think>{_CALL}", calls=False) == [Reasoning("Hm"), Content(_CALL)]


def test_text_around_calls() -> None:
    assert _read(f"One. \n{_CALL}\n{_CALL} \n") == [Content("One."), *_CALLED, *_CALLED]
    assert _read(f"{_CALL}\n\nTwo. ") == [*_CALLED, Content("\n\nTwo. ")]


def test_what_is_cut_in_a_call() -> None:
    for end in range(len("<tool_call>"), _CALL.index("{}")):
        assert _read(f"One. {_CALL[:end]}", cut=True) == [Content("One.")]
        assert _read(f"One. {_CALL[:end]}") == [Content(f"One. {_CALL[:end]}")]
    for end in range(_CALL.index("{}") + 2, len(_CALL)):
        assert _read(f"One. {_CALL[:end]}", cut=True) == [Content("One."), *_CALLED]
        assert _read(f"One. {_CALL[:end]}") == [Content("One."), *_CALLED]


def test_raw_thoughts_are_left_in_the_text() -> None:
    text = f"<think>\nHm\n</think>\n{_CALL}"
    answer = AnswerReader(thinking=THINKING_TAGS, raw_thoughts=True, calls=HERMES, names=frozenset({"f"}))
    parts = [part for letter in text for part in answer.push(letter)]
    assert _merged(parts + answer.finish()) == [Content("<think>\nHm\n</think>"), *_CALLED]


@given(st.text(alphabet="ab <>\n"), st.text(alphabet="ab <>\n"), st.sampled_from(THINKING_TAGS))
def test_thoughts_and_text_are_as_they_were_written(thoughts: str, text: str, tags: ThinkingTags) -> None:
    answer = AnswerReader(thinking=THINKING_TAGS)
    parts = _merged([*answer.push(f"{tags.start}{thoughts}{tags.end}{text}"), *answer.finish()])
    expected = [Reasoning(thoughts.strip()), Content(text.lstrip())]
    assert parts == [part for part in expected if part.text]
