"""Writes GGUF files in the shapes of families of encoders, with weights that are small numbers and mean nothing.

Like ``synthetic_models``, of which it has the sizes and the bytes: what a text becomes is noise, and takes the memory
that it would with the family's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf_writer import FLOAT32, INT32, STRING, Array
from synthetic_models import F32, Shape, llama_vocabulary, write_tensors

Description = tuple[str, tuple[int, ...], int]
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WITH_RMS = ("gemma-embedding", "neo-bert", "eurobert", "t5encoder")
_BUCKETS = 32  # of distances, in T5


def write_encoder(path: Path, shape: Shape, *, hollow: bool = False) -> Path:
    """Write an encoder; a ``hollow`` one has a whole header and holes for weights."""
    return write_tensors(path, encoder_metadata(shape), encoder_tensors(shape), hollow=hollow)


def encoder_metadata(shape: Shape) -> dict[str, Any]:
    """Return what its header says."""
    name = shape.architecture
    norm = "layer_norm_rms_epsilon" if name in _WITH_RMS else "layer_norm_epsilon"
    metadata: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.context_length": shape.context,
        f"{name}.embedding_length": shape.width,
        f"{name}.block_count": shape.layers,
        f"{name}.feed_forward_length": shape.forward,
        f"{name}.attention.head_count": shape.heads,
        f"{name}.attention.{norm}": 1e-5,
        f"{name}.attention.causal": False,
        f"{name}.pooling_type": 1,
    }
    if name == "gemma-embedding":
        sizes = {"head_count_kv": shape.kv_heads, "key_length": shape.head, "value_length": shape.head}
        metadata |= {f"{name}.attention.{key}": value for key, value in sizes.items()}
    if name == "t5encoder":
        metadata[f"{name}.attention.relative_buckets_count"] = _BUCKETS
    if shape.window:
        metadata[f"{name}.attention.sliding_window"] = shape.window
    if shape.experts:
        metadata |= {
            f"{name}.expert_count": shape.experts,
            f"{name}.expert_used_count": shape.used,
            f"{name}.moe_every_n_layers": 2,
        }
    pieces = llama_vocabulary(shape.tokens) if name == "gemma-embedding" else _words(shape.tokens)
    return metadata | shape.extra | pieces


def _words(tokens: int) -> dict[str, Any]:
    names = [*_SPECIALS, *(f"▁w{number:x}" for number in range(tokens - len(_SPECIALS)))]
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": Array(STRING, names),
        "tokenizer.ggml.scores": Array(FLOAT32, [0.0] * tokens),
        "tokenizer.ggml.token_type": Array(INT32, [3] * len(_SPECIALS) + [1] * (tokens - len(_SPECIALS))),
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
    }


def encoder_tensors(shape: Shape) -> Iterator[Description]:
    """Yield its tensors: name, shape and type."""
    width, name = shape.width, shape.architecture
    kind = shape.type if shape.embedding_type is None else shape.embedding_type
    yield "token_embd.weight", (width, shape.tokens), kind
    if name == "bert":
        yield "position_embd.weight", (width, shape.context), F32
    if name in ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2"):
        yield "token_types.weight", (width, 2), F32
        yield "token_embd_norm.bias", (width,), F32
    if name in ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "modern-bert"):
        yield "token_embd_norm.weight", (width,), F32
    if name in ("gemma-embedding", "eurobert", "modern-bert"):
        yield "output_norm.weight", (width,), F32
    if name in ("neo-bert", "t5encoder"):
        yield "enc.output_norm.weight", (width,), F32
    for layer in range(shape.layers):
        for part, dims, kind in _LAYERS[name](shape, layer):
            yield f"{'enc.' if name == 't5encoder' else ''}blk.{layer}.{part}", dims, kind


def _bert(shape: Shape, layer: int) -> Iterator[Description]:
    """A BERT, and what was made of it: norms behind the parts, biases, perhaps gates or experts."""
    width, forward, name = shape.width, shape.forward, shape.architecture
    biased = name != "nomic-bert"
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        yield f"{part}.weight", (width, width), shape.type
        if biased:
            yield f"{part}.bias", (width,), F32
    for part in ("attn_output_norm", "layer_output_norm"):
        yield f"{part}.weight", (width,), F32
        yield f"{part}.bias", (width,), F32
    if shape.experts and layer % 2:
        yield "ffn_gate_inp.weight", (width, shape.experts), F32
        yield "ffn_up_exps.weight", (width, forward, shape.experts), shape.type
        yield "ffn_down_exps.weight", (forward, width, shape.experts), shape.type
        return
    yield "ffn_up.weight", (width, 2 * forward if name == "jina-bert-v2" else forward), shape.type
    yield "ffn_down.weight", (forward, width), shape.type
    if name == "nomic-bert":
        yield "ffn_gate.weight", (width, forward), shape.type
    if biased and name != "jina-bert-v2":
        yield "ffn_up.bias", (forward,), F32
    if biased:
        yield "ffn_down.bias", (width,), F32


def _fused(shape: Shape, layer: int) -> Iterator[Description]:
    """ModernBERT and NeoBERT: one matrix for queries, keys and values, one for gate and inner layer, norms before."""
    width, forward = shape.width, shape.forward
    if layer or shape.architecture == "neo-bert":
        yield "attn_norm.weight", (width,), F32
    yield "attn_qkv.weight", (width, 3 * width), shape.type
    yield "attn_output.weight", (width, width), shape.type
    yield "ffn_norm.weight", (width,), F32
    yield "ffn_up.weight", (width, 2 * forward), shape.type
    yield "ffn_down.weight", (forward, width), shape.type


def _decoder_like(shape: Shape, layer: int) -> Iterator[Description]:
    """EuroBERT and EmbeddingGemma: the layers of a decoder that looks both ways."""
    width, forward = shape.width, shape.forward
    kv_heads = shape.kv_heads if isinstance(shape.kv_heads, int) else shape.kv_heads[0]
    for name, heads in (("attn_q", shape.heads), ("attn_k", kv_heads), ("attn_v", kv_heads)):
        yield f"{name}.weight", (width, heads * shape.head), shape.type
    yield "attn_output.weight", (shape.heads * shape.head, width), shape.type
    for name in ("ffn_gate", "ffn_up"):
        yield f"{name}.weight", (width, forward), shape.type
    yield "ffn_down.weight", (forward, width), shape.type
    norms = ["attn_norm", "ffn_norm"]
    if shape.architecture == "gemma-embedding":
        norms += ["post_attention_norm", "post_ffw_norm"]
        yield "attn_q_norm.weight", (shape.head,), F32
        yield "attn_k_norm.weight", (shape.head,), F32
    for name in norms:
        yield f"{name}.weight", (width,), F32


def _t5(shape: Shape, layer: int) -> Iterator[Description]:
    width, forward, inner = shape.width, shape.forward, shape.heads * shape.head
    if not layer:
        yield "attn_rel_b.weight", (shape.heads, _BUCKETS), F32
    for name in ("attn_q", "attn_k", "attn_v"):
        yield f"{name}.weight", (width, inner), shape.type
    yield "attn_o.weight", (inner, width), shape.type
    for name in ("attn_norm", "ffn_norm"):
        yield f"{name}.weight", (width,), F32
    for name in ("ffn_gate", "ffn_up"):
        yield f"{name}.weight", (width, forward), shape.type
    yield "ffn_down.weight", (forward, width), shape.type


_LAYERS = {
    "bert": _bert,
    "nomic-bert": _bert,
    "nomic-bert-moe": _bert,
    "jina-bert-v2": _bert,
    "modern-bert": _fused,
    "neo-bert": _fused,
    "eurobert": _decoder_like,
    "gemma-embedding": _decoder_like,
    "t5encoder": _t5,
}
