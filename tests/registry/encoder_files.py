"""Small encoders with a header that is changed, for tests of what is made of a header, and of what it may not say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synthetic_encoders import Description, encoder_metadata, encoder_tensors
from synthetic_models import F32, Shape, write_tensors

ARCHITECTURES = (
    *("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "modern-bert", "neo-bert", "eurobert"),
    *("gemma-embedding", "t5encoder"),
)
WIDTH, CONTEXT, TOKENS = 64, 128, 300
_SHAPES: dict[str, dict[str, Any]] = {
    "nomic-bert-moe": {"experts": 4, "used": 2},
    "modern-bert": {"window": 32, "layers": 3},
    "gemma-embedding": {"window": 32, "layers": 6},
    "neo-bert": {"extra": {"neo-bert.attention.head_count_kv": 4}},
}


def small_encoder(architecture: str, **changes: Any) -> Shape:
    """Return the dimensions of an encoder that is as small as its kind may be."""
    dimensions: dict[str, Any] = {
        "layers": 2,
        "width": WIDTH,
        "heads": 4,
        "kv_heads": 4,
        "head": WIDTH // 4,
        "forward": 96,
        "tokens": TOKENS,
        "type": F32,
        "context": CONTEXT,
    }
    return Shape(architecture=architecture, **dimensions | _SHAPES.get(architecture, {}) | changes)


def encoder_file(
    path: Path,
    architecture: str,
    more: Sequence[tuple[str, tuple[int, ...]]] = (),
    tensors: dict[str, tuple[int, ...] | None] | None = None,
    shape: Shape | None = None,
    **changes: Any,
) -> Path:
    """Write a small encoder with ``more`` tensors, other shapes of some (None: without them), and changes of metadata
    as ``tiny_llama`` takes them; ``arch__`` at the beginning stands for the architecture.
    """
    shape = shape or small_encoder(architecture)
    metadata = encoder_metadata(shape)
    for name, value in changes.items():
        key = name.replace("__", ".")
        key = architecture + key.removeprefix("arch") if key.startswith("arch.") else key
        if value is None:
            metadata.pop(key, None)
        else:
            metadata[key] = value
    described: list[Description] = []
    for name, dims, kind in encoder_tensors(shape):
        other = (tensors or {}).get(name, dims)
        if other is not None:
            described.append((name, other, kind))
    described += [(name, dims, F32) for name, dims in more]
    return write_tensors(path, metadata, described, hollow=False)
