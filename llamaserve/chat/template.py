"""Rendering chat templates in child processes, which are killed when a template takes too much time or memory.

A chat template is a program from a stranger: it comes with a model file or with a request. Jinja's sandbox keeps it
from the process's objects, but not from looping for ever or from ``10 ** 10 ** 9``, which no thread can interrupt. So
each render is a job for a renderer process (``renderer.py``); this module is the asyncio side.

It knows nothing of HTTP, of Jinja, or of where a template comes from, and has no template for a model without one.
"""

from __future__ import annotations

from typing import Any

import msgspec

from llamaserve.chat.traits import ProbeJob, Traits
from llamaserve.errors import ChatTemplateError, ErrorValue, InvalidRequest, from_value
from llamaserve.sandbox import Budget, Ended, OutOfMemory, Sandbox, TookTooLong

TIME_LIMIT = 2.0  # seconds of CPU time for one job; an ordinary template takes a few milliseconds
GUEST_TIME_LIMIT = 1.0  # the same for one that came with a request
MEMORY_LIMIT = 512  # MB of address space for one renderer process, Python included
RESERVED = frozenset({"messages", "bos_token", "eos_token", "add_generation_prompt"})


class RenderJob(msgspec.Struct, frozen=True, tag=True):
    """One prompt to render. The contents of ``messages`` are strings; ``variables`` go to the template as they are.

    With ``continue_final_message`` the prompt ends right after the text of the last message, which is an assistant's:
    what the model writes goes on with it. ``add_generation_prompt`` then counts as false.
    """

    template: str
    messages: list[dict[str, Any]]
    bos_token: str
    eos_token: str
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: dict[str, Any] = {}


class RenderAnswer(msgspec.Struct, frozen=True):
    """A renderer's answer: ``text``, ``traits`` or ``error``."""

    text: str = ""
    traits: Traits | None = None
    error: ErrorValue | None = None


class TemplateRenderer(Sandbox):
    """A pool of at most ``size`` renderer processes, started when a job needs one and reused. For one event loop."""

    def __init__(self, size: int = 2, *, time_limit: float = TIME_LIMIT) -> None:
        super().__init__("llamaserve.chat.renderer", "the chat template renderer", size=size, time_limit=time_limit)

    async def render(self, job: RenderJob, budget: Budget | None = None) -> str:
        """Return the prompt text. What that takes is taken from the budget.

        Raises ``ChatTemplateError`` when the template refuses the messages, fails, or takes too much time or memory;
        ``InvalidRequest`` when the variables hold a reserved name or a value that can't be passed on, or when the last
        message is none to continue; ``Unavailable`` as ``Sandbox.ask``.
        """
        return (await self._answer(_encoded(job), budget)).text

    async def probe(self, job: ProbeJob, budget: Budget | None = None) -> Traits:
        """Return what a template can do, as ``render``. Raises ``ChatTemplateError`` as above, and ``Unavailable``."""
        answer = await self._answer(msgspec.msgpack.encode(job), budget)
        assert answer.traits is not None
        return answer.traits

    async def _answer(self, payload: bytes, budget: Budget | None) -> RenderAnswer:
        try:
            answer = msgspec.msgpack.decode(await self.ask(payload, budget), type=RenderAnswer)
        except TookTooLong as late:
            raise _failure(f"took {late}") from None
        except OutOfMemory:
            raise _failure(f"needed more than {MEMORY_LIMIT} MB of memory") from None
        except Ended as ended:
            raise _failure(f"crashed its renderer process ({ended})") from None
        if answer.error is not None:
            raise from_value(answer.error)
        return answer


def guest_renderer() -> TemplateRenderer:
    """Return a pool for templates out of requests, of which several bad ones may come at once."""
    return TemplateRenderer(3, time_limit=GUEST_TIME_LIMIT)


def _failure(what: str) -> ChatTemplateError:
    return ChatTemplateError(f"the chat template {what}")


def _encoded(job: RenderJob) -> bytes:
    taken = sorted(RESERVED & job.variables.keys())
    if taken:
        raise InvalidRequest(f"a chat template variable can't be named {taken[0]!r}")
    if job.continue_final_message:
        _check_continuable(job.messages)
    try:
        return msgspec.msgpack.encode(job)
    except (OverflowError, RecursionError, UnicodeEncodeError) as error:
        raise InvalidRequest(f"the messages or variables can't be passed to the chat template: {error}") from error


def _check_continuable(messages: list[dict[str, Any]]) -> None:
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant":
        raise InvalidRequest("only a last message of the assistant's can be continued", param="messages")
    if last.get("tool_calls"):
        raise InvalidRequest("a message with tool calls can't be continued", param=f"messages[{len(messages) - 1}]")
