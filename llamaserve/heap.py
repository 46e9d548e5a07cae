"""Memory that is free again but kept by the C library: gives it back to the operating system. Knows nothing of what it
was used for.

glibc keeps freed memory for later, and does so apart for each of up to eight arenas per core, which threads take turns
to use: what one thread has freed is then nothing to another. Other C libraries have no such calls.
"""

from __future__ import annotations

import asyncio
import ctypes

_M_ARENA_MAX = -8  # as in <malloc.h>
_PERIOD = 60.0  # seconds


def use_one_arena() -> None:
    """Have threads that begin from now on share the memory that is kept. It costs nothing where the interpreter's lock
    lets one thread run at a time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(1))


def give_back() -> None:
    """Have the C library give back what it keeps: it takes about a millisecond for 100 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


async def keep_small() -> None:
    """Give back each minute what requests have needed, until cancelled."""
    while True:
        await asyncio.sleep(_PERIOD)
        await asyncio.to_thread(give_back)
