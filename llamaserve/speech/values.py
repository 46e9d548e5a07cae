"""How speech is transcribed, and what is reported of it. Plain data: importing this loads no library.

All times are in seconds from the beginning of the audio.
"""

from __future__ import annotations

import msgspec

SAMPLE_RATE = 16_000  # samples a second, which is what Whisper was trained for
SAMPLE_SIZE = 2  # bytes; signed integers, little-endian


class TranscriberParams(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """How a Whisper model is loaded: its ggml file, the CPU threads that it may use, whether their number falls while
    other programs use the cores (``adaptive_threads``), and whether it is computed on a GPU if the library can.
    """

    path: str
    threads: int
    adaptive_threads: bool
    gpu: bool


class Transcription(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What to make of an audio: a transcript in its ``language`` (a code; None: it is found out), or a translation into
    English. ``prompt`` is text that might come before it, for names and style. ``temperature`` 0 takes the most
    probable token each time; higher ones are tried by themselves where a transcript seems to have failed.
    """

    language: str | None = None
    translate: bool = False
    prompt: str = ""
    temperature: float = 0.0


class SpokenWord(msgspec.Struct, frozen=True, array_like=True):
    """A word, as it stands in the text with what belongs to it, when it is spoken, and how sure the model is of it."""

    text: str
    start: float
    end: float
    probability: float


class TextToken(msgspec.Struct, frozen=True, array_like=True):
    """A token of the text, the bytes that it stands for, and its log-probability (natural logarithm)."""

    token: int
    data: bytes
    logprob: float


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a transcript, mostly a sentence or a part of one.

    ``seek`` is where the 30 seconds begin that it was heard in. ``temperature`` is the one at which it was found,
    ``logprob`` the mean log-probability of its tokens, and ``compression`` how many times larger the text of all that
    was heard together with it is than its compressed form; a high one comes from repetitions.
    """

    text: str
    start: float
    end: float
    seek: float
    temperature: float
    logprob: float
    compression: float
    words: tuple[SpokenWord, ...]
    tokens: tuple[TextToken, ...]


class Heard(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """New segments of a request, and up to where the audio is done."""

    request: int
    segments: list[Segment]
    seconds: float


class Transcribed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """All of a request's audio is done. ``language`` is the code of the one that is spoken, asked for or found; the
    prompt has lost its first ``truncated`` tokens.
    """

    request: int
    language: str
    truncated: int
