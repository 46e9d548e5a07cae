"""The time that a request's templates may take together."""

from __future__ import annotations

import asyncio

import pytest

from llamaserve.chat import conversation
from llamaserve.chat.conversation import Conversations
from llamaserve.chat.modes import Mode, ModelTemplate, Style
from llamaserve.chat.preparation import ChatWish
from llamaserve.chat.template import RenderJob, TemplateRenderer, guest_renderer
from llamaserve.chat.traits import ProbeJob, Traits
from llamaserve.errors import ChatTemplateError
from llamaserve.sandbox import Budget
from llamaserve.worker.grammar_check import GrammarChecker

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}"
WISH = ChatWish(
    [{"role": "user", "content": "Hello"}], ModelTemplate(TEMPLATE), Style(mode=Mode.CHAT_INSTRUCT, name2="Zoe")
)


class Watched(TemplateRenderer):
    """Notes which budgets its jobs come with."""

    def __init__(self) -> None:
        super().__init__()
        self.budgets: list[Budget | None] = []

    async def probe(self, job: ProbeJob, budget: Budget | None = None) -> Traits:
        self.budgets.append(budget)
        return await super().probe(job, budget)

    async def render(self, job: RenderJob, budget: Budget | None = None) -> str:
        self.budgets.append(budget)
        return await super().render(job, budget)


def test_all_templates_of_a_request_have_one_budget() -> None:
    async def run() -> list[Budget | None]:
        async with Watched() as renderer, guest_renderer() as guests, GrammarChecker() as grammars:
            conversations = Conversations(renderer, guests, grammars)
            for _ in range(2):
                await conversations.prepare(WISH)
            return renderer.budgets

    budgets = asyncio.run(run())
    first, second = budgets[0], budgets[-1]
    assert len(budgets) > 2
    assert first is not None
    assert second is not None
    assert first is not second
    assert {id(each) for each in budgets} == {id(first), id(second)}
    assert first.seconds == conversation._TIME_LIMIT > first.left > 0
    assert first.turn_limit == conversation._TURN_LIMIT


def test_an_instruction_template_is_tried_within_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "_TIME_LIMIT", 0.25)

    async def run() -> None:
        async with TemplateRenderer() as renderer, guest_renderer() as guests, GrammarChecker() as grammars:
            conversations = Conversations(renderer, guests, grammars)
            await conversations.check(TEMPLATE)
            with pytest.raises(ChatTemplateError, match=r"the chat template took longer than 0\.25 s in all"):
                await conversations.check(ENDLESS)

    asyncio.run(run())
