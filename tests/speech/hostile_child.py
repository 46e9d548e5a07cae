"""The decoding process for tests with hostile files: a bad one does not end it, and it tells how much memory it had."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import msgspec

from llamaserve.sandbox import serve
from llamaserve.speech import audio_main
from llamaserve.speech.audio import MEMORY_LIMIT, DecodeJob


def answer(payload: bytes) -> tuple[bytes, bool]:
    result, _ = audio_main.answer(payload)
    job = msgspec.msgpack.decode(payload, type=DecodeJob)
    Path(job.target + ".peak").write_text(f"{peak()}")
    return result, False


def peak() -> int:
    """Return the most memory that this process ever had, in bytes."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024  # `ru_maxrss` would count the parent's, before the program was started


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), answer, memory_limit=MEMORY_LIMIT))
