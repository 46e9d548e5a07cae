"""A tiny recurrent model (Mamba) in 32-bit floats: it remembers in a state of fixed size, which can't be cut."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

from gguf_writer import F32, File, Tensor, tiny_llama_metadata

_WIDTH, _INNER, _STATE, _RANK, _TOKENS = 32, 64, 8, 4, 261


def write_recurrent_model(path: Path) -> None:
    """Write a GGUF file with the vocabulary of the loud model."""
    path.write_bytes(File(_metadata(), _tensors()).bytes())


def _metadata() -> dict[str, Any]:
    vocabulary = {key: value for key, value in tiny_llama_metadata().items() if not key.startswith("llama.")}
    return vocabulary | {
        "general.architecture": "mamba",
        "mamba.context_length": 1024,
        "mamba.embedding_length": _WIDTH,
        "mamba.block_count": 2,
        "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0,
        "mamba.attention.layer_norm_rms_epsilon": 1e-5,
        "mamba.ssm.conv_kernel": 4,
        "mamba.ssm.inner_size": _INNER,
        "mamba.ssm.state_size": _STATE,
        "mamba.ssm.time_step_rank": _RANK,
    }


def _tensors() -> list[Tensor]:
    source = random.Random(0)

    def weights(name: str, *shape: int, mean: float = 0.0, spread: float = 0.6) -> Tensor:
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        values = array("f", (mean + source.uniform(-spread, spread) for _ in range(count)))
        return Tensor(name, shape, F32, values.tobytes())

    tensors = [weights("token_embd.weight", _WIDTH, _TOKENS), weights("output_norm.weight", _WIDTH, mean=1, spread=0.1)]
    for layer in range(2):
        name = f"blk.{layer}."
        tensors += [
            weights(name + "attn_norm.weight", _WIDTH, mean=1, spread=0.1),
            weights(name + "ssm_in.weight", _WIDTH, 2 * _INNER),
            weights(name + "ssm_conv1d.weight", 4, _INNER),
            weights(name + "ssm_conv1d.bias", _INNER),
            weights(name + "ssm_x.weight", _INNER, _RANK + 2 * _STATE),
            weights(name + "ssm_dt.weight", _RANK, _INNER),
            weights(name + "ssm_dt.bias", _INNER, mean=-2, spread=0.5),
            weights(name + "ssm_a", _STATE, _INNER, mean=-0.5, spread=0.4),
            weights(name + "ssm_d", _INNER),
            weights(name + "ssm_out.weight", _INNER, _WIDTH),
        ]
    return tensors
