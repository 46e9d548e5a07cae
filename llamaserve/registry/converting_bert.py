"""Converts the safetensors weights of a BERT model to GGUF. The same weights always become the same bytes.

Tensors are read, converted and written one by one, so no more than one is in memory. Matrices get the type that is
asked for; what is added to vectors, and not multiplied with them, stays in F32 as in llama.cpp's own conversion.
Sources: docs/gguf.md in ggml for the keys, and the files which that conversion makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

from llamaserve.errors import SourceError
from llamaserve.registry.bert import IGNORED, BertModel, Vocabulary, read_bert
from llamaserve.registry.conversion import BERT, SHA256_KEY, VERSION, VERSION_KEY, Request
from llamaserve.registry.quantising import READABLE, Type, check_row, converted
from llamaserve.registry.safetensors import SafetensorsFile, StoredTensor, read_safetensors
from llamaserve.registry.sources import Quantisation

_TYPES: Final[dict[Quantisation, tuple[Type, gguf.LlamaFileType]]] = {
    "F32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "F16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "Q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_POOLINGS: Final = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS}
_ALWAYS_F32: Final = frozenset({"position_embd.weight", "token_types.weight"})  # and all vectors
_WORD_START: Final = (
    "\u2581"  # what llama.cpp has before a word's first piece, where WordPiece has ## before the others
)


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be converted: its name in both files, its shape with the fastest dimension last, its new type."""

    name: str
    gguf_name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def size(self) -> int:
        """Return the bytes that it takes in the new file."""
        return math.prod(quant_shape_to_byte_shape(self.shape, self.type))


def convert(request: Request) -> None:
    """Convert weights. Raises ``SourceError`` before anything is written, but for values that cannot be converted."""
    folder = Path(request.folder)
    model = read_bert(folder)
    weights = read_safetensors(folder / BERT.weights)
    tensors = [*_checked(model, weights, request.quantisation)]
    writer = gguf.GGUFWriter(request.target, "bert")
    try:
        _describe(writer, request, model, tensors)
        for tensor in tensors:
            kind = np.dtype(np.float32)
            writer.add_tensor_info(tensor.gguf_name, tensor.shape, kind, tensor.size, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            data, dtype = weights.read(tensor.name), weights.tensors[tensor.name].dtype
            writer.write_tensor_data(converted(tensor.name, data, dtype, tensor.shape, tensor.type))
    finally:
        writer.close()


def _checked(model: BertModel, weights: SafetensorsFile, quantisation: Quantisation) -> Iterator[_Tensor]:
    """Yield what is to be converted, all of it as the model's configuration says and nothing else."""
    needed = {name: (gguf_name, shape) for name, gguf_name, shape in model.tensors()}
    unknown = [name for name in weights.tensors if name not in needed and name not in IGNORED]
    if unknown:
        raise SourceError(f"the model cannot be converted: no BERT model has the tensor {unknown[0][:100]!r}")
    for name, (gguf_name, shape) in needed.items():
        stored = weights.tensors.get(name)
        if stored is None:
            raise SourceError(f"the model cannot be converted: its tensor {name} is missing")
        _check(name, stored, shape)
        matrix = len(shape) > 1 and gguf_name not in _ALWAYS_F32
        kind = _TYPES[quantisation][0] if matrix else Type.F32
        check_row(name, shape[-1], kind)
        yield _Tensor(name, gguf_name, shape, kind)


def _check(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise SourceError(
            f"the model cannot be converted: its tensor {name} has the shape {list(stored.shape)}, "
            f"and {list(shape)} is that of its configuration"
        )
    if stored.dtype not in READABLE:
        raise SourceError(f"the model cannot be converted: its tensor {name} is {stored.dtype}, not F32, F16 or BF16")


# ---- metadata ---------------------------------------------------------------------------------------------------


def _describe(writer: gguf.GGUFWriter, request: Request, model: BertModel, tensors: list[_Tensor]) -> None:
    """Write what the file says of itself: no time and no place, so that it is always the same."""
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(request.name)
    writer.add_size_label(gguf.size_label(parameters, 0, 0, 0))
    if model.licence is not None:
        writer.add_license(model.licence)
    writer.add_source_url(request.url)
    writer.add_string(SHA256_KEY, request.sha256)
    writer.add_uint32(VERSION_KEY, VERSION)
    writer.add_file_type(_TYPES[request.quantisation][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.layers)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.feed_forward)
    writer.add_head_count(model.heads)
    writer.add_layer_norm_eps(model.norm_epsilon)
    writer.add_causal_attention(False)
    writer.add_pooling_type(_POOLINGS[model.pooling])
    writer.add_token_type_count(model.token_types)
    _describe_tokenizer(writer, model.vocabulary)


def _describe_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    special = set(vocabulary.specials.values())
    numbered = [*enumerate(vocabulary.tokens)]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")  # llama.cpp's name for BERT's own way to split a text
    tokens = [token if number in special else _spelled(token) for number, token in numbered]
    if len(set(tokens)) < len(tokens):
        raise SourceError("the model cannot be converted: vocab.txt: two tokens are one to llama.cpp")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number, _ in numbered]
    )
    writer.add_bos_token_id(vocabulary.specials["cls"])
    writer.add_eos_token_id(vocabulary.specials["sep"])
    writer.add_sep_token_id(vocabulary.specials["sep"])
    writer.add_unk_token_id(vocabulary.specials["unk"])
    writer.add_pad_token_id(vocabulary.specials["pad"])
    writer.add_mask_token_id(vocabulary.specials["mask"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_add_sep_token(False)
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", vocabulary.lowercase)
    if vocabulary.strip_accents is not None:  # else llama.cpp takes it to be as lowercase
        writer.add_bool("tokenizer.ggml.normalizer.strip_accents", vocabulary.strip_accents)


def _spelled(token: str) -> str:
    """Return a piece as llama.cpp spells it."""
    return token[2:] if token.startswith("##") else _WORD_START + token
