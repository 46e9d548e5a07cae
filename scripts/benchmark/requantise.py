"""Write a GGUF file anew in another type: ``python requantise.py SOURCE TARGET TYPE``, with TYPE as llama.cpp calls it.

A process of its own, since llama.cpp may end the one it is in.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import llama_cpp.llama_cpp as lib

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # llama_ftype


def requantise(source: str, target: str, kind: str) -> int:
    """Return llama.cpp's code, 0 when the file is there. What a coarse type has lost does not come back."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = TYPES[kind]
    params.allow_requantize = True
    unfinished = Path(target + ".part")
    code: int = lib.llama_model_quantize(source.encode(), str(unfinished).encode(), ctypes.byref(params))
    if code == 0:
        unfinished.replace(target)
    return code


if __name__ == "__main__":
    sys.exit(requantise(*sys.argv[1:]))
