"""A few seconds of speech for transcriptions: the beginning of a recording that the tests have."""

from __future__ import annotations

import io
import wave
from importlib.util import find_spec
from pathlib import Path

_RECORDING = Path(__file__).parents[2] / "tests" / "speech" / "jfk.flac"
_RATE = 16_000  # samples a second
_SECONDS = 4


def can_be_heard() -> bool:
    """Whether the packages for speech are installed."""
    return all(find_spec(name) is not None for name in ("av", "pywhispercpp"))


def speech() -> bytes:
    """Return a WAV file."""
    import av

    resampler, samples = av.AudioResampler(format="s16", layout="mono", rate=_RATE), bytearray()
    with av.open(str(_RECORDING)) as recording:
        for frame in recording.decode(audio=0):
            for part in resampler.resample(frame):
                samples += part.to_ndarray().tobytes()
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(_RATE)
        written.writeframes(samples[: 2 * _RATE * _SECONDS])
    return file.getvalue()
