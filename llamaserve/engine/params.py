"""The values that describe what the engine shall load and generate. Plain data: importing this loads no library."""

from __future__ import annotations

from typing import Literal

import msgspec

GpuLayers = Literal["auto", "all", "none"] | int
FlashAttention = Literal["auto", "on", "off"]
KVType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]

DRAFTED_ROWS = 16  # guessed tokens in a step at most, of all sequences together; each has a row of logits


class LoadParams(msgspec.Struct, frozen=True, kw_only=True):
    """How a GGUF model is loaded.

    ``context`` is the largest number of tokens (prompt and answer) of one request, ``parallel`` the number of sequences
    evaluated at once, and ``batch`` the largest number of tokens in one step. ``kv_cells`` is the number of tokens that
    the key-value cache holds for all sequences together. ``kv_unified`` says that any sequence may use any cell;
    otherwise each has its own ``kv_cells / parallel``, which must not be less than ``context``. ``adaptive_threads``
    lets the number of ``threads`` fall while other programs use the cores, ``prefix_cache`` allows to reuse what was
    evaluated for another request, ``spill`` is the bytes of main memory that this may take beside the cache (None: as
    many as the cache has, but at most a quarter of what is free, and none with a GPU), and ``speculation`` allows to
    evaluate guessed tokens beforehand.
    """

    path: str
    context: int
    parallel: int
    kv_cells: int
    kv_unified: bool
    batch: int
    threads: int
    adaptive_threads: bool
    gpu_layers: GpuLayers
    flash_attention: FlashAttention
    key_type: KVType
    value_type: KVType
    prefix_cache: bool
    spill: int | None
    speculation: bool


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen from the logits.

    ``temperature`` 0 takes the most probable token. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and the neutral penalties
    switch their stage off. ``repetition_penalty_range`` is the number of last tokens, prompt included, that the three
    penalties look at; 0 means all of them. ``logit_bias`` maps token ids to what is added to their logit.
    """

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_penalty_range: int = 1024
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate from each prompt: ``choices`` answers of at most ``max_tokens`` tokens (None: until the context
    ends), cut before the first of the ``stop`` strings or after ``time_limit`` seconds, waiting included. Choice *i*
    samples with ``sampling.seed + i``.
    """

    sampling: Sampling
    choices: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    time_limit: float | None = None
    stream: bool = False
