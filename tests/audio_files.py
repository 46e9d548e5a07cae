"""Audio files for tests, encoded from one short speech in most of the formats that people have."""

from __future__ import annotations

import io
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from av.container import Flags

SPEECH = Path(__file__).parent / "speech" / "jfk.flac"
SPEECH_SECONDS = 11.0
# When some of its words begin, by number, in seconds, and when the last ends: read off the waveform, where the sound
# rises after a pause, and for the last, "country", at the burst of its first letter.
SPEECH_STARTS = {0: 0.33, 5: 3.29, 6: 4.03, 7: 5.41, 14: 8.19, 21: 9.72}
SPEECH_END = 10.2
CLICKS = (0.0, 0.5, 1.25, 3.0, 3.9)  # seconds at which `clicks` has one
RATE = 16_000  # Hz, of the speech


@dataclass(frozen=True)
class Encoding:
    """How to encode: FFmpeg's names and options."""

    container: str
    codec: str
    rate: int
    layout: str = "mono"
    bit_rate: int | None = None
    options: dict[str, str] = field(default_factory=dict)
    container_options: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds that the time stamps begin at


_VORBIS = {"strict": "experimental"}
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}

ENCODINGS = {
    "wav": Encoding("wav", "pcm_s16le", 16_000),
    "wav, 8 bits": Encoding("wav", "pcm_u8", 22_050),
    "wav, 24 bits": Encoding("wav", "pcm_s24le", 44_100, "stereo"),
    "wav, 32 bits": Encoding("wav", "pcm_s32le", 192_000),
    "wav, float": Encoding("wav", "pcm_f32le", 48_000, "stereo"),
    "wav, double": Encoding("wav", "pcm_f64le", 96_000),
    "wav, a-law": Encoding("wav", "pcm_alaw", 8_000),
    "wav, mu-law": Encoding("wav", "pcm_mulaw", 8_000),
    "wav, adpcm": Encoding("wav", "adpcm_ima_wav", 22_050),
    "wav, ms adpcm": Encoding("wav", "adpcm_ms", 22_050),
    "wav, g722": Encoding("wav", "g722", 16_000),
    "wav, 5.1": Encoding("wav", "pcm_s16le", 48_000, "5.1"),
    "rf64": Encoding("wav", "pcm_s16le", 16_000, container_options={"rf64": "always"}),
    "w64": Encoding("w64", "pcm_s16le", 16_000),
    "flac": Encoding("flac", "flac", 44_100),
    "mp3": Encoding("mp3", "mp3", 44_100),
    "mp3, 8 kHz": Encoding("mp3", "mp3", 8_000),
    "mp3 without a tag": Encoding("mp3", "mp3", 44_100, container_options={"write_xing": "0"}),
    "mp2": Encoding("mp2", "mp2", 48_000),
    "mpeg": Encoding("mpeg", "mp2", 48_000),
    "m4a": Encoding("ipod", "aac", 44_100),
    "m4a, alac": Encoding("ipod", "alac", 44_100),
    "mp4": Encoding("mp4", "aac", 48_000, "stereo", container_options={"movflags": "faststart"}),
    "mp4 in fragments": Encoding("mp4", "aac", 48_000, container_options=_FRAGMENTS),
    "mp4, mp3": Encoding("mp4", "mp3", 44_100),
    "mp4, opus": Encoding("mp4", "opus", 48_000),
    "mp4, flac": Encoding("mp4", "flac", 48_000),
    "mp4, ac3": Encoding("mp4", "ac3", 48_000),
    "mov": Encoding("mov", "pcm_s16le", 44_100),
    "aac": Encoding("adts", "aac", 44_100),
    "ogg, opus": Encoding("ogg", "libopus", 48_000),
    "ogg, vorbis": Encoding("ogg", "vorbis", 44_100, "stereo", options=_VORBIS),
    "ogg, flac": Encoding("ogg", "flac", 44_100),
    "webm": Encoding("webm", "libopus", 48_000),
    "webm, vorbis": Encoding("webm", "vorbis", 44_100, "stereo", options=_VORBIS),
    "webm of a browser": Encoding("webm", "libopus", 48_000, container_options={"live": "1"}),
    "webm that begins late": Encoding("webm", "libopus", 48_000, delay=0.5),
    "mka, aac": Encoding("matroska", "aac", 44_100),
    "mka, mp3": Encoding("matroska", "mp3", 44_100),
    "mka, flac": Encoding("matroska", "flac", 44_100),
    "mka, pcm": Encoding("matroska", "pcm_s16le", 44_100),
    "mka, eac3": Encoding("matroska", "eac3", 48_000),
    "amr": Encoding("amr", "libopencore_amrnb", 8_000, bit_rate=12_200),
    "3gp, amr": Encoding("3gp", "libopencore_amrnb", 8_000, bit_rate=12_200),
    "3gp, aac": Encoding("3gp", "aac", 44_100),
    "caf": Encoding("caf", "pcm_s16le", 44_100),
    "caf, alac": Encoding("caf", "alac", 44_100),
    "aiff": Encoding("aiff", "pcm_s16be", 44_100),
    "au": Encoding("au", "pcm_mulaw", 8_000),
    "wma": Encoding("asf", "wmav2", 44_100, bit_rate=64_000),
}


@cache
def speech() -> np.ndarray:
    """Return the speech: 16-bit samples, mono, 16 kHz."""
    with av.open(str(SPEECH)) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    samples.setflags(write=False)
    return samples


def clicks(rate: int = 48_000) -> np.ndarray:
    """Return four seconds of silence with short tones in it, each of which begins at one of ``CLICKS``."""
    samples = np.zeros(4 * rate, np.int16)
    tone = 26_000 * np.sin(2 * np.pi * 1000 * np.arange(rate // 100) / rate)
    for click in CLICKS:
        begin = int(click * rate)
        samples[begin : begin + len(tone)] = tone
    return samples


def encoded(samples: np.ndarray, rate: int, encoding: Encoding) -> bytes:
    """Return mono samples of 16 bits as a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audio"  # some options need a file that is written and read
        with av.open(str(path), "w", format=encoding.container, container_options=encoding.container_options) as file:
            file.flags |= Flags.bitexact.value  # else there are random numbers in it
            stream = file.add_stream(encoding.codec, encoding.rate, encoding.options, layout=encoding.layout)
            if encoding.bit_rate:
                stream.bit_rate = encoding.bit_rate
            for frame in frames(samples, rate, stream):
                frame.pts += round(encoding.delay * encoding.rate)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        return path.read_bytes()


def movie(samples: np.ndarray, rate: int, container: str, codec: str, *, delay: float = 0.0) -> bytes:
    """Return six seconds of black video whose sound begins after ``delay`` seconds."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        file.flags |= Flags.bitexact.value
        picture = file.add_stream("mpeg4", 10, width=64, height=64, pix_fmt="yuv420p")
        sound = file.add_stream(codec, 48_000, layout="stereo")
        for _ in range(60):
            black = av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), "yuv420p")
            file.mux(picture.encode(black))
        file.mux(picture.encode(None))
        for frame in frames(samples, rate, sound):
            frame.pts += round(delay * 48_000)
            file.mux(sound.encode(frame))
        file.mux(sound.encode(None))
    return target.getvalue()


def frames(samples: np.ndarray, rate: int, stream: av.AudioStream) -> list[av.AudioFrame]:
    """Return samples as the frames that a stream's encoder wants."""
    context = stream.codec_context
    context.open(strict=False)
    source = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "s16", "mono")
    source.sample_rate = rate
    resampler = av.AudioResampler(context.format, context.layout, context.sample_rate, context.frame_size or 1024)
    begin, done = 0, [*resampler.resample(source), *resampler.resample(None)]
    for frame in done:
        frame.pts, frame.time_base = begin, Fraction(1, frame.sample_rate)
        begin += frame.samples
    return done


@cache
def spoken(name: str) -> bytes:
    """Return the speech as a file in one of ``ENCODINGS``."""
    return encoded(speech(), RATE, ENCODINGS[name])


def wav(samples: np.ndarray, rate: int = RATE) -> bytes:
    """Return mono samples of 16 bits as a WAV file."""
    return encoded(samples, rate, Encoding("wav", "pcm_s16le", rate))
