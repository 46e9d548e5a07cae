"""Whether a constraint can be compiled, found out in child processes that are killed when it takes too much.

A schema of 1 KiB can keep llguidance busy for minutes, and no thread can interrupt it. So before a model's process sees
one, a checking process compiles it (``grammar_check_main.py``); this module is the asyncio side.

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

TIME_LIMIT = 0.8  # seconds for one constraint; an ordinary one takes a few milliseconds
MEMORY_LIMIT = 1024  # MB of address space for one process, Python included
REMEMBERED = 256  # constraints that were checked


class GrammarChecker(Sandbox):
    """A pool of at most ``size`` checking processes, started when one is needed and reused. For one event loop."""

    def __init__(self, size: int = 2, *, time_limit: float = TIME_LIMIT) -> None:
        super().__init__(
            "llamaserve.worker.grammar_check_main", "the grammar checker", size=size, time_limit=time_limit
        )
        self._faults: OrderedDict[tuple[str, bytes], str | None] = OrderedDict()  # least recently used first

    async def check(self, constraint: Constraint) -> None:
        """Return when the constraint can be compiled. What was found out lately, good or bad, is not tried again.

        Raises ``InvalidRequest`` when it is wrong or takes too much time or memory, and ``Unavailable`` when the pool
        is closed or no process can be started.
        """
        key = constraint.kind, hashlib.sha256(constraint.text.encode()).digest()  # the texts may be long
        if key not in self._faults:
            self._faults[key] = await self._fault(constraint)
            if len(self._faults) > REMEMBERED:
                self._faults.popitem(last=False)
        self._faults.move_to_end(key)
        if (fault := self._faults[key]) is not None:
            raise _refusal(constraint, f": {fault}")

    async def _fault(self, constraint: Constraint) -> str | None:
        """Return what is wrong with a constraint. Raises ``InvalidRequest`` where a limit came before the answer: that
        is not remembered, since the machine may have been busy.
        """
        try:
            answer = await self.ask(msgspec.msgpack.encode(constraint))
        except TookTooLong:
            raise _refusal(constraint, f" took longer than {self._time_limit:g} s to compile") from None
        except Ended as ended:
            # Rust's answer to an allocation that fails is SIGABRT.
            if isinstance(ended, OutOfMemory) or ended.status == -signal.SIGABRT:
                raise _refusal(constraint, f" needed more than {MEMORY_LIMIT} MB of memory to compile") from None
            raise _refusal(constraint, f" crashed the process that compiled it ({ended})") from None
        return msgspec.msgpack.decode(answer, type=str | None)


def _refusal(constraint: Constraint, why: str) -> InvalidRequest:
    return InvalidRequest(f"{constraint.param}{why}", param=constraint.param)
