"""Builds small ggml Whisper files for tests, well formed or broken on purpose.

It writes what it is told and checks nothing, and knows nothing of the reader under test. The layout is that of
``convert-pt-to-ggml.py`` in whisper.cpp, and its ``quantize`` for quantised files; the weights are random and small.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

MAGIC = 0x67676D6C
F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 30

# In the order of the file; a small English-only model.
HYPERPARAMETERS = {
    "n_vocab": 51864,
    "n_audio_ctx": 1500,
    "n_audio_state": 64,
    "n_audio_head": 1,
    "n_audio_layer": 1,
    "n_text_ctx": 64,
    "n_text_state": 64,
    "n_text_head": 1,
    "n_text_layer": 1,
    "n_mels": 80,
    "ftype": 1,
}
FREQUENCIES = 201
WEIGHT_TYPES = {0: F32, 1: F16, 2: Q4_0, 3: Q4_1, 8: Q5_0, 9: Q5_1, 7: Q8_0, 10: Q2_K, 11: Q3_K, 12: Q4_K, 13: Q5_K}
WEIGHT_TYPES |= {14: Q6_K, 24: BF16}

# Weights and bytes of a block, and where in it float16 numbers are.
_BLOCKS: dict[int, tuple[int, int, tuple[int, ...]]] = {
    F32: (1, 4, ()),
    F16: (1, 2, (0,)),
    BF16: (1, 2, ()),
    Q4_0: (32, 18, (0,)),
    Q4_1: (32, 20, (0, 2)),
    Q5_0: (32, 22, (0,)),
    Q5_1: (32, 24, (0, 2)),
    Q8_0: (32, 34, (0,)),
    Q2_K: (256, 84, (80, 82)),
    Q3_K: (256, 110, (108,)),
    Q4_K: (256, 144, (0, 2)),
    Q5_K: (256, 176, (0, 2)),
    Q6_K: (256, 210, (208,)),
}
_PATTERN = 509  # blocks that are made; then they come again


@dataclass(frozen=True)
class Tensor:
    """A tensor, its shape with the fastest dimension first; without ``data`` it is filled with small weights."""

    name: str | bytes
    shape: tuple[int, ...]
    type: int = F32
    data: bytes | None = None
    dims: int | None = None

    def bytes(self) -> bytes:
        """Return the tensor as it stands in the file."""
        name = self.name.encode() if isinstance(self.name, str) else self.name
        dims = len(self.shape) if self.dims is None else self.dims
        data = weights(self.type, math.prod(self.shape)) if self.data is None else self.data
        return struct.pack(f"<{3 + len(self.shape)}i", dims, len(name), self.type, *self.shape) + name + data


@dataclass(frozen=True)
class WhisperFile:
    """A file in its parts. ``token_count`` and ``filter_shape`` lie about the parts behind them when set."""

    hyperparameters: Mapping[str, int]
    tensors: Sequence[Tensor]
    tokens: Sequence[bytes]
    filters: Sequence[float]
    filter_shape: tuple[int, int] | None = None
    token_count: int | None = None
    magic: int = MAGIC
    tail: bytes = b""

    def header(self) -> bytes:
        """Return all that stands before the tensors."""
        numbers = self.hyperparameters
        shape = self.filter_shape or (numbers["n_mels"], FREQUENCIES)
        count = len(self.tokens) if self.token_count is None else self.token_count
        return b"".join(
            (
                struct.pack("<I11i2i", self.magic, *numbers.values(), *shape),
                struct.pack(f"<{len(self.filters)}f", *self.filters),
                struct.pack("<i", count),
                *(struct.pack("<I", len(token)) + token for token in self.tokens),
            )
        )

    def bytes(self) -> bytes:
        """Return the whole file."""
        return self.header() + b"".join(tensor.bytes() for tensor in self.tensors) + self.tail


def whisper_file(**changed: int) -> WhisperFile:
    """Return a sound file of a small model; ``changed`` hyperparameters count for all of it."""
    numbers = HYPERPARAMETERS | changed
    if "n_audio_state" in changed:
        numbers["n_text_state"] = changed["n_audio_state"]
    filters = [0.001 * (1 + place % 7) for place in range(numbers["n_mels"] * FREQUENCIES)]
    return WhisperFile(numbers, tensors_of(numbers), vocabulary(), filters)


def vocabulary() -> list[bytes]:
    """Return the tokens of text: all bytes, then others."""
    return [bytes([number]) for number in range(256)] + [b"t%d" % number for number in range(256, 50257)]


def tensors_of(numbers: Mapping[str, int]) -> list[Tensor]:
    """Return the tensors of a model with these hyperparameters."""
    state, vocab = numbers["n_audio_state"], numbers["n_vocab"]
    matrix = WEIGHT_TYPES[numbers["ftype"] % 1000]
    convolution = min(matrix, F16)
    tensors = [
        Tensor("encoder.positional_embedding", (state, numbers["n_audio_ctx"])),
        Tensor("encoder.conv1.weight", (3, numbers["n_mels"], state), convolution),
        Tensor("encoder.conv1.bias", (1, state)),
        Tensor("encoder.conv2.weight", (3, state, state), convolution),
        Tensor("encoder.conv2.bias", (1, state)),
    ]
    for layer in range(numbers["n_audio_layer"]):
        tensors += _block(f"encoder.blocks.{layer}", state, matrix, ("attn",))
    tensors += [Tensor("encoder.ln_post.weight", (state,)), Tensor("encoder.ln_post.bias", (state,))]
    tensors += [Tensor("decoder.positional_embedding", (state, numbers["n_text_ctx"]))]
    tensors += [Tensor("decoder.token_embedding.weight", (state, vocab), matrix)]
    for layer in range(numbers["n_text_layer"]):
        tensors += _block(f"decoder.blocks.{layer}", state, matrix, ("attn", "cross_attn"))
    return [*tensors, Tensor("decoder.ln.weight", (state,)), Tensor("decoder.ln.bias", (state,))]


def _block(name: str, state: int, matrix: int, attentions: Sequence[str]) -> list[Tensor]:
    tensors = []
    for attention in attentions:
        inner = f"{name}.{attention}"
        tensors += [Tensor(f"{inner}_ln.weight", (state,)), Tensor(f"{inner}_ln.bias", (state,))]
        tensors += [Tensor(f"{inner}.{part}.weight", (state, state), matrix) for part in ("query", "key", "value")]
        tensors += [Tensor(f"{inner}.{part}.bias", (state,)) for part in ("query", "value")]
        tensors += [Tensor(f"{inner}.out.weight", (state, state), matrix), Tensor(f"{inner}.out.bias", (state,))]
    return [
        *tensors,
        Tensor(f"{name}.mlp_ln.weight", (state,)),
        Tensor(f"{name}.mlp_ln.bias", (state,)),
        Tensor(f"{name}.mlp.0.weight", (state, 4 * state), matrix),
        Tensor(f"{name}.mlp.0.bias", (4 * state,)),
        Tensor(f"{name}.mlp.2.weight", (4 * state, state), matrix),
        Tensor(f"{name}.mlp.2.bias", (state,)),
    ]


def weights(kind: int, count: int) -> bytes:
    """Return so many weights of a ggml type, all finite and small."""
    block, size, _ = _BLOCKS[kind]
    blocks = count // block
    return (_pattern(kind) * (blocks // _PATTERN + 1))[: blocks * size]


@cache
def _pattern(kind: int) -> bytes:
    source = random.Random(kind)
    return b"".join(_random_block(source, kind) for _ in range(_PATTERN))


def _random_block(source: random.Random, kind: int) -> bytes:
    _, size, floats = _BLOCKS[kind]
    number = source.uniform(-0.05, 0.05)
    if kind == F32:
        return struct.pack("<f", number)
    if kind == BF16:
        return struct.pack("<f", number)[2:]
    data = bytearray(source.randbytes(size))
    for place in floats:
        struct.pack_into("<e", data, place, number if kind == F16 else number / 100)
    return bytes(data)
