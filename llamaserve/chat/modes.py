"""The modes of text-generation-webui: from a request's messages to the prompt and the texts that end the answer.

``instruct`` writes the conversation with an instruction template, the model's own or another. ``chat`` writes it as a
dialogue of two names under the description of a character, for models that know no template. ``chat-instruct`` gives
such a dialogue to an instruction template, as the user's one message.

This module knows nothing of HTTP, of tokens, or of how templates render.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from llamaserve.chat.characters import MAX_NAME, UNNAMED, Character, filled, replaced
from llamaserve.chat.instruction_templates import OWN, InstructionTemplate
from llamaserve.chat.template import RenderJob
from llamaserve.chat.values import text
from llamaserve.errors import InvalidRequest, ModelNotCapable

USER = "You"  # the user's name when nothing gives one
COMMAND = (
    "Below is a conversation. Write what <|character|> says next: one reply, in the same style, and nothing else."
    "\n\n<|prompt|>"
)
# How the chat mode writes a dialogue. The system message is the character's context.
CHAT_TEMPLATE = """
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\\n\\n' if message.content }}
        {{- user_bio + '\\n\\n' if loop.first and user_bio }}
    {%- elif message.role == 'user' %}
        {{- name1 + ': ' + message.content + '\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '[Result of ' + message.name | default('a tool', true) + ': ' + message.content + ']\\n' }}
    {%- else %}
        {{- name2 + ': ' + message.content + '\\n' if message.content or not message.tool_calls }}
        {%- for call in message.tool_calls or [] %}
            {{- '[Call of ' + call.function.name + ': ' + call.function.arguments | tojson + ']\\n' }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{{- name2 + ':' if add_generation_prompt }}"""

_SAMPLE = ("firstquokka", "secondquokka", "thirdquokka", "fourthquokka")  # texts that no template writes by itself
_CLOSING = {"<": ">", "[": "]", "(": ")", "{": "}"}

Render = Callable[[RenderJob], Awaitable[str]]  # as TemplateRenderer.render


class Mode(StrEnum):
    """How a conversation becomes a prompt."""

    INSTRUCT = "instruct"
    CHAT = "chat"
    CHAT_INSTRUCT = "chat-instruct"


@dataclass(frozen=True)
class Style:
    """What a request says of how its prompt is written. Empty texts are as good as not given.

    ``name1`` is the user's name and gives way to one in the character's file; ``name2``, the model's, and ``context``
    stand before those in the file. A ``greeting`` has no use: one that was shown is among the messages. Without a
    ``generation_prompt`` the model's turn is not opened.
    """

    mode: Mode = Mode.INSTRUCT
    character: Character = UNNAMED
    name1: str = ""
    name2: str = ""
    context: str = ""
    greeting: str = ""
    user_bio: str = ""
    instruction: InstructionTemplate = OWN
    chat_template: str = ""
    chat_instruct_command: str = ""
    continue_: bool = False
    generation_prompt: bool = True


@dataclass(frozen=True)
class ModelTemplate:
    """What the model's file says: its chat template, None if it has none, and its special tokens."""

    source: str | None
    bos_token: str = ""
    eos_token: str = ""


NO_TEMPLATE: Final = ModelTemplate(None)


@dataclass(frozen=True)
class Styled:
    """A prompt, and what is to be done with the answer.

    ``stop`` are texts that end it. Where there are ``speakers``, it may begin with white space and one of these, which
    is no part of it.
    """

    prompt: str
    stop: tuple[str, ...] = ()
    speakers: tuple[str, ...] = ()


async def styled(
    render: Render,
    style: Style,
    messages: Sequence[Mapping[str, Any]],
    model: ModelTemplate,
    variables: Mapping[str, Any] | None = None,
) -> Styled:
    """Return the prompt for messages as ``normalise`` makes them; ``variables`` go to all templates, ``tools`` too.

    Outside of the model's own template, texts lose the white space around them, but for one that is continued.

    Raises ``InvalidRequest`` when a name or text can't be, or when there is no message to continue;
    ``ModelNotCapable`` when the mode needs a template and there is none; and what ``render`` raises.
    """
    _check(style, messages)
    writer = _Writer(render, style, model, dict(variables or {}))
    match style.mode:
        case Mode.INSTRUCT:
            return await writer.instruct(messages)
        case Mode.CHAT:
            return await writer.chat(messages)
        case Mode.CHAT_INSTRUCT:
            return await writer.chat_instruct(messages)


def _check(style: Style, messages: Sequence[Mapping[str, Any]]) -> None:
    for param in ("name1", "name2", "context", "greeting", "user_bio", "chat_instruct_command"):
        text(getattr(style, param), param)
    for param, name in (("name1", style.name1), ("name2", style.name2)):
        if len(name) > MAX_NAME:
            raise InvalidRequest(f"{param} has {len(name)} characters; at most {MAX_NAME} are taken", param=param)
    if style.continue_ and (not messages or messages[-1]["role"] != "assistant"):
        raise InvalidRequest("only a last message of the assistant's can be continued", param="messages")


class _Writer:
    """Writes the prompt of one request."""

    def __init__(self, render: Render, style: Style, model: ModelTemplate, variables: dict[str, Any]) -> None:
        self._render = render
        self._style = style
        self._model = model
        self._variables = variables
        self._user = style.character.user or style.name1.strip() or USER
        self._bot = style.name2.strip() or style.character.name

    async def instruct(self, messages: Sequence[Mapping[str, Any]]) -> Styled:
        own = self._style.instruction.source is None
        conversation = self._with_system([dict(message) for message in messages] if own else self._stripped(messages))
        prompted = self._style.generation_prompt
        job = self._job(self._instruction(), conversation, continues=self._style.continue_, prompted=prompted)
        return Styled(await self._render(job), () if own else await self._ends(job))

    async def chat(self, messages: Sequence[Mapping[str, Any]]) -> Styled:
        system, turns = _split(self._stripped(messages))
        prompted = self._style.generation_prompt
        job = self._dialogue(system, turns, continues=self._style.continue_, prompted=prompted)
        return Styled(await self._render(job), await self._ends(job), self._speakers())

    async def chat_instruct(self, messages: Sequence[Mapping[str, Any]]) -> Styled:
        """Have the template write the model's name as the beginning of an answer that is to be continued.

        So the name stands wherever the template has an answer's text, whatever it writes before it.
        """
        system, turns = _split(self._stripped(messages))
        reply = f"{self._bot}:"
        if self._style.continue_:
            reply = f"{reply} {turns.pop()['content']}"
        dialogue = await self._render(self._dialogue("", turns, prompted=False))
        conversation = [
            *([{"role": "system", "content": system}] if system else []),
            {"role": "user", "content": self._command(dialogue)},
            {"role": "assistant", "content": reply},
        ]
        job = self._job(self._instruction(), self._with_system(conversation), continues=True)
        ends = () if self._style.instruction.source is None else await self._ends(job)
        names = tuple(f"\n{name}:" for name in dict.fromkeys((self._user, self._bot)))
        return Styled(await self._render(job), (*ends, *names), self._speakers())

    def _instruction(self) -> str:
        source = self._style.instruction.source or self._model.source
        if not source:
            raise ModelNotCapable(
                f"the model has no chat template, which mode {self._style.mode.value!r} needs; "
                "give an instruction_template, or use mode 'chat'",
                param="mode",
            )
        return source

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        system = self._style.instruction.system.strip()
        if not system or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _stripped(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages without white space around their texts. What is continued stays as it is: the client
        puts the answer behind it.
        """
        stripped = [{**message, "content": (message["content"] or "").strip()} for message in messages]
        if self._style.continue_:
            stripped[-1] = dict(messages[-1])
        return stripped

    def _dialogue(
        self, system: str, turns: Sequence[dict[str, Any]], *, continues: bool = False, prompted: bool = True
    ) -> RenderJob:
        """Return the job for a dialogue. The leading system text stands after the character's context."""
        context = self._filled(self._style.context.strip() or self._style.character.context, "context")
        bio = self._filled(self._style.user_bio.strip(), "user_bio")
        about = "\n\n".join(filter(None, (context, system)))
        opening = [{"role": "system", "content": about}] if about or bio else []
        source = self._filled(self._style.chat_template or CHAT_TEMPLATE, "chat_template_str")
        names = {"name1": self._user, "name2": self._bot, "user_bio": bio}
        return self._job(source, [*opening, *turns], continues=continues, prompted=prompted, variables=names)

    def _command(self, dialogue: str) -> str:
        command = self._style.chat_instruct_command or COMMAND
        param = "chat_instruct_command"
        command = replaced(command, "<|character|>", self._bot, param=param)
        return self._filled(replaced(command, "<|prompt|>", dialogue, param=param), param)

    def _filled(self, value: str, param: str) -> str:
        return filled(value, user=self._user, bot=self._bot, param=param)

    def _speakers(self) -> tuple[str, ...]:
        return () if self._style.continue_ else (f"{self._bot}:", f"{self._user}:")

    def _job(
        self,
        source: str,
        messages: list[dict[str, Any]],
        *,
        continues: bool = False,
        prompted: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderJob:
        return RenderJob(
            source,
            messages,
            self._model.bos_token,
            self._model.eos_token,
            add_generation_prompt=prompted,
            continue_final_message=continues,
            variables={**self._variables, **(variables or {})},
        )

    async def _ends(self, job: RenderJob) -> tuple[str, ...]:
        """Return the texts by which an answer ends, from what the job's template writes after and between texts."""
        roles = ("user", "assistant") * 2
        opening = [message for message in job.messages[:1] if message["role"] == "system"]
        sample = [{"role": role, "content": content} for role, content in zip(roles, _SAMPLE, strict=True)]
        shown = await self._render(
            RenderJob(
                job.template,
                [*opening, *sample],
                job.bos_token,
                job.eos_token,
                add_generation_prompt=False,
                variables={**job.variables, "tools": None},
            )
        )
        return ends_of(shown, job.template)


def ends_of(shown: str, template: str) -> tuple[str, ...]:
    """Return the texts that end an answer, given how the template shows ``_SAMPLE``."""
    rest, gaps = shown, []
    for content, following in zip(_SAMPLE, (*_SAMPLE[1:], None), strict=True):
        rest = rest.partition(content)[2]
        gaps.append(rest if following is None else rest.partition(following)[0])
    ends: list[str] = []
    for gap in (gaps[0], gaps[1], gaps[3]):
        end = _end_in(gap)
        if end == "<|end|>" and "<|channel|>" in template:  # of gpt-oss: it ends every message, also one of thoughts
            end = next((each for each in ("<|return|>", "<|result|>") if each in template), end)
        if end:
            ends.append(end)
    return tuple(
        end
        for index, end in enumerate(ends)
        if end not in ends[:index] and not any(end != other and end.startswith(other) for other in ends)
    )


def _end_in(gap: str) -> str:
    """Return the first mark of what follows a text: something in brackets, or all up to a colon, or ""."""
    stripped = gap.strip()
    closing = _CLOSING.get(stripped[:1])
    if closing and closing in stripped:
        return stripped[: stripped.index(closing) + 1]
    return gap[: gap.index(":") + 1] if ":" in gap else ""


def _split(messages: Sequence[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Return the leading system text and the other messages."""
    if messages and messages[0]["role"] == "system":
        return messages[0]["content"], list(messages[1:])
    return "", list(messages)
