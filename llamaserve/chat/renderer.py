"""The renderer process: ``python -m llamaserve.chat.renderer FD`` renders chat templates, one job at a time.

Each ``RenderJob`` gets a ``RenderAnswer``; ``sandbox.py`` brings and takes them. The Jinja environment is that of
Hugging Face's transformers, which templates are written for.

Two things are done that no template does by itself. Templates that complain about the order of roles are rendered as
if they did not, as long as every message shows (``_prompt``). And a prompt may end within its last message
(``_continued``).

It does not know the time limit of a job: the parent measures it and kills this process. It knows nothing of models.
"""

from __future__ import annotations

import gc
import json
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import groupby
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError, TemplateSyntaxError, UndefinedError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from msgspec.structs import replace

from llamaserve.chat.probing import probe
from llamaserve.chat.template import MEMORY_LIMIT, RenderAnswer, RenderJob
from llamaserve.chat.traits import ProbeJob
from llamaserve.errors import ChatTemplateError, to_value
from llamaserve.sandbox import serve

MAX_TEXT = 16  # MiB of rendered text; the longest prompts are a few
MAX_TEMPLATE = 256 * 1024  # characters; the longest templates of real models have some 20,000
MAX_CODE = 1024 * 1024  # characters of Python, which Jinja makes of a template: some five times its length
KEPT_TEMPLATES = 8  # compiled templates in memory: few, since strangers' templates share the memory limit

_SOURCE_NAME = "<template>"  # Jinja's name for the file of a template that was given as a string
_JOBS = msgspec.msgpack.Decoder(RenderJob | ProbeJob)
_PROBE = "quokkaprobe"  # a text that no template writes by itself
_ANSWERED = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
_OPENINGS: tuple[list[dict[str, Any]], ...] = ([], [{"role": "system", "content": "a system text"}], _ANSWERED)

# What templates say when they don't know how to show the messages in this order. Anything else is a refusal.
_COMPLAINTS = re.compile(
    r"must alternate|roles? (should|need to) alternate|only .{1,60} roles? (is|are) (supported|allowed)"
    r"|must (start|begin) with (a |the )?user|system messages? (must be|is only allowed) at the (beginning|start)",
    re.IGNORECASE,
)
_NO_SYSTEM = re.compile(r"system (role|messages?|prompts?) (is |are )?not supported", re.IGNORECASE)

# How a text may begin that holds its own reasoning, and what a template may then have written before it by itself.
_EMPTY_BLOCKS = {
    opening: re.compile(rf"{before}\s*\Z")
    for opening, before in {
        "<think>": r"<think>\s*</think>",
        "<thinking>": r"<thinking>\s*</thinking>",
        "<seed:think>": r"<seed:think>\s*</seed:think>",
        "[THINK]": r"\[THINK\]\s*\[/THINK\]",
        "<|channel>thought": r"<\|channel>thought\s*<channel\|>",
        "<|channel|>": r"<\|channel\|>final<\|message\|>",
    }.items()
}

# What a template, its compilation or the sandbox raises. Anything else ends the process, and the parent says so.
_FAILURES = (
    *(TemplateError, SyntaxError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


class Refusal(TemplateError):
    """The template called ``raise_exception``."""


class CantContinue(Exception):
    """The template does not show the last message once and whole."""


class OutputTooLong(Exception):
    """The template wrote more than ``MAX_TEXT``."""


class GenerationTag(Extension):
    """Tolerates ``{% generation %}``, which marks the assistant's text for training; as there, it opens a scope."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the nodes between the tag and ``{% endgeneration %}``."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: object) -> NoReturn:
    raise Refusal(str(message))


def _tolerate(message: object) -> str:
    """Stand in for ``raise_exception`` where a complaint about the order of roles shall not count."""
    if _COMPLAINTS.search(str(message)):
        return ""
    raise Refusal(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 (templates may pass it by name)
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replace Jinja's filter, which escapes HTML: a prompt is no web page."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT = _environment()


@dataclass
class _Program:
    """A compiled template. ``takes_parts`` is None until a probe has told which form of content it takes."""

    template: Template
    takes_parts: bool | None = None


@lru_cache(maxsize=KEPT_TEMPLATES)
def _compiled(source: str) -> _Program:
    """Compile a template, in two steps: Jinja computes constants, so the short ``{{ 'x' * 10 ** 8 }}`` is long code."""
    if len(source) > MAX_TEMPLATE:
        raise ValueError(f"it has {len(source)} characters, and the limit is {MAX_TEMPLATE}")
    python = _ENVIRONMENT.compile(source, raw=True)
    if len(python) > MAX_CODE:
        raise ValueError(f"it compiles to {len(python)} characters, and the limit is {MAX_CODE}")
    code = compile(python, _SOURCE_NAME, "exec")
    return _Program(Template.from_code(_ENVIRONMENT, code, _ENVIRONMENT.make_globals(None)))


def render(job: RenderJob) -> str:
    """Return the prompt. Raises ``CantContinue``, ``OutputTooLong``, ``MemoryError``, or what the template raises."""
    program = _compiled(job.template)
    if program.takes_parts is None:
        program.takes_parts = _takes_parts(program.template, job)
    return _continued(program, job) if job.continue_final_message else _prompt(program, job)


def _continued(program: _Program, job: RenderJob) -> str:
    """Return the prompt up to the end of the last message's text, which stands in it exactly as it was written.

    The template gets another text in its place, so it makes no difference what it would have done to the text: trim
    it, or take out the reasoning.
    """
    *earlier, last = job.messages
    dummy = f"{_PROBE}{secrets.token_hex(8)}"
    messages = [*earlier, {**last, "content": dummy}]
    pieces = _prompt(program, replace(job, messages=messages, add_generation_prompt=False)).split(dummy)
    if len(pieces) != 2:
        raise CantContinue
    text: str = last["content"]
    before = pieces[0]
    for opening, block in _EMPTY_BLOCKS.items():
        if text.lstrip().startswith(opening):
            before = block.sub("", before)
    return before + text


def _prompt(program: _Program, job: RenderJob) -> str:
    """Return the prompt, tolerating complaints about the order of roles, and without losing what the system says.

    Where a template complains, or silently leaves out a system message, the messages are arranged in another way. When
    none shows every message, the complaint stands.
    """
    try:
        text = _text(program, job, job.messages)
    except Refusal as refusal:
        if not (_COMPLAINTS.search(str(refusal)) or _NO_SYSTEM.search(str(refusal))):
            raise
        arranged = _arranged(program, job)
        if arranged is None:
            raise
        return arranged
    if all(message["content"].strip() in text for message in job.messages if message["role"] == "system"):
        return text
    return _arranged(program, job) or text


def _arranged(program: _Program, job: RenderJob) -> str | None:
    """Return the prompt for the first arrangement of the messages of which the template shows every one."""
    for messages in _rearranged(job.messages):
        try:
            if _shows_all(program, job, messages):
                return _text(program, job, messages, tolerant=True)
        except _FAILURES:
            continue
    return None


def _rearranged(messages: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    """Yield the messages as they are, then with what is later and from the system in the user's messages, then with all
    that is from the system there, then with neighbours of one role joined.
    """
    yield messages
    yield _system_in_user(messages, keep=1)
    without_system = _system_in_user(messages, keep=0)
    yield without_system
    yield _neighbours_joined(without_system)


def _system_in_user(messages: Sequence[dict[str, Any]], *, keep: int) -> list[dict[str, Any]]:
    """Put each system text, but for the first ``keep`` messages, before the text of the user's message after it."""
    arranged: list[dict[str, Any]] = []
    waiting: list[str] = []
    for index, message in enumerate(messages):
        if message["role"] == "system" and index >= keep:
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            arranged.append({**message, "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            arranged.append(message)
    if waiting:
        arranged.append({"role": "user", "content": "\n\n".join(waiting)})
    return arranged


def _neighbours_joined(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    def kind(item: tuple[int, dict[str, Any]]) -> tuple[str, int]:
        index, message = item
        alone = message["role"] == "tool" or message.get("tool_calls")
        return message["role"], index if alone else -1

    groups = [[message for _, message in group] for _, group in groupby(enumerate(messages), kind)]
    return [{**group[0], "content": "\n\n".join(message["content"] for message in group)} for group in groups]


def _shows_all(program: _Program, job: RenderJob, messages: Sequence[dict[str, Any]]) -> bool:
    """Say whether the template shows the text of each message, by giving it marks in place of the texts."""
    marks = {i: f"{_PROBE}{i}." for i, message in enumerate(messages) if _must_show(message)}
    marked = [{**message, "content": marks.get(i, message["content"])} for i, message in enumerate(messages)]
    shown = _text(program, job, marked, tolerant=True).lower()
    return all(mark in shown for mark in marks.values())


def _must_show(message: dict[str, Any]) -> bool:
    return bool((message["content"] or "").strip()) and not message.get("tool_calls")  # beside them many leave it out


def _text(program: _Program, job: RenderJob, messages: Sequence[dict[str, Any]], *, tolerant: bool = False) -> str:
    """Render the messages, in parts if the template wants them so. Without tools, a template gets none, and where it
    can't bear that, it does not get the variable.
    """
    messages = _in_parts(messages) if program.takes_parts else messages
    variables = {"tools": None, **job.variables}
    try:
        return _written(program.template, job, messages, variables, tolerant=tolerant)
    except TypeError:
        if variables.pop("tools") is not None:
            raise
        return _written(program.template, job, messages, variables, tolerant=tolerant)


def _written(
    template: Template,
    job: RenderJob,
    messages: Sequence[dict[str, Any]],
    variables: Mapping[str, Any],
    *,
    tolerant: bool = False,
) -> str:
    variables = {
        "documents": None,  # templates test `documents is not none`; transformers passes it too
        **variables,
        "messages": messages,
        "bos_token": job.bos_token,
        "eos_token": job.eos_token,
        "add_generation_prompt": job.add_generation_prompt,
        "raise_exception": _tolerate if tolerant else _raise_exception,
    }
    chunks: list[str] = []
    room = MAX_TEXT * 1024 * 1024
    for chunk in template.generate(variables):
        room -= len(chunk)
        if room < 0:
            raise OutputTooLong
        chunk.encode()  # raises for half a surrogate pair, which can't leave this process
        chunks.append(chunk)
    return "".join(chunks)


def _takes_parts(template: Template, job: RenderJob) -> bool | None:
    """Find out whether contents must be lists of typed parts: None when no probe shows, and the real render will tell.

    Some templates want a system message, or an answered question, before the user message that they show; the job's
    variables are there because some want one of those.
    """
    conversations = [[*opening, {"role": "user", "content": _PROBE}] for opening in _OPENINGS]
    if any(_shows_probe(template, job, messages) for messages in conversations):
        return False
    if any(_shows_probe(template, job, _in_parts(messages)) for messages in conversations):
        return True
    return None


def _shows_probe(template: Template, job: RenderJob, messages: Sequence[dict[str, Any]]) -> bool:
    try:
        return _PROBE in _written(template, job, messages, {"tools": None, **job.variables}).lower()
    except _FAILURES:
        return False


def _in_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each string content as a list of one text part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def answer_bytes(payload: bytes) -> tuple[bytes, bool]:
    """Answer an encoded job, as ``serve`` wants it."""
    result, spent = answer(_JOBS.decode(payload))
    return msgspec.msgpack.encode(result), spent


def answer(job: RenderJob | ProbeJob) -> tuple[RenderAnswer, bool]:
    """Do the job, with any failure of the template as a value. Say, too, whether it has used up the memory."""
    try:
        if isinstance(job, ProbeJob):
            _compiled(job.template)
            return RenderAnswer(traits=probe(job, render, (*_FAILURES, CantContinue, OutputTooLong))), False
        return RenderAnswer(text=render(job)), False
    except MemoryError as error:
        line = _line(error)
    except (*_FAILURES, CantContinue, OutputTooLong) as error:
        of_messages = isinstance(error, Refusal | CantContinue)
        return _failed(_reason(error), "messages" if of_messages else None), False
    gc.collect()  # outside the except clause nothing holds what the template built
    return _failed(f"the chat template needed more than {MEMORY_LIMIT} MB of memory{_in_line(line)}"), True


def _failed(reason: str, param: str | None = None) -> RenderAnswer:
    return RenderAnswer(error=to_value(ChatTemplateError(reason, param=param)))


def _reason(error: BaseException) -> str:
    where = _in_line(_line(error))
    # The text may be the template's own: long, or with halves of surrogate pairs.
    detail = str(error)[:500].encode(errors="replace").decode()
    match error:
        case CantContinue():
            return "the chat template does not show the last message as it is, so it can't be continued"
        case OutputTooLong():
            return f"the chat template wrote more than {MAX_TEXT} MiB of text{where}"
        case Refusal():
            return f"the chat template refused the messages{where}: {detail}"
        case TemplateSyntaxError():
            return f"the chat template has a syntax error{where}: {detail}"
        case SecurityError():
            return f"the chat template did what no template may{where}: {detail}"
        case UndefinedError():
            return f"the chat template used a value that is not defined{where}: {detail}"
        case RecursionError():
            return f"the chat template nests too deeply{where}"
        case SyntaxError():  # from Python, whose blocks nest less deeply than Jinja's
            return f"the chat template can't be compiled: {error.msg}"
        case _:
            return f"the chat template failed{where}: {type(error).__name__}: {detail}"


def _in_line(line: int | None) -> str:
    return "" if line is None else f" in line {line}"


def _line(error: BaseException) -> int | None:
    """Return the template's line that raised, if it is known: Jinja rewrites tracebacks to the template's lines."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _SOURCE_NAME:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def main(fd: int) -> int:
    """Run the process and return its exit status."""
    return serve(fd, answer_bytes, memory_limit=MEMORY_LIMIT)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
