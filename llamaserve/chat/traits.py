"""What a chat template can show and how its model writes, found out once for each template by rendering probes.

The probes are rendered where all templates are, in a renderer process (``probing.py``). Knows nothing of requests.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Literal, Protocol

import msgspec

from llamaserve.sandbox import Budget

REMEMBERED = 128  # templates


class CallTexts(msgspec.Struct, frozen=True):
    """The fields of ``JsonCalls``, as a renderer process finds them out."""

    before: str
    between: str
    after: str
    begin: str
    separator: str
    end: str
    lone: bool


class Traits(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a template can do.

    ``tools``: it shows the tools. ``calls``: it shows the calls of earlier answers, ``several`` of them in one.
    ``results``: it shows messages of role tool. ``arguments``: whether it wants those of calls as objects or as JSON
    texts. ``null_content``: whether an answer with calls must have no text, and its content be None: it shows the calls
    twice otherwise, or not at all. ``text_apart``: whether its text must be an answer of its own before it: it is lost
    otherwise. Not where the template does not show two answers in a row. ``id_length``: how many letters and digits the
    ids of calls must have, if it insists on that. ``ids_name``: it shows an id in place of a call's name.
    ``call_texts``: how calls are written, if that could be found out.

    ``thinking``: the start tag of the thoughts that it knows of (``answer.THINKING_TAGS``). ``thoughts``: the key under
    which it looks in an answer for what was thought before, if it ever shows that.
    """

    tools: bool = False
    calls: bool = False
    several: bool = False
    results: bool = False
    arguments: Literal["object", "text"] = "object"
    null_content: bool = False
    text_apart: bool = False
    id_length: int | None = None
    ids_name: bool = False
    call_texts: CallTexts | None = None
    thinking: str | None = None
    thoughts: Literal["reasoning_content", "thinking", "reasoning"] | None = None


class ProbeJob(msgspec.Struct, frozen=True, tag=True):
    """A template to be tried out."""

    template: str
    bos_token: str
    eos_token: str


class Prober(Protocol):
    """What tries templates out: ``TemplateRenderer``."""

    async def probe(self, job: ProbeJob, budget: Budget | None = None) -> Traits:
        """Return what a template can do; what that takes is taken from the budget."""


class TraitFinder:
    """Finds out the traits of templates, and remembers them."""

    def __init__(self, prober: Prober) -> None:
        self._prober = prober
        self._known: OrderedDict[bytes, Traits] = OrderedDict()  # least recently used first

    async def of(self, template: str, bos_token: str, eos_token: str, budget: Budget | None = None) -> Traits:
        """Return a template's traits; what it takes to find them is taken from the budget. Raises
        ``ChatTemplateError`` when it takes too much time or memory, or can't be compiled.
        """
        job = ProbeJob(template, bos_token, eos_token)
        key = hashlib.sha256(msgspec.msgpack.encode(job)).digest()
        if key not in self._known:
            self._known[key] = await self._prober.probe(job, budget)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]
