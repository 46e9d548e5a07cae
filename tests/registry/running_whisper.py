"""Run as a process of its own: lets whisper.cpp load files and transcribe noise, as the server does.

``python running_whisper.py try`` reads paths from standard input and prints for each what came of it, in a line;
``python running_whisper.py measure PATH`` prints as JSON how many bytes of resident memory that adds: once ``loaded``,
after a ``window`` of 30 s, and once ``used`` to the full: several decoders, and a prompt as long as it can be.
"""

from __future__ import annotations

import atexit
import json
import sys
from typing import Any

import _pywhispercpp as lib
import numpy as np
import psutil

RATE = 16_000


def main() -> None:
    """Try or measure."""
    log: list[str] = []
    lib.whisper_log_set(lambda level, text: log.append(text))
    atexit.register(lib.whisper_log_set, None)
    if sys.argv[1] == "measure":
        json.dump(_measure(sys.argv[2]), sys.stdout)
        return
    for line in sys.stdin:
        log.clear()
        sys.stdout.write(_try(line.rstrip("\n"), log) + "\n")
        sys.stdout.flush()


def _try(path: str, log: list[str]) -> str:
    context = _load(path)
    if any("failed to" in text for text in log):
        return "not loaded: " + next((text.strip() for text in log if "tensor" in text), "")
    result = _transcribe(context, 1, temperature=0.0)
    lib.whisper_free(context)
    return f"returned {result}"


def _measure(path: str) -> dict[str, int]:
    before = _resident()
    context = _load(path)
    loaded = _resident() - before
    assert _transcribe(context, 30) == 0
    window = _resident() - before
    assert _transcribe(context, 30, temperature=0.4, initial_prompt="a b c " * 200) == 0
    return {"loaded": loaded, "window": window, "used": _resident() - before}


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _load(path: str) -> Any:
    params = lib.whisper_context_default_params()
    params.use_gpu, params.flash_attn = False, True
    return lib.whisper_init_from_file_with_params(path, params)


def _transcribe(context: Any, seconds: int, **changed: object) -> int:
    params = lib.whisper_full_default_params(lib.whisper_sampling_strategy.WHISPER_SAMPLING_GREEDY)
    params.print_progress = params.print_realtime = params.print_timestamps = False
    params.n_threads, params.language, params.token_timestamps = 2, "en", True
    params.temperature_inc, params.max_tokens, params.single_segment = 0.0, 8, True
    for name, value in changed.items():
        setattr(params, name, value)
    noise = np.random.default_rng(0).normal(0, 0.05, RATE * seconds).astype(np.float32)
    return int(lib.whisper_full(context, params, noise, len(noise)))


if __name__ == "__main__":
    main()
