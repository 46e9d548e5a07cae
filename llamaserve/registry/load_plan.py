"""From a model's settings and its header to how it is loaded, and what memory that takes.

Decides every automatic setting. Knows no names of models but to say them in errors, no processes, and not what else is
in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from llamaserve.engine.params import Adapter, Footprint, LoadParams
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.hardware import performance_cores
from llamaserve.registry.measurements import corrected
from llamaserve.registry.memory import Estimate, estimate, insufficient, most_gpu_layers
from llamaserve.registry.spec import ModelSpec

logger = logging.getLogger(__name__)

MEBIBYTE = 1024 * 1024

# What a child takes before it has loaded anything: the interpreter and the libraries (60 MiB are resident, measured).
PROCESS: Final = Footprint(64 * MEBIBYTE)


@dataclass(frozen=True)
class LoadPlan:
    """How a model is loaded, and what it takes: ``need`` in any case, child included, and up to ``spill`` bytes more of
    main memory if they are there.
    """

    params: LoadParams
    estimate: Estimate
    need: Footprint
    spill: int


def context_of(spec: ModelSpec, header: GGUFHeader) -> int:
    """Return the largest number of tokens of a request, prompt and answer: the configured one, but never what is over
    the length that the model was trained for.
    """
    trained = header.context_length
    return spec.context if trained is None else min(spec.context, trained)


def load_params(spec: ModelSpec, header: GGUFHeader, adapters: Sequence[Adapter] = ()) -> LoadParams:
    """Return how a model is loaded. ``gpu_layers`` and ``spill`` may still be to be decided.

    Sequences share all cells of the cache, so that prefixes can be shared without copying. With flash attention that
    costs little: a step of eight sequences of 600 tokens takes 55 ms, and 53 with cells for each. Idle prefixes would
    make it slower, so they are kept in main memory. With flash attention off it goes over all cells at full cost
    (measured: 89 against 51 ms for a step of eight sequences of 600 tokens), and what a sequence computes would depend
    on where its cells happen to lie. With cells of its own, a short one computes the same as alone.
    """
    context = context_of(spec, header)
    unified = spec.flash_attention != "off"
    batch = max(spec.batch, spec.parallel)
    return LoadParams(
        path=str(header.path),
        context=context,
        parallel=spec.parallel,
        kv_cells=max(spec.kv_cells or context, context) if unified else context * spec.parallel,
        kv_unified=unified,
        batch=batch,
        threads=performance_cores() if spec.threads == "auto" else spec.threads,
        adaptive_threads=spec.threads == "auto",
        gpu_layers=spec.gpu_layers,
        flash_attention=spec.flash_attention,
        key_type=spec.key_type,
        value_type=spec.value_type,
        prefix_cache=spec.prefix_cache,
        spill=_configured_spill(spec),
        speculation=spec.speculation,
        micro_batch=None if spec.micro_batch is None else min(spec.micro_batch, batch),
        batch_threads=spec.batch_threads,
        mmap=spec.mmap,
        mlock=spec.mlock,
        numa=spec.numa,
        gpu_cache=spec.gpu_cache,
        tensor_split=spec.tensor_split,
        split_mode=spec.split_mode,
        rope_freq_base=spec.rope_freq_base,
        rope_freq_scale=spec.rope_freq_scale,
        full_window=spec.full_window,
        adapters=tuple(adapters),
    )


def plan_load(name: str, header: GGUFHeader, params: LoadParams, budget: Footprint, devices: int) -> LoadPlan:
    """Decide what is still to be decided, for so many GPUs, and return what the load takes. Raises
    ``InsufficientMemory`` when that is more than the whole budget.
    """
    fixed = PROCESS + Footprint(params.spill or 0)
    room = budget - fixed
    layers = _gpu_layers(header, params, room, devices)
    params = msgspec.structs.replace(params, gpu_layers=layers)
    parts = estimate(header, params, layers, max(1, devices))
    total = corrected(header, params, parts.total)
    if not total.fits(room):
        raise insufficient(name, header, params, total + fixed, budget)
    wish = 0
    if params.spill is None:
        wish = parts.cache.host if params.prefix_cache and params.kv_unified and not layers else 0
    return LoadPlan(params, parts, total + fixed, wish)


def _configured_spill(spec: ModelSpec) -> int | None:
    if not spec.prefix_cache:
        return 0
    return None if spec.spill == "auto" else spec.spill * MEBIBYTE


def _gpu_layers(header: GGUFHeader, params: LoadParams, room: Footprint, devices: int) -> int:
    match params.gpu_layers:
        case "auto":
            return most_gpu_layers(header, params, room, devices) if devices else 0
        case "all":
            return (header.block_count or 0) + 1 if devices else 0
        case "none":
            return 0
        case number:
            return min(number, (header.block_count or 0) + 1) if devices else 0
