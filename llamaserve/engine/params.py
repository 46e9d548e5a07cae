"""The values that describe what the engine shall load and generate. Plain data: importing this loads no library."""

from __future__ import annotations

from typing import Literal

import msgspec

GpuLayers = Literal["auto", "all", "none"] | int
FlashAttention = Literal["auto", "on", "off"]
KVType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]


class LoadParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a GGUF model is loaded.

    ``context`` is the largest number of tokens (prompt and answer) of one request, ``parallel`` the number of sequences
    evaluated at once, ``kv_cells`` the number of tokens that the key-value cache holds for all sequences together.
    """

    path: str
    context: int
    parallel: int
    kv_cells: int
    batch: int
    threads: int
    gpu_layers: GpuLayers
    flash_attention: FlashAttention
    key_type: KVType
    value_type: KVType
