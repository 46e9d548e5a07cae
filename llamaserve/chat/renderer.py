"""The renderer process: ``python -m llamaserve.chat.renderer FD`` renders chat templates, one job at a time.

Each ``RenderJob`` gets a ``RenderAnswer``; ``sandbox.py`` brings and takes them. The Jinja environment is that of
Hugging Face's transformers, which templates are written for.

It does not know the time limit of a job: the parent measures it and kills this process. It knows nothing of models.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError, TemplateSyntaxError, UndefinedError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamaserve.chat.template import MEMORY_LIMIT, RenderAnswer, RenderJob
from llamaserve.errors import ChatTemplateError, to_value
from llamaserve.sandbox import serve

MAX_TEXT = 16  # MiB of rendered text; the longest prompts are a few
MAX_TEMPLATE = 256 * 1024  # characters; the longest templates of real models have some 20,000
MAX_CODE = 1024 * 1024  # characters of Python, which Jinja makes of a template: some five times its length
KEPT_TEMPLATES = 8  # compiled templates in memory: few, since strangers' templates share the memory limit

_SOURCE_NAME = "<template>"  # Jinja's name for the file of a template that was given as a string
_JOBS = msgspec.msgpack.Decoder(RenderJob)
_PROBE = "quokkaprobe"  # a text that no template writes by itself
_ANSWERED = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
_OPENINGS: tuple[list[dict[str, Any]], ...] = ([], [{"role": "system", "content": "a system text"}], _ANSWERED)

# What a template, its compilation or the sandbox raises. Anything else ends the process, and the parent says so.
_FAILURES = (
    *(TemplateError, SyntaxError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)


class Refusal(TemplateError):
    """The template called ``raise_exception``."""


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
    environment.globals["raise_exception"] = _raise_exception
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
    """Return the job's prompt. Raises ``OutputTooLong``, ``MemoryError``, or what the template raises."""
    program = _compiled(job.template)
    if program.takes_parts is None:
        program.takes_parts = _takes_parts(program.template, job)
    return _text(program.template, job, _in_parts(job.messages) if program.takes_parts else job.messages)


def _text(template: Template, job: RenderJob, messages: Sequence[dict[str, Any]]) -> str:
    variables = {
        "tools": None,
        "documents": None,  # templates test `documents is not none`; transformers passes it too
        **job.variables,
        "messages": messages,
        "bos_token": job.bos_token,
        "eos_token": job.eos_token,
        "add_generation_prompt": job.add_generation_prompt,
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
        return _PROBE in _text(template, job, messages).lower()
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


def answer(job: RenderJob) -> tuple[RenderAnswer, bool]:
    """Render the job, with any failure of the template as a value. Say, too, whether it has used up the memory."""
    try:
        return RenderAnswer(text=render(job)), False
    except MemoryError as error:
        line = _line(error)
    except (*_FAILURES, OutputTooLong) as error:
        return _failed(_reason(error)), False
    gc.collect()  # outside the except clause nothing holds what the template built
    return _failed(f"the chat template needed more than {MEMORY_LIMIT} MB of memory{_in_line(line)}"), True


def _failed(reason: str) -> RenderAnswer:
    return RenderAnswer(error=to_value(ChatTemplateError(reason, param="messages")))


def _reason(error: BaseException) -> str:
    where = _in_line(_line(error))
    # The text may be the template's own: long, or with halves of surrogate pairs.
    detail = str(error)[:500].encode(errors="replace").decode()
    match error:
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
