"""Writes safetensors files, and small random BERT models for sentence embeddings as they are published, for tests.

It writes what it is told and checks nothing, and knows nothing of what reads it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WIDTH, INNER, LAYERS, CONTEXT = 64, 96, 2, 40
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = (*SPECIALS, "a", "the", "cat", "##s", "##a", "!", "é", "日")

Stored = tuple[str, tuple[int, ...], bytes]  # type, shape, bytes


def write_safetensors(tensors: Mapping[str, Stored], header: str | bytes | None = None, **changes: Any) -> bytes:
    """Return a file. ``header`` replaces the whole one, ``changes`` are added to it by name."""
    entries: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    if header is None:
        header = json.dumps({**entries, **changes})
    encoded = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def stored(values: np.ndarray[Any, Any], dtype: str = "F32") -> Stored:
    """Return an array as a file has it."""
    if dtype == "BF16":
        return dtype, values.shape, (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return dtype, values.shape, values.astype({"F32": "<f4", "F16": "<f2", "I64": "<i8"}[dtype]).tobytes()


def shapes(vocabulary: int = len(VOCABULARY)) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model by name."""
    found: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, WIDTH),
        "embeddings.position_embeddings.weight": (CONTEXT, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "attention.self.query": (WIDTH, WIDTH),
            "attention.self.key": (WIDTH, WIDTH),
            "attention.self.value": (WIDTH, WIDTH),
            "attention.output.dense": (WIDTH, WIDTH),
            "attention.output.LayerNorm": (WIDTH,),
            "intermediate.dense": (INNER, WIDTH),
            "output.dense": (WIDTH, INNER),
            "output.LayerNorm": (WIDTH,),
        }.items():
            found[f"encoder.layer.{layer}.{name}.weight"] = shape
            found[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
    return found


@dataclass
class TinyBert:
    """A model's files, to be changed before they are written. ``weights`` are the values by tensor."""

    dtype: str = "F32"
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    pooling: dict[str, Any] = field(default_factory=lambda: {"pooling_mode_mean_tokens": True})
    modules: tuple[str, ...] = ("Transformer", "Pooling", "Normalize")
    vocabulary: tuple[str, ...] = VOCABULARY
    card: str = "---\nlicense: mit\n---\n"
    extra: dict[str, Stored] = field(default_factory=dict)
    replaced: dict[str, bytes | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random = np.random.default_rng(1)
        self.weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes().items()}

    def safetensors(self) -> bytes:
        tensors = {name: stored(values, self.dtype) for name, values in self.weights.items()}
        return write_safetensors(
            {"embeddings.position_ids": stored(np.arange(CONTEXT)[None], "I64")} | tensors | self.extra
        )

    def files(self) -> dict[str, bytes]:
        """Return the files by name; ``replaced`` ones as they are there, None for one that is missing."""
        paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [{"type": f"models.{kind}", "path": paths.get(kind, kind)} for kind in self.modules]
        config = {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "intermediate_size": INNER,
            "max_position_embeddings": CONTEXT,
            "vocab_size": len(VOCABULARY),
            **self.config,
        }
        written: dict[str, bytes | None] = {
            "config.json": json.dumps(config).encode(),
            "tokenizer_config.json": json.dumps(self.tokenizer).encode(),
            "vocab.txt": "".join(f"{token}\n" for token in self.vocabulary).encode(),
            "modules.json": json.dumps(modules).encode(),
            "1_Pooling/config.json": json.dumps(self.pooling).encode(),
            "README.md": self.card.encode(),
            "model.safetensors": self.safetensors(),
            **self.replaced,
        }
        return {name: data for name, data in written.items() if data is not None}
