"""Gives memory that is free again back to the operating system. Knows nothing of what it was used for."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Have the C library give back what it keeps for later; glibc keeps up to all of it, others have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
