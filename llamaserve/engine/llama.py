"""A thin, checked facade over llama.cpp's C API.

Several C++ exceptions and assertions end the process (an out-of-range token id is enough), so every value is checked
here before it crosses. Objects own their C counterparts and free them in ``close``. This module knows the C API and
nothing of scheduling, text or requests; it is the only one that imports ``llama_cpp``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from llamaserve.engine.binding import without_package
from llamaserve.engine.devices import gpu_devices
from llamaserve.engine.events import Device
from llamaserve.engine.params import DRAFTED_ROWS, SCORED_ROWS, Footprint, LoadParams
from llamaserve.errors import EngineError, InvalidRequest, ModelLoadFailed, OutOfCells

with without_package("llama_cpp"):
    import llama_cpp.llama_cpp as lib

# ggml_type, from ggml.h
_KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}  # llama_flash_attn_type
_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}  # llama_split_mode
_POOLING = {"mean": 1, "cls": 2, "last": 3, "rank": 4}  # llama_pooling_type
_LOAD_MODES = {  # llama_load_mode, by mmap and mlock; -1 maps the file where the devices have no reason against it
    (True, False): -1,
    (False, False): 0,
    (False, True): 2,
    (True, True): 3,
}
_NUMA_STRATEGIES = {"distribute": 1, "isolate": 2, "numactl": 3}  # ggml_numa_strategy
_ALL_LAYERS = -1
_WORDPIECE = 3  # llama_vocab_type
_CHANCES = ("qwen3", "qwen3vl")  # architectures whose scores llama.cpp puts through a softmax
_LOG_WARNING, _LOG_ERROR, _LOG_CONTINUED = 3, 4, 5

_recent_errors: deque[str] = deque(maxlen=4)
_last_level = 0
_interrupting = False  # while a step is given up on request, which llama.cpp logs as a failure


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    """Pass llama.cpp's errors on to standard error and remember them; drop the rest.

    Its warnings are dropped too: the loudest ones are about settings that are meant, such as a cache that is larger
    than the context of one sequence. But it must be said when memory could not be locked.
    """
    global _last_level
    level = _last_level if level == _LOG_CONTINUED else level
    _last_level = level
    refused = level == _LOG_WARNING and b"failed to mlock" in text
    if (level == _LOG_ERROR and not _interrupting) or refused:
        line = text.decode("utf-8", "replace")
        sys.stderr.write(line)
        if line.strip() and not refused:
            _recent_errors.append(line.strip())


class Interrupted(Exception):
    """The evaluation was given up on request; what it had written is undone by truncating its sequences."""


def start_backend() -> None:
    """Prepare llama.cpp for use; once in a process, before anything else here."""
    lib.llama_log_set(_on_log, ctypes.c_void_p(0))
    lib.llama_backend_init()


def list_gpus() -> list[Device]:
    """Return the GPUs that this build of llama.cpp can use here."""
    return gpu_devices(lib._lib)  # ggml's functions are found in the libraries that it depends on


def memory_in_use() -> Footprint:
    """Return the resident memory of this process, and what anybody uses of the memory of GPUs."""
    used = sum(gpu.total - gpu.free for gpu in list_gpus())
    return Footprint(psutil.Process().memory_info().rss, used)


def supports_gpu_offload() -> bool:
    """Tell whether this build of llama.cpp can use a GPU (Metal, CUDA, Vulkan, ...)."""
    return bool(lib.llama_supports_gpu_offload())


def system_info() -> str:
    """Return what llama.cpp says of its build: ``CPU : AVX2 = 1 | FMA = 1 |`` and so on, for each of its backends."""
    return bytes(lib.llama_print_system_info()).decode("utf-8", "replace")


def gpu_layer_count(setting: str | int) -> int:
    """Translate ``gpu_layers`` to llama.cpp's number: auto means all where the build has a GPU backend, else none."""
    match setting:
        case "auto":
            return _ALL_LAYERS if supports_gpu_offload() else 0
        case "all":
            return _ALL_LAYERS
        case "none":
            return 0
        case _:
            return int(setting)


def uses_gpu(params: LoadParams) -> bool:
    """Tell whether a model with these settings has layers on a GPU."""
    return supports_gpu_offload() and gpu_layer_count(params.gpu_layers) != 0


def model_params(params: LoadParams) -> Any:
    """Return the ``llama_model_params`` for these settings, without a progress callback."""
    native = lib.llama_model_default_params()
    native.n_gpu_layers = gpu_layer_count(params.gpu_layers)
    native.load_mode = _LOAD_MODES[params.mmap is not False, params.mlock]
    native.split_mode = _SPLIT_MODES[params.split_mode]
    if params.tensor_split:
        native.tensor_split = _shares(params.tensor_split)  # which the structure keeps alive
    return native


def _shares(tensor_split: Sequence[float]) -> Any:
    gpus = min(len(list_gpus()), lib.llama_max_devices())
    if len(tensor_split) > gpus or not any(tensor_split):
        found = ", ".join(f"{share:g}" for share in tensor_split)
        raise ModelLoadFailed(
            f"tensor_split is [{found}]; it must have a share over 0, and none beyond the {gpus} GPUs that are here"
        )
    return (ctypes.c_float * lib.llama_max_devices())(*tensor_split)  # it always reads so many


def context_params(params: LoadParams) -> Any:
    """Return the ``llama_context_params`` for these settings."""
    native = lib.llama_context_default_params()
    native.n_ctx = params.kv_cells
    native.n_batch = params.batch
    native.n_ubatch = min(params.batch, params.micro_batch or params.batch)
    native.n_seq_max = params.parallel + _scratch_sequences(params)
    # A row of logits for each sequence, guess and scored token: llama.cpp would reserve one for each token of a batch.
    # It ends the process when there are fewer than sequence ids.
    native.n_outputs_max = native.n_seq_max + (DRAFTED_ROWS if params.speculation else 0) + SCORED_ROWS
    native.n_threads = params.threads
    native.n_threads_batch = params.batch_threads or params.threads
    native.flash_attn_type = _FLASH_ATTENTION[params.flash_attention]
    native.type_k = _KV_TYPES[params.key_type]
    native.type_v = _KV_TYPES[params.value_type]
    native.kv_unified = params.kv_unified
    native.swa_full = params.full_window
    native.offload_kqv = params.gpu_cache
    native.rope_freq_base = params.rope_freq_base
    native.rope_freq_scale = params.rope_freq_scale
    native.no_perf = True
    if params.pooling is not None:
        _prepare_pooling(native, params)
    return native


def _prepare_pooling(native: Any, params: LoadParams) -> None:
    """Have vectors computed instead of logits. llama.cpp ends the process when a step can't be divided evenly among the
    sequences, and when there is not an output for each token.
    """
    native.embeddings = True
    native.pooling_type = _POOLING[params.pooling or ""]
    native.n_seq_max = params.parallel
    step = -(-params.batch // params.parallel) * params.parallel
    native.n_batch = native.n_ubatch = native.n_outputs_max = step
    native.n_ctx = max(params.kv_cells, step)  # else it would cut the step to its cells


def _scratch_sequences(params: LoadParams) -> int:
    """Return the number of sequence ids to reserve: one, to copy to what is saved and from what is restored, in main
    memory or in a file. llama.cpp saves no sequence with an id beyond those that can be evaluated, and restores nothing
    behind other tokens.
    """
    return 1 if params.kv_unified and params.prefix_cache else 0


# llama.cpp's own tokenise function, for libraries that call it from C
TOKENIZE_ADDRESS = ctypes.cast(lib._lib.llama_tokenize, ctypes.c_void_p).value


class Vocab:
    """A model's vocabulary. Thread-safe: needs no context and never waits for an evaluation."""

    def __init__(self, model: Any) -> None:
        self._vocab = lib.llama_model_get_vocab(model)
        self.size: int = lib.llama_vocab_n_tokens(self._vocab)
        self.bos: int = lib.llama_vocab_bos(self._vocab)
        self.add_bos: bool = lib.llama_vocab_get_add_bos(self._vocab)
        self._pieces: dict[tuple[int, bool], bytes] = {}

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens with which the model says that its answer is complete. Found at the first use: it takes 20 ms for
        49,152 tokens, and few requests need it.
        """
        return frozenset(token for token in range(self.size) if self.is_end_of_generation(token))

    @property
    def handle(self) -> Any:
        """The C pointer, for samplers that need it."""
        return self._vocab

    def check(self, tokens: Iterable[int], param: str) -> None:
        """Refuse token ids outside the vocabulary; llama.cpp would end the process on one."""
        for token in tokens:
            if not 0 <= token < self.size:
                raise InvalidRequest(f"token id {token} is not between 0 and {self.size - 1}", param=param)

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Turn text into token ids. ``add_bos`` puts the begin token first where the model wants one and the text does
        not already start with it; ``parse_special`` reads the names of control tokens as those tokens.
        """
        tokens = self._tokenize(text, add_special=False, parse_special=parse_special)
        if add_bos and self.add_bos and tokens[:1] != [self.bos]:
            tokens.insert(0, self.bos)
        return tokens

    def _tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"character {error.start} of the text is half of a surrogate pair") from error
        room = len(data) + 2
        buffer = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, parse_special)
        if count < 0 and count != -(2**31):
            room = -count
            buffer = (lib.llama_token * room)()
            count = lib.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, parse_special)
        if count < 0:
            raise EngineError("llama.cpp could not tokenise the text")
        return list(buffer[:count])

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The tokens that the model wants before and after a text, such as ``[CLS]`` and ``[SEP]``."""
        bare = self._tokenize("a", add_special=False, parse_special=False)
        whole = self._tokenize("a", add_special=True, parse_special=False)
        start = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    @cached_property
    def separator(self) -> list[int]:
        """The tokens that the model wants between two texts: the end of the first and, for RoBERTa and its kin, the
        start of the second.
        """
        _, after = self.frame
        doubled = lib.llama_vocab_type(self._vocab) != _WORDPIECE and lib.llama_vocab_get_add_sep(self._vocab)
        return [*after, lib.llama_vocab_sep(self._vocab)] if doubled else after

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes that a token stands for, which need not be whole characters.

        Control tokens are empty unless ``special``.
        """
        found = self._pieces.get((token, special))
        if found is None:
            self.check((token,), "tokens")
            found = self._pieces[token, special] = self._read_piece(token, special)
        return found

    def _read_piece(self, token: int, special: bool) -> bytes:
        room = 64
        buffer = ctypes.create_string_buffer(room)
        count = lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
        if count < 0:
            room = -count
            buffer = ctypes.create_string_buffer(room)
            count = lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
        return buffer.raw[:count]

    def detokenize(self, tokens: Sequence[int], *, special: bool) -> str:
        """Return the text of the tokens; bytes that are no UTF-8 become U+FFFD."""
        self.check(tokens, "tokens")
        return b"".join(self.piece(token, special=special) for token in tokens).decode("utf-8", "replace")

    def is_control(self, token: int) -> bool:
        """Tell whether a token is no part of any text: a control token, or one that was added in the form of one."""
        attributes = lib.llama_vocab_get_attr(self._vocab, token)
        if attributes & (lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN):
            return True
        piece = self.piece(token, special=True) if attributes & lib.LLAMA_TOKEN_ATTR_USER_DEFINED else b""
        return piece.startswith(b"<") and piece.endswith(b">")

    def control(self, name: str) -> int | None:
        """Return the token that is no part of any text and has this name, unless it ends an answer."""
        tokens = self.tokenize(name, add_bos=False, parse_special=True)
        if len(tokens) != 1 or self.is_end_of_generation(tokens[0]) or not self.is_control(tokens[0]):
            return None
        return tokens[0] if self.piece(tokens[0], special=True) == name.encode() else None

    def is_end_of_generation(self, token: int) -> bool:
        """Tell whether the model says with this token that its answer is complete."""
        return bool(lib.llama_vocab_is_eog(self._vocab, token))


class Model:
    """Loaded weights."""

    def __init__(self, params: LoadParams, on_progress: Callable[[float], bool]) -> None:
        if params.numa != "off":  # before anything is loaded; llama.cpp knows no way back
            lib.llama_numa_init(_NUMA_STRATEGIES[params.numa])
        native = model_params(params)

        def report(fraction: float, _user_data: Any) -> bool:
            return on_progress(fraction)

        native.progress_callback = callback = lib.llama_progress_callback(report)
        _recent_errors.clear()
        self.handle = lib.llama_model_load_from_file(os.fsencode(params.path), native)
        del callback  # kept alive until the load returned
        if not self.handle:
            raise ModelLoadFailed(f"llama.cpp can't load {params.path}: {_why()}")
        if lib.llama_model_has_encoder(self.handle) and lib.llama_model_has_decoder(self.handle):
            self.close()
            raise ModelLoadFailed(f"{params.path} translates with an encoder and a decoder, which is not supported")
        self.vocab = Vocab(self.handle)

    @property
    def width(self) -> int:
        """The length of the vectors that it computes for tokens."""
        return int(lib.llama_model_n_embd_out(self.handle))

    @property
    def labels(self) -> int:
        """How many scores it gives a pair of texts, if it gives any."""
        return int(lib.llama_model_n_cls_out(self.handle))

    @property
    def gives_chances(self) -> bool:
        """Whether the first score that it gives a pair is the probability that they fit, and not its logit."""
        return self._metadata("general.architecture") in _CHANCES

    @property
    def rank_template(self) -> str | None:
        """The text in which it wants to see a ``{query}`` and a ``{document}``; most want them one behind the other."""
        text = lib.llama_model_chat_template(self.handle, b"rerank")
        return None if text is None else bytes(text).decode("utf-8", "replace")

    @property
    def looks_ahead(self) -> bool:
        """Whether a token also sees those behind it, so that a text can only be evaluated as a whole."""
        name = self._metadata("general.architecture")
        return self._metadata(f"{name}.attention.causal") == "false"

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(128)
        count = lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer))
        return None if count < 0 else buffer.value.decode("utf-8", "replace")

    @property
    def has_state(self) -> bool:
        """Whether it remembers the past in a state of fixed size, which can be kept or dropped but not cut."""
        return bool(lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle))

    @property
    def sliding_window(self) -> int:
        """Width of the sliding attention window in tokens; 0 when attention reaches back to the start."""
        return max(0, int(lib.llama_model_n_swa(self.handle)))

    def load_adapter(self, path: str) -> LoraWeights:
        """Return what a LoRA adapter's file adds to the weights. Raises ``ModelLoadFailed``."""
        return LoraWeights(self, path)

    def close(self) -> None:
        """Free the weights, and those of adapters. Contexts on them must be closed first."""
        if self.handle:
            lib.llama_model_free(self.handle)
            self.handle = None


def read_vocabulary(path: str) -> Vocab:
    """Return the vocabulary of a model file without its weights. It stays in memory: for processes that soon end.

    Raises ``ModelLoadFailed``.
    """
    native = lib.llama_model_default_params()
    native.vocab_only = True
    _recent_errors.clear()
    handle = lib.llama_model_load_from_file(os.fsencode(path), native)
    if not handle:
        raise ModelLoadFailed(f"llama.cpp can't read the vocabulary of {path}: {_why()}")
    return Vocab(handle)


class LoraWeights:
    """The weights of a LoRA adapter, which go with the model's."""

    def __init__(self, model: Model, path: str) -> None:
        _recent_errors.clear()
        self._model = model
        self.handle = lib.llama_adapter_lora_init(model.handle, os.fsencode(path))
        if not self.handle:
            raise ModelLoadFailed(f"llama.cpp can't load the LoRA adapter {path}: {_why()}")

    def close(self) -> None:
        """Free them; no context may use them any more. Closing the model has done it, too."""
        if self.handle and self._model.handle:
            lib.llama_adapter_lora_free(self.handle)
        self.handle = None


def _why() -> str:
    return "; ".join(_recent_errors) or "it gave no reason"


class Context:
    """A key-value cache and the buffers to evaluate batches with it. Owned by one thread."""

    def __init__(self, model: Model, params: LoadParams) -> None:
        self._model = model
        _recent_errors.clear()
        self.handle = lib.llama_init_from_model(model.handle, context_params(params))
        if not self.handle:
            raise ModelLoadFailed(f"llama.cpp can't make a context of {params.kv_cells} tokens: {_why()}")
        self._memory = lib.llama_get_memory(self.handle)
        self._encodes = bool(lib.llama_model_has_encoder(model.handle))  # T5
        if not self.remembers and params.pooling is None:
            self.close()
            raise ModelLoadFailed(f"{params.path} is an encoder; it can't generate text token by token")
        self._abort = lib.ggml_abort_callback(lambda _user_data: _interrupting)
        self._no_abort = lib.ggml_abort_callback()
        self._interruptible = False
        self.cells: int = lib.llama_n_ctx(self.handle)
        self._vocab_size = model.vocab.size
        self._unified = params.kv_unified
        self._threads = params.threads
        self._batch_threads = params.batch_threads or params.threads
        self._scratch = params.parallel  # the sequence id for saving and restoring
        self._logits: dict[int, npt.NDArray[np.float32]] = {}  # by address: one for each row that had some
        self._pooled_width = model.labels if params.pooling == "rank" else model.width

    def evaluate(self, batch: Batch, *, interruptible: bool = False) -> None:
        """Run the batch through the model; logits are then there for the rows that asked for them.

        Only an ``interruptible`` one can be ended by ``interrupt``: being asked at every node of the graph whether to
        go on costs a few milliseconds, too much for the short steps of decoding. CUDA does not ask at all.
        """
        global _interrupting
        if interruptible != self._interruptible:
            self._interruptible = interruptible
            lib.llama_set_abort_callback(self.handle, self._abort if interruptible else self._no_abort, None)
        code = (lib.llama_encode if self._encodes else lib.llama_decode)(self.handle, batch.native)
        _interrupting = False  # not before: it may have been asked for while the batch was being filled
        if code == 1:
            raise OutOfCells("the key-value cache is full")
        if code == 2:
            raise Interrupted
        if code != 0:
            raise EngineError(f"llama.cpp failed to evaluate a batch of {batch.native.n_tokens} tokens (code {code})")

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """Return the logits of a batch row, shape (vocabulary,), as a view that the next ``evaluate`` overwrites."""
        pointer = lib.llama_get_logits_ith(self.handle, row)
        if not pointer:
            raise EngineError(f"row {row} of the batch has no logits")
        address = ctypes.addressof(pointer.contents)
        view = self._logits.get(address)
        if view is None:  # making one takes longer than all that is done with it
            view = self._logits[address] = np.ctypeslib.as_array(pointer, (self._vocab_size,))
        return view

    @property
    def remembers(self) -> bool:
        """Whether it keeps what was evaluated; if not, each evaluation must have its texts whole."""
        return bool(self._memory) and not self._encodes

    def pooled(self, sequence: int) -> npt.NDArray[np.float32]:
        """Return what the last evaluation has made of a sequence's tokens in it: a vector, or scores."""
        pointer = lib.llama_get_embeddings_seq(self.handle, sequence)
        if not pointer:
            raise EngineError(f"llama.cpp has computed no vector for sequence {sequence}")
        return np.ctypeslib.as_array(pointer, (self._pooled_width,)).copy()

    def truncate(self, sequence: int, length: int) -> int:
        """Keep the first ``length`` tokens of a sequence and return how many were kept: ``length``, or 0 where the
        model's memory can't be cut there (recurrent state, or a sliding window that has moved on).
        """
        if length > 0 and lib.llama_memory_seq_rm(self._memory, sequence, length, -1):
            window = self._model.sliding_window
            oldest = lib.llama_memory_seq_pos_min(self._memory, sequence)
            if window == 0 or 0 <= oldest <= max(0, length - window):
                return length
        lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return 0

    def copy(self, source: int, target: int, length: int) -> int:
        """Make an empty sequence begin with the first ``length`` tokens of another one, and return how many it has:
        ``length``, or 0 where the model's memory can't be cut there. In a unified cache the two share the cells (5 µs);
        in a split one llama.cpp copies all of the source's cells before the next evaluation, and no less.
        """
        lib.llama_memory_seq_cp(self._memory, source, target, *self._part(0, length))
        return self.truncate(target, length)

    def state_size(self, sequence: int) -> int:
        """Return the bytes of a sequence's state."""
        return int(lib.llama_state_seq_get_size(self.handle, sequence))

    def save(self, sequence: int, start: int, end: int) -> bytearray:
        """Return the state of some of a sequence's tokens, 23 kB each of the starter model; nothing when llama.cpp
        can't, or there is no memory. Recurrent states have no parts: it must be all of them.
        """
        lib.llama_memory_seq_cp(self._memory, sequence, self._scratch, *self._part(start, end))
        size = self.state_size(self._scratch)
        state = bytearray()
        with contextlib.suppress(MemoryError):
            state = bytearray(size)
            buffer = (ctypes.c_uint8 * size).from_buffer(state)
            if lib.llama_state_seq_get_data(self.handle, buffer, size, self._scratch) != size:
                state = bytearray()
        lib.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        return state

    def restore(self, sequence: int, state: bytearray, start: int, end: int) -> bool:
        """Append the tokens from ``start`` to ``end`` of a state that was saved to a sequence of ``start`` tokens;
        False when there are no cells for the whole state.
        """
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        restored = lib.llama_state_seq_set_data(self.handle, buffer, len(state), self._scratch)
        if restored:
            lib.llama_memory_seq_cp(self._memory, self._scratch, sequence, *self._part(start, end))
        lib.llama_memory_seq_rm(self._memory, self._scratch, -1, -1)
        return bool(restored)

    def _part(self, start: int, end: int) -> tuple[int, int]:
        """Return the range of positions for a copy. Split caches and recurrent states are copied whole: llama.cpp ends
        the process on parts of the former, and of some of the latter.
        """
        return (start, end) if self._unified and not self._model.has_state else (-1, -1)

    def set_threads(self, threads: int) -> None:
        """Use at most so many CPU threads from the next evaluation on; with as many as there may be for one token, all
        that there may be for more of them.
        """
        most = self._batch_threads
        lib.llama_set_n_threads(self.handle, threads, most if threads >= self._threads else min(threads, most))

    def use_adapters(self, adapters: Sequence[tuple[LoraWeights, float]]) -> None:
        """Evaluate with these LoRA adapters and scales, and no others, from now on."""
        handles = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*(weights.handle for weights, _ in adapters))
        scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
        code = lib.llama_set_adapters_lora(self.handle, handles, len(adapters), scales)
        if code != 0:
            raise EngineError(f"llama.cpp can't use {len(adapters)} LoRA adapters (code {code})")

    def interrupt(self) -> None:
        """Have the evaluation under way, if it can be, raise ``Interrupted``. The one method for other threads."""
        global _interrupting
        _interrupting = True

    def clear(self) -> None:
        """Forget all sequences and overwrite their cells: a value that is no number would spoil those evaluated next,
        since attention multiplies also what it masks.
        """
        lib.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        """Free the cache and the buffers."""
        if self.handle:
            lib.llama_free(self.handle)
            self.handle = None


class Batch:
    """The rows of one step in llama.cpp's layout, allocated once: token, position and sequence of each row, and
    whether its logits are wanted.
    """

    def __init__(self, capacity: int) -> None:
        self._token = np.zeros(capacity, np.int32)
        self._position = np.zeros(capacity, np.int32)
        self._sequence = np.zeros(capacity, np.int32)
        self._sequence_count = np.ones(capacity, np.int32)
        self._wants_logits = np.zeros(capacity, np.int8)
        addresses = self._sequence.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)
        self._sequence_pointers = np.ascontiguousarray(addresses, np.uintp)
        self.native = lib.llama_batch()
        self.native.token = self._token.ctypes.data_as(ctypes.POINTER(lib.llama_token))
        self.native.pos = self._position.ctypes.data_as(ctypes.POINTER(lib.llama_pos))
        self.native.n_seq_id = self._sequence_count.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.native.seq_id = ctypes.cast(
            self._sequence_pointers.ctypes.data, ctypes.POINTER(ctypes.POINTER(lib.llama_seq_id))
        )
        self.native.logits = self._wants_logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        self.clear()

    @property
    def size(self) -> int:
        """The number of rows."""
        return int(self.native.n_tokens)

    def clear(self) -> None:
        """Drop all rows."""
        self.native.n_tokens = 0

    def add(self, tokens: Sequence[int], position: int, sequence: int, *, logits: int) -> int:
        """Append consecutive tokens of a sequence, the first at ``position``; the last ``logits`` of them want theirs.
        Returns the row of the last one.
        """
        start = self.native.n_tokens
        end = start + len(tokens)
        if len(tokens) == 1:  # the common case, and slices cost more than items
            self._token[start] = tokens[0]
            self._position[start] = position
            self._sequence[start] = sequence
            self._wants_logits[start] = logits
        else:
            self._token[start:end] = tokens
            self._position[start:end] = range(position, position + len(tokens))
            self._sequence[start:end] = sequence
            self._wants_logits[start : end - logits] = 0
            self._wants_logits[end - logits : end] = 1
        self.native.n_tokens = end
        return int(end - 1)


class NativeSampler:
    """One of llama.cpp's samplers that change logits by what has been generated before. Frees itself, when nobody else
    does.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        if not handle:
            raise EngineError("llama.cpp refused a sampler")
        self._data = np.zeros(0, np.dtype(lib.llama_token_data))
        self._array = lib.llama_token_data_array(None, 0, -1, False)

    @classmethod
    def penalties(cls, vocab: Vocab, last: int, repeat: float, frequency: float, presence: float) -> NativeSampler:
        """Penalise tokens among the ``last`` accepted ones. Memory for all of those is allocated."""
        return cls(lib.llama_sampler_init_penalties(vocab.size, last, repeat, frequency, presence))

    @classmethod
    def dry(
        cls, vocab: Vocab, last: int, multiplier: float, base: float, allowed_length: int, breakers: Sequence[bytes]
    ) -> NativeSampler:
        """Penalise tokens that would go on repeating a sequence among the ``last`` accepted ones. Looks for each of the
        ``breakers`` in the whole vocabulary, which takes 2.5 ms for 49,152 tokens; ``clone`` does not.
        """
        texts = (ctypes.c_char_p * len(breakers))(*breakers)
        native = lib.llama_sampler_init_dry
        return cls(native(vocab.handle, multiplier, base, allowed_length, last, texts, len(breakers)))

    def clone(self) -> NativeSampler:
        """Return another one that has accepted the same tokens."""
        return NativeSampler(lib.llama_sampler_clone(self.handle))

    def accept(self, token: int) -> None:
        """Take note of a token."""
        lib.llama_sampler_accept(self.handle, token)

    def apply(self, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
        """Change the logits of some tokens in place; both of shape (n,)."""
        if len(tokens) > len(self._data):
            self._data = np.zeros(2 * len(tokens), self._data.dtype)
            self._array.data = ctypes.cast(self._data.ctypes.data, ctypes.POINTER(lib.llama_token_data))
        data = self._data[: len(tokens)]
        data["id"] = tokens
        data["logit"] = logits
        self._array.size = len(tokens)
        lib.llama_sampler_apply(self.handle, ctypes.byref(self._array))
        logits[:] = data["logit"]

    def close(self) -> None:
        """Free it."""
        if self.handle:
            lib.llama_sampler_free(self.handle)
            self.handle = None

    __del__ = close


def close_all(*owners: Context | Model | None) -> None:
    """Close in the given order; each one's C memory is freed even when an earlier one fails."""
    with contextlib.ExitStack() as stack:
        for owner in reversed(owners):
            if owner is not None:
                stack.callback(owner.close)
