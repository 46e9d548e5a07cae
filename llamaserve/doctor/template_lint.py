"""Whether a model's chat template writes conversations so that the model understands them, and ends its answers.

The template is rendered where all are, and tried out as for every request (``chat/traits.py``); what it writes is then
read with the model's own vocabulary. What llamaserve makes up for by itself is said, and is no fault.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from llamaserve.chat.adapting import adapted
from llamaserve.chat.conversation import call_format
from llamaserve.chat.formats.hermes import HERMES
from llamaserve.chat.formats.json_calls import JsonCalls
from llamaserve.chat.messages import normalise
from llamaserve.chat.modes import ModelTemplate
from llamaserve.chat.template import RenderJob, TemplateRenderer
from llamaserve.chat.tools import toolbox
from llamaserve.chat.traits import ProbeJob, Traits
from llamaserve.doctor.findings import Finding, command, note, ok, problem, warning
from llamaserve.doctor.llama import NoAnswer, Question, Vocabulary
from llamaserve.errors import ChatTemplateError, InvalidRequest, Unavailable
from llamaserve.sandbox import Budget

Message = dict[str, Any]
Read = Callable[[Question], Vocabulary]

_SLOW = 0.2  # seconds of CPU time; ordinary templates take some milliseconds
_MOST = 60.0  # seconds, more than a renderer grants
_SYSTEM, _FIRST, _ANSWER, _SECOND = "quokkasystem", "firstquokka", "quokkaanswer", "secondquokka"
_RESULT = "quokkaresult"
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "quokka_count",
            "description": "Counts quokkas.",
            "parameters": {"type": "object", "properties": {"island": {"type": "string"}}, "required": ["island"]},
        },
    }
]
_CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "quokka_count", "arguments": '{"island": "quokkaisle"}'},
}
# Tokens of which a vocabulary with them knows conversations as the instruction template has them.
_INSTRUCTIONS = {"<|im_start|>": "ChatML", "<|start_header_id|>": "Llama-v3"}
_PLAIN = "Alpaca"


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


async def lint(name: str, template: ModelTemplate, read: Read, port: int, renderer: TemplateRenderer) -> list[Finding]:
    """Return what there is to say of a model's template. ``read`` asks the model's vocabulary; the commands that are
    proposed send requests to ``port``.
    """
    try:
        return await _Lint(name, template, read, port, renderer).findings()
    except Unavailable as error:
        return [warning(name, f"its chat template could not be tried: {error.message}", command("doctor"))]


class _Lint:
    def __init__(self, name: str, template: ModelTemplate, read: Read, port: int, renderer: TemplateRenderer) -> None:
        self._name = name
        self._template = template
        self._read = read
        self._port = port
        self._renderer = renderer

    async def findings(self) -> list[Finding]:
        """Try the template out."""
        source = self._template.source
        if not source:
            message = "the file has no chat template; chats need an instruction template, as the command gives one"
            return [note(self._name, message, self._instead(self._vocabulary("", "")))]
        try:
            job = ProbeJob(source, self._template.bos_token, self._template.eos_token)
            traits = await self._renderer.probe(job)
            budget = Budget(_MOST, _MOST)
            prompt = await self._show([_said("user", _FIRST)], prompt=True, budget=budget)
            seconds = budget.seconds - budget.left
        except ChatTemplateError as error:
            return [problem(self._name, f"{error.message}: chats fail", self._instead(self._vocabulary("", "")))]
        answered = await self._shown([_said("user", _FIRST), _said("assistant", _ANSWER)])
        vocabulary = self._vocabulary(prompt, await self._ending(answered))
        checks: list[Awaitable[Finding | None]] = [
            self._opening(prompt, answered),
            self._turns(),
            self._system(),
            self._neighbours(),
            self._tools(traits),
        ]
        found = [await check for check in checks]
        if isinstance(vocabulary, Vocabulary):
            found += [self._begin(prompt, vocabulary), self._end(answered, vocabulary)]
        else:
            message = f"llama.cpp can't read its vocabulary: its process {vocabulary}"
            found.append(problem(self._name, message, _INSTEAD))
        if seconds > _SLOW:
            message = f"its chat template takes {seconds:.1f} s for one short message"
            found.append(warning(self._name, message, self._instead(vocabulary)))
        return self._fixed([each for each in found if each is not None], vocabulary)

    def _fixed(self, found: Sequence[Finding], vocabulary: Vocabulary | NoAnswer) -> list[Finding]:
        """Give findings without a command of their own the one that replaces the template."""
        instead = self._instead(vocabulary)
        return [
            each if each.fix != _INSTEAD else Finding(each.level, each.subject, each.message, instead) for each in found
        ]

    # ---- what it writes ------------------------------------------------------------------------------------------

    async def _show(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        tools: Sequence[Any] | None = None,
        budget: Budget | None = None,
    ) -> str:
        job = RenderJob(
            self._template.source or "",
            list(messages),
            self._template.bos_token,
            self._template.eos_token,
            prompt,
            variables={"tools": tools} if tools is not None else {},
        )
        return await self._renderer.render(job, budget)

    async def _shown(self, messages: Sequence[Message]) -> str | None:
        """Return a conversation; None where the template refuses it."""
        try:
            return await self._show(messages)
        except ChatTemplateError:
            return None

    async def _opening(self, prompt: str, answered: str | None) -> Finding | None:
        """Compare what is written before an answer that is asked for with what is written before one that was given."""
        if answered is None or _ANSWER not in answered:
            return self._bad("its chat template does not show answers: the model does not see what it said")
        before = answered.rpartition(_ANSWER)[0].rstrip()
        if before != prompt.rstrip() and before.startswith(prompt.rstrip()) and await self._is_plain(prompt):
            return self._bad("its chat template does not open the answer: add_generation_prompt changes nothing")
        return None

    async def _ending(self, answered: str | None) -> str:
        """Return what is written behind an answer: if it is nothing, what is before the next question."""
        ending = answered.rpartition(_ANSWER)[2] if answered is not None else ""
        if ending.strip():
            return ending
        text = await self._shown([_said("user", _FIRST), _said("assistant", _ANSWER), _said("user", _SECOND)]) or ""
        return text.rpartition(_ANSWER)[2].partition(_SECOND)[0]

    async def _is_plain(self, prompt: str) -> bool:
        return await self._shown([_said("user", _FIRST)]) == prompt

    async def _turns(self) -> Finding | None:
        turns = [_said("user", _FIRST), _said("assistant", _ANSWER), _said("user", _SECOND)]
        text = await self._shown(turns)
        if text is None or not _in_order(text, _FIRST, _ANSWER, _SECOND):
            return self._bad("its chat template fails on a conversation of several turns, or leaves out some")
        return None

    async def _system(self) -> Finding:
        text = await self._shown([_said("system", _SYSTEM), _said("user", _FIRST)])
        if text is None:
            return self._bad("its chat template fails on a system message")
        if _SYSTEM not in text:
            return self._bad("its chat template ignores system messages")
        if text == await self._shown([_said("user", f"{_SYSTEM}\n\n{_FIRST}")]):
            return ok(
                self._name, "its chat template has no place for a system message: it is put before the user's text"
            )
        return ok(self._name, "its chat template shows system messages")

    async def _neighbours(self) -> Finding | None:
        two = [_said("user", _FIRST), _said("user", _SECOND)]
        text = await self._shown(two)
        if text is None or not _in_order(text, _FIRST, _SECOND):
            return self._bad("its chat template fails on two messages of one role in a row, or leaves out one")
        if text == await self._shown([_said("user", f"{_FIRST}\n\n{_SECOND}")]):
            return ok(self._name, "its chat template wants roles in turn: neighbours of one role are joined")
        return None

    async def _tools(self, traits: Traits) -> Finding:
        offered = toolbox(tools=_TOOLS, tool_choice=None, parallel_tool_calls=None, functions=None, function_call=None)
        called = {"role": "assistant", "content": None, "tool_calls": [_CALL]}
        result = {"role": "tool", "tool_call_id": "call_1", "content": _RESULT}
        calls = call_format(self._template.source or "", traits)
        written = calls if isinstance(calls, JsonCalls) else HERMES
        messages = normalise([_said("user", _FIRST), called, result])
        shown, described = adapted(messages, traits, offered, written)
        try:
            text = await self._show(shown, prompt=True, tools=described)
        except (ChatTemplateError, InvalidRequest) as error:
            return self._bad(f"tools can't be used with its chat template: {error.message}")
        if not all(word in text for word in ("quokka_count", "quokkaisle", _RESULT)):
            return self._bad("its chat template leaves out tools, their calls or their results")
        if not traits.tools:
            return ok(self._name, "its chat template knows no tools: they are described in the system message")
        return ok(self._name, "its chat template shows tools")

    # ---- how it is read ------------------------------------------------------------------------------------------

    def _vocabulary(self, prompt: str, ending: str) -> Vocabulary | NoAnswer:
        try:
            return self._read(Question(prompt, ending, list(_INSTRUCTIONS)))
        except NoAnswer as error:
            return error

    def _begin(self, prompt: str, vocabulary: Vocabulary) -> Finding | None:
        bos = self._template.bos_token
        if vocabulary.begins > 1:
            return self._bad(f"its chat template writes {bos} more than once, which makes answers worse")
        late = bool(bos) and vocabulary.adds_begin and prompt.lstrip().startswith(bos) and not prompt.startswith(bos)
        if late:
            message = f"its chat template writes {bos} behind white space, and its tokenizer adds one before it"
            return warning(self._name, message, self._request(add_bos_token=False))
        if bos and vocabulary.adds_begin and prompt.startswith(bos):
            return ok(self._name, f"both chat template and tokenizer begin with {bos}: llamaserve writes it once")
        return None

    def _end(self, answered: str | None, vocabulary: Vocabulary) -> Finding | None:
        """Say whether what the template writes behind an answer is what ends one."""
        if answered is None or _ANSWER not in answered:
            return None
        if vocabulary.marker is None:
            message = "its chat template writes no token behind an answer that ends one: answers may run on"
            return self._bad(message)
        if not vocabulary.marker_ends:
            marker = vocabulary.marker
            message = f"its chat template ends answers with {marker}, which the tokenizer takes for no end: they run on"
            return warning(self._name, message, self._request(stop=[marker]))
        return ok(self._name, f"answers end with {vocabulary.marker}")

    # ---- commands ------------------------------------------------------------------------------------------------

    def _bad(self, message: str) -> Finding:
        return warning(self._name, message, _INSTEAD)

    def _instead(self, vocabulary: Vocabulary | NoAnswer) -> str:
        """Return the command that chats without the model's template."""
        known = vocabulary.controls if isinstance(vocabulary, Vocabulary) else []
        return self._request(instruction_template=next((_INSTRUCTIONS[name] for name in known), _PLAIN))

    def _request(self, **options: Any) -> str:
        body = {"model": self._name, **options, "messages": [_said("user", "Hello!")]}
        url = f"http://localhost:{self._port or 5000}/v1/chat/completions"
        return command("curl", url, "-d", json.dumps(body, ensure_ascii=False))


_INSTEAD = "instead"  # stands for the command that replaces the template, until the vocabulary is known


def _in_order(text: str, *words: str) -> bool:
    """Tell whether words are in a text, one after the other."""
    places = [text.find(word) for word in words]
    return -1 not in places and places == sorted(places)
