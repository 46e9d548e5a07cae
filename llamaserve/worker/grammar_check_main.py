"""The checking process: ``python -m llamaserve.worker.grammar_check_main FD`` compiles constraints, one at a time.

Each ``Constraint`` gets a ``Verdict``. ``sandbox.py`` brings and takes them.

It compiles them for a vocabulary of single bytes, which takes about as long as for a model's: without one, most of the
work would be put off until the model's process does it, where nothing could stop it. It does not know the time limit of
a job: the parent measures it and kills this process. It knows nothing of models.
"""

from __future__ import annotations

import sys

import msgspec
import psutil
from llguidance import LLTokenizer, TokenizerWrapper

from llamaserve.engine.grammar import compiled, left_out, words
from llamaserve.engine.params import Constraint
from llamaserve.sandbox import serve
from llamaserve.worker.grammar_check import MEMORY_LIMIT, Verdict

KEPT_MEMORY = 256  # MB; a process that still holds more after a job ends, since the models may need them

_CONSTRAINTS = msgspec.msgpack.Decoder(Constraint)
_PROCESS = psutil.Process()
_END = 256  # the token after those of the bytes


class _Bytes:
    """The vocabulary, as llguidance asks for it."""

    eos_token_id = _END
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(_END)), b"<end>")
    special_token_ids = (_END,)

    def __call__(self, text: bytes) -> list[int]:
        """Return the tokens of a text."""
        return list(text)


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def answer(payload: bytes) -> tuple[bytes, bool]:
    """Check an encoded constraint, as ``serve`` wants it."""
    result = msgspec.msgpack.encode(verdict(_CONSTRAINTS.decode(payload)))
    return result, _PROCESS.memory_info().rss > KEPT_MEMORY * 1024 * 1024


def verdict(constraint: Constraint) -> Verdict:
    """Tell whether the constraint can be compiled, in llguidance's words."""
    try:
        matcher = compiled(constraint, _TOKENIZER)
    except ValueError as error:
        return Verdict(words(str(error)))
    return Verdict(left_out=left_out(matcher))


def main(fd: int) -> int:
    """Run the process and return its exit status."""
    return serve(fd, answer, memory_limit=MEMORY_LIMIT)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
