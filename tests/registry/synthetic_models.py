"""Writes GGUF files in the shapes of real model families, with weights that are small numbers and mean nothing.

llama.cpp loads them and computes with them as with the families' own; only the answers are noise. For tests of how much
memory a model takes. Knows the tensors of a few architectures, and nothing of what is measured.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf_writer import FLOAT32, INT32, STRING, Array, File, Tensor

F32, F16, Q4_0, Q4_1, Q5_0, Q8_0, Q4_K, Q6_K, MXFP4 = 0, 1, 2, 3, 6, 8, 12, 14, 39

# Elements and bytes of a block, and where its 16-bit scales are.
_BLOCKS = {
    F32: (1, 4, ()),
    F16: (1, 2, ()),
    Q4_0: (32, 18, (0,)),
    Q4_1: (32, 20, (0, 2)),
    Q5_0: (32, 22, (0,)),
    Q8_0: (32, 34, (0,)),
    Q4_K: (256, 144, (0, 2)),
    Q6_K: (256, 210, (208,)),
    MXFP4: (32, 17, ()),
}
_Description = tuple[str, tuple[int, ...], int]

_PIECE = 1 << 16  # blocks that are drawn; longer tensors repeat them


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's dimensions, in the names of the paper's world: ``heads`` share ``kv_heads``, which may differ by layer;
    ``experts`` of which ``used`` work for a token; ``window`` tokens that a sliding layer sees. ``state`` is the size
    of a recurrent layer's state and ``recurrent`` which layers are such. ``latent`` is the rank of a compressed cache.
    """

    architecture: str = "llama"
    width: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int | tuple[int, ...] = 8
    head: int = 64
    forward: int = 1536
    tokens: int = 8192
    type: int = Q8_0
    embedding_type: int | None = None
    tied: bool = False
    experts: int = 0
    used: int = 0
    window: int = 0
    state: int = 0
    latent: int = 0
    context: int = 32768
    extra: dict[str, Any] = field(default_factory=dict)

    def kv(self, layer: int) -> int:
        """Return the key/value heads of a layer; 0 where it is recurrent."""
        return self.kv_heads if isinstance(self.kv_heads, int) else self.kv_heads[layer]


def write_model(path: Path, shape: Shape, *, hollow: bool = False) -> Path:
    """Write a model; a ``hollow`` one has a whole header and holes for weights."""
    return write_tensors(path, _metadata(shape), _tensors(shape), hollow=hollow)


def write_tensors(path: Path, metadata: dict[str, Any], described: Iterable[_Description], *, hollow: bool) -> Path:
    """Write a file with this metadata and tensors of these names, shapes and types."""
    tensors = [_Weights(name, dims, kind) for name, dims, kind in described]
    file = File(metadata, tensors)
    with path.open("wb") as out:
        out.write(file.head())
        for tensor in tensors:
            if hollow:
                out.seek(tensor.padded, 1)
            else:
                for piece in tensor.pieces():
                    out.write(piece)
        out.truncate()
    return path


class _Weights(Tensor):
    """A tensor whose bytes are made when they are written."""

    @property
    def size(self) -> int:
        elements, size, _ = _BLOCKS[self.type]
        return math.prod(self.shape) // elements * size

    @property
    def padded(self) -> int:
        return -(-self.size // 32) * 32

    def bytes(self) -> bytes:
        return _Length(self.size)  # type: ignore[return-value]

    def pieces(self) -> Iterator[bytes]:
        """Yield the weights, and the padding."""
        pattern = _pattern(self.type)
        for start in range(0, self.size, len(pattern)):
            yield pattern[: self.size - start]
        yield bytes(self.padded - self.size)


class _Length:
    """Stands for bytes of which only the number is asked."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __add__(self, other: bytes) -> _Length:
        return _Length(self._length + len(other))


_patterns: dict[int, bytes] = {}


def _pattern(kind: int) -> bytes:
    """Return the bytes of many blocks, random but for their scales, which make all weights small."""
    if kind not in _patterns:
        source = random.Random(kind)
        elements, size, scales = _BLOCKS[kind]
        if kind == F32:
            _patterns[kind] = struct.pack(f"<{_PIECE}f", *(source.uniform(-0.05, 0.05) for _ in range(_PIECE)))
        elif kind == F16:
            _patterns[kind] = struct.pack(f"<{_PIECE}e", *(source.uniform(-0.05, 0.05) for _ in range(_PIECE)))
        else:
            blocks = bytearray(source.randbytes(_PIECE // elements * size))
            for start in range(0, len(blocks), size):
                for place in scales:
                    struct.pack_into("<e", blocks, start + place, 0.001)
                if kind == MXFP4:
                    blocks[start] = 120  # a scale of 2 ** -7
            _patterns[kind] = bytes(blocks)
    return _patterns[kind]


def _metadata(shape: Shape) -> dict[str, Any]:
    name = shape.architecture
    kv_heads = shape.kv_heads if isinstance(shape.kv_heads, int) else Array(INT32, shape.kv_heads)
    metadata: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.context_length": shape.context,
        f"{name}.embedding_length": shape.width,
        f"{name}.block_count": shape.layers,
        f"{name}.feed_forward_length": shape.forward,
        f"{name}.attention.head_count": shape.heads,
        f"{name}.attention.head_count_kv": kv_heads,
        f"{name}.attention.key_length": shape.head,
        f"{name}.attention.value_length": shape.head,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{name}.rope.dimension_count": shape.head,
    }
    if shape.experts:
        metadata |= {
            f"{name}.expert_count": shape.experts,
            f"{name}.expert_used_count": shape.used,
            f"{name}.expert_feed_forward_length": shape.forward,
        }
    if shape.window:
        metadata[f"{name}.attention.sliding_window"] = shape.window
    if shape.state:
        metadata |= {
            f"{name}.ssm.conv_kernel": 4,
            f"{name}.ssm.inner_size": 2 * shape.width,
            f"{name}.ssm.state_size": shape.state,
            f"{name}.ssm.time_step_rank": 2 * shape.width // 64,
            f"{name}.ssm.group_count": 1,
        }
    if shape.latent:
        metadata |= _latent_metadata(shape)
    return metadata | shape.extra | llama_vocabulary(shape.tokens)


def _latent_metadata(shape: Shape) -> dict[str, Any]:
    """Return what DeepSeek's compressed cache is described by: one head of the latent and the rotated part."""
    name = shape.architecture
    return {
        f"{name}.attention.head_count_kv": 1,
        f"{name}.attention.key_length": shape.latent + shape.head // 2,
        f"{name}.attention.value_length": shape.latent,
        f"{name}.attention.key_length_mla": shape.head + shape.head // 2,
        f"{name}.attention.value_length_mla": shape.head,
        f"{name}.attention.kv_lora_rank": shape.latent,
        f"{name}.attention.q_lora_rank": shape.latent,
        f"{name}.rope.dimension_count": shape.head // 2,
        f"{name}.leading_dense_block_count": 0,
        f"{name}.expert_shared_count": 1,
    }


def llama_vocabulary(tokens: int) -> dict[str, Any]:
    """Return the metadata of a SentencePiece vocabulary of so many tokens, all bytes among them."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [f"▁w{number:x}" for number in range(tokens - len(names))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": Array(STRING, names),
        "tokenizer.ggml.scores": Array(FLOAT32, [0.0] * tokens),
        "tokenizer.ggml.token_type": Array(INT32, [2, 3, 3, *[6] * 256, *[1] * (tokens - 259)]),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _tensors(shape: Shape) -> Iterator[_Description]:
    width = shape.width
    embedding = shape.type if shape.embedding_type is None else shape.embedding_type
    yield "token_embd.weight", (width, shape.tokens), embedding
    yield ("token_embd_norm.weight" if shape.architecture == "lfm2" else "output_norm.weight"), (width,), F32
    if not shape.tied:
        yield "output.weight", (width, shape.tokens), embedding
    for layer in range(shape.layers):
        for name, dims, kind in _layer(shape, layer):
            yield f"blk.{layer}.{name}", dims, kind


def _layer(shape: Shape, layer: int) -> Iterator[_Description]:
    yield "attn_norm.weight", (shape.width,), F32
    if shape.state and (shape.architecture == "mamba2" or not shape.kv(layer)):
        yield from _recurrent(shape)
    elif shape.architecture == "lfm2" and not shape.kv(layer):
        yield "shortconv.conv.weight", (shape.extra["lfm2.shortconv.l_cache"], shape.width), F32
        yield "shortconv.in_proj.weight", (shape.width, 3 * shape.width), shape.type
        yield "shortconv.out_proj.weight", (shape.width, shape.width), shape.type
    elif shape.latent:
        yield from _latent_attention(shape)
    else:
        yield from _attention(shape, layer)
    if shape.architecture == "mamba2":
        return
    if shape.architecture == "gpt-oss":
        yield "post_attention_norm.weight", (shape.width,), F32
    else:
        yield "ffn_norm.weight", (shape.width,), F32
    yield from _experts(shape) if shape.experts else _forward(shape)
    if shape.architecture in ("gemma2", "gemma3"):
        yield "post_attention_norm.weight", (shape.width,), F32
        yield "post_ffw_norm.weight", (shape.width,), F32


def _attention(shape: Shape, layer: int) -> Iterator[_Description]:
    width, queries, keys = shape.width, shape.heads * shape.head, shape.kv(layer) * shape.head
    yield "attn_q.weight", (width, queries), shape.type
    yield "attn_k.weight", (width, keys), shape.type
    yield "attn_v.weight", (width, keys), shape.type
    yield "attn_output.weight", (queries, width), shape.type
    if shape.architecture in ("qwen2", "gpt-oss"):
        yield from (("attn_q.bias", (queries,), F32), ("attn_k.bias", (keys,), F32), ("attn_v.bias", (keys,), F32))
    if shape.architecture == "gpt-oss":
        yield "attn_output.bias", (width,), F32
        yield "attn_sinks.weight", (shape.heads,), F32
    if shape.architecture in ("qwen3", "qwen3moe", "gemma3", "lfm2"):
        yield "attn_q_norm.weight", (shape.head,), F32
        yield "attn_k_norm.weight", (shape.head,), F32


def _latent_attention(shape: Shape) -> Iterator[_Description]:
    width, heads, head, latent, rotated = shape.width, shape.heads, shape.head, shape.latent, shape.head // 2
    yield "attn_q_a_norm.weight", (latent,), F32
    yield "attn_kv_a_norm.weight", (latent,), F32
    yield "attn_q_a.weight", (width, latent), shape.type
    yield "attn_q_b.weight", (latent, heads * (head + rotated)), shape.type
    yield "attn_kv_a_mqa.weight", (width, latent + rotated), shape.type
    yield "attn_k_b.weight", (head, latent, heads), shape.type
    yield "attn_v_b.weight", (latent, head, heads), shape.type
    yield "attn_output.weight", (heads * head, width), shape.type


def _recurrent(shape: Shape) -> Iterator[_Description]:
    inner, heads = 2 * shape.width, 2 * shape.width // 64
    mixed = inner + 2 * shape.state
    yield "ssm_in.weight", (shape.width, inner + mixed + heads), shape.type
    yield "ssm_conv1d.weight", (4, mixed), F32
    yield "ssm_conv1d.bias", (mixed,), F32
    yield "ssm_dt.bias", (heads,), F32
    yield "ssm_a", (1, heads), F32
    yield "ssm_d", (1, heads), F32
    yield "ssm_norm.weight", (inner, 1), F32
    yield "ssm_out.weight", (inner, shape.width), shape.type


def _forward(shape: Shape) -> Iterator[_Description]:
    yield "ffn_gate.weight", (shape.width, shape.forward), shape.type
    yield "ffn_up.weight", (shape.width, shape.forward), shape.type
    yield "ffn_down.weight", (shape.forward, shape.width), shape.type


def _experts(shape: Shape) -> Iterator[_Description]:
    width, forward, experts = shape.width, shape.forward, shape.experts
    yield "ffn_gate_inp.weight", (width, experts), F32
    yield "ffn_gate_exps.weight", (width, forward, experts), shape.type
    yield "ffn_up_exps.weight", (width, forward, experts), shape.type
    yield "ffn_down_exps.weight", (forward, width, experts), shape.type
    if shape.architecture == "gpt-oss":
        yield "ffn_gate_inp.bias", (experts,), F32
        yield "ffn_gate_exps.bias", (forward, experts), F32
        yield "ffn_up_exps.bias", (forward, experts), F32
        yield "ffn_down_exps.bias", (width, experts), F32
    if shape.architecture == "deepseek2":
        yield "ffn_gate_shexp.weight", (width, forward), shape.type
        yield "ffn_up_shexp.weight", (width, forward), shape.type
        yield "ffn_down_shexp.weight", (forward, width), shape.type
