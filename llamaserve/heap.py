"""Memory that is free again but kept by the C library: gives it back to the operating system. Knows nothing of what it
was used for.

glibc keeps freed memory for later, and does so apart for each of up to eight arenas per core, which threads take turns
to use: what one thread has freed is then nothing to another. Most other C libraries have no such calls.
"""

from __future__ import annotations

import asyncio
import ctypes

_M_ARENA_MAX = -8  # as in <malloc.h>
_PERIOD = 60.0  # seconds


def use_one_arena() -> None:
    """Have threads share the memory that is kept, which costs little where the interpreter's lock lets one of them run
    at a time. To be called before any has begun: an arena that is there stays in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(1))


def give_back() -> None:
    """Have the C library give back what it keeps. It takes a few milliseconds for 100 MiB, in which other threads may
    have to wait for memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


async def keep_small() -> None:
    """Give back each minute what requests have needed, until cancelled."""
    while True:
        await asyncio.sleep(_PERIOD)
        await asyncio.to_thread(give_back)
