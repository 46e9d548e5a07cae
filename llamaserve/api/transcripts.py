"""What a transcript looks like: plain text, JSON, or subtitles, as OpenAI's endpoint has them.

Pure: knows segments, and nothing of requests or models.
"""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llamaserve.speech.languages import NAMES
from llamaserve.speech.values import Segment, TextToken

_LEAST: Final = 0.001  # seconds that a subtitle is shown
_DIGITS: Final = 3  # of seconds
_ARROW: Final = re.compile("-+>")  # stands between the times of a cue, and nowhere else
_KEPT: Final = "%#&@"  # signs that are a part of a word


@dataclass
class Transcript:
    """What has been heard of an audio of so many ``seconds``. ``language`` is a code, known at the end."""

    seconds: float
    segments: list[Segment] = field(default_factory=list)
    language: str = ""

    @property
    def text(self) -> str:
        """All that was said."""
        return "".join(segment.text for segment in self.segments).strip()

    @property
    def tokens(self) -> Iterator[TextToken]:
        """The tokens of the text."""
        for segment in self.segments:
            yield from segment.tokens


def usage(transcript: Transcript) -> dict[str, Any]:
    """Return OpenAI's usage object: whole seconds, begun ones counted."""
    return {"type": "duration", "seconds": math.ceil(transcript.seconds)}


def as_json(transcript: Transcript, *, logprobs: bool) -> dict[str, Any]:
    """Return the short answer."""
    body: dict[str, Any] = {"text": transcript.text}
    if logprobs:
        body["logprobs"] = [logprob(token) for token in transcript.tokens]
    return body | {"usage": usage(transcript)}


def as_verbose_json(transcript: Transcript, *, task: str, segments: bool, words: bool) -> dict[str, Any]:
    """Return the answer with all that is known."""
    body: dict[str, Any] = {
        "task": task,
        "language": NAMES[transcript.language],
        "duration": round(transcript.seconds, _DIGITS),
        "text": transcript.text,
    }
    if segments:
        body["segments"] = [described(segment, number) for number, segment in enumerate(transcript.segments)]
    if words:
        body["words"] = [word for segment in transcript.segments for word in spoken_words(segment)]
    return body | {"usage": usage(transcript)}


def described(segment: Segment, number: int) -> dict[str, Any]:
    """Return a segment as OpenAI has it. The library does not tell how probable it is that nothing is said, and many
    clients can't read a segment without a number there; what was taken for silence is no segment.
    """
    return {
        "id": number,
        "seek": round(segment.seek * 100),  # in hundredths of a second, as Whisper's own program has it
        "start": round(segment.start, _DIGITS),
        "end": round(segment.end, _DIGITS),
        "text": segment.text,
        "tokens": [token.token for token in segment.tokens],
        "temperature": round(segment.temperature, _DIGITS),
        "avg_logprob": segment.logprob,
        "compression_ratio": segment.compression,
        "no_speech_prob": 0.0,
    }


def spoken_words(segment: Segment) -> Iterator[dict[str, Any]]:
    """Yield the words of a segment, without the signs around them."""
    for word in segment.words:
        if text := _bare(word.text):
            yield {"word": text, "start": round(word.start, _DIGITS), "end": round(word.end, _DIGITS)}


def _bare(text: str) -> str:
    """Return a word without the signs around it."""
    places = [place for place, character in enumerate(text) if _is_of_word(character)]
    return text[places[0] : places[-1] + 1] if places else ""


def _is_of_word(character: str) -> bool:
    return character in _KEPT or unicodedata.category(character)[0] in "LNMS"


def logprob(token: TextToken) -> dict[str, Any]:
    """Return a token with its log-probability."""
    return {"token": token.data.decode("utf-8", "replace"), "bytes": list(token.data), "logprob": token.logprob}


def as_srt(transcript: Transcript) -> str:
    """Return subtitles in the SubRip format."""
    return "".join(_cues(transcript.segments, ",", lambda text: text, numbered=True))


def as_vtt(transcript: Transcript) -> str:
    """Return subtitles in the WebVTT format."""
    return "WEBVTT\n\n" + "".join(_cues(transcript.segments, ".", _escaped, numbered=False))


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _cues(segments: Sequence[Segment], point: str, escaped: Callable[[str], str], *, numbered: bool) -> Iterator[str]:
    for number, segment in enumerate(segments, 1):
        text = _ARROW.sub("->", " ".join(segment.text.split()))
        start, end = _time(segment.start, point), _time(max(segment.end, segment.start + _LEAST), point)
        yield (f"{number}\n" if numbered else "") + f"{start} --> {end}\n{escaped(text)}\n\n"


def _time(seconds: float, point: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{point}{rest % 1000:03}"
