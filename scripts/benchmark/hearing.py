"""Recordings, and who writes down what is said in them: a server over HTTP, or the library alone.

Knows nothing of what is measured, and of sound only how to put it into a WAV file.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import wave
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from benchmark.client import Stream, Unreachable, message_in, unpack
from benchmark.contenders import HERE, WORKER_ENVIRONMENT, HttpServer
from benchmark.processes import LineProcess, StartFailed, running

SPEECH = HERE.parent.parent / "tests" / "speech" / "jfk.flac"
SPOKEN = "And so, my fellow Americans: ask not what your country can do for you; ask what you can do for your country."
LANGUAGE = "en"  # of the recording; it is said, so that nobody has to find it out: one more run of the encoder
_RATE = 16_000  # samples a second, of 16 bits
_PAUSE = 1.0  # seconds between repetitions
LIMIT = 300.0  # seconds for one answer


@dataclass(frozen=True)
class Clip:
    """A recording as a WAV file."""

    wav: bytes
    seconds: float


@dataclass(frozen=True)
class Heard:
    """What was understood, in which language if that is known, and the seconds that it took."""

    text: str
    seconds: float
    language: str | None = None


class Listener(Protocol):
    """Somebody who writes down speech."""

    name: str

    def hear(self, clip: Clip) -> Heard:
        """Return what is said."""


def read_speech() -> bytes:
    """Return the samples of the recording of eleven seconds. Raises ``StartFailed``."""
    try:
        import av
    except ImportError as error:
        raise StartFailed(f"speech needs more packages: pip install 'llamaserve[speech]' ({error})") from error
    with av.open(str(SPEECH)) as file:
        return b"".join(frame.to_ndarray().astype("<i2").tobytes() for frame in file.decode(audio=0))


def repeated(samples: bytes, times: int) -> Clip:
    """Return samples so many times in a row, with a pause after each time, if it is more than one."""
    if times > 1:
        samples = (samples + bytes(2 * int(_PAUSE * _RATE))) * times
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(_RATE)
        writer.writeframes(samples)
    return Clip(file.getvalue(), len(samples) / 2 / _RATE)


class SpeechServer:
    """A model of a server over HTTP. Other streams of the same client are read meanwhile."""

    def __init__(self, server: HttpServer, model: str) -> None:
        self.name = server.name
        self._client = server.client
        self._model = model

    def hear(self, clip: Clip) -> Heard:
        """See ``Listener``."""
        return self._answer("/audio/transcriptions", clip.wav, language=LANGUAGE)

    def transcribe(self, audio: bytes, *, translate: bool = False) -> Heard:
        """Return what is said in a file, or that in English; in which language is for the server to find out. Raises
        ``Unreachable``, also for an error's answer.
        """
        return self._answer("/audio/translations" if translate else "/audio/transcriptions", audio)

    @contextlib.contextmanager
    def listening(self, clip: Clip) -> Iterator[Stream]:
        """Have a recording transcribed as long as the block lasts. When it begins, the first words have come."""
        with self._upload("/audio/transcriptions", clip.wav, language=LANGUAGE, stream="true") as stream:
            self._client.pump(lambda: stream.flowing, LIMIT)
            yield stream

    def _answer(self, path: str, audio: bytes, **fields: str) -> Heard:
        with self._upload(path, audio, **fields) as stream:
            self._client.pump(lambda: stream.done, LIMIT)
        return _heard(stream)

    @contextlib.contextmanager
    def _upload(self, path: str, audio: bytes, **fields: str) -> Iterator[Stream]:
        form = {"model": self._model, "response_format": "verbose_json", **fields}
        stream = self._client.upload(path, form, audio)
        try:
            yield stream
        finally:
            self._client.stop(stream)


def _heard(stream: Stream) -> Heard:
    status, body, _ = unpack(b"".join(data for _, data in stream.pieces))
    if status != 200:
        raise Unreachable(f"status {status}: {message_in(body)}" if status else "no HTTP answer")
    content = json.loads(body)
    return Heard(content["text"], stream.pieces[-1][0] - stream.started, content["language"])


class BareCall(LineProcess):
    """A process that has nothing but the library."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: IO[bytes], clips: Path) -> None:
        """``clips`` is a folder for the recordings that it is to read."""
        super().__init__(name, process, errors)
        self.name = name
        self._clips = clips

    def load(self, model: Path, threads: int | None) -> None:
        """Load a model; without ``threads`` as the library does it when it is told nothing."""
        self.command(do="load", path=str(model), threads=threads)

    def hear(self, clip: Clip) -> Heard:
        """See ``Listener``."""
        file = self._clips / f"{clip.seconds:g}.wav"
        if not file.exists():
            file.write_bytes(clip.wav)
        return Heard(**self.command(do="transcribe", path=str(file)))


@contextlib.contextmanager
def bare_call(name: str, model: Path, threads: int | None) -> Iterator[BareCall]:
    """Run the library alone with a model loaded: with so many threads and a child's environment, or as it comes."""
    environment = None if threads is None else WORKER_ENVIRONMENT
    command = [sys.executable, str(HERE / "bare_speech.py")]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="llamaserve-bench-"))
        call = BareCall(name, *stack.enter_context(running(command, environment)), Path(folder))
        call.wait_until_started()
        call.load(model, threads)
        yield call
