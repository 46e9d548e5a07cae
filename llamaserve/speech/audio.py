"""Decoding uploaded audio to mono 16 kHz samples, in child processes that are killed when it takes too much.

A file from a stranger meets FFmpeg, which is a million lines of C: it may crash, or take for ever, and no thread can
interrupt it. So each file is a job for a decoding process (``audio_main.py``); this module is the asyncio side.

It knows nothing of HTTP, of models, or of what is said in the audio, and does not load FFmpeg.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from llamaserve.errors import ErrorValue, InvalidRequest, from_value
from llamaserve.sandbox import Ended, OutOfMemory, Sandbox, TookTooLong
from llamaserve.speech.values import SAMPLE_RATE

TIME_LIMIT = 120.0  # seconds of CPU time for one file; an hour of audio takes a few
IDLE_LIMIT = 900.0  # seconds after which a process without work ends; a new one takes a short request 0.15 s more
MEMORY_LIMIT = 512  # MB of address space for one process, Python included
TOO_MUCH_MEMORY = f"the audio needed more than {MEMORY_LIMIT} MB of memory to decode"


class DecodeJob(msgspec.Struct, frozen=True):
    """A file to decode into another, unless its audio is longer than so many seconds."""

    source: str
    target: str
    longest: float


class Audio(msgspec.Struct, frozen=True):
    """What a file held: ``samples`` of 16 bits, mono, 16,000 a second.

    ``damaged`` is set when a part of it could not be decoded, when less is there than the file says, or when a time
    stamp is later than can be. ``gaps`` are the seconds in the middle that the file has no audio for, since it is
    damaged or nothing was recorded; they are silence. Where a file does not say how long it is, a missing end is not
    noticed. ``container`` and ``codec`` are FFmpeg's names.
    """

    samples: int
    container: str
    codec: str
    gaps: float
    damaged: bool

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.samples / SAMPLE_RATE


class DecodeAnswer(msgspec.Struct, frozen=True):
    """A decoding process's answer: ``audio`` or ``error``."""

    audio: Audio | None = None
    error: ErrorValue | None = None


class AudioDecoder(Sandbox):
    """A pool of at most ``size`` decoding processes, started when one is needed and reused. For one event loop.

    Audio of more than ``longest`` seconds is refused.
    """

    def __init__(self, size: int = 2, *, longest: float, time_limit: float = TIME_LIMIT) -> None:
        super().__init__(
            "llamaserve.speech.audio_main",
            "the audio decoder",
            size=size,
            time_limit=time_limit,
            idle_limit=IDLE_LIMIT,
        )
        self._longest = longest

    async def decode(self, source: Path, target: Path) -> Audio:
        """Write the audio of ``source`` to ``target``: raw samples, 16 bits, little-endian, mono, 16,000 a second.

        Raises ``InvalidRequest`` when there is none, when it can't be decoded or is too long, or takes too much time or
        memory, and ``Unavailable`` as ``Sandbox.ask``, or when ``target`` can't be written.
        What is in ``target`` then means nothing.
        """
        job = DecodeJob(str(source), str(target), self._longest)
        try:
            answer = msgspec.msgpack.decode(await self.ask(msgspec.msgpack.encode(job)), type=DecodeAnswer)
        except TookTooLong as late:
            raise refusal(f"the audio took {late} to decode") from None
        except OutOfMemory:
            raise refusal(TOO_MUCH_MEMORY) from None
        except Ended as ended:
            raise refusal(f"the audio could not be decoded: it crashed the decoder ({ended})") from None
        if answer.error is not None:
            raise from_value(answer.error)
        assert answer.audio is not None
        return answer.audio


def refusal(message: str) -> InvalidRequest:
    """Return the error for a file that is not decoded."""
    return InvalidRequest(message, param="file")
