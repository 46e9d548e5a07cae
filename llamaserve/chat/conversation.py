"""From what a chat request wants to what the model is given: the whole of ``chat`` in order.

The tools are brought into a form that can be enforced, the messages are fitted to what the template can show, and
rendered; ``preparation.py`` does the rest. Knows nothing of HTTP, of tokens, or of how templates render.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from llamaserve.chat.adapting import adapted
from llamaserve.chat.form import Calls, closed, schema_of, without_look_around
from llamaserve.chat.formats.format import CallFormat
from llamaserve.chat.formats.hermes import HERMES
from llamaserve.chat.formats.json_calls import JsonCalls
from llamaserve.chat.formats.known import answer_format, by_template
from llamaserve.chat.modes import Mode, Styled, styled
from llamaserve.chat.preparation import ChatWish, Prepared, prepared, prepared_whole
from llamaserve.chat.shortening import fitting
from llamaserve.chat.template import RenderJob, TemplateRenderer
from llamaserve.chat.tools import Tool, Toolbox
from llamaserve.chat.traits import TraitFinder, Traits
from llamaserve.engine.params import Constraint
from llamaserve.errors import InvalidRequest
from llamaserve.sandbox import Budget
from llamaserve.worker.grammar_check import GrammarChecker

Message = dict[str, Any]

_TIME_LIMIT = 4.0  # seconds of CPU time for all that is rendered for one request; an ordinary chat takes milliseconds
_TURN_LIMIT = 30.0  # seconds for each turn; on a busy machine a renderer that has to start may take some of them


class Conversations:
    """Prepares chats. Templates that requests bring or name are rendered by ``guests``: however long they take, chats
    with the models' own don't wait for them.
    """

    def __init__(self, renderer: TemplateRenderer, guests: TemplateRenderer, grammars: GrammarChecker) -> None:
        self._grammars = grammars
        self._own = renderer, TraitFinder(renderer)
        self._guests = guests, TraitFinder(guests)

    async def prepare(
        self, wish: ChatWish, *, room: int | None = None, count: Callable[[str], Awaitable[int]] | None = None
    ) -> Prepared:
        """Return what is to be generated. With ``room``, the oldest turns of a chat that has more tokens, which
        ``count`` tells, are left out.

        Raises ``ChatTemplateError`` and ``InvalidRequest``, and what else ``modes.styled`` does.
        """
        if wish.style.continue_ and wish.messages[-1].get("tool_calls"):
            raise InvalidRequest("a message with tool calls can't be continued", param="messages")
        own = wish.style.instruction.source is None and not wish.style.chat_template
        renderer, finder = self._own if own else self._guests
        budget = Budget(_TIME_LIMIT, _TURN_LIMIT)
        traits = await _traits_of(wish, finder, budget)
        template = _instruction(wish) or ""
        tools = [await self._closed(tool) for tool in _callable(wish.toolbox)]
        calls = call_format(template, traits).for_tools(tools)
        written = calls if isinstance(calls, JsonCalls) else HERMES

        async def rendered(job: RenderJob) -> str:
            return await renderer.render(job, budget)

        async def render(messages: Sequence[Message]) -> Styled:
            shown, offered = adapted(messages, traits, wish.toolbox, written)
            variables = {**wish.variables, "tools": offered}
            return await styled(rendered, wish.style, shown, wish.model, variables)

        messages, dropped = list(wish.messages), 0
        if room is not None and count is not None:
            messages, dropped = await fitting(messages, room, _counted(render, count))
        prompted = await render(messages)
        whole = answer_format(template)
        if whole is not None:
            schemas, relaxed = await self._relaxed([schema_of(tool) for tool in tools], tools)
            found = prepared_whole(wish, prompted, whole, tools, schemas)
        else:
            form, relaxed = await self._calls(wish.toolbox, calls, tools, traits)
            found = prepared(wish, prompted, form, tools, traits.thinking)
        return replace(found, relaxed=relaxed, dropped=dropped)

    async def check(self, template: str) -> None:
        """Raise ``ChatTemplateError`` for an instruction template that can't be compiled, or takes for ever."""
        await self._guests[1].of(template, "", "", Budget(_TIME_LIMIT, _TURN_LIMIT))

    async def _closed(self, tool: Tool) -> Tool:
        """Return the tool without arguments that it does not list, if that leaves some arguments possible."""
        other = closed(tool)
        if other == tool:
            return tool
        try:
            await self._grammars.relaxed(schema_of(other))
        except InvalidRequest:
            return tool
        return other

    async def _calls(
        self, toolbox: Toolbox | None, written: CallFormat, tools: Sequence[Tool], traits: Traits
    ) -> tuple[Calls | None, dict[str, str]]:
        """Return what calls must look like, and what of the tools' schemas can't be enforced."""
        if toolbox is None:
            return None, {}
        several = toolbox.several
        if several is None:  # models that are made to call, or were never taught to, don't know when to stop
            several = traits.several and not toolbox.forced
        rules = written.rules(tools, several=several)
        parts = [schema_of(tool) for tool in tools] if rules.parts is None else rules.parts
        parts, relaxed = await self._relaxed(parts, tools)
        return Calls(written, rules, parts, toolbox.forced), relaxed

    async def _relaxed(
        self, parts: Sequence[Constraint], tools: Sequence[Tool]
    ) -> tuple[list[Constraint], dict[str, str]]:
        """Return the parts as far as they can be enforced, and what can't be. Those of strict tools must be."""
        strict = tuple(f"{tool.place}." for tool in tools if tool.strict)
        enforced: list[Constraint] = []
        relaxed: dict[str, str] = {}
        for part in parts:
            each, left_out = part, None
            if part.param.startswith(strict):
                await self._grammars.check(part)
            else:
                each, left_out = await self._relaxed_part(part)
            enforced.append(each)
            if left_out is not None:
                relaxed[part.param] = left_out
        return enforced, relaxed

    async def _relaxed_part(self, part: Constraint) -> tuple[Constraint, str | None]:
        try:
            return await self._grammars.relaxed(part)
        except InvalidRequest:
            seen = without_look_around(part)
            if seen is None:
                raise
            relaxed, left_out = await self._grammars.relaxed(seen)
            return relaxed, f'"pattern" {left_out or ""}'


async def _traits_of(wish: ChatWish, finder: TraitFinder, budget: Budget) -> Traits:
    """Return what the template shows; a dialogue of the chat modes has no place for tools."""
    source = _instruction(wish)
    if source is None:
        return Traits()
    return await finder.of(source, wish.model.bos_token, wish.model.eos_token, budget)


def _instruction(wish: ChatWish) -> str | None:
    """Return the template that writes the messages, if it is one of instructions."""
    return (wish.style.instruction.source or wish.model.source) if wish.style.mode is Mode.INSTRUCT else None


def _counted(
    render: Callable[[Sequence[Message]], Awaitable[Styled]], count: Callable[[str], Awaitable[int]]
) -> Callable[[Sequence[Message]], Awaitable[int]]:
    async def counted(messages: Sequence[Message]) -> int:
        return await count((await render(messages)).prompt)

    return counted


def _callable(toolbox: Toolbox | None) -> list[Tool]:
    return [tool for tool in toolbox.tools if tool.name in toolbox.names] if toolbox is not None else []


def call_format(template: str, traits: Traits) -> CallFormat:
    """Return how calls are written: in the way of a family that the template shows to be of, as the template writes
    those of earlier answers, or in the way of most models, which is what they are told if the template does not know
    tools.
    """
    if not traits.tools:
        return HERMES
    known, derived = by_template(template), traits.call_texts
    if derived is None or not isinstance(known, JsonCalls | None):
        return known or HERMES
    texts = {name: getattr(derived, name) for name in ("before", "between", "after", "begin", "separator", "end")}
    return replace(known or JsonCalls("derived", "", "", ""), **texts, lone=derived.lone)
