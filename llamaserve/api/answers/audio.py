"""How transcripts look: as JSON, as text and subtitles, and as events."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from llamaserve.api.answers.answer import EVENTS, Answer, Content, Documented
from llamaserve.api.answers.errors import BODY, LACKS, WAITS, ErrorAnswer
from llamaserve.api.answers.generation import HEADERS

Seconds = Annotated[float, Meta(ge=0)]


class AudioUsage(Answer):
    """How long the audio is, in whole seconds, begun ones counted."""

    type: Literal["duration"]
    seconds: Annotated[int, Meta(ge=0)]


class SpokenToken(Answer):
    """A token with its log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class SpokenWord(Answer):
    """A word, and when it was said, in seconds."""

    word: str
    start: Seconds
    end: Seconds


class SpokenText(Answer):
    """What was said from one second to another."""

    seek: Annotated[int, Meta(description="Where the window that it was heard in begins, in hundredths of a second.")]
    start: Seconds
    end: Seconds
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class AudioSegment(SpokenText):
    """A segment of a transcript."""

    id: int


class Transcription(Answer):
    """What was said: `json`."""

    text: str
    usage: AudioUsage
    logprobs: list[SpokenToken] | UnsetType = UNSET


class VerboseTranscription(Answer):
    """What was said, and all that is known of it: `verbose_json`."""

    task: Literal["transcribe", "translate"]
    language: Annotated[str, Meta(description="In English, such as `german`.")]
    duration: Seconds
    text: str
    usage: AudioUsage
    segments: list[AudioSegment] | UnsetType = UNSET
    words: list[SpokenWord] | UnsetType = UNSET


class TranscriptDelta(Answer):
    """An event: a piece of the text."""

    type: Literal["transcript.text.delta"]
    delta: str
    logprobs: list[SpokenToken] | UnsetType = UNSET


class TranscriptSegment(SpokenText):
    """An event of verbose JSON: a segment."""

    type: Literal["transcript.text.segment"]
    id: str


class TranscriptDone(Answer):
    """The last event: all of it, and what else would be in headers."""

    type: Literal["transcript.text.done"]
    text: str
    usage: AudioUsage
    logprobs: list[SpokenToken] | UnsetType = UNSET
    task: Literal["transcribe", "translate"] | UnsetType = UNSET
    language: str | UnsetType = UNSET
    duration: Seconds | UnsetType = UNSET
    segments: list[AudioSegment] | UnsetType = UNSET
    words: list[SpokenWord] | UnsetType = UNSET
    truncated: str | UnsetType = msgspec.field(name="x-llamaserve-truncated", default=UNSET)
    warning: str | UnsetType = msgspec.field(name="x-llamaserve-warning", default=UNSET)


_TEXT: Final = "And so, my fellow Americans, ask not what your country can do for you."
_USAGE: Final = {"type": "duration", "seconds": 11}
_SEGMENT: Final[dict[str, Any]] = {
    "seek": 0,
    "start": 0.0,
    "end": 8.16,
    "text": f" {_TEXT}",
    "tokens": [843, 523, 11],
    "temperature": 0.0,
    "avg_logprob": -0.24,
    "compression_ratio": 1.1,
    "no_speech_prob": 0.0,
}
_VERBOSE: Final = {
    "task": "transcribe",
    "language": "english",
    "duration": 11.0,
    "text": _TEXT,
    "segments": [{"id": 0, **_SEGMENT}],
    "usage": _USAGE,
}
_EVENTS: Final = {
    "piece": {"type": "transcript.text.delta", "delta": _TEXT},
    "segment": {"type": "transcript.text.segment", **_SEGMENT, "id": "0"},
    "done": {"type": "transcript.text.done", "text": _TEXT, "usage": _USAGE},
}
_SUBTITLES: Final = f"1\n00:00:00,000 --> 00:00:08,160\n{_TEXT}\n\n"
_VTT: Final = f"WEBVTT\n\n00:00:00.000 --> 00:00:08.160\n{_TEXT}\n\n"


def _documented(model: str) -> Documented:
    return Documented(
        answers=(
            Content(
                (Transcription, VerboseTranscription),
                {"json": {"text": _TEXT, "usage": _USAGE}, "verbose_json": _VERBOSE},
            ),
            Content(str, {"text": f"{_TEXT}\n", "srt": _SUBTITLES}, "text/plain"),
            Content(str, {"vtt": _VTT}, "text/vtt"),
            Content((TranscriptDelta, TranscriptSegment, TranscriptDone, ErrorAnswer), _EVENTS, EVENTS),
        ),
        errors=(*BODY, *WAITS, *LACKS),
        requests={
            "text": {"file": "speech.flac", "model": model},
            "with times": {"file": "speech.flac", "model": model, "response_format": "verbose_json"},
            "subtitles": {"file": "speech.flac", "model": model, "response_format": "vtt"},
            "streamed": {"file": "speech.flac", "model": model, "stream": True},
        },
        headers=(*HEADERS, "x-llamaserve-truncated", "x-llamaserve-warning"),
    )


ROUTES: Final = {
    "POST /v1/audio/transcriptions": _documented("whisper-1"),
    "POST /v1/audio/translations": _documented("base"),
}
