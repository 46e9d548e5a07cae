"""Makes LoRA adapters for tests, and models into which they are merged: random weights of low rank, as GGUF files.

What a file shall hold is taken as it is, wrong or not; nothing here knows of llama.cpp or of the checks under test.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf_writer import ARRAY, F32, File, Raw, Tensor

from llamaserve.registry.gguf import GGUFArray, GGUFHeader, TensorInfo, read_header

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Lora:
    """An adapter: for each tensor of the model ``a`` of shape (rank, inputs) and ``b`` of shape (outputs, rank)."""

    pairs: Mapping[str, tuple[Weights, Weights]]
    alpha: float = 8.0
    architecture: str = "llama"

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of its file."""
        return {
            "general.architecture": self.architecture,
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": self.alpha,
        }

    def tensors(self) -> list[Tensor]:
        """Return the tensors of its file."""
        halves = [(f"{name}.lora_{half}", w) for name, pair in self.pairs.items() for half, w in zip("ab", pair)]  # noqa: B905
        return [float_tensor(name, weights) for name, weights in halves]

    def write(self, path: Path, **changes: Any) -> Path:
        """Write its file. A change replaces a metadata entry (``adapter__type="x"``); None removes it."""
        metadata = self.metadata()
        for name, value in changes.items():
            metadata[name.replace("__", ".")] = value
        kept = {name: value for name, value in metadata.items() if value is not None}
        path.write_bytes(File(kept, self.tensors()).bytes())
        return path

    def change(self, name: str, scale: float) -> Weights:
        """Return what it adds to a tensor, shape (outputs, inputs)."""
        a, b = self.pairs[name]
        return (b @ a) * np.float32(scale * self.alpha / len(a))


def random_lora(
    shapes: Mapping[str, tuple[int, ...]], *, rank: int = 4, seed: int = 0, size: float = 1.0, alpha: float = 8.0
) -> Lora:
    """Return an adapter for tensors of these shapes (inputs first, as in a file). Each of them changes by numbers of
    about ``size`` / √inputs.
    """
    source = np.random.default_rng(seed)
    pairs: dict[str, tuple[Weights, Weights]] = {}
    for name, (inputs, outputs) in shapes.items():
        a = source.normal(0, size / np.sqrt(inputs), (rank, inputs)).astype(np.float32)
        b = source.normal(0, np.sqrt(rank) / alpha, (outputs, rank)).astype(np.float32)
        pairs[name] = a, b
    return Lora(pairs, alpha)


def float_tensor(name: str, weights: Weights) -> Tensor:
    """Return a tensor of 32-bit floats for a file."""
    return Tensor(name, weights.shape[::-1], F32, np.ascontiguousarray(weights, np.float32).tobytes())


def shapes_of(tensors: Iterable[Tensor | TensorInfo], *endings: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices whose names end so; of all in layers without an ending."""
    return {
        tensor.name: tensor.shape
        for tensor in tensors
        if len(tensor.shape) == 2 and (tensor.name.endswith(endings) if endings else tensor.name.startswith("blk."))
    }


def merge(model: File, *adapters: tuple[Lora, float]) -> File:
    """Return a model of 32-bit floats with adapters merged into its weights, each with a scale."""
    tensors = list(model.tensors)
    for place, tensor in enumerate(tensors):
        changes = [lora.change(tensor.name, scale) for lora, scale in adapters if tensor.name in lora.pairs]
        if changes:
            weights = np.frombuffer(tensor.bytes(), np.float32).reshape(tensor.shape[::-1])
            tensors[place] = replace(tensor, data=np.sum([weights, *changes], 0, np.float32).tobytes())
    return replace(model, tensors=tensors, metadata=model.metadata)


def in_floats(path: Path) -> File:
    """Return a model of the types F32, Q8_0 and Q4_1 with all its weights as 32-bit floats."""
    header = read_header(path)
    data = np.memmap(path, np.uint8, "r")
    metadata = {name: _entry(value, data) for name, value in header.metadata.items()}
    return File(metadata, [float_tensor(tensor.name, _floats(header, tensor, data)) for tensor in header.tensors])


@contextlib.contextmanager
def merged_in_place(path: Path, *adapters: tuple[Lora, float]) -> Iterator[None]:
    """Have adapters merged into the weights of a file of 32-bit floats for a while, without writing another one."""
    header = read_header(path)
    before: dict[int, Weights] = {}
    data = np.memmap(path, np.uint8, "r+")
    for tensor in header.tensors:
        changes = [lora.change(tensor.name, scale) for lora, scale in adapters if tensor.name in lora.pairs]
        start = header.data_offset + tensor.offset
        if changes:
            weights = data[start : start + tensor.size].view(np.float32).reshape(tensor.shape[::-1])
            before[start] = weights.copy()
            for change in changes:
                weights += change
    try:
        yield
    finally:
        for start, weights in before.items():
            data[start : start + weights.nbytes] = weights.reshape(-1).view(np.uint8)


def _entry(value: Any, data: npt.NDArray[np.uint8]) -> Any:
    if not isinstance(value, GGUFArray):
        return value
    elements = data[value.offset : value.offset + value.size].tobytes()
    return Raw(struct.pack("<IIQ", ARRAY, value.type, value.count) + elements)


def _floats(header: GGUFHeader, tensor: TensorInfo, data: npt.NDArray[np.uint8]) -> Weights:
    start = header.data_offset + tensor.offset
    raw = data[start : start + tensor.size]
    match tensor.type_name:
        case "F32":
            weights = raw.view(np.float32)
        case "Q8_0":  # a scale, then 32 signed bytes
            blocks = raw.reshape(-1, 34)
            weights = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].copy().view(np.int8)
        case "Q4_1":  # a scale and a minimum, then 32 halves of bytes: the lower ones first
            blocks = raw.reshape(-1, 20)
            scale, least = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
            numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
            weights = numbers * scale[:, None] + least[:, None]
        case other:
            raise AssertionError(other)
    return weights.reshape(tensor.shape[::-1]).astype(np.float32)
