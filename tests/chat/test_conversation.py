"""The time that a request's templates may take together."""

from __future__ import annotations

import asyncio

import pytest

from llamaserve.chat import conversation
from llamaserve.chat.conversation import Conversations
from llamaserve.chat.template import TemplateRenderer, guest_renderer
from llamaserve.errors import ChatTemplateError
from llamaserve.worker.grammar_check import GrammarChecker

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a * b }}{% endfor %}{% endfor %}"


def test_templates_of_a_request_have_a_time_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "_TIME_LIMIT", 0.25)

    async def run() -> None:
        async with TemplateRenderer() as renderer, guest_renderer() as guests, GrammarChecker() as grammars:
            conversations = Conversations(renderer, guests, grammars)
            await conversations.check("{{ messages[0].content }}")
            with pytest.raises(ChatTemplateError, match=r"the chat template took longer than 0\.25 s in all"):
                await conversations.check(ENDLESS)

    asyncio.run(run())
