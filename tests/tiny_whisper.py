"""Writes CTranslate2's model files, and small random Whisper models as they are published so, for tests.

It writes what it is told and checks nothing, and knows nothing of what reads it.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WIDTH, HEADS, ANSWER, WINDOW = 32, 2, 448, 1500
ENGLISH, MULTILINGUAL, LARGE_V3 = 51864, 51865, 51866
TYPES = {"F32": 0, "I8": 1, "I16": 2, "I32": 3, "F16": 4, "BF16": 5}

Variable = tuple[int, tuple[int, ...], bytes]  # number of the type, shape, bytes


def write_ctranslate2(
    variables: Mapping[str, Variable],
    aliases: Mapping[str, str] | None = None,
    specification: str = "WhisperSpec",
    revision: int = 3,
    version: int = 6,
) -> bytes:
    """Return a file."""
    parts = [struct.pack("<I", version), text(specification), struct.pack("<II", revision, len(variables))]
    parts += [entry(name, *variable) for name, variable in variables.items()]
    parts += [struct.pack("<I", len(aliases or {}))]
    parts += [text(name) + text(target) for name, target in (aliases or {}).items()]
    return b"".join(parts)


def entry(name: str, kind: int, shape: tuple[int, ...], data: bytes, size: int | None = None) -> bytes:
    """Return a variable as a file has it; it may say that it has another size."""
    head = struct.pack(f"<B{len(shape)}IB", len(shape), *shape, kind)
    return text(name) + head + struct.pack("<I", len(data) if size is None else size) + data


def text(value: str) -> bytes:
    encoded = value.encode() + b"\0"
    return struct.pack("<H", len(encoded)) + encoded


def variable(values: np.ndarray[Any, Any], dtype: str) -> Variable:
    """Return an array as a file has it."""
    if dtype == "BF16":
        return TYPES[dtype], values.shape, (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    as_numpy = {"F32": "<f4", "F16": "<f2", "I8": "i1", "I16": "<i2", "I32": "<i4"}[dtype]
    return TYPES[dtype], values.shape, values.astype(as_numpy).tobytes()


def letters() -> list[str]:
    """Return what stands for each byte in GPT-2's spelling."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    found = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in found)
    found |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [found[byte] for byte in range(256)]


def words(vocabulary: int) -> list[str]:
    """Return tokens as they are published: all bytes, pairs of them, and those with a meaning."""
    texts = 50256 if vocabulary == ENGLISH else 50257
    pairs = ("".join(pair) for pair in itertools.product(letters(), repeat=2))
    listed = [*letters(), *itertools.islice(pairs, texts - 256), "<|endoftext|>", "<|startoftranscript|>"]
    return listed + [f"<|{number}|>" for number in range(vocabulary - len(listed))]


@dataclass
class TinyWhisper:
    """A model's files, to be changed before they are written. ``weights`` are the values by variable; ``settings`` are
    those that are one number, ``extra`` variables are written as they are, None for one that is missing.
    """

    vocabulary: int = ENGLISH
    bands: int = 80
    width: int = WIDTH
    window: int = WINDOW
    answer: int = ANSWER
    audio_layers: int = 2
    text_layers: int = 1
    dtype: str = "F16"
    specification: str = "WhisperSpec"
    revision: int = 3
    version: int = 6
    settings: dict[str, int | None] = field(default_factory=dict)
    extra: dict[str, Variable | None] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=lambda: {"decoder/projection/weight": "decoder/embeddings/weight"})
    replaced: dict[str, bytes | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(1)
        self.weights = {name: random.standard_normal(shape).astype("<f4") for name, shape in self.shapes().items()}
        for name, values in self.weights.items():  # the keys of Whisper have no biases
            if name.endswith(("self_attention/linear_0/bias", "attention/linear_1/bias")) and len(values) != self.width:
                first = 0 if len(values) == 2 * self.width else self.width
                values[first : first + self.width] = 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the variables with weights."""
        width = self.width
        found: dict[str, tuple[int, ...]] = {
            "encoder/position_encodings/encodings": (self.window, width),
            "encoder/conv1/weight": (width, self.bands, 3),
            "encoder/conv1/bias": (width,),
            "encoder/conv2/weight": (width, width, 3),
            "encoder/conv2/bias": (width,),
            "decoder/position_encodings/encodings": (self.answer, width),
            "decoder/embeddings/weight": (self.vocabulary, width),
        }
        for side, layers in (("encoder", self.audio_layers), ("decoder", self.text_layers)):
            for layer in range(layers):
                place = f"{side}/layer_{layer}"
                rows = {"self_attention/linear_0": 3 * width, "self_attention/linear_1": width}
                if side == "decoder":
                    rows |= {"attention/linear_0": width, "attention/linear_1": 2 * width, "attention/linear_2": width}
                rows |= {"ffn/linear_0": 4 * width, "ffn/linear_1": width}
                for name, count in rows.items():
                    columns = 4 * width if name == "ffn/linear_1" else width
                    found |= {f"{place}/{name}/weight": (count, columns), f"{place}/{name}/bias": (count,)}
                for part in dict.fromkeys(name.split("/")[0] for name in rows):
                    found |= {f"{place}/{part}/layer_norm/{kind}": (width,) for kind in ("gamma", "beta")}
            found |= {f"{side}/layer_norm/{kind}": (width,) for kind in ("gamma", "beta")}
        return found

    def model(self) -> bytes:
        """Return model.bin."""
        numbers: dict[str, int | None] = {
            "decoder/activation": 3,
            "decoder/alibi": 0,
            "decoder/alignment_heads": 1,
            "decoder/alignment_layer": -1,
            "decoder/num_heads": HEADS,
            "decoder/pre_norm": 1,
            "decoder/scale_embeddings": 0,
            "decoder/start_from_zero_embedding": 0,
            "encoder/num_heads": HEADS,
            **self.settings,
        }
        found: dict[str, Variable | None] = {
            name: variable(np.array(value), "I16" if "heads" in name or "layer" in name else "I8")
            for name, value in numbers.items()
            if value is not None
        }
        found |= {name: variable(values, self.dtype) for name, values in self.weights.items()}
        written = {name: each for name, each in sorted((found | self.extra).items()) if each is not None}
        return write_ctranslate2(written, self.aliases, self.specification, self.revision, self.version)

    def files(self) -> dict[str, bytes]:
        """Return the files by name; ``replaced`` ones as they are there, None for one that is missing."""
        written: dict[str, bytes | None] = {
            "model.bin": self.model(),
            "vocabulary.txt": "".join(f"{word}\n" for word in words(self.vocabulary)).encode(),
            "config.json": json.dumps({"lang_ids": []}).encode(),
            **self.replaced,
        }
        return {name: data for name, data in written.items() if data is not None}


def servable_whisper() -> TinyWhisper:
    """Return a model with heads of the size that all of Whisper's have, without which whisper.cpp must not see it."""
    return TinyWhisper(width=64, settings={"encoder/num_heads": 1, "decoder/num_heads": 1})
