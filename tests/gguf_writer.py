"""Builds small GGUF files for tests: from a metadata mapping and a list of tensors, well formed or broken on purpose.

It writes what it is told and checks nothing, and knows nothing of the reader under test. The layout is that of
``docs/gguf.md`` in ggml, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import random
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q4_1, Q8_0 = 0, 1, 2, 3, 8

_CODES = {
    UINT8: "B",
    INT8: "b",
    UINT16: "H",
    INT16: "h",
    UINT32: "I",
    INT32: "i",
    FLOAT32: "f",
    BOOL: "?",
    UINT64: "Q",
    INT64: "q",
    FLOAT64: "d",
}
_BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q4_1: (32, 20), Q8_0: (32, 34)}


@dataclass(frozen=True)
class Value:
    """A metadata value whose GGUF type is given, where the Python type would mean another one."""

    type: int
    value: Any


@dataclass(frozen=True)
class Array:
    """A metadata array whose element type is given; ``count`` lies about the number of elements when set."""

    type: int
    values: Sequence[Any]
    count: int | None = None


@dataclass(frozen=True)
class Raw:
    """A metadata entry's bytes after the key: type and value, exactly as they are to stand in the file."""

    data: bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor; without ``data`` it is filled with zeros. ``offset`` and ``dims`` lie about their fields when set."""

    name: str
    shape: tuple[int, ...]
    type: int = F32
    data: bytes | None = None
    offset: int | None = None
    dims: int | None = None

    def bytes(self) -> bytes:
        """Return the weights as they stand in the file, without padding."""
        if self.data is not None:
            return self.data
        block, size = _BLOCKS[self.type]
        elements = 1
        for dim in self.shape:
            elements *= dim
        return bytes(elements // block * size)


def string(text: str | bytes) -> bytes:
    """Return a GGUF string: 64-bit length, then the bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _scalar(kind: int, value: Any) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + _CODES[kind], value)


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return UINT32 if 0 <= value < 2**32 else INT64
    return FLOAT32 if isinstance(value, float) else STRING


def _array(kind: int, values: Sequence[Any], count: int | None) -> bytes:
    header = struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count)
    if kind == STRING:
        return header + b"".join(string(value) for value in values)
    return header + struct.pack(f"<{len(values)}{_CODES[kind]}", *values)


def entry(value: Any) -> bytes:
    """Return type and value of one metadata entry. A list of numbers becomes INT32 or FLOAT32 elements."""
    if isinstance(value, Raw):
        return value.data
    if isinstance(value, Value):
        return struct.pack("<I", value.type) + _scalar(value.type, value.value)
    if isinstance(value, Array):
        return _array(value.type, value.values, value.count)
    if isinstance(value, list | tuple):
        kind = _kind(value[0]) if value else INT32
        return _array(INT32 if kind == UINT32 else kind, value, None)
    kind = _kind(value)
    return struct.pack("<I", kind) + _scalar(kind, value)


def _padding(length: int, alignment: int) -> bytes:
    return bytes(-length % alignment)


@dataclass(frozen=True)
class File:
    """A GGUF file. ``metadata`` may be a list of pairs, to repeat a key. The counts lie when they are set."""

    metadata: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]]
    tensors: Sequence[Tensor] = ()
    version: int = 3
    alignment: int = 32
    magic: bytes = b"GGUF"
    metadata_count: int | None = None
    tensor_count: int | None = None
    pairs: list[tuple[str | bytes, Any]] = field(init=False)

    def __post_init__(self) -> None:
        pairs = self.metadata.items() if isinstance(self.metadata, Mapping) else self.metadata
        object.__setattr__(self, "pairs", list(pairs))

    def head(self) -> bytes:
        """Return everything before the weights, the padding included."""
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.metadata_count is None else self.metadata_count
        parts = [self.magic, struct.pack("<IQQ", self.version, tensors, pairs)]
        parts += [string(key) + entry(value) for key, value in self.pairs]
        offset = 0
        for tensor in self.tensors:
            dims = len(tensor.shape) if tensor.dims is None else tensor.dims
            parts += [string(tensor.name), struct.pack(f"<I{len(tensor.shape)}Q", dims, *tensor.shape)]
            parts.append(struct.pack("<IQ", tensor.type, offset if tensor.offset is None else tensor.offset))
            offset += len(tensor.bytes() + _padding(len(tensor.bytes()), self.alignment))
        head = b"".join(parts)
        return head + _padding(len(head), self.alignment)

    def bytes(self) -> bytes:
        """Return the whole file."""
        weights = [tensor.bytes() + _padding(len(tensor.bytes()), self.alignment) for tensor in self.tensors]
        return self.head() + b"".join(weights)


def tiny_llama_metadata() -> dict[str, Any]:
    """Return the metadata of a llama of two layers that llama.cpp loads: 261 tokens (SPM), all bytes among them."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁b"]
    return {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 0,
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }


def tiny_llama_tensors(tokens: int = 261, layers: int = 2) -> list[Tensor]:
    """Return the weights that go with ``tiny_llama_metadata``: small random numbers, the same ones each time."""
    source = random.Random(0)

    def weights(name: str, *shape: int) -> Tensor:
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        return Tensor(name, shape, F32, array("f", (source.uniform(-0.1, 0.1) for _ in range(count))).tobytes())

    tensors = [weights("token_embd.weight", 32, tokens), weights("output_norm.weight", 32)]
    for layer in range(layers):
        name = f"blk.{layer}."
        tensors += [
            weights(name + "attn_norm.weight", 32),
            weights(name + "attn_q.weight", 32, 32),
            weights(name + "attn_k.weight", 32, 16),
            weights(name + "attn_v.weight", 32, 16),
            weights(name + "attn_output.weight", 32, 32),
            weights(name + "ffn_norm.weight", 32),
            weights(name + "ffn_gate.weight", 32, 64),
            weights(name + "ffn_down.weight", 64, 32),
            weights(name + "ffn_up.weight", 32, 64),
        ]
    return tensors


def tiny_llama(**changes: Any) -> bytes:
    """Return a whole tiny model. A change replaces a metadata entry (``llama__block_count=0``); None removes it."""
    metadata = tiny_llama_metadata()
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = value
    return File(metadata, tiny_llama_tensors()).bytes()
