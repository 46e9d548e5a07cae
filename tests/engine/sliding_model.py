"""A tiny model in 32-bit floats of which one layer of two looks back over a few tokens only (Gemma 2's layout)."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

from gguf_writer import F32, File, Tensor, tiny_llama_metadata

WINDOW = 16  # tokens
_WIDTH, _FORWARD, _HEADS, _HEAD, _TOKENS = 32, 64, 4, 8, 261


def write_sliding_model(path: Path) -> None:
    """Write a GGUF file with the vocabulary of the loud model."""
    path.write_bytes(File(_metadata(), _tensors()).bytes())


def _metadata() -> dict[str, Any]:
    vocabulary = {key: value for key, value in tiny_llama_metadata().items() if not key.startswith("llama.")}
    return vocabulary | {
        "general.architecture": "gemma2",
        "gemma2.context_length": 1024,
        "gemma2.embedding_length": _WIDTH,
        "gemma2.block_count": 2,
        "gemma2.feed_forward_length": _FORWARD,
        "gemma2.attention.head_count": _HEADS,
        "gemma2.attention.head_count_kv": _HEADS,
        "gemma2.attention.key_length": _HEAD,
        "gemma2.attention.value_length": _HEAD,
        "gemma2.attention.layer_norm_rms_epsilon": 1e-5,
        "gemma2.attention.sliding_window": WINDOW,
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
    }


def _tensors() -> list[Tensor]:
    source = random.Random(0)

    def weights(name: str, *shape: int, mean: float = 0.0, spread: float = 0.6) -> Tensor:
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = array("f", (mean + source.uniform(-spread, spread) for _ in range(count)))
        return Tensor(name, shape, F32, values.tobytes())

    def norm(name: str) -> Tensor:
        return weights(name, _WIDTH, mean=1, spread=0.1)

    tensors = [weights("token_embd.weight", _WIDTH, _TOKENS), norm("output_norm.weight")]
    for layer in range(2):
        name = f"blk.{layer}."
        tensors += [
            norm(name + "attn_norm.weight"),
            weights(name + "attn_q.weight", _WIDTH, _HEADS * _HEAD),
            weights(name + "attn_k.weight", _WIDTH, _HEADS * _HEAD),
            weights(name + "attn_v.weight", _WIDTH, _HEADS * _HEAD),
            weights(name + "attn_output.weight", _HEADS * _HEAD, _WIDTH),
            norm(name + "post_attention_norm.weight"),
            norm(name + "ffn_norm.weight"),
            weights(name + "ffn_gate.weight", _WIDTH, _FORWARD),
            weights(name + "ffn_up.weight", _WIDTH, _FORWARD),
            weights(name + "ffn_down.weight", _FORWARD, _WIDTH),
            norm(name + "post_ffw_norm.weight"),
        ]
    return tensors
