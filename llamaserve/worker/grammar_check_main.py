"""The checking process: ``python -m llamaserve.worker.grammar_check_main FD`` compiles constraints, one at a time.

Each ``Constraint`` gets an answer: what is wrong with it, or None. ``sandbox.py`` brings and takes them.

It does not know the time limit of a job: the parent measures it and kills this process. It knows nothing of models and
has no vocabulary, so it finds what is wrong with a constraint by itself, not what a model can't say.
"""

from __future__ import annotations

import sys

import msgspec
import psutil
from llguidance import LLMatcher

from llamaserve.engine.grammar import grammar_text, limits, words
from llamaserve.engine.params import Constraint
from llamaserve.sandbox import serve
from llamaserve.worker.grammar_check import MEMORY_LIMIT

KEPT_MEMORY = 256  # MB; a process that still holds more after a job ends, since the models may need them

_CONSTRAINTS = msgspec.msgpack.Decoder(Constraint)
_LIMITS = limits()
_PROCESS = psutil.Process()


def answer(payload: bytes) -> tuple[bytes, bool]:
    """Check an encoded constraint, as ``serve`` wants it."""
    result = msgspec.msgpack.encode(fault(_CONSTRAINTS.decode(payload)))
    return result, _PROCESS.memory_info().rss > KEPT_MEMORY * 1024 * 1024


def fault(constraint: Constraint) -> str | None:
    """Return why the constraint can't be compiled, in llguidance's words."""
    try:
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar_text(constraint), None, limits=_LIMITS)
    except ValueError as error:
        return words(str(error))
    return words("\n".join(messages)) if wrong else None


def main(fd: int) -> int:
    """Run the process and return its exit status."""
    return serve(fd, answer, memory_limit=MEMORY_LIMIT)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
