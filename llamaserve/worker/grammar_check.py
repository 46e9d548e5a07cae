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
REMEMBERED = 256  # constraints that were accepted


class GrammarChecker(Sandbox):
    """A pool of at most ``size`` checking processes, started when one is needed and reused. For one event loop."""

    def __init__(self, size: int = 2, *, time_limit: float = TIME_LIMIT) -> None:
        super().__init__(
            "llamaserve.worker.grammar_check_main", "the grammar checker", size=size, time_limit=time_limit
        )
        self._accepted: OrderedDict[tuple[str, bytes], None] = OrderedDict()  # least recently used first

    async def check(self, constraint: Constraint) -> None:
        """Return when the constraint can be compiled. One that was accepted lately is not compiled again.

        Raises ``InvalidRequest`` when it is wrong or takes too much time or memory, and ``Unavailable`` when the pool
        is closed or no process can be started.
        """
        key = constraint.kind, hashlib.sha256(constraint.text.encode()).digest()  # the texts may be long
        if key not in self._accepted and (fault := await self._fault(constraint)) is not None:
            raise InvalidRequest(f"{constraint.param}{fault}", param=constraint.param)
        self._accepted[key] = None
        self._accepted.move_to_end(key)
        if len(self._accepted) > REMEMBERED:
            self._accepted.popitem(last=False)

    async def _fault(self, constraint: Constraint) -> str | None:
        """Return what is wrong with a constraint, to be read after its name."""
        try:
            reason = msgspec.msgpack.decode(await self.ask(msgspec.msgpack.encode(constraint)), type=str | None)
        except TookTooLong:
            return f" took longer than {self._time_limit:g} s to compile"
        except Ended as ended:
            # Rust's answer to an allocation that fails is SIGABRT.
            if isinstance(ended, OutOfMemory) or ended.status == -signal.SIGABRT:
                return f" needed more than {MEMORY_LIMIT} MB of memory to compile"
            return f" crashed the process that compiled it ({ended})"
        return None if reason is None else f": {reason}"
