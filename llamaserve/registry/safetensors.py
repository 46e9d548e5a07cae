"""Reads safetensors files: which tensors there are, and the bytes of one.

The file may come from anywhere, so nothing in it is believed: lengths, shapes and places are checked against each other
and against the file's size before any tensor is read. Source: the format's description in the safetensors repository,
which forbids all that is refused here. This module does not know what tensors are for, and needs no numpy.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec

from llamaserve.errors import SourceError

MAX_HEADER: Final = 16 << 20  # bytes; a thousand layers take one
MAX_TENSORS: Final = 100_000
MAX_DIMENSIONS: Final = 8

_LENGTH: Final = struct.Struct("<Q")
_METADATA: Final = "__metadata__"  # texts about the file
_ITEM_SIZES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}

_Natural = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor as the header describes it."""

    dtype: str
    shape: Annotated[tuple[_Natural, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]
    data_offsets: tuple[_Natural, _Natural]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type there (``F32``), its shape with the fastest dimension last, and where its bytes are,
    counted from the file's beginning.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A file with its tensors by name, in the order of their bytes."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    def read(self, name: str) -> bytes:
        """Return a tensor's bytes, little-endian, the last dimension contiguous. Raises ``SourceError``."""
        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            data = file.read(tensor.size)
        if len(data) != tensor.size:
            raise _damaged(self.path, f"the tensor {name[:100]!r} is cut short")
        return data


def read_safetensors(path: Path) -> SafetensorsFile:
    """Read and check what is in a file; the tensors' bytes are there, their values are not looked at.

    Raises ``SourceError``.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise _damaged(path, "it is no regular file")
            length = _header_length(path, file.read(_LENGTH.size), status.st_size)
            header = file.read(length)
    except OSError as error:
        raise SourceError(f"{path.name} cannot be read: {error.strerror or error}") from error
    entries = _entries(path, header)
    return SafetensorsFile(path, _placed(path, entries, _LENGTH.size + length, status.st_size))


def _damaged(path: Path, what: str) -> SourceError:
    return SourceError(f"{path.name} is no good safetensors file: {what}")


def _header_length(path: Path, data: bytes, size: int) -> int:
    if len(data) < _LENGTH.size:
        raise _damaged(path, f"it has {size} bytes")
    (length,) = _LENGTH.unpack(data)
    if length > MAX_HEADER or _LENGTH.size + length > size:
        raise _damaged(path, f"its header should have {length} bytes, and the file has {size}")
    return int(length)


def _entries(path: Path, header: bytes) -> dict[str, _Entry]:
    try:
        plain = json.loads(header.decode("utf-8"), object_pairs_hook=lambda pairs: _mapping(path, pairs))
        if not isinstance(plain, dict):
            raise _damaged(path, "its header is no JSON object")
        msgspec.convert(plain.pop(_METADATA, {}), dict[str, str])
        if len(plain) > MAX_TENSORS:
            raise _damaged(path, f"it has {len(plain)} tensors, and {MAX_TENSORS} are the most")
        return msgspec.convert(plain, dict[str, _Entry])
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and brackets without end
        raise _damaged(path, f"its header cannot be read: {str(error)[:200]}") from error


def _mapping(path: Path, pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise _damaged(path, "its header has a name twice")
    return values


def _placed(path: Path, entries: Mapping[str, _Entry], start: int, size: int) -> dict[str, StoredTensor]:
    """Return where the tensors are. They must follow each other without a gap, and fill the file."""
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        item_size = _ITEM_SIZES.get(entry.dtype)
        if item_size is None:
            raise _damaged(path, f"the tensor {name[:100]!r} is of the unknown type {entry.dtype[:20]!r}")
        first, last = entry.data_offsets
        needed = math.prod(entry.shape) * item_size
        if first != end or last - first != needed:
            raise _damaged(
                path, f"the tensor {name[:100]!r} needs {needed} bytes from {end} on, and {first} to {last} are named"
            )
        end = last
        tensors[name] = StoredTensor(entry.dtype, entry.shape, start + first, needed)
    if start + end != size:
        raise _damaged(path, f"its tensors end at byte {start + end}, and the file has {size}")
    return tensors
