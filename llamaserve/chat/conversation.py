"""From what a chat request wants to what the model is given and how its answer is read: the whole of ``chat`` in order.

The messages are fitted to what the template can show, and rendered; where the prompt ends says whether the model is
thinking already; that, the tools and the request's own form make the form of the answer. Knows nothing of HTTP, of
tokens, or of how templates render.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llamaserve.chat.adapting import adapted
from llamaserve.chat.answer import THINKING_TAGS, AnswerReader, ThinkingTags
from llamaserve.chat.form import Calls, Thoughts, answer_form, closed, schema_of, without_look_around
from llamaserve.chat.formats.format import AnswerFormat, CallFormat
from llamaserve.chat.formats.hermes import HERMES
from llamaserve.chat.formats.json_calls import JsonCalls
from llamaserve.chat.formats.known import answer_format, by_template
from llamaserve.chat.modes import Mode, ModelTemplate, Style, Styled, styled
from llamaserve.chat.reading import Part
from llamaserve.chat.shortening import fitting
from llamaserve.chat.template import TemplateRenderer
from llamaserve.chat.tools import Tool, Toolbox
from llamaserve.chat.traits import TraitFinder, Traits
from llamaserve.engine.params import Constraint, Thinking
from llamaserve.errors import InvalidRequest
from llamaserve.worker.grammar_check import GrammarChecker

Message = dict[str, Any]

_TAGS = {tags.start: tags for tags in THINKING_TAGS}


@dataclass(frozen=True)
class ThinkingWish:
    """What a request wants of thinking: whether the model shall (None: as it likes), how many tokens at most, what is
    put at the end of thoughts that are cut there, and whether thoughts are ``read`` or left in the text.
    """

    wanted: bool | None = None
    budget: int | None = None
    message: str = ""
    read: bool = True


@dataclass(frozen=True)
class ChatWish:
    """What a request wants. ``messages`` are as ``normalise`` returns them.

    ``continues``: the answer goes on with the last message, which ``echo`` puts before it. ``body`` is the form of the
    answer's text. ``variables`` are for the template. ``streamed`` answers are read as they come.
    """

    messages: Sequence[Message]
    model: ModelTemplate
    style: Style = field(default_factory=Style)
    toolbox: Toolbox | None = None
    body: Constraint | None = None
    thinking: ThinkingWish = field(default_factory=ThinkingWish)
    variables: Mapping[str, Any] = field(default_factory=dict)
    echo: bool = False
    streamed: bool = False


@dataclass(frozen=True)
class Prepared:
    """What the model is given and how its answer is read.

    ``shown`` are names of control tokens that the reader wants to see. ``begun`` are the parts that every answer goes
    on from, as far as they belong to it. ``relaxed`` are the places of schemas of which not all can be enforced, with
    what can't. ``dropped`` is how many messages were left out.
    """

    prompt: str
    reader: Callable[[], AnswerReader]
    constraint: Constraint | None = None
    stop: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    thinking: Thinking | None = None
    begun: Sequence[Part] = ()
    relaxed: Mapping[str, str] = field(default_factory=dict)
    dropped: int = 0


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
        own = wish.style.instruction.source is None and not wish.style.chat_template
        renderer, finder = self._own if own else self._guests
        traits = await _traits_of(wish, finder)
        template = _instruction(wish) or ""
        tools = [closed(tool) for tool in _callable(wish.toolbox)]
        calls = call_format(template, traits).for_tools(tools)
        written = calls if isinstance(calls, JsonCalls) else HERMES

        async def render(messages: Sequence[Message]) -> Styled:
            shown, offered = adapted(messages, traits, wish.toolbox, written)
            variables = {**wish.variables, "tools": offered}
            return await styled(renderer.render, wish.style, shown, wish.model, variables)

        messages, dropped = list(wish.messages), 0
        if room is not None and count is not None:
            messages, dropped = await fitting(messages, room, _counted(render, count))
        prompted = await render(messages)
        whole = answer_format(template)
        if whole is not None:
            schemas, relaxed = await self._relaxed([schema_of(tool) for tool in tools], tools)
            prepared = _WholePreparation(wish, whole, tools, schemas, prompted).prepared()
        else:
            found, relaxed = await self._calls(wish.toolbox, calls, tools, traits)
            prepared = _Preparation(wish, traits.thinking, found, tools, prompted).prepared()
        return replace(prepared, relaxed=relaxed, dropped=dropped)

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


async def _traits_of(wish: ChatWish, finder: TraitFinder) -> Traits:
    """Return what the template shows; a dialogue of the chat modes has no place for tools."""
    source = _instruction(wish)
    if source is None:
        return Traits()
    return await finder.of(source, wish.model.bos_token, wish.model.eos_token)


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


class _Preparation:
    """Puts together what depends on where the prompt ends. ``thinking`` is the tag that thoughts begin with, if the
    template knows any.
    """

    def __init__(
        self, wish: ChatWish, thinking: str | None, calls: Calls | None, tools: Sequence[Tool], prompted: Styled
    ) -> None:
        self._wish = wish
        self._thinking = thinking
        self._calls = calls
        self._names = frozenset(tool.name for tool in tools)
        self._prompted = prompted
        self._prompt = prompted.prompt
        self._continued = wish.messages[-1]["content"] if wish.style.continue_ else None
        self._tags, self._opened = self._thinking_tags()

    def prepared(self) -> Prepared:
        """Return it all."""
        off = self._wish.thinking.wanted is False or self._wish.thinking.budget == 0
        if off and self._opened and self._tags is not None:
            self._prompt = f"{self._prompt.rstrip()}\n{self._tags.end}\n\n"
            self._opened = False
        tags = self._tags
        thoughts = Thoughts(tags, self._opened) if tags is not None and not off else None
        constraint = answer_form(thoughts, self._calls, self._wish.body)
        parts = self._reader().push(self._continued) if self._continued else []
        return Prepared(
            self._prompt,
            self._reader_of_the_rest,
            constraint,
            self._prompted.stop,
            self._shown(),
            self._budget(off=off),
            parts if self._wish.echo else (),
        )

    def _thinking_tags(self) -> tuple[ThinkingTags | None, bool]:
        """Return the tags of the thoughts that may come, or that the prompt has begun, and whether it has; None where
        it has ended them.
        """
        end = self._prompt.rstrip()
        for tags in THINKING_TAGS:
            if end.endswith(tags.end):
                return None, False
            if end.endswith(tags.start) or (self._continued and _open(self._continued, tags)):
                return tags, True
        if self._continued:
            return None, False
        return _TAGS.get(self._thinking or ""), False

    def _budget(self, *, off: bool) -> Thinking | None:
        wish, tags = self._wish.thinking, self._tags
        budget = 0 if off else wish.budget
        if tags is None or budget is None or (off and self._prompt != self._prompted.prompt):
            return None
        return Thinking(tags.start, tags.end, budget, self._opened, wish.message)

    def _shown(self) -> tuple[str, ...]:
        own = self._calls.format.shown if self._calls is not None else ()
        tags = [text for tags in THINKING_TAGS for text in (tags.start, tags.end, tags.answer)]
        return tuple(dict.fromkeys(filter(None, (*own, *tags, *self._prompted.stop))))

    def _reader(self) -> AnswerReader:
        wish = self._wish
        return AnswerReader(
            thinking=THINKING_TAGS,
            begun=self._tags if self._opened and not self._continued else None,
            raw_thoughts=not wish.thinking.read,
            calls=self._calls.format if self._calls is not None else None,
            names=self._names,
            speakers=self._prompted.speakers,
            trimmed=wish.body is None and not self._continued,
            whole=not wish.streamed and not self._continued,
        )

    def _reader_of_the_rest(self) -> AnswerReader:
        """Return a reader that has read what is continued."""
        reader = self._reader()
        if self._continued:
            reader.push(self._continued)
        return reader


def _open(text: str, tags: ThinkingTags) -> bool:
    """Say whether a text has begun to think and not ended that."""
    return text.lstrip().startswith(tags.start) and tags.end not in text


class _WholePreparation:
    """The same for a format of whole answers."""

    def __init__(
        self,
        wish: ChatWish,
        answers: AnswerFormat,
        tools: Sequence[Tool],
        schemas: Sequence[Constraint],
        prompted: Styled,
    ) -> None:
        self._wish = wish
        self._format = answers
        self._tools = tools
        self._schemas = schemas
        self._prompted = prompted
        self._continued = wish.messages[-1]["content"] if wish.style.continue_ else ""
        self._begun = answers.begun(prompted.prompt)

    def prepared(self) -> Prepared:
        """Return it all."""
        parts = self._reader().push(self._continued) if self._continued else []
        shown = tuple(dict.fromkeys((*self._format.SHOWN, *self._prompted.stop)))
        return Prepared(
            self._prompted.prompt,
            self._reader_of_the_rest,
            self._constraint(),
            self._prompted.stop,
            shown,
            self._budget(),
            parts if self._wish.echo else (),
        )

    def _constraint(self) -> Constraint | None:
        toolbox, body = self._wish.toolbox, self._wish.body
        if toolbox is None and body is None:
            return None
        rules = self._format.lark(
            self._tools,
            forced=toolbox is not None and toolbox.forced,
            calls=toolbox is not None,
            body=body is not None,
            begun=self._begun,
        )
        parts = (*self._schemas, body) if body is not None else tuple(self._schemas)
        return Constraint("lark", rules, "tools" if body is None else body.param, self._format.SHOWN, parts)

    def _budget(self) -> Thinking | None:
        wish, tags = self._wish.thinking, self._format.THOUGHTS
        budget = 0 if wish.wanted is False else wish.budget
        if tags is None or budget is None:
            return None
        start, end = tags
        return Thinking(start, end, budget, self._begun.endswith(start), wish.message)

    def _reader(self) -> AnswerReader:
        names = frozenset(tool.name for tool in self._tools)
        reader = AnswerReader(names=names, read=self._format.read_answer)
        reader.push(self._begun)
        return reader

    def _reader_of_the_rest(self) -> AnswerReader:
        reader = self._reader()
        reader.push(self._continued)
        return reader
