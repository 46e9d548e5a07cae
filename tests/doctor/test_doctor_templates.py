"""Chat templates: good ones are called good, and each fault is found."""

from __future__ import annotations

import asyncio
import json
import shlex
from typing import Any

import pytest
from doctor_machine import bad, checked
from published_templates import BOS, PUBLISHED

from llamaserve.chat.modes import ModelTemplate
from llamaserve.chat.template import TemplateRenderer
from llamaserve.chat.traits import ProbeJob, Traits
from llamaserve.doctor import template_lint
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.llama import NoAnswer, Question, Vocabulary
from llamaserve.doctor.template_lint import Read, lint
from llamaserve.errors import Unavailable
from llamaserve.sandbox import Budget

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LIMIT = 10.0  # seconds for a template; the machine that tests may be slow


def linted(source: str | None, bos: str = "", *, seconds: float = LIMIT, **vocabulary: Any) -> list[Finding]:
    """Return the findings on a template whose vocabulary reads it so."""
    told: dict[str, Any] = {"adds_begin": False, "begins": 0, "marker": "<|im_end|>", "marker_ends": True}
    read = Vocabulary(**{**told, "controls": ["<|im_start|>"], **vocabulary})
    return found_by(ModelTemplate(source, bos, "</s>"), lambda _: read, seconds)


def found_by(template: ModelTemplate, read: Read, seconds: float = LIMIT) -> list[Finding]:
    async def found() -> list[Finding]:
        async with TemplateRenderer(1, time_limit=seconds) as renderer:
            return await lint("model", template, read, 5000, renderer)

    return checked(asyncio.run(found()))


def body(finding: Finding) -> dict[str, Any]:
    """Return the request that a finding's command sends."""
    assert finding.fix is not None
    curl, url, option, text = shlex.split(finding.fix)
    assert (curl, url, option) == ("curl", "http://localhost:5000/v1/chat/completions", "-d")
    found: dict[str, Any] = json.loads(text)
    assert found["model"] == "model"
    return found


def fault(source: str | None, words: str, **vocabulary: Any) -> Finding:
    """Return the one finding on a template that is not ok, which must have these words."""
    (found,) = bad(linted(source, **vocabulary))
    assert words in found.message
    return found


def test_published_templates_are_good() -> None:
    asked: list[Question] = []

    def read(question: Question) -> Vocabulary:
        asked.append(question)
        return Vocabulary(True, 1, "<end>", True, [])

    async def lint_all() -> list[tuple[str, str]]:
        async with TemplateRenderer(1, time_limit=LIMIT) as renderer:
            found = []
            for each in PUBLISHED:
                template = ModelTemplate(each.source, BOS, each.eos)
                findings = bad(await lint("model", template, read, 5000, renderer))
                found += [(each.name, finding.message) for finding in findings]
            return found

    found = asyncio.run(lint_all())
    assert [each for each in found if " s for one short message" not in each[1]] == []
    assert all(question.prompt and question.ending.strip() for question in asked)


def test_what_llamaserve_makes_up_for_is_said() -> None:
    found = {finding.message for finding in linted(CHATML)}
    assert "its chat template shows system messages" in found
    assert "its chat template knows no tools: they are described in the system message" in found
    assert "answers end with <|im_end|>" in found
    alternating = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% else %}"
        "[{{ m.role }}]{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = {finding.message for finding in linted(alternating)}
    assert "its chat template has no place for a system message: it is put before the user's text" in found
    assert "its chat template wants roles in turn: neighbours of one role are joined" in found


def test_a_model_without_a_template() -> None:
    finding = fault(None, "no chat template")
    assert finding.level is Level.NOTE
    assert body(finding)["instruction_template"] == "ChatML"
    assert body(fault(None, "no chat template", controls=[]))["instruction_template"] == "Alpaca"


def test_a_template_that_cannot_be_rendered() -> None:
    finding = fault("{% for m in messages %}{{ m.content }}", "syntax error")
    assert finding.level is Level.PROBLEM
    assert body(finding)["instruction_template"] == "ChatML"
    assert fault("{{ raise_exception('no, never') }}", "no, never").level is Level.PROBLEM


def test_a_template_that_takes_for_ever() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert fault(loop, "took longer than", seconds=0.5).level is Level.PROBLEM


def test_a_template_that_could_not_be_tried() -> None:
    class Stalled(TemplateRenderer):
        async def probe(self, job: ProbeJob, budget: Budget | None = None) -> Traits:
            raise Unavailable("the chat template renderer does not get on")

    async def found() -> list[Finding]:
        async with Stalled() as renderer:
            return await lint("model", ModelTemplate(CHATML, "", ""), lambda _: Vocabulary(), 5000, renderer)

    (finding,) = checked(asyncio.run(found()))
    assert finding.level is Level.WARNING
    assert "could not be tried: the chat template renderer does not get on" in finding.message


def test_a_template_that_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_lint, "_SLOW", 0.0)
    assert fault(CHATML, "s for one short message").level is Level.WARNING


def test_a_template_that_does_not_open_the_answer() -> None:
    finding = fault(CHATML.partition("{% if add")[0], "add_generation_prompt changes nothing")
    assert body(finding)["instruction_template"] == "ChatML"


def test_a_template_that_leaves_out_answers_or_turns() -> None:
    without = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'assistant' %}")
    assert [each for each in bad(linted(without)) if "does not show answers" in each.message]
    last = CHATML.replace("in messages", "in messages[-2:]")
    assert [each for each in bad(linted(last)) if "leaves out some" in each.message]


def test_a_template_that_ignores_or_refuses_system_messages() -> None:
    only = "{% for m in messages if m.role != 'system' %}"
    text = CHATML.replace("{% for m in messages %}", only)
    assert not [each for each in bad(linted(text)) if "ignores" in each.message]  # it is put before the user's text
    refusing = CHATML.replace("<|im_start|>{{ m.role", "{{ {}.x.y if m.role == 'system' }}<|im_start|>{{ m.role")
    assert [each for each in bad(linted(refusing)) if "fails on a system message" in each.message]
    deaf = (
        "{% set m = messages[-1] %}<|im_start|>{{ m.role }} {{ m.content[-11:] }}<|im_end|>"
        "{{ 'x' if add_generation_prompt }}"
    )
    assert [each for each in bad(linted(deaf)) if "ignores system messages" in each.message]


def test_a_template_that_drops_one_of_two_neighbours() -> None:
    dropping = CHATML.replace(
        "in messages %}", "in messages %}{% if loop.last or loop.nextitem.role != m.role %}"
    ).replace("<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor")
    assert [each for each in bad(linted(dropping)) if "two messages of one role" in each.message]


def test_answers_that_run_on() -> None:
    finding = fault(CHATML, "ends answers with <|stop|>", marker="<|stop|>", marker_ends=False)
    assert body(finding)["stop"] == ["<|stop|>"]
    assert fault(CHATML, "no token behind an answer", marker=None, marker_ends=False)


def test_a_begin_token_that_comes_twice() -> None:
    begun = "{{ bos_token }}" + CHATML
    assert not bad(linted(begun, "<s>", adds_begin=True, begins=1))
    assert fault("{{ bos_token }}" + begun, "<s> more than once", bos="<s>", begins=2)
    late = fault("\n {{ bos_token }}" + CHATML, "behind white space", bos="<s>", adds_begin=True, begins=1)
    assert body(late)["add_bos_token"] is False


def test_a_vocabulary_that_cannot_be_read_is_a_problem() -> None:
    def read(question: Question) -> Vocabulary:
        raise NoAnswer("was ended by SIGSEGV", 11)

    (finding,) = bad(found_by(ModelTemplate(CHATML, "", "</s>"), read))
    assert finding.level is Level.PROBLEM
    assert "SIGSEGV" in finding.message
