"""The yardstick: the most direct loop over llama.cpp's C API that does a server's work, and nothing else.

A process of its own, like the server's. It takes commands as JSON lines on standard input and answers each with one
line. Prompts are evaluated in full batches, then every step takes one token of each sequence, and llama.cpp's greedy
sampler picks the next. There is no text, no cache and no scheduler; after each command everything is forgotten. With a
model that makes vectors of texts it evaluates batches that were packed and filled beforehand, and reads the vectors.
"""

from __future__ import annotations

import base64
import ctypes
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}
_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
_POOLING = {"mean": 1, "cls": 2, "last": 3}
_ALL_LAYERS = -1

_log: list[str] = []


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(_level: int, text: bytes, _user_data: Any) -> None:
    _log.append(text.decode("utf-8", "replace"))


class Loop:
    """One model and one context."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """``settings`` are the server's: path, kv_cells, kv_unified, parallel, batch, threads, gpu_layers and types."""
        self._n_batch: int = settings["batch"]
        model = lib.llama_model_default_params()
        layers = settings["gpu_layers"]
        auto = _ALL_LAYERS if lib.llama_supports_gpu_offload() else 0
        model.n_gpu_layers = {"auto": auto, "all": _ALL_LAYERS, "none": 0}.get(layers, layers)
        started = time.perf_counter()
        self._model = lib.llama_model_load_from_file(settings["path"].encode(), model)
        if not self._model:
            raise SystemExit("llama.cpp can't load the model: " + "".join(_log[-3:]))
        context = lib.llama_context_default_params()
        context.n_ctx = settings["kv_cells"]
        context.n_batch = context.n_ubatch = self._n_batch
        context.n_seq_max = settings["parallel"]
        context.n_outputs_max = settings.get("outputs", settings["parallel"])  # most rows of logits in a batch
        context.n_threads = context.n_threads_batch = settings["threads"]
        context.flash_attn_type = _FLASH_ATTENTION[settings["flash_attention"]]
        context.type_k, context.type_v = _TYPES[settings["key_type"]], _TYPES[settings["value_type"]]
        context.kv_unified = settings["kv_unified"]
        context.swa_full = False
        context.no_perf = True
        self._pools: bool = settings.get("pooling") is not None
        if self._pools:
            _prepare_pooling(context, settings)
        self._context = lib.llama_init_from_model(self._model, context)
        self.load_seconds = time.perf_counter() - started
        if not self._context:
            raise SystemExit("llama.cpp can't make a context: " + "".join(_log[-3:]))
        self._memory = lib.llama_get_memory(self._context)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self._size = lib.llama_vocab_n_tokens(self._vocab)
        self._ends = {token for token in range(self._size) if lib.llama_vocab_is_eog(self._vocab, token)}
        self._batch = lib.llama_batch_init(self._n_batch, 0, 1)
        as_array = np.ctypeslib.as_array
        self._token = as_array(self._batch.token, (self._n_batch,))
        self._position = as_array(self._batch.pos, (self._n_batch,))
        self._logits = as_array(self._batch.logits, (self._n_batch,))
        self._sequence_count = as_array(self._batch.n_seq_id, (self._n_batch,))
        self._sequence_count[:] = 1
        self._sequences = [self._batch.seq_id[row] for row in range(self._n_batch)]
        self._sampler = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        lib.llama_sampler_chain_add(self._sampler, lib.llama_sampler_init_greedy())

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a prompt, or of a text to be embedded, as the server makes them."""
        data = text.encode()
        room = len(data) + 8
        buffer = (lib.llama_token * room)()
        count = lib.llama_tokenize(self._vocab, data, len(data), buffer, room, self._pools, True)
        tokens = list(buffer[:count])
        if self._pools:
            return tokens
        bos = lib.llama_vocab_bos(self._vocab)
        return [bos, *tokens] if lib.llama_vocab_get_add_bos(self._vocab) and tokens[:1] != [bos] else tokens

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of generated tokens."""
        pieces = bytearray()
        buffer = ctypes.create_string_buffer(512)
        for token in tokens:
            length = lib.llama_token_to_piece(self._vocab, token, buffer, 512, 0, False)
            pieces += buffer.raw[: max(0, length)]
        return pieces.decode("utf-8", "replace")

    def generate(self, prompts: Sequence[Sequence[int]], limit: int, copies: int) -> dict[str, Any]:
        """Continue all prompts together until each has ``limit`` tokens or ends; with ``copies`` over 1, the one prompt
        in so many answers. Return the tokens of each answer and the moment of every one of them.
        """
        lib.llama_memory_clear(self._memory, False)
        started = time.perf_counter()
        rows = self._prefill(prompts)
        if copies > 1:
            rows = dict.fromkeys(range(copies), rows[0])
            for sequence in range(1, copies):
                lib.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)
        first = {
            sequence: lib.llama_sampler_sample(self._sampler, self._context, row) for sequence, row in rows.items()
        }
        moment = time.perf_counter()
        tokens: dict[int, list[int]] = {sequence: [] for sequence in sorted(first)}
        times: dict[int, list[float]] = {sequence: [] for sequence in sorted(first)}
        for sequence, token in first.items():
            if token not in self._ends:
                tokens[sequence].append(token)
                times[sequence].append(moment)
        lengths = {sequence: len(prompts[0 if copies > 1 else sequence]) for sequence in tokens}
        self._decode(tokens, times, lengths, limit)
        return {
            "started": started,
            "answers": [
                {"tokens": tokens[sequence], "times": times[sequence], "text": self.text(tokens[sequence])}
                for sequence in tokens
            ],
        }

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> dict[int, int]:
        """Evaluate the prompts, each a sequence, in full batches, and return the row with the logits of each.

        All rows must be from one batch to be sampled together, so the last tokens are evaluated with the last batch.
        """
        waiting = [
            (token, place, number) for number, prompt in enumerate(prompts) for place, token in enumerate(prompt[:-1])
        ]
        last = [(prompt[-1], len(prompt) - 1, number) for number, prompt in enumerate(prompts)]
        room = self._n_batch - len(last)
        while len(waiting) > room:
            self._fill(waiting[: self._n_batch])
            self._logits[: self._n_batch] = 0
            self._evaluate(min(self._n_batch, len(waiting)))
            del waiting[: self._n_batch]
        self._fill([*waiting, *last])
        count = len(waiting) + len(last)
        self._logits[:count] = 0
        self._logits[len(waiting) : count] = 1
        self._evaluate(count)
        return {number: len(waiting) + number for number in range(len(last))}

    def _fill(self, rows: Sequence[tuple[int, int, int]]) -> None:
        count = len(rows)
        self._token[:count], self._position[:count], sequences = zip(*rows, strict=True)
        for row, sequence in enumerate(sequences):
            self._sequences[row][0] = sequence

    def _decode(
        self, tokens: dict[int, list[int]], times: dict[int, list[float]], lengths: dict[int, int], limit: int
    ) -> None:
        """Take one token of each sequence a step. What a batch holds changes only when a sequence ends."""
        sample, sampler, context, now = lib.llama_sampler_sample, self._sampler, self._context, time.perf_counter
        alive = [sequence for sequence, mine in tokens.items() if mine and len(mine) < limit]
        while alive:
            count = len(alive)
            for row, sequence in enumerate(alive):
                self._sequences[row][0] = sequence
            self._position[:count] = [lengths[sequence] + len(tokens[sequence]) - 1 for sequence in alive]
            self._token[:count] = [tokens[sequence][-1] for sequence in alive]
            self._logits[:count] = 1
            finished: set[int] = set()
            while not finished:
                self._evaluate(count)
                for row, sequence in enumerate(alive):
                    token = sample(sampler, context, row)
                    if token in self._ends:
                        finished.add(sequence)
                        continue
                    tokens[sequence].append(token)
                    times[sequence].append(now())
                    self._token[row] = token
                    if len(tokens[sequence]) >= limit:
                        finished.add(sequence)
                self._position[:count] += 1
            alive = [sequence for sequence in alive if sequence not in finished]

    def _evaluate(self, count: int) -> None:
        self._batch.n_tokens = count
        if (code := lib.llama_decode(self._context, self._batch)) != 0:
            raise SystemExit(f"llama.cpp failed to evaluate a batch (code {code})")

    def step_costs(self, prompt: Sequence[int], rows: Sequence[int], repeats: int) -> dict[str, list[float]]:
        """Return the seconds of steps with so many tokens of one sequence, each with its logits, after a prompt."""
        costs: dict[str, list[float]] = {str(count): [] for count in rows}
        lib.llama_memory_clear(self._memory, False)
        self._prefill([prompt])
        depth = len(prompt)
        for _ in range(repeats):
            for count in rows:
                self._fill([(prompt[place], depth + place, 0) for place in range(count)])
                self._logits[:count] = 1
                start = time.perf_counter()
                self._evaluate(count)
                lib.llama_get_logits_ith(self._context, count - 1)  # waits, where a GPU is still at work
                costs[str(count)].append(time.perf_counter() - start)
                lib.llama_memory_seq_rm(self._memory, 0, depth, -1)
        return costs

    def embed(self, steps: Sequence[Sequence[tuple[Sequence[int], int, int, bool]]]) -> dict[str, Any]:
        """Evaluate steps of texts or parts of them, each with its tokens, the place of the first one, its sequence, and
        whether it is the last part. Return the seconds of evaluating them and reading the vectors, and the vectors of
        all parts.
        """
        batches = [_filled(step) for step in steps]
        width = lib.llama_model_n_embd_out(self._model)
        vectors = np.zeros((sum(map(len, steps)), width), np.float32)
        address, size = vectors.ctypes.data, vectors.strides[0]
        encodes = lib.llama_model_has_encoder(self._model)  # T5
        evaluate = lib.llama_encode if encodes else lib.llama_decode
        read, copy = lib.llama_get_embeddings_seq, ctypes.memmove
        started = time.perf_counter()
        for step, (batch, _) in zip(steps, batches, strict=True):
            if (code := evaluate(self._context, batch)) != 0:
                raise SystemExit(f"llama.cpp failed to evaluate a batch (code {code})")
            for _, _, sequence, is_last in step:
                copy(address, read(self._context, sequence), size)
                address += size
                if is_last and self._memory:
                    lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "vectors": base64.b64encode(vectors.tobytes()).decode(), "width": width}

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer."""
        return sorted(self._ends)


def _prepare_pooling(context: Any, settings: dict[str, Any]) -> None:
    """Have vectors computed instead of logits, with as many tokens in a batch as all sequences share evenly."""
    parallel = settings["parallel"]
    context.embeddings = True
    context.pooling_type = _POOLING[settings["pooling"]]
    context.n_batch = context.n_ubatch = context.n_outputs_max = -(-settings["batch"] // parallel) * parallel


def _filled(step: Sequence[tuple[Sequence[int], int, int, bool]]) -> tuple[Any, list[Any]]:
    """Return a batch with the tokens of a step, and what must live as long as it."""
    rows = [
        (token, start + place, sequence) for tokens, start, sequence, _ in step for place, token in enumerate(tokens)
    ]
    count = len(rows)
    tokens, positions, sequences = zip(*rows, strict=True)
    each = (lib.llama_seq_id * count)(*sequences)
    pointer, size = ctypes.POINTER(lib.llama_seq_id), ctypes.sizeof(lib.llama_seq_id)
    kept = [
        (lib.llama_token * count)(*tokens),
        (lib.llama_pos * count)(*positions),
        (ctypes.c_int32 * count)(*[1] * count),
        (pointer * count)(*(ctypes.cast(ctypes.addressof(each) + row * size, pointer) for row in range(count))),
        (ctypes.c_int8 * count)(*[1] * count),
    ]
    batch = lib.llama_batch()
    batch.n_tokens = count
    batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits = kept
    return batch, [*kept, each]


def sizes() -> dict[str, float]:
    """Return the MiB of each kind of buffer, as llama.cpp logged them while loading."""
    found: dict[str, float] = {}
    for line in "".join(_log).splitlines():
        name, separator, value = line.partition(" size = ")
        if separator and "buffer" in name and "MiB" in value:
            what = " ".join(name.partition(": ")[2].split())
            found[what] = found.get(what, 0.0) + float(value.split("MiB")[0])
    return found


def main() -> None:
    """Answer commands until standard input closes."""
    lib.llama_log_set(_on_log, ctypes.c_void_p(0))
    lib.llama_backend_init()
    _say({"imported": True})
    loop: Loop | None = None
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "load":
                loop = Loop(command["settings"])
                gpu = bool(lib.llama_supports_gpu_offload()) and command["settings"]["gpu_layers"] not in ("none", 0)
                _say({"ends": loop.ends, "sizes": sizes(), "seconds": loop.load_seconds, "gpu": gpu})
            case _ if loop is None:
                raise SystemExit("load a model first")
            case "tokenize":
                _say(loop.tokenize(command["text"]))
            case "generate":
                prompts = [loop.tokenize(text) for text in command["prompts"]]
                _say(loop.generate(prompts, command["tokens"], command["copies"]))
            case "tokenize_all":
                _say([loop.tokenize(text) for text in command["texts"]])
            case "embed":
                _say(loop.embed(command["steps"]))
            case "step_costs":
                _say(loop.step_costs(loop.tokenize(command["text"]), command["rows"], command["repeats"]))


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
