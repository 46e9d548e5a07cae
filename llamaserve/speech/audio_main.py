"""The decoding process: ``python -m llamaserve.speech.audio_main FD`` decodes audio files, one at a time.

Each ``DecodeJob`` gets a ``DecodeAnswer``; ``sandbox.py`` brings and takes them. FFmpeg sees nothing but the one file,
which it reads through a Python object: it may use no protocol, so no playlist and no reference inside a file opens
another one or the network. Only the containers and codecs that people have audio in are allowed.

It does not know the time limit of a job: the parent measures it and kills this process. It knows nothing of models.
"""

from __future__ import annotations

import codecs
import errno
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import av
import msgspec
import psutil
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Discard

from llamaserve.errors import LlamaserveError, Unavailable, to_value
from llamaserve.sandbox import serve
from llamaserve.speech.audio import (
    MEMORY_LIMIT,
    TOO_MUCH_MEMORY,
    Audio,
    DecodeAnswer,
    DecodeJob,
    refusal,
)
from llamaserve.speech.audio_track import Track, check_length

KEPT_MEMORY = 128  # MB; a process that still holds more after a job ends, since the models may need them
HEAD = 64 * 1024  # bytes of a file that are looked at before FFmpeg does

DEMUXERS = frozenset(
    ("aac", "aiff", "amr", "asf", "au", "caf", "flac", "matroska", "mov", "mp3", "mpeg", "ogg", "w64", "wav")
)
DECODERS = frozenset(
    {
        *("aac", "ac3", "alac", "amrnb", "amrwb", "eac3", "flac", "mp1float", "mp2", "mp2float", "mp3", "mp3float"),
        *("opus", "vorbis", "wmav1", "wmav2"),
        *("adpcm_ima_wav", "adpcm_ms", "g722", "g726", "gsm", "gsm_ms"),
        *("pcm_alaw", "pcm_mulaw", "pcm_s8", "pcm_u8", "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le"),
        *("pcm_s32be", "pcm_s32le", "pcm_f32be", "pcm_f32le", "pcm_f64be", "pcm_f64le"),
    }
)

_OPTIONS = {
    "format_whitelist": ",".join(DEMUXERS),
    "codec_whitelist": ",".join(DECODERS),
    "protocol_whitelist": "",
    "max_streams": "64",
    "probesize": "5000000",  # bytes
    "analyzeduration": "5000000",  # microseconds
}

# The containers with time stamps. For others FFmpeg makes them up, wrongly where the sample rate changes.
_STAMPED = frozenset({"asf", "flac", "matroska", "mov", "mpeg", "ogg"})

# What a file may be instead, by how it begins.
_OTHERS = {
    b"%PDF": "a PDF document",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
}

_TAG = b"ID3"

_JOBS = msgspec.msgpack.Decoder(DecodeJob)
_PROCESS = psutil.Process()


def answer(payload: bytes) -> tuple[bytes, bool]:
    """Decode the file of an encoded job, as ``serve`` wants it.

    A process that met a bad file takes no more: whatever that did to its memory, nobody else's audio comes near.
    """
    result = _result(_JOBS.decode(payload))
    bad = result.audio is None or result.audio.damaged
    return msgspec.msgpack.encode(result), bad or _PROCESS.memory_info().rss > KEPT_MEMORY * 1024 * 1024


def _result(job: DecodeJob) -> DecodeAnswer:
    try:
        return DecodeAnswer(audio=decode(job))
    except MemoryError:
        return DecodeAnswer(error=to_value(refusal(TOO_MUCH_MEMORY)))
    except FFmpegError as error:
        return DecodeAnswer(error=to_value(refusal(f"the audio could not be decoded: {error.strerror}")))
    except LlamaserveError as error:
        return DecodeAnswer(error=to_value(error))
    except OSError as error:  # of the disk; FFmpeg's own are above
        return DecodeAnswer(error=to_value(Unavailable(f"the audio can't be read or written: {error.strerror}")))


def decode(job: DecodeJob) -> Audio:
    """Decode one file, or raise why that can't be done."""
    with Path(job.source).open("rb", buffering=0) as source, Path(job.target).open("wb") as target:
        head = source.read(HEAD)
        source.seek(0)
        with _opened(_Source(source), head) as container:
            return _written(container, head, target, job.longest)


class _Source:
    """A file as FFmpeg sees it. It has no name, and a place that can't be is an error of FFmpeg's, not an exception."""

    def __init__(self, file: FileIO) -> None:
        self.read = file.read
        self.tell = file.tell
        self._file = file

    def seek(self, offset: int, whence: int) -> int:
        """Return the new place, or the negative number of an error."""
        try:
            return self._file.seek(offset, whence)
        except OSError as error:
            return -(error.errno or errno.EINVAL)


def _opened(source: _Source, head: bytes) -> InputContainer:
    try:
        return av.open(source, "r", container_options=_OPTIONS, metadata_errors="replace")
    except MemoryError:
        raise
    except FFmpegError as error:
        raise refusal(_instead(head) or "the file is no audio of a known format, or damaged at its start") from error


def _written(container: InputContainer, head: bytes, target: BinaryIO, longest: float) -> Audio:
    """Write the audio of an open file."""
    stream = _audio_stream(container)
    name = container.format.name.split(",")[0]
    stated = _stated_length(container, stream)
    check_length(stated, longest)
    track = Track(target, start=_start(container), longest=longest)
    unit = float(stream.time_base or 0) if name in _STAMPED else None
    whole = True
    for frame in _frames(container, stream, open_ended=_is_open_ended(head)):
        if frame is None:
            whole = False
        else:
            track.add(frame, None if frame.pts is None or unit is None else frame.pts * unit)
    track.finish()
    if not track.samples:
        raise refusal("no audio could be decoded from the file")
    return Audio(
        samples=track.samples,
        container=container.format.name,
        codec=stream.codec_context.name,
        gaps=track.gaps,
        damaged=not whole or track.misplaced or track.seconds < stated - max(0.5, stated / 100),
    )


def _audio_stream(container: InputContainer) -> AudioStream:
    """Return the first stream that is audio and can be decoded, and have the other ones passed over."""
    for stream in container.streams.audio:
        if stream.codec_context is not None and stream.codec_context.name in DECODERS:
            stream.codec_context.thread_count = 1  # the cores are for the models
            for other in container.streams:
                other.discard = Discard.default if other is stream else Discard.all
            return stream
    if container.streams.audio:
        raise refusal("the file's audio is of a kind that can't be decoded here, or its description is damaged")
    kinds = sorted({stream.type for stream in container.streams})
    raise refusal(f"the file holds no audio, only {' and '.join(kinds)}" if kinds else "the file holds no audio")


def _stated_length(container: InputContainer, stream: AudioStream) -> float:
    """Return the seconds of audio that the file says it has, or 0: where it says nothing, FFmpeg guesses."""
    name = container.format.name.split(",")[0]
    exact = name in ("aiff", "au", "caf", "flac", "mov", "ogg")
    tagged = name == "mp3" and bool(stream.start_time)  # its encoder's delay, told by the tag that tells its length
    if exact or tagged:
        return (stream.duration or 0) * float(stream.time_base or 0)
    guessed = stream.duration is not None  # Matroska tells the length of all, not of a track
    if name == "matroska" and not guessed and not container.streams.video:
        return (container.duration or 0) / av.time_base - _start(container)
    return 0


def _start(container: InputContainer) -> float:
    return (container.start_time or 0) / av.time_base


def _frames(container: InputContainer, stream: AudioStream, *, open_ended: bool) -> Iterator[AudioFrame | None]:
    """Yield the frames that can be decoded, and None for what can't be or is not whole.

    In an ``open_ended`` file the last packet is never whole.
    """
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt and not open_ended:
                yield None
            yield from _decoded(stream, packet)
    except MemoryError:
        raise
    except FFmpegError:  # the rest can't be read
        yield None
        yield from _decoded(stream, None)


def _decoded(stream: AudioStream, packet: Packet[AudioStream] | None) -> list[AudioFrame] | list[None]:
    try:
        return stream.codec_context.decode(packet)
    except MemoryError:
        raise
    except FFmpegError:
        joined = packet is not None and bytes(packet).startswith(_TAG)  # an MP3 that begins behind another one
        return [] if joined else [None]


def _is_open_ended(head: bytes) -> bool:
    """Tell whether a WAV file has no length: a writer that can't go back leaves 0 or the most there is."""
    _, found, rest = head.partition(b"data")
    return head.startswith(b"RIFF") and bool(found) and not 0 < int.from_bytes(rest[:4], "little") < 0x7FFF_F000


def _instead(head: bytes) -> str | None:
    """Say what a file is instead of audio, as far as its first bytes show it."""
    if not head:
        return "the file is empty"
    for beginning, kind in _OTHERS.items():
        if head.startswith(beginning):
            return f"the file is {kind}, not audio"
    if head[4:8] == b"ftyp":
        return "the file is MP4 without its index, cut short or damaged, or of a kind that can't be read"
    return "the file is text, not audio" if _is_text(head) else None


def _is_text(head: bytes) -> bool:
    """Tell whether bytes, the last of which may be half a character, are UTF-8 without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character >= " " or character in "\t\n\f\r" for character in text)


def main(fd: int) -> int:
    """Run the process and return its exit status."""
    return serve(fd, answer, memory_limit=MEMORY_LIMIT)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
