"""From a model's settings and its header to how it is loaded, and what memory that takes.

Decides every automatic setting. Knows no names of models but to say them in errors, no processes, and not what else is
in memory.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from llamaserve.engine.params import UNTILED, Adapter, Footprint, LoadParams, Pooling
from llamaserve.errors import ModelFileMissing, ModelNotCapable
from llamaserve.registry.fetching import locate
from llamaserve.registry.gguf import GGUFHeader
from llamaserve.registry.hardware import performance_cores
from llamaserve.registry.measurements import correction
from llamaserve.registry.memory import Estimate, Estimation, claimed, insufficient
from llamaserve.registry.sources import parse_source
from llamaserve.registry.spec import ModelSpec
from llamaserve.registry.tasks import pooling_of, task_of
from llamaserve.worker.protocol import ModelParams

logger = logging.getLogger(__name__)

MEBIBYTE = 1024 * 1024
_MAPPED_MAY_TAKE = 1.05  # of what a file that is read takes; mapped, it is loaded sooner

# What a child takes before it has loaded anything: the interpreter and the libraries (60 MiB are resident, measured).
PROCESS: Final = Footprint(64 * MEBIBYTE)


@dataclass(frozen=True)
class LoadPlan:
    """How a model is loaded, and what it takes: ``need`` in any case, of which ``fixed`` is not the model itself but
    its child and the spill that the settings name, and up to ``spill`` bytes more of main memory if they are there.
    Where GPUs use the main memory, what is for them is in both parts of ``need``.
    """

    params: ModelParams
    estimate: Estimate
    need: Footprint
    fixed: Footprint
    spill: int


# Texts that are embedded together: no more short ones have room in a step on a CPU, and llama.cpp keeps a row of
# outputs for each.
_TEXTS_TOGETHER = 64


def context_of(spec: ModelSpec, header: GGUFHeader) -> int:
    """Return the largest number of tokens of a request, prompt and answer, or of a text: the configured one, but never
    what is over the length that the model was trained for. A text that can only be seen as a whole must fit into a
    step.
    """
    lengths = [spec.context, header.context_length or spec.context]
    if task_of(spec, header) in ("embedding", "rerank") and header.sees_whole_texts:
        lengths.append(min(spec.batch, spec.micro_batch or spec.batch))
    return min(lengths)


def load_params(spec: ModelSpec, header: GGUFHeader, adapters: Sequence[Adapter] = ()) -> LoadParams:
    """Return how a model is loaded. ``gpu_layers``, ``mmap`` and ``spill`` may still be to be decided.

    Sequences share all cells of the cache, so that prefixes can be shared without copying. With flash attention that
    costs little: a step of eight sequences of 600 tokens takes 55 ms, and 53 with cells for each. Idle prefixes would
    make it slower, so they are kept in main memory. With flash attention off it goes over all cells at full cost
    (measured: 89 against 51 ms for a step of eight sequences of 600 tokens), and what a sequence computes would depend
    on where its cells happen to lie. With cells of its own, a short one computes the same as alone.
    """
    pooling = pooling_of(spec, header)
    context = context_of(spec, header)
    unified = spec.flash_attention != "off"
    batch = max(spec.batch, spec.parallel)
    params = LoadParams(
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
        mmap=None if spec.mmap == "auto" else spec.mmap,
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
    return params if pooling is None else _for_vectors(params, header, pooling)


def _for_vectors(params: LoadParams, header: GGUFHeader, pooling: Pooling) -> LoadParams:
    """Return how a model is loaded that makes vectors: nothing is kept from one text to the next, and all tokens of a
    step are computed at once.
    """
    if params.adapters:
        raise ModelNotCapable("LoRA adapters are for models that generate text")
    whole = header.sees_whole_texts
    batch = min(params.batch, params.micro_batch or params.batch)
    return msgspec.structs.replace(
        params,
        pooling=pooling,
        parallel=_TEXTS_TOGETHER if whole else params.parallel,
        kv_cells=params.context,
        kv_unified=True,
        batch=batch,
        micro_batch=None,
        prefix_cache=False,
        spill=0,
        speculation=False,
    )


def _with_layers(params: LoadParams, header: GGUFHeader, layers: int) -> LoadParams:
    """Return the same with so many layers on GPUs. On a CPU larger steps than are used for vectors only take memory:
    for each of its tokens llama.cpp keeps as many outputs as the vocabulary has tokens. It makes no step larger than
    the cache, and ends the process when such a step can't be divided evenly among the sequences.
    """
    params = msgspec.structs.replace(params, gpu_layers=layers)
    if params.pooling is None:
        return params
    used = max(params.context if header.sees_whole_texts else 0, UNTILED + 1)
    batch = params.batch if layers else min(params.batch, used)
    step = -(-batch // params.parallel) * params.parallel
    return msgspec.structs.replace(params, batch=batch, kv_cells=max(params.kv_cells, step))


def configured_adapters(name: str, spec: ModelSpec, base: Path) -> list[Adapter]:
    """Return the LoRA adapters that a model's settings name; relative paths begin at ``base``. Raises
    ``ModelFileMissing`` when one is not here.
    """
    adapters = []
    for each in spec.lora:
        source = parse_source(each.source, base)
        path = locate(source)
        if path is None:
            raise ModelFileMissing(
                f"the LoRA adapter {each.source} of {name} is not on this machine",
                hint=shlex.join(("llamaserve", "pull", name)),
            )
        adapters.append(Adapter(each.name or source.name, str(path), each.scale))
    return adapters


def plan_load(
    name: str, header: GGUFHeader, params: LoadParams, budget: Footprint, devices: int, *, unified: bool = False
) -> LoadPlan:
    """Decide what is still to be decided, for so many GPUs, and return what the load takes. ``unified`` tells that they
    use the main memory. If several are not to share a model, it has the first, which is believed to be like the others.
    Raises ``InsufficientMemory`` when it takes more than the whole budget.
    """
    fixed = PROCESS + Footprint(params.spill or 0)
    if params.split_mode == "none" and devices > 1:
        budget, devices = Footprint(budget.host, budget.device // devices), 1
    room = budget - fixed
    assumed, correct = params, correction(header)
    estimation = Estimation(header, assumed, max(1, devices))
    for layers in _gpu_layers(header, params, devices):
        there = _with_layers(params, header, layers)
        if (there.batch, there.kv_cells) != (assumed.batch, assumed.kv_cells):
            estimation, assumed = Estimation(header, there, max(1, devices)), there
        decided, parts = _mapped_or_read(there, estimation)
        total = correct(decided, parts)
        if claimed(total, unified=unified).fits(room):
            break
    else:
        raise insufficient(name, header, decided, total + fixed, budget, max(1, devices), unified=unified)
    wish = 0
    if params.spill is None:
        wish = parts.cache.host if params.prefix_cache and params.kv_unified and not layers else 0
    return LoadPlan(decided, parts, claimed(total, unified=unified) + fixed, fixed, wish)


def _mapped_or_read(params: LoadParams, estimation: Estimation) -> tuple[LoadParams, Estimate]:
    """Decide between a mapped file and one that is read: mapped, unless that takes more memory. Weights that ggml puts
    into another order stay in memory twice then (Q4_0 and Q4_K on most CPUs).
    """
    layers = params.gpu_layers
    assert isinstance(layers, int)
    if params.mmap is not None:
        return params, estimation.estimate(layers)
    mapped, read = (estimation.estimate(layers, mmap=mmap) for mmap in (True, False))
    is_larger = mapped.weights.host > _MAPPED_MAY_TAKE * read.weights.host
    return msgspec.structs.replace(params, mmap=not is_larger), read if is_larger else mapped


def _configured_spill(spec: ModelSpec) -> int | None:
    if not spec.prefix_cache:
        return 0
    return None if spec.spill == "auto" else spec.spill * MEBIBYTE


def _gpu_layers(header: GGUFHeader, params: LoadParams, devices: int) -> Sequence[int]:
    """Return how many layers may be on GPUs, the output counted as one, the best first."""
    most = (header.block_count or 0) + 1
    match params.gpu_layers if devices else "none":
        case "auto":
            return range(most, -1, -1)
        case "all":
            return (most,)
        case "none":
            return (0,)
        case int(number):
            return (min(number, most),)
