"""A process for the sandbox's tests, which does what a job says."""

from __future__ import annotations

import os
import sys
import time

from llamaserve import sandbox
from llamaserve.sandbox import serve


def answer(payload: bytes) -> tuple[bytes, bool]:
    order, _, rest = payload.partition(b" ")
    match order:
        case b"lie":
            now = sandbox._worked()
            sandbox._worked = lambda: now + float(rest)
            return b"true", True
        case b"exit":
            os._exit(int(rest))
        case b"forget":
            raise MemoryError
        case b"pid":
            return str(os.getpid()).encode(), False
        case b"sleep":
            time.sleep(float(rest))
        case b"work":
            end = time.process_time() + float(rest)
            while time.process_time() < end:
                pass
    return rest, order == b"last"


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), answer, memory_limit=512))
