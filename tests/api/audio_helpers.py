"""What the tests of speech over HTTP share: uploads, streams of what is heard, and what is said in the clip."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from api_helpers import LIMIT, events
from audio_files import RATE, SPEECH, speech, wav
from model_helpers import write_registry
from running_server import RunningServer

TRANSCRIPTIONS = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
SENTENCE = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"
SAID = SENTENCE.split()
TOLERANCE = 0.3  # seconds
HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
FORM = {"content-type": "multipart/form-data; boundary=x"}  # of a form that begins with ``HEAD``
PERIOD = 15  # seconds; two clips with their pauses are what Whisper listens to at once


def words_of(text: str) -> list[str]:
    """Return the words of a transcript without case and signs."""
    return re.findall(r"[a-z']+", text.lower())


@cache
def spoken_times(times: int) -> bytes:
    """Return a WAV file in which the clip is heard so many times, each with a pause after it."""
    clip = np.zeros(PERIOD * RATE, np.int16)
    clip[: len(speech())] = speech()
    return wav(np.tile(clip, times))


def speech_server_in(folder: Path, models: dict[str, Path | str], environment: dict[str, str]) -> RunningServer:
    """Return a server with speech models, the first of which is the usual one, whose temporary folder is in a folder.
    Streams that wait say so five times a second.
    """
    (folder / "tmp").mkdir()
    path = write_registry(folder / "models.yaml", models, "transcription_model: tiny.en")
    settings = {"LLAMASERVE_HEARTBEAT": "0.2", "TMPDIR": str(folder / "tmp"), **environment}
    return RunningServer("serve", "tiny.en", "--models-file", str(path), environment=settings)


def forgotten(server: RunningServer, temporary: Path) -> bool:
    """Tell whether nothing runs, waits or lies around."""
    return server.running == 0 and not list(temporary.iterdir())


def upload(
    server: RunningServer, content: bytes | None = None, *, path: str = TRANSCRIPTIONS, name: str = "a", **fields: Any
) -> httpx.Response:
    """Send a file, the clip unless another is given, with fields, and return the response whatever its status."""
    content = SPEECH.read_bytes() if content is None else content
    return httpx.post(server.url + path, files={"file": (name, content)}, data=fields, timeout=LIMIT)


@contextmanager
def hearing(server: RunningServer, content: bytes, **fields: Any) -> Iterator[httpx.Response]:
    """Send a file, and have the response that streams what is heard; the client leaves at the end of the block."""
    files, data = {"file": ("a", content)}, {**fields, "stream": "true"}
    with httpx.stream("POST", server.url + TRANSCRIPTIONS, files=files, data=data, timeout=LIMIT) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield response


def all_heard(server: RunningServer, content: bytes, **fields: Any) -> list[Any]:
    """Return all events of a stream."""
    with hearing(server, content, **fields) as response:
        return list(events(response.iter_lines()))
