"""Whether a constraint can be compiled, found out in child processes that are killed when it takes too much.

A schema of 1 KiB can keep llguidance busy for minutes, and no thread can interrupt it. So before a model's process sees
one, a checking process compiles it (``grammar_check_main.py``); this module is the asyncio side. The parts of a
constraint are checked each for itself first: what is wrong is said of the right one then, and they recur in other ones.

It knows nothing of HTTP, of models or of what a constraint means, and does not load llguidance.
"""

from __future__ import annotations

import hashlib
import signal
from collections import OrderedDict

import msgspec

from llamaserve.engine.params import Constraint
from llamaserve.errors import InvalidRequest
from llamaserve.sandbox import Ended, OutOfMemory, Sandbox, TookTooLong

TIME_LIMIT = 0.8  # seconds of CPU time for one constraint; an ordinary one takes a few milliseconds
MEMORY_LIMIT = 1024  # MB of address space for one process, Python included
REMEMBERED = 4096  # constraints that were checked; a request may bring a hundred, and half a kB is kept of each


class Verdict(msgspec.Struct, frozen=True):
    """What came of a check: why a constraint can't be compiled, if so, and what of it is not enforced."""

    fault: str | None = None
    left_out: str = ""


class GrammarChecker(Sandbox):
    """A pool of at most ``size`` checking processes, started when one is needed and reused. For one event loop."""

    def __init__(self, size: int = 2, *, time_limit: float = TIME_LIMIT) -> None:
        super().__init__(
            "llamaserve.worker.grammar_check_main", "the grammar checker", size=size, time_limit=time_limit
        )
        self._verdicts: OrderedDict[bytes, Verdict] = OrderedDict()  # least recently used first

    async def check(self, constraint: Constraint) -> None:
        """Return when the constraint can be compiled. What was found out lately, good or bad, is not tried again.

        Raises ``InvalidRequest`` when it, or a part of it, is wrong or takes too much time or memory, and
        ``Unavailable`` as ``Sandbox.ask``.
        """
        for each in (*constraint.parts, constraint):
            if (fault := (await self._verdict(each)).fault) is not None:
                raise _refusal(each, f": {fault}")

    async def relaxed(self, constraint: Constraint) -> tuple[Constraint, str | None]:
        """Return a constraint that can be compiled, or a schema that can be only without some of its keywords as a
        lenient one, with llguidance's words about what is left out. Raises like ``check``.
        """
        if constraint.kind != "json_schema":
            await self.check(constraint)
            return constraint, None
        strict = await self._verdict(constraint)
        if strict.fault is None:
            return constraint, strict.left_out or None
        lenient = msgspec.structs.replace(constraint, lenient=True)
        await self.check(lenient)
        return lenient, (await self._verdict(lenient)).left_out or strict.fault

    async def _verdict(self, constraint: Constraint) -> Verdict:
        """Return what there is to say of a constraint by itself, of which the parts have been checked."""
        key = hashlib.sha256(msgspec.msgpack.encode(constraint.anonymous())).digest()  # the texts may be long
        if key not in self._verdicts:
            self._verdicts[key] = await self._judge(constraint)
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        return self._verdicts[key]

    async def _judge(self, constraint: Constraint) -> Verdict:
        """Have a constraint compiled. Raises ``InvalidRequest`` where a limit came before the answer, which is not
        remembered, and ``Unavailable`` as ``Sandbox.ask``.
        """
        try:
            answer = await self.ask(msgspec.msgpack.encode(constraint))
        except TookTooLong as late:
            raise _refusal(constraint, f" took {late} to compile") from None
        except Ended as ended:
            # Rust's answer to an allocation that fails is SIGABRT.
            if isinstance(ended, OutOfMemory) or ended.status == -signal.SIGABRT:
                raise _refusal(constraint, f" needed more than {MEMORY_LIMIT} MB of memory to compile") from None
            raise _refusal(constraint, f" crashed the process that compiled it ({ended})") from None
        return msgspec.msgpack.decode(answer, type=Verdict)


def _refusal(constraint: Constraint, why: str) -> InvalidRequest:
    return InvalidRequest(f"{constraint.param}{why}", param=constraint.param)
