"""What depends on where a prompt ends: which form its answer has, how it is read, and how long it may think.

Knows nothing of HTTP, of tokens, or of templates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from llamaserve.chat.answer import THINKING_TAGS, AnswerReader, ThinkingTags
from llamaserve.chat.form import Calls, Thoughts, answer_form
from llamaserve.chat.formats.format import AnswerFormat
from llamaserve.chat.modes import Mode, ModelTemplate, Style, Styled
from llamaserve.chat.reading import Part
from llamaserve.chat.tools import Tool, Toolbox
from llamaserve.engine.params import Constraint, Thinking
from llamaserve.errors import InvalidRequest

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

    @property
    def off(self) -> bool:
        """Whether the model shall not think."""
        return self.wanted is False or self.budget == 0

    @property
    def limit(self) -> int | None:
        """How many tokens it may think; None for any number."""
        return 0 if self.off else self.budget


@dataclass(frozen=True)
class ChatWish:
    """What a request wants. ``messages`` are as ``normalise`` returns them.

    ``body`` is the form of the answer's text. ``variables`` are for the template. An answer that goes on with the last
    message begins with its text if there is to be an ``echo``. ``streamed`` answers are read as they come.
    """

    messages: Sequence[dict[str, Any]]
    model: ModelTemplate
    style: Style = field(default_factory=Style)
    toolbox: Toolbox | None = None
    body: Constraint | None = None
    thinking: ThinkingWish = field(default_factory=ThinkingWish)
    variables: Mapping[str, Any] = field(default_factory=dict)
    echo: bool = False
    streamed: bool = False

    @property
    def needs_model(self) -> bool:
        """Whether the prompt is written by a template of the model's own."""
        return self.style.mode is not Mode.CHAT and self.style.instruction.source is None

    @property
    def continued(self) -> str:
        """The text that the answer goes on with; empty if it begins anew."""
        text: str = self.messages[-1]["content"] if self.style.continue_ else ""
        return text


@dataclass(frozen=True)
class Prepared:
    """What the model is given and how its answer is read.

    ``shown`` are names of control tokens that the reader wants to see. ``begun`` are the parts that every answer begins
    with. ``thinks``: as far as is known, the model may think first. ``relaxed`` are the places of schemas of which not
    all can be enforced, with what can't. ``dropped`` is how many messages were left out.
    """

    prompt: str
    reader: Callable[[], AnswerReader]
    constraint: Constraint | None = None
    stop: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    thinking: Thinking | None = None
    begun: Sequence[Part] = ()
    thinks: bool = False
    relaxed: Mapping[str, str] = field(default_factory=dict)
    dropped: int = 0


def prepared(
    wish: ChatWish, prompted: Styled, calls: Calls | None, tools: Sequence[Tool], thinking: str | None
) -> Prepared:
    """Return what is to be generated after a prompt. ``thinking`` is the tag that thoughts begin with, if the template
    knows any. Raises ``InvalidRequest`` when a call is to be continued.
    """
    return _Preparation(wish, prompted, calls, tools, thinking).prepared()


class _Preparation:
    def __init__(
        self, wish: ChatWish, prompted: Styled, calls: Calls | None, tools: Sequence[Tool], thinking: str | None
    ) -> None:
        self._wish = wish
        self._prompted = prompted
        self._calls = calls
        self._tools = tools
        self._known = _TAGS.get(thinking or "")
        self._tags, self._opened = self._thinking_tags()
        self._closing = f"\n{self._tags.end}\n\n" if self._opened and self._tags and wish.thinking.off else ""

    def prepared(self) -> Prepared:
        continued = self._wish.continued
        marker = self._calls.format.marker if self._calls is not None else None
        if marker is not None and marker in continued:
            raise InvalidRequest(f"a message that has begun a call ({marker}) can't be continued", param="messages")
        prompt = self._prompted.prompt
        return Prepared(
            f"{prompt.rstrip()}{self._closing}" if self._closing else prompt,
            self._reader,
            answer_form(self._thoughts(), self._calls, self._wish.body),
            self._prompted.stop,
            self._shown(),
            self._limit(),
            self._begun() if self._wish.echo and continued else (),
            self._tags is not None,
        )

    def _thinking_tags(self) -> tuple[ThinkingTags | None, bool]:
        """Return the tags of the thoughts that may come, or that the prompt has begun, and whether it has; None where
        it has ended them.
        """
        end, continued = self._prompted.prompt.rstrip(), self._wish.continued
        for tags in THINKING_TAGS:
            if end.endswith(tags.end):
                return None, False
            if end.endswith(tags.start) or _open(continued, tags):
                return tags, True
        return (None if continued else self._known), False

    def _thoughts(self) -> Thoughts | None:
        """Return what the answer may think, for its form."""
        if self._tags is None or self._wish.thinking.off:
            return None
        return Thoughts(self._tags, self._opened)

    def _limit(self) -> Thinking | None:
        wish, tags = self._wish.thinking, self._tags
        if tags is None or wish.limit is None or self._closing:
            return None
        return Thinking(tags.start, tags.end, wish.limit, self._opened, wish.message)

    def _shown(self) -> tuple[str, ...]:
        own = self._calls.format.shown if self._calls is not None else ()
        tags = [text for tags in THINKING_TAGS for text in (tags.start, tags.end, tags.answer)]
        return tuple(dict.fromkeys(filter(None, (*own, *tags, *self._prompted.stop))))

    def _reader(self) -> AnswerReader:
        wish, continued, raw = self._wish, bool(self._wish.continued), not self._wish.thinking.read
        opened = self._opened and not self._closing and not (continued and raw)
        return AnswerReader(
            thinking=THINKING_TAGS if not continued else (),
            begun=self._tags if opened else None,
            resumed=continued,
            raw_thoughts=raw,
            calls=self._calls.format if self._calls is not None else None,
            names=frozenset(tool.name for tool in self._tools),
            forced=self._calls is not None and self._calls.forced,
            speakers=self._prompted.speakers,
            trimmed=wish.body is None and not continued,
            whole=not (wish.streamed or continued or self._calls) and _is_text(wish.body),
        )

    def _begun(self) -> list[Part]:
        """Return the text that the answer goes on with, in parts."""
        reader = AnswerReader(thinking=THINKING_TAGS, raw_thoughts=not self._wish.thinking.read)
        return [*reader.push(self._wish.continued), *reader.finish()]


def _is_text(body: Constraint | None) -> bool:
    """Say whether an answer is text, in which tags mean something, and not what may have them in strings."""
    return body is None or body.kind in ("regex", "choice")


def _open(text: str, tags: ThinkingTags) -> bool:
    """Say whether a text has begun to think and not ended that."""
    return text.lstrip().startswith(tags.start) and tags.end not in text


def prepared_whole(
    wish: ChatWish, prompted: Styled, answers: AnswerFormat, tools: Sequence[Tool], schemas: Sequence[Constraint]
) -> Prepared:
    """Return what is to be generated after a prompt, for a format of whole answers. ``schemas`` are what the arguments
    of the tools must be.
    """
    toolbox, body, thinking = wish.toolbox, wish.body, wish.thinking
    header = answers.begun(prompted.prompt)
    names = frozenset(tool.name for tool in tools)

    def reader() -> AnswerReader:
        made = AnswerReader(read=partial(answers.read_answer, names=names, raw_thoughts=not thinking.read))
        made.push(header)
        return made

    limit = None
    if answers.THOUGHTS is not None and thinking.limit is not None:
        start, end = answers.THOUGHTS
        limit = Thinking(start, end, thinking.limit, header.endswith(start), thinking.message)
    constraint = None
    if toolbox is not None or body is not None or limit is not None:
        rules = answers.lark(
            tools,
            forced=toolbox is not None and toolbox.forced,
            calls=toolbox is not None,
            body=body is not None,
            begun=header,
            limited=limit is not None,
        )
        parts = (*schemas, body) if body is not None else tuple(schemas)
        constraint = Constraint("lark", rules, "tools" if body is None else body.param, answers.SHOWN, parts)
    begun = AnswerReader().push(wish.continued) if wish.echo else []
    shown = tuple(dict.fromkeys((*answers.SHOWN, *prompted.stop)))
    thinks = answers.THOUGHTS is not None
    return Prepared(prompted.prompt, reader, constraint, prompted.stop, shown, limit, begun, thinks)
