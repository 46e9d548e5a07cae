"""Converts CTranslate2's weights of a Whisper model to whisper.cpp's format. The same weights always become the same
bytes.

Tensors are read, converted and written in runs of rows, so that little of the model is in memory. Matrices get the type
that is asked for; the convolutions are always F16, since whisper.cpp ends its process over others, and what is added,
and not multiplied, stays in F32. Sources: whisper_model_load in whisper.cpp for the format, which has nothing but
numbers, tokens and tensors, and its quantize example.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

import gguf
import numpy as np

from llamaserve.errors import SourceError
from llamaserve.registry.conversion import WHISPER, Request
from llamaserve.registry.ctranslate2 import CTranslate2File, read_ctranslate2
from llamaserve.registry.ctranslate2_whisper import Tensor, WhisperModel, read_whisper
from llamaserve.registry.mel_filters import mel_filters
from llamaserve.registry.quantising import Type, check_row, converted, values
from llamaserve.registry.sources import Quantisation

_MAGIC: Final = 0x67676D6C  # "ggml"
_TYPES: Final[dict[Quantisation, tuple[Type, int]]] = {  # of matrices, and what a file of them says
    "F16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0 + 1000 * gguf.GGML_QUANT_VERSION),
}
_ALWAYS_F32: Final = frozenset({"encoder.positional_embedding", "decoder.positional_embedding"})  # and all vectors
_COLUMNS: Final = frozenset({"encoder.conv1.bias", "encoder.conv2.bias"})  # vectors that whisper.cpp has as matrices
_RUN: Final = 4 << 20  # bytes of weights that are read at once


def convert(request: Request) -> None:
    """Convert weights. Raises ``SourceError`` before anything is written, but for values that cannot be converted."""
    folder = Path(request.folder)
    weights = read_ctranslate2(folder / WHISPER.weights)
    model = read_whisper(folder, weights)
    for tensor in model.tensors():
        check_row(tensor.variable, tensor.shape[-1], _type(tensor, request.quantisation))
    with Path(request.target).open("wb") as file:
        _write_head(file, model, request.quantisation)
        for tensor in model.tensors():
            if tensor.name is None:
                _check_zero(weights, tensor)
            else:
                _write_tensor(file, weights, tensor, tensor.name, _type(tensor, request.quantisation))


def _type(tensor: Tensor, quantisation: Quantisation) -> Type:
    """Return which type of ggml a tensor gets."""
    if len(tensor.shape) == 1 or tensor.name in _ALWAYS_F32:
        return Type.F32
    return Type.F16 if len(tensor.shape) == 3 else _TYPES[quantisation][0]


def _write_head(file: BinaryIO, model: WhisperModel, quantisation: Quantisation) -> None:
    filters = mel_filters(model.bands)
    listening = (model.window, model.width, model.audio_heads, model.audio_layers)
    writing = (model.answer, model.width, model.text_heads, model.text_layers)
    file.write(_integers(_MAGIC, model.vocabulary, *listening, *writing, model.bands, _TYPES[quantisation][1]))
    file.write(_integers(*filters.shape) + filters.astype("<f4").tobytes())
    file.write(_integers(len(model.tokens)))
    file.writelines(_integers(len(token)) + token for token in model.tokens)


def _write_tensor(file: BinaryIO, weights: CTranslate2File, tensor: Tensor, name: str, kind: Type) -> None:
    shape = (*tensor.shape, 1) if name in _COLUMNS else tensor.shape
    file.write(_integers(len(shape), len(name), kind, *reversed(shape)) + name.encode())
    dtype = weights.variables[tensor.variable].dtype
    for data in _runs(weights, tensor):
        file.write(converted(tensor.variable, data, dtype, (-1, *tensor.shape[1:]), kind).tobytes())


def _check_zero(weights: CTranslate2File, tensor: Tensor) -> None:
    dtype = weights.variables[tensor.variable].dtype
    if any(np.any(values(data, dtype)) for data in _runs(weights, tensor)):
        raise SourceError(f"the model cannot be converted: {tensor.variable}: the keys have biases, and Whisper's none")


def _runs(weights: CTranslate2File, tensor: Tensor) -> Iterator[bytes]:
    """Yield a tensor's bytes in runs of whole rows."""
    size = weights.variables[tensor.variable].size // tensor.of
    row = size // tensor.shape[0]
    step = max(1, _RUN // row) * row
    for start in range(0, size, step):
        yield weights.read(tensor.variable, tensor.at * size + start, min(step, size - start))


def _integers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)
