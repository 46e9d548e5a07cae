"""How much memory a model takes once it is loaded and used, and what to do when that is more than there is.

``estimate`` follows how the llama.cpp in llama-cpp-python 0.3.36 lays out weights, cache and buffers; the few numbers
that could only be measured say so. Everything comes from the header, and from those of LoRA adapters.
Prefixes kept beside the cache (``spill``) are not part of it. Knows nothing of what else is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import msgspec

from llamaserve.engine.params import DRAFTED_ROWS, SCORED_ROWS, Footprint, KVType, LoadParams
from llamaserve.errors import InsufficientMemory, ModelError
from llamaserve.registry.gguf import GGUFArray, GGUFHeader, TensorInfo, read_header
from llamaserve.registry.hardware import cpu_features
from llamaserve.registry.layers import Layer, ModelLayers, layer_of, read_layers
from llamaserve.registry.step_memory import Step, input_bytes, step_buffer

_MEBIBYTE = 1024 * 1024
_FLOAT = 4  # bytes
_CELLS = 256  # llama.cpp rounds a cache up to so many

# Elements and bytes of a block of what the cache may hold.
_KV_BLOCKS: dict[KVType, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}
_UNQUANTISED = ("f32", "f16", "bf16")

# Weights that ggml copies into another order, with the CPU features for which it does (repack.cpp), and of how many
# rows it makes one.
_REPACKED = {
    "Q4_0": (("avx2", 8), ("dotprod", 4)),
    "Q4_K": (("avx2", 8), ("dotprod", 8)),
    "Q2_K": (("avx512f", 8),),
    "Q5_K": (("dotprod", 8),),
    "Q6_K": (("dotprod", 8),),
    "IQ4_NL": (("avx2", 8), ("dotprod", 4)),
    "MXFP4": (("avx2", 8), ("dotprod", 4)),
    "Q8_0": (("dotprod", 4),),
}
_NO_MATRICES = ("token_embd", "norm", "bias", "ssm_conv1d", "shortconv.conv", "per_layer_token_embd", "rope_freqs")

# Measured: bytes of the vocabulary's structures a token and a merge, of which many small ones leave gaps in the heap
# behind; a token of a SentencePiece unigram model (T5) has a trie.
_TOKEN, _UNIGRAM_TOKEN = 157, 528
_MERGE, _MERGE_OF_MANY, _MANY_MERGES = 172, 112, 262_144

# Measured: graphs, their allocation, threads and samplers, and what a tensor adds to the first two.
_CONTEXT, _CONTEXT_OF_TENSOR = 4 * _MEBIBYTE, 6 * 1024

# Measured: what a change of a LoRA adapter, two tensors, takes beside its numbers: as it is loaded, and in graphs and
# buffers once it is used.
_PAIR, _PAIR_AT_WORK = 1536, 6656
_REMEMBERED_ADAPTERS = 1024  # files

# Of the buffers for a whole batch. Their pages become resident when they are first written to, and that depends on use:
# short steps write to little, and a CPU computes no whole batch if that takes long. So this is at most as far off from
# what is there after a load as from the most that there can be.
_TOUCHED = 0.5
_DEVICE_CONTEXT = 320 * _MEBIBYTE  # a GPU's driver and kernels: CUDA's, which has the largest

# Bits a weight of common quantisations, on average over a model, best first.
_QUANTISATIONS = (
    ("Q8_0", 8.5),
    ("Q6_K", 6.57),
    ("Q5_K_M", 5.7),
    ("Q4_K_M", 4.85),
    ("Q4_0", 4.55),
    ("Q3_K_M", 3.9),
    ("Q2_K", 2.9),
    ("IQ2_XXS", 2.2),
)


@dataclass(frozen=True)
class Estimate:
    """The bytes that a model takes: ``cache`` is that of keys and values and recurrent states, ``compute`` the buffers
    for a step and its logits, ``vocabulary`` main memory for the tokenizer. ``later`` is the part of ``compute`` that
    is there only once large steps have been computed.
    """

    weights: Footprint
    cache: Footprint
    compute: Footprint
    vocabulary: int
    later: Footprint

    @property
    def total(self) -> Footprint:
        """Return all of it."""
        return self.weights + self.cache + self.compute + Footprint(self.vocabulary)

    @property
    def certain(self) -> Footprint:
        """Return what is in use whatever requests do."""
        return self.weights + self.cache


def estimate(header: GGUFHeader, params: LoadParams, gpu_layers: int = 0, devices: int = 1) -> Estimate:
    """Return what loading a model and ordinary use add to its process's resident memory, and to that of GPUs. The last
    of ``gpu_layers`` is the output, as llama.cpp counts them. Raises ``GGUFError`` when the file has changed.
    """
    return Estimation(header, params, devices).estimate(gpu_layers)


def claimed(taken: Footprint, *, unified: bool) -> Footprint:
    """Return what counts as taken. Where GPUs use the main memory (``unified``), what is for them counts there, too;
    and on their side still, since a driver gives them a part of it only.
    """
    return Footprint(taken.host + taken.device, taken.device) if unified else taken


def largest_context(
    header: GGUFHeader,
    params: LoadParams,
    room: Footprint,
    gpu_layers: int = 0,
    devices: int = 1,
    *,
    unified: bool = False,
) -> int | None:
    """Return the largest context, a multiple of 256 up to the configured one, with which a model would fit; None when
    not even the smallest does. The cache is as large as one context then, or one for each sequence if it is split.
    """

    def fits(steps: int) -> bool:
        smaller = _with_context(params, steps * _CELLS)
        return claimed(estimate(header, smaller, gpu_layers, devices).total, unified=unified).fits(room)

    low, high = 0, params.context // _CELLS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * _CELLS or None


def insufficient(
    name: str,
    header: GGUFHeader,
    params: LoadParams,
    estimate_total: Footprint,
    room: Footprint,
    devices: int = 1,
    *,
    unified: bool = False,
) -> InsufficientMemory:
    """Return the refusal of a model that is larger than all the memory that may be used. It names the numbers and what
    would fit instead: a smaller context, or else a smaller quantisation.
    """
    layers = params.gpu_layers if isinstance(params.gpu_layers, int) else 0
    parts = estimate(header, params, layers, devices)
    rest = estimate_total - parts.total
    others = estimate_total - parts.weights - parts.cache - parts.compute
    numbers = f"weights {_size(parts.weights)}, cache {_size(parts.cache)}, buffers {_size(parts.compute)}"
    numbers += f", vocabulary and process {_size(others)}"
    message = f"{name} needs {_size(estimate_total)} ({numbers}), and models may use {_size(room)}"
    context = largest_context(header, params, room - rest, layers, devices, unified=unified)
    if context is not None:
        return InsufficientMemory(
            f"{message}. It would fit with a context of {context} tokens instead of {params.context}",
            hint=f"set `context: {context}` for {name} in models.yaml, or give models more with --memory",
        )
    smallest = estimate(header, _with_context(params, _CELLS), layers, devices)
    places = room.host if unified else room.host + room.device
    weights = places - _sum(smallest.total + rest - smallest.weights)
    quantisation = _fitting_quantisation(header, weights)
    if quantisation is None:
        return InsufficientMemory(
            f"{message}. No context and no quantisation of it would fit",
            hint="choose a model with fewer parameters, or give models more with --memory",
        )
    return InsufficientMemory(
        f"{message}. No context would fit; its {quantisation} quantisation would, with a short one",
        hint=f"fetch a {quantisation} file of this model, or give models more with --memory",
    )


def _with_context(params: LoadParams, context: int) -> LoadParams:
    cells = context if params.kv_unified else context * params.parallel
    return msgspec.structs.replace(params, context=context, kv_cells=min(cells, params.kv_cells))


def _fitting_quantisation(header: GGUFHeader, room: int) -> str | None:
    """Return the best common quantisation with which the weights, and a tenth more, fit: those with which a quantised
    file differs most from an average one.
    """
    now = sum(tensor.size for tensor in header.tensors)
    for label, bits in _QUANTISATIONS:
        size = int(header.parameter_count * bits / 8)
        if size < now and 1.1 * size <= room:
            return label
    return None


def _sum(footprint: Footprint) -> int:
    return footprint.host + footprint.device


def _size(footprint: Footprint) -> str:
    """Return sizes for people."""
    parts = [f"{_rounded(footprint.host)}"]
    if footprint.device:
        parts.append(f"{_rounded(footprint.device)} of GPU memory")
    return " and ".join(parts)


def _rounded(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


class Estimation:
    """Estimates for one model and its settings, whatever the division between main memory and GPUs, and whether or not
    the file is mapped.
    """

    def __init__(self, header: GGUFHeader, params: LoadParams, devices: int) -> None:
        self._header = header
        self._params = params
        self._devices = devices
        self._model = read_layers(header)
        self._features = cpu_features()
        self._step = _largest_step(self._model, params)
        if not header.remembers:
            self._step = _without_cache(self._step, header)

    def estimate(self, gpu_layers: int, *, mmap: bool | None = None) -> Estimate:
        """Return the estimate with so many layers on GPUs. Without ``mmap`` the settings say whether it is mapped, and
        where they say nothing it is.
        """
        mapped = self._params.mmap is not False if mmap is None else mmap
        first = max(0, self._model.blocks + 1 - gpu_layers)  # of the layers there; the output is the last
        adapters, pairs = _adapters(self._params, gpu_layers / (self._model.blocks + 1))
        lasting = self._lasting(first)
        buffers = self._buffers(first) + Footprint(pairs * _PAIR_AT_WORK)
        later = Footprint(buffers.host + self._late_outputs())
        compute, vocabulary = lasting + buffers, _vocabulary(self._header)
        return Estimate(self._weights(first, mapped) + adapters, self._cache(first), compute, vocabulary, later)

    def _weights(self, first: int, mapped: bool) -> Footprint:
        host: list[TensorInfo] = []
        device = 0
        tied = not any(tensor.name == "output.weight" for tensor in self._header.tensors)
        output_there = first <= self._model.blocks
        for tensor in self._header.tensors:
            number = layer_of(tensor.name)
            if number is None and tensor.name.startswith(("output", "cls")):
                number = self._model.blocks
            if number is not None and number >= first:
                device += tensor.size if number == self._model.blocks or number < len(self._model.layers) else 0
            else:
                host.append(tensor)
            if tied and tensor.name == "token_embd.weight" and output_there:
                device += tensor.size  # once more, to multiply by
        return Footprint(self._host_weights(host, tied and not output_there, mapped), device)

    def _host_weights(self, tensors: list[TensorInfo], tied: bool, mapped: bool) -> int:
        """Return what stays resident. What is mapped does from the first to the last tensor that is used in place, so
        that repacked ones in between are there twice.
        """
        repacked = [tensor for tensor in tensors if self._is_repacked(tensor)]
        copies = sum(tensor.size for tensor in repacked)
        if tied:
            copies += sum(tensor.size for tensor in tensors if self._is_repacked_output(tensor))
        in_place = {tensor.name for tensor in tensors} - {tensor.name for tensor in repacked}
        if not mapped:
            return copies + sum(tensor.size for tensor in tensors if tensor.name in in_place)
        return copies + sum(_mapped(part, in_place) for part in self._header.tensors_by_file)

    def _is_repacked(self, tensor: TensorInfo) -> bool:
        """Whether ggml copies it: matrices, and those of experts, one behind the other."""
        if any(part in tensor.name for part in _NO_MATRICES):
            return False
        return (len(tensor.shape) == 2 or "_exps." in tensor.name) and self._has_order(tensor)

    def _is_repacked_output(self, tensor: TensorInfo) -> bool:
        return tensor.name == "token_embd.weight" and self._has_order(tensor)

    def _has_order(self, tensor: TensorInfo) -> bool:
        rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
        orders = _REPACKED.get(tensor.type_name, ())
        return any(feature in self._features and rows % together == 0 for feature, together in orders)

    def _cache(self, first: int) -> Footprint:
        params, host, device = self._params, 0, 0
        if not self._header.remembers:
            return Footprint()
        widest = max((layer.value for layer in self._model.layers), default=0)
        for number, layer in enumerate(self._model.layers):
            value = widest if layer.value and not self._step.flash else layer.value
            cells = self._step.sliding_cells if layer.sliding else self._step.cells
            row = _row(params.key_type, layer.key + layer.indexer) + _row(params.value_type, value)
            streams = 1 if params.kv_unified else self._step.sequences
            size = cells * streams * row + self._step.sequences * layer.state * _FLOAT
            if number >= first and params.gpu_cache:
                device += size
            else:
                host += size
        return Footprint(host, device)

    def _lasting(self, first: int) -> Footprint:
        """Return what the context itself and the logits of the last step take."""
        logits = self._used_outputs() * self._output
        context = _CONTEXT + _CONTEXT_OF_TENSOR * len(self._header.tensors)
        return Footprint(context + logits, self._devices * _DEVICE_CONTEXT if first <= self._model.blocks else 0)

    @property
    def _output(self) -> int:
        """The bytes of what llama.cpp keeps of a token for which something is wanted; of logits it has room for all,
        even if none are computed.
        """
        return (self._model.vocabulary + (self._model.width if self._params.pooling else 0)) * _FLOAT

    def _late_outputs(self) -> int:
        """Return the bytes of outputs that no load uses: for vectors there is one of each token, and at first of no
        more than there may be texts.
        """
        if self._params.pooling is None:
            return 0
        return max(0, self._used_outputs() - self._step.sequences) * self._output

    def _used_outputs(self) -> int:
        """Return how many rows of logits are wanted at once: seldom for all tokens that could be guessed or scored."""
        if self._params.pooling is not None:
            return self._step.outputs
        guessed = DRAFTED_ROWS // 2 if self._params.speculation else 0
        return min(self._step.outputs, self._step.sequences + guessed)

    def _buffers(self, first: int) -> Footprint:
        """Return what is touched of the buffers to compute in. Those of GPUs are there as a whole."""
        model, step = self._model, self._step
        touched = _TOUCHED if self._params.pooling is None else 1.0  # a long text has a whole step
        here, there = model.layers[:first], model.layers[first:]
        embedded = step.tokens * model.width * _FLOAT
        if first > model.blocks:
            seldom = replace(step, outputs=self._used_outputs())
            host = step_buffer(model, here, seldom, logits=self._computes_logits) + self._scratch(here)
            return Footprint(int(touched * host))
        host = step_buffer(model, here, step, logits=False) + self._scratch(here) if here else 0
        device = step_buffer(model, there, step, logits=self._computes_logits) + embedded
        return Footprint(int(touched * max(host, input_bytes(model, step) + embedded)), device * self._devices)

    @property
    def _computes_logits(self) -> bool:
        """Whether there are logits, which nobody wants of a decoder that makes vectors, and which are computed."""
        return self._params.pooling is None or self._header.remembers

    def _scratch(self, layers: Iterable[Layer]) -> int:
        """Return the memory in which a CPU converts what weights or values are multiplied by. Half of it is a byte a
        number, the most common case.
        """
        step = self._step
        types = {tensor.type_name for tensor in self._header.tensors if tensor.name.endswith("ffn_down.weight")}
        factor = 2 if types & {"F16", "BF16"} else 0 if types == {"F32"} else 34 / 32
        widest = max((_widest(layer) for layer in layers), default=0)
        size = int(step.tokens * widest * factor)
        if not step.flash and self._params.value_type != "f32":
            scores = max((layer.heads * _seen(layer, step) for layer in layers), default=0)
            size = max(size, step.tokens * scores * 2)
        return size


def _widest(layer: Layer) -> int:
    return max(layer.width, layer.forward, layer.used * layer.expert_forward, layer.inner, layer.query)


def _seen(layer: Layer, step: Step) -> int:
    return step.sliding_cells if layer.sliding else step.cells


def _row(kind: KVType, width: int) -> int:
    elements, size = _KV_BLOCKS[kind]
    return width // elements * size


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _largest_step(model: ModelLayers, params: LoadParams) -> Step:
    """Return the step for which llama.cpp reserves its buffers (``context_params`` in ``engine.llama``)."""
    sequences = params.parallel + (1 if params.kv_unified and params.prefix_cache else 0)
    cells = _padded(params.kv_cells, _CELLS)
    if not params.kv_unified:
        cells = _padded(cells // sequences, _CELLS)
    batch = min(params.batch, params.micro_batch or params.batch, cells * (1 if params.kv_unified else sequences))
    window = _padded(min(cells, model.window * (sequences if params.kv_unified else 1) + batch), _CELLS)
    tokens = _padded(batch, sequences)
    outputs = sequences + (DRAFTED_ROWS if params.speculation else 0) + SCORED_ROWS
    return Step(
        tokens=tokens,
        sequences=sequences,
        outputs=tokens if params.pooling else min(outputs, tokens),
        cells=cells,
        sliding_cells=cells if params.full_window else window,
        flash=params.flash_attention != "off",
        turned_keys=params.key_type not in _UNQUANTISED,
        turned_values=params.value_type not in _UNQUANTISED,
        wide_keys=params.key_type == "f32",
        wide_values=params.value_type == "f32",
    )


def _without_cache(step: Step, header: GGUFHeader) -> Step:
    """Return the same of a model whose tokens look at those of the step only."""
    biased = header.architecture == "t5encoder"
    flash = step.flash and not biased
    return replace(step, cells=step.tokens, sliding_cells=step.tokens, cached=False, flash=flash, biased=biased)


def _mapped(tensors: Iterable[TensorInfo], in_place: set[str]) -> int:
    used = [tensor for tensor in tensors if tensor.name in in_place]
    start = min((tensor.offset for tensor in used), default=0)
    return max((tensor.offset + tensor.size for tensor in used), default=0) - start


def _adapters(params: LoadParams, share: float) -> tuple[Footprint, int]:
    """Return the memory of LoRA adapters, which lie where the layers do that they change, and the number of changes."""
    size = pairs = 0
    for adapter in params.adapters:
        path = Path(adapter.path)
        try:
            status = path.stat()
            size += status.st_size
            pairs += _adapter_tensors(path, status.st_size, status.st_mtime_ns) // 2
        except (OSError, ModelError):  # the load will say so
            continue
    there = int(size * min(1.0, share))
    return Footprint(size - there + pairs * _PAIR, there), pairs


@lru_cache(_REMEMBERED_ADAPTERS)
def _adapter_tensors(path: Path, size: int, changed: int) -> int:  # noqa: ARG001  (of another size, it is another file)
    return len(read_header(path).tensors)


def _vocabulary(header: GGUFHeader) -> int:
    merges = header.metadata.get("tokenizer.ggml.merges")
    pairs = merges.count if isinstance(merges, GGUFArray) else 0
    unigram = header.text("tokenizer.ggml.model") == "t5"
    token = _UNIGRAM_TOKEN if unigram else _TOKEN
    return header.vocabulary_size * token + pairs * (_MERGE if pairs < _MANY_MERGES else _MERGE_OF_MANY)
