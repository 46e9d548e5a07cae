"""Splits a GGUF file into several as llama.cpp's own tool does: all metadata in the first, tensors in order.

It takes the metadata's bytes as they are, and knows of the reader under test only where the weights begin.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from gguf_writer import INT32, UINT16, Value, entry, string

from llamaserve.registry.gguf import TensorInfo, read_header

ALIGNMENT = 32


def part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def split_gguf(whole: Path, folder: Path, stem: str, count: int, *, empty_first: bool = False) -> list[Path]:
    """Write a file as so many parts. With ``empty_first`` the first holds metadata only."""
    header = read_header(whole)
    data = whole.read_bytes()
    metadata = data[24 : _tensor_list(data, header.data_offset, header.tensors)]
    (pairs,) = struct.unpack_from("<Q", data, 16)
    groups = _groups(header.tensors, count - empty_first)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, tensors in enumerate([[], *groups] if empty_first else groups):
        split = {
            "split.no": Value(UINT16, number),
            "split.count": Value(UINT16, count),
            "split.tensors.count": Value(INT32, len(header.tensors)),
        }
        own = b"".join(string(key) + entry(value) for key, value in split.items())
        head = struct.pack("<4sIQQ", b"GGUF", header.version, len(tensors), 3 + (0 if number else pairs))
        head += own if number else metadata + own
        paths.append(folder / part_name(stem, number + 1, count))
        paths[-1].write_bytes(_with_tensors(head, tensors, data[header.data_offset :]))
    return paths


def _groups(tensors: Sequence[TensorInfo], count: int) -> list[Sequence[TensorInfo]]:
    size = -(-len(tensors) // count)
    return [tensors[number * size : (number + 1) * size] for number in range(count)]


def _tensor_list(data: bytes, data_offset: int, tensors: Sequence[TensorInfo]) -> int:
    """Return where the list of tensors begins: in front of it there is only metadata, behind it only padding."""
    length = sum(len(string(tensor.name)) + 16 + 8 * len(tensor.shape) for tensor in tensors)
    first = string(tensors[0].name)
    return next(
        start
        for start in range(data_offset - length, data_offset - length - ALIGNMENT, -1)
        if data[start : start + len(first)] == first
    )


def _with_tensors(head: bytes, tensors: Sequence[TensorInfo], weights: bytes) -> bytes:
    offset, parts = 0, []
    for tensor in tensors:
        head += string(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape)
        head += struct.pack("<IQ", tensor.type, offset)
        parts.append(_padded(weights[tensor.offset : tensor.offset + tensor.size]))
        offset += len(parts[-1])
    return _padded(head) + b"".join(parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)
