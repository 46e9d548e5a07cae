"""Tries out a chat template: runs in a renderer process, where it renders small conversations and looks for its words.

A probe that a template refuses or fails on says that it can't show such a thing. Knows no family of models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from llamaserve.chat.answer import THINKING_TAGS
from llamaserve.chat.deriving import ANSWER, CALLS, ProbeCall, Shown, derive
from llamaserve.chat.template import RenderJob
from llamaserve.chat.traits import CallTexts, ProbeJob, Traits

Message = dict[str, Any]
Render = Callable[[RenderJob], str]
_ThoughtKey = Literal["reasoning_content", "thinking", "reasoning"]

_WORD = "quokka"  # in all that is shown, and nowhere else
_QUESTION = {"role": "user", "content": f"{_WORD}question"}
_SYSTEM = {"role": "system", "content": f"{_WORD}system"}
_PLAIN = {"role": "assistant", "content": ANSWER}
_RESULT = f"{_WORD}result"
_RESULT_FROM_USER = {"role": "user", "content": _RESULT}
_BESIDE = f"{_WORD}beside"  # the text of an answer with calls
_THOUGHT = f"{_WORD}thought"
_THOUGHT_KEYS: tuple[_ThoughtKey, ...] = ("reasoning_content", "thinking", "reasoning")
_FIRST, _SECOND, _ = CALLS
_ODD_IDS = ("c1", f"call_{_WORD}_0123456789")
_SHORT = 9  # what Mistral's templates insist on
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": call.name,
            "description": f"{_WORD}tool",
            "parameters": {
                "type": "object",
                "properties": {call.key: {"type": "string", "description": "a text"}},
                "required": [call.key],
            },
        },
    }
    for call in CALLS
]


@dataclass(frozen=True)
class _Probes:
    """Renders conversations, in the way in which the template wants its messages.

    ``opening`` comes before the question. ``as_text`` and ``null``: see ``Traits.arguments`` and ``null_content``.
    ``followed``: results come right after calls.
    """

    job: ProbeJob
    render: Render
    failures: tuple[type[Exception], ...]
    opening: tuple[Message, ...] = ()
    as_text: bool = False
    null: bool = False
    followed: bool = False

    def show(self, *messages: Message, prompt: bool = False) -> str:
        """Return a conversation that ends in these messages; empty where the template does not show it."""
        conversation = [*self.opening, _QUESTION, *messages]
        job, variables = self.job, {"tools": _TOOLS}
        try:
            return self.render(
                RenderJob(job.template, conversation, job.bos_token, job.eos_token, prompt, variables=variables)
            )
        except self.failures:
            return ""

    def called(self, *calls: ProbeCall, id: str = "", **more: str) -> str:  # noqa: A002 (as in the API)
        """Return a conversation that ends in an answer with these calls."""
        results = [_result(call, id) for call in calls]
        return self.show(self.calling(*calls, id=id, **more), *(results if self.followed else ()))

    def calling(self, *calls: ProbeCall, id: str = "", **more: str) -> Message:  # noqa: A002
        """Return an answer with these calls."""
        listed = [self._call(call, id or call.id) for call in calls]
        return {"role": "assistant", "content": None if self.null else "", "tool_calls": listed, **more}

    def _call(self, call: ProbeCall, id: str) -> Message:  # noqa: A002
        arguments = json.dumps(call.arguments) if self.as_text else call.arguments
        return {"id": id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _result(call: ProbeCall, id: str = "") -> Message:  # noqa: A002
    return {"role": "tool", "tool_call_id": id or call.id, "name": call.name, "content": _RESULT}


def probe(job: ProbeJob, render: Render, failures: tuple[type[Exception], ...]) -> Traits:
    """Return a template's traits. ``failures`` are what rendering raises where a template can't show something."""
    probes = _Probes(job, render, failures)
    plain = probes.show(_PLAIN)
    if ANSWER not in plain:  # some want a system message
        opened = replace(probes, opening=(_SYSTEM,))
        if ANSWER in (text := opened.show(_PLAIN)):
            probes, plain = opened, text
    probes, one = _with_call(probes, plain)
    two = probes.called(_FIRST, _SECOND) if one else ""
    several = _shows(_FIRST, two, plain) and _shows(_SECOND, two, plain)
    asked = probes.show(prompt=True)
    thinking, thoughts = _thinking(probes)
    results = _RESULT in replace(probes, followed=True).called(_FIRST)
    return Traits(
        tools=f"{_WORD}tool" in asked or _FIRST.name in asked,
        calls=bool(one),
        several=several,
        results=results,
        arguments="text" if probes.as_text else "object",
        null_content=probes.null,
        text_apart=bool(one) and _text_apart(probes, _result(_FIRST) if results else _RESULT_FROM_USER, thoughts),
        id_length=_SHORT if one and not all(probes.called(_FIRST, id=odd) for odd in _ODD_IDS) else None,
        ids_name=bool(one) and one.count(_FIRST.name) == plain.count(_FIRST.name),
        call_texts=_call_texts(probes, plain, [one, two] if several else [one]) if one else None,
        thinking=thinking,
        thoughts=thoughts,
    )


def _with_call(probes: _Probes, plain: str) -> tuple[_Probes, str]:
    """Return the probes in the way in which the template shows a call, and the call; empty if it shows none."""
    for followed in (False, True):
        text = _with_arguments(replace(probes, followed=followed), plain)
        null = _with_arguments(replace(probes, followed=followed, null=True), plain)
        if null[1] and (not text[1] or len(_behind(null[1])) < len(_behind(text[1]))):
            return null
        if text[1]:
            return text
    return probes, ""


def _behind(text: str) -> str:
    """Return what stands behind the call."""
    return text.rpartition(_FIRST.value)[2].strip()


def _with_arguments(probes: _Probes, plain: str) -> tuple[_Probes, str]:
    """Return the probes with arguments as the template wants them: objects where it can write those as JSON or in a
    notation of its own, and JSON texts where it would only show what Python makes of an object.
    """
    shown = probes.called(_FIRST)
    if _FIRST.find(shown, 0) is None and (_FIRST.value not in shown or repr(_FIRST.arguments) in shown):
        as_text = replace(probes, as_text=True)
        text = as_text.called(_FIRST)
        if _FIRST.find(text, 0) is not None:
            probes, shown = as_text, text
    return probes, shown if _shows(_FIRST, shown, plain) else ""


def _shows(call: ProbeCall, text: str, plain: str) -> bool:
    """Say whether a text has a call, by its name or by an id that is made of it; the tools may be in it, too."""
    return call.value in text and (text.count(call.name) > plain.count(call.name) or call.id in text)


def _text_apart(probes: _Probes, result: Message, thoughts: _ThoughtKey | None) -> bool:
    """Say whether the text of an answer with a call and thoughts is only shown as an answer of its own before it."""
    thought: dict[str, str] = {thoughts: _THOUGHT} if thoughts is not None else {}
    text = {**_PLAIN, "content": _BESIDE}
    together = probes.show(probes.calling(_FIRST, **thought, content=_BESIDE), result, _PLAIN)
    apart = probes.show(text, probes.calling(_FIRST, **thought), result, _PLAIN)
    return not _in_order(together, _BESIDE) and _in_order(apart, _BESIDE, _FIRST.value, _RESULT, ANSWER)


def _in_order(text: str, *words: str) -> bool:
    """Say whether words are in a text, one after the other."""
    return re.search(".*".join(map(re.escape, words)), text, re.DOTALL) is not None


def _call_texts(probes: _Probes, plain: str, called: list[str]) -> CallTexts | None:
    if len(called) > 1:
        called = [*called, probes.called(*CALLS)]
    both = probes.called(_FIRST, content=ANSWER)
    found = derive(Shown(plain, called, both, probes.job.eos_token, probes.followed))
    if found is None:
        return None
    return CallTexts(found.before, found.between, found.after, found.begin, found.separator, found.end, lone=found.lone)


def _thinking(probes: _Probes) -> tuple[str | None, _ThoughtKey | None]:
    """Return the start tag of thoughts and the key under which the template looks for them."""
    source = probes.job.template
    known = next((tags.start for tags in THINKING_TAGS if tags.start in source and tags.end in source), None)
    for key in _THOUGHT_KEYS:
        for text in (probes.called(_FIRST, **{key: _THOUGHT}), probes.show({**_PLAIN, key: _THOUGHT})):
            before, thought, _ = text.partition(_THOUGHT)
            if thought:
                return next((tags.start for tags in THINKING_TAGS if before.rstrip().endswith(tags.start)), known), key
    return known, None
