"""Values as they are published become values of one of ggml's types, and none of them is lost or becomes infinite.

For the process that converts only, since it takes numpy. This module does not know where values are read from, and
which type a tensor should have.
"""

from __future__ import annotations

from typing import Final

import gguf
import numpy as np
from gguf.quants import quantize

from llamaserve.errors import SourceError

Type = gguf.GGMLQuantizationType

READABLE: Final = ("F32", "F16", "BF16")  # as safetensors and CTranslate2 call them

_LARGEST_F32: Final = float(np.finfo(np.float32).max)
_LARGEST_F16: Final = float(np.finfo(np.float16).max)  # also a block of Q8_0 has one for a factor


def check_row(name: str, length: int, kind: Type) -> None:
    """Check that rows of this many values can have a type. Raises ``SourceError``."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if length % block:
        raise SourceError(
            f"the model cannot be converted to {kind.name}: rows of {name} have {length} values, "
            f"which is no multiple of {block}; F16 is possible"
        )


def values(data: bytes, dtype: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the values of little-endian bytes of a readable type."""
    if dtype == "BF16":  # the upper half of F32
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f4" if dtype == "F32" else "<f2").astype(np.float32, copy=False)


def converted(
    name: str, data: bytes, dtype: str, shape: tuple[int, ...], kind: Type
) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Return a tensor's values, or those of some of its rows, in a type of ggml. ``shape`` has the fastest dimension
    last. Raises ``SourceError`` for a value that the type does not have.
    """
    found = values(data, dtype)
    largest, limit = float(np.abs(found).max()), _LARGEST_F32 if kind is Type.F32 else _LARGEST_F16
    if not largest <= limit:  # no number, or one that would become infinite
        what = f"{name} has the value {largest}, and {limit} is the largest of {kind.name}"
        raise SourceError(f"the model cannot be converted: its tensor {what}")
    return quantize(found.reshape(shape), kind)
