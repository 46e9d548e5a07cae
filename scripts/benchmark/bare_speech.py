"""The yardstick for speech: one call of whisper.cpp's function for a whole recording, or of the binding's own class.

A process of its own, like the server's. It takes commands as JSON lines on standard input and answers each with one
line. The samples are in memory before the clock starts, as the server's decoder makes them of a file.
"""

from __future__ import annotations

import atexit
import json
import sys
import time
import wave
from collections.abc import Callable
from typing import Any

import _pywhispercpp as native
import numpy as np
import numpy.typing as npt

_Samples = npt.NDArray[np.float32]
_Transcribe = Callable[[_Samples], list[str]]  # the segments


def plain(path: str, threads: int) -> _Transcribe:
    """Return the C++ function with its defaults and so many threads, for English, as the server is told, too."""
    context = native.whisper_init_from_file_with_params(path, native.whisper_context_default_params())
    params = native.whisper_full_default_params(native.whisper_sampling_strategy.WHISPER_SAMPLING_GREEDY)
    params.n_threads = threads
    params.language = "en"
    params.print_progress = False

    def transcribe(samples: _Samples) -> list[str]:
        if native.whisper_full(context, params, samples, len(samples)) != 0:
            raise SystemExit("whisper.cpp failed")
        count = native.whisper_full_n_segments(context)
        return [
            native.whisper_full_get_segment_text(context, number).decode("utf-8", "replace") for number in range(count)
        ]

    return transcribe


def as_it_comes(path: str) -> _Transcribe:
    """Return what a user of the binding has who changes nothing."""
    from pywhispercpp.model import Model

    model = Model(path, redirect_whispercpp_logs_to=None)
    return lambda samples: [segment.text for segment in model.transcribe(samples)]


def samples_of(path: str) -> _Samples:
    """Return the samples of a WAV file with 16 bits."""
    with wave.open(path) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / np.float32(32768)


def main() -> None:
    """Answer commands until standard input closes."""
    native.whisper_log_set(lambda _level, _text: None)
    atexit.register(native.whisper_log_set, None)
    _say({"imported": True})
    transcribe: _Transcribe | None = None
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "load":
                threads = command["threads"]
                transcribe = as_it_comes(command["path"]) if threads is None else plain(command["path"], threads)
                _say({"loaded": True})
            case _ if transcribe is None:
                raise SystemExit("load a model first")
            case "transcribe":
                samples = samples_of(command["path"])
                start = time.perf_counter()
                segments = transcribe(samples)
                _say({"seconds": time.perf_counter() - start, "text": " ".join(" ".join(segments).split())})


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
