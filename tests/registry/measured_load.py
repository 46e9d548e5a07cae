"""Run as a process of its own: loads models as the server does and prints what that adds to the resident memory, or
what llama.cpp would reserve for their steps. Reads ``LoadParams`` from its first argument, prints JSON.

Run as ``python measured_load.py load PARAMS`` or ``python measured_load.py reserve PARAMS``, where PARAMS is a JSON
list; ``load`` takes one of one.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys

import llama_cpp.llama_cpp as lib
import msgspec
import psutil

from llamaserve.engine import llama
from llamaserve.engine.embedder import Encoded, LoadedEmbedder
from llamaserve.engine.engine import LoadedEngine
from llamaserve.engine.params import Generation, LoadParams, Sampling


def main() -> None:
    """Measure and print."""
    requests = msgspec.json.decode(sys.argv[2], type=list[LoadParams])
    llama.start_backend()
    if sys.argv[1] == "load":
        params = requests[0]
        json.dump(_measure(params) if params.pooling is None else _measure_vectors(params), sys.stdout)
    else:
        json.dump([_reserve(params) for params in requests], sys.stdout)


def _measure(params: LoadParams) -> dict[str, int]:
    """Return the growth right after loading, and after a whole batch and a few tokens of all sequences at once."""
    before = _resident()
    engine = LoadedEngine(params, lambda fraction: True)
    loaded = _resident() - before
    _evaluate_whole_batch(engine, params)
    for number in range(params.parallel):
        sampling = Sampling(seed=number, temperature=1.0)
        engine.submit(number, [[5, 6, 7, 8 + number]], Generation(sampling=sampling, max_tokens=8))
    while not engine.idle:
        engine.step()
    return {"loaded": loaded, "used": _resident() - before}


def _measure_vectors(params: LoadParams) -> dict[str, int]:
    """Return the growth right after loading, and after the longest text and many short ones."""
    before = _resident()
    embedder = LoadedEmbedder(params, lambda fraction: True)
    loaded = _resident() - before
    for number, length in enumerate((params.context, *[3] * 2 * params.parallel)):
        embedder.submit(number, [Encoded([5 + place % 100 for place in range(length)])], None)
    while not embedder.idle:
        embedder.step()
    return {"loaded": loaded, "used": _resident() - before}


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _evaluate_whole_batch(engine: LoadedEngine, params: LoadParams) -> None:
    batch = llama.Batch(params.batch)
    each = min(params.batch, params.kv_cells) // params.parallel
    for sequence in range(params.parallel):
        batch.add(list(range(3, 3 + each)), 0, sequence, logits=1)
    assert engine._native is not None
    engine._native.evaluate(batch)
    engine._native.clear()


def _reserve(params: LoadParams) -> int:
    """Return the bytes of the compute buffer, which llama.cpp computes without weights and without allocating it."""
    lines: list[str] = []

    @lib.llama_log_callback  # type: ignore[untyped-decorator]
    def listen(_level: int, text: bytes, _user_data: object) -> None:
        lines.append(text.decode(errors="replace"))

    lib.llama_log_set(listen, ctypes.c_void_p(0))
    native = llama.model_params(params)
    native.no_alloc, native.load_mode = True, 0
    model = lib.llama_model_load_from_file(params.path.encode(), native)
    context = lib.llama_init_from_model(model, llama.context_params(params))
    lib.llama_free(context)
    lib.llama_model_free(model)
    found = re.findall(r"compute buffer size = +([\d.]+) MiB", "".join(lines))
    return int(float(found[-1]) * 1024 * 1024)


if __name__ == "__main__":
    main()
