"""Decoded audio as one track of mono 16 kHz samples, written piece by piece, each where in time a player has it.

Gaps in the time stamps become silence, and where they go back they begin anew. Mixing and resampling are FFmpeg's.
This module does not know where the frames come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from av.audio.fifo import AudioFifo
from av.audio.frame import AudioFrame
from av.error import FFmpegError
from av.filter import Graph

from llamaserve.errors import Unavailable
from llamaserve.speech.audio import refusal
from llamaserve.speech.values import SAMPLE_RATE, SAMPLE_SIZE

TOLERANCE = 0.1  # seconds by which time stamps may differ from the audio between them: recorders are that inexact
RATES = range(1_000, 768_001)  # Hz
_AT_ONCE = 16_384  # samples for a mixer: each call of one costs as much as some hundred samples


class Track:
    """The samples written so far. Raises ``InvalidRequest`` where they would be more than ``longest`` seconds.

    ``start`` is the time stamp in seconds that the track begins at, at the latest with its first frame.
    """

    def __init__(self, target: BinaryIO, *, start: float, longest: float) -> None:
        self.samples = 0
        self.gaps = 0.0  # seconds of silence in the middle
        self.misplaced = False  # a time stamp was later than can be
        self._target = target
        self._longest = longest
        self._time = 0.0  # seconds of audio and silence so far
        self._shift = -start  # from time stamps to the track's time
        self._last: float | None = None  # the last time stamp
        self._mixer: _Mixer | None = None

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.samples / SAMPLE_RATE

    def add(self, frame: AudioFrame, stamp: float | None) -> None:
        """Take the next frame, with its time stamp in seconds if it has one."""
        if frame.sample_rate not in RATES:
            raise refusal(f"audio with a sample rate of {frame.sample_rate} Hz can't be decoded")
        if stamp is not None:
            self._place(stamp)
        self._time += frame.samples / frame.sample_rate
        check_length(self._time, self._longest)
        self._mix(frame)

    def finish(self) -> None:
        """Write what is still in the mixer."""
        if self._mixer is not None:
            self._write(self._mixer.rest())
            self._mixer = None

    def _place(self, stamp: float) -> None:
        """Make the track end where the next frame begins, unless it is further already: no audio is left out."""
        if self._last is None:
            self._shift = max(self._shift, -stamp)
        ahead = stamp + self._shift - self._time
        restarted = self._last is not None and stamp < self._last - TOLERANCE  # as where two recordings were joined
        impossible = stamp + self._shift > self._longest
        self._last = stamp
        if restarted or impossible:
            self.misplaced |= impossible
            self._shift -= ahead
        elif ahead > (TOLERANCE if self._time else 0):
            self.gaps += ahead if self._time else 0
            self._write_silence(ahead)

    def _write_silence(self, seconds: float) -> None:
        self.finish()
        self._time += seconds
        missing = round(self._time * SAMPLE_RATE) - self.samples
        self._write(bytes(SAMPLE_SIZE * min(SAMPLE_RATE, missing - begin)) for begin in range(0, missing, SAMPLE_RATE))

    def _mix(self, frame: AudioFrame) -> None:
        kind = _kind(frame)
        if self._mixer is None or kind != self._mixer.kind:  # it may change in the middle of a stream
            self.finish()
            self._mixer = _Mixer(kind)
        self._write(self._mixer.mixed(frame))

    def _write(self, pieces: Iterator[bytes | memoryview]) -> None:
        for piece in pieces:
            try:
                self._target.write(piece)
            except OSError as error:
                raise Unavailable(f"the decoded audio can't be written: {error.strerror}") from error
            self.samples += len(piece) // SAMPLE_SIZE


def check_length(seconds: float, longest: float) -> None:
    """Raise ``InvalidRequest`` when audio is too long."""
    if round(seconds, 3) > longest:  # a sum of many lengths is not exact
        raise refusal(f"the audio is longer than {longest:g} s; send it in parts")


_Kind = tuple[str, str, int, int]  # of a frame: its sample format, channel layout, sample rate and number of channels


def _kind(frame: AudioFrame) -> _Kind:
    return frame.format.name, frame.layout.name, frame.sample_rate, frame.layout.nb_channels


class _Mixer:
    """Filters that turn frames of a kind into samples: mono, 16 bits, ``SAMPLE_RATE``."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        self._graph = _mixing_graph(kind)
        self._held = AudioFifo()

    def mixed(self, frame: AudioFrame) -> Iterator[memoryview]:
        """Take a frame, and yield the samples that are due."""
        frame.pts = None  # nothing here needs time stamps, least of all wrong ones
        self._held.write(frame)
        if self._held.samples >= _AT_ONCE:
            yield from self._pushed(self._held.read())

    def rest(self) -> Iterator[memoryview]:
        """Yield what is left, after the last frame."""
        if self._held.samples:
            yield from self._pushed(self._held.read())
        yield from self._pushed(None)

    def _pushed(self, frame: AudioFrame | None) -> Iterator[memoryview]:
        self._graph.push(frame)
        while True:
            try:
                done = self._graph.pull()
            except (BlockingIOError, EOFError):  # nothing more for now, or at all
                return
            assert isinstance(done, AudioFrame)
            yield memoryview(done.planes[0])[: SAMPLE_SIZE * done.samples]


def _mixing_graph(kind: _Kind) -> Graph:
    sample_format, layout, rate, channels = kind
    try:
        return _graph(sample_format, layout, rate)
    except FFmpegError:  # FFmpeg has no mix for such a layout: then all channels count the same
        pass
    try:
        return _graph(sample_format, layout, rate, "mono|c0<" + "+".join(f"c{index}" for index in range(channels)))
    except FFmpegError as error:
        raise refusal(f"audio with {channels} channels can't be mixed to one") from error


def _graph(sample_format: str, layout: str, rate: int, *pans: str) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = {"sample_fmt": sample_format, "channel_layout": layout, "sample_rate": f"{rate}"}
    sink = {"sample_fmts": "s16", "channel_layouts": "mono", "sample_rates": f"{SAMPLE_RATE}"}
    graph.link_nodes(
        graph.add("abuffer", **source, time_base=f"1/{rate}"),
        *(graph.add("pan", each) for each in pans),
        graph.add("aformat", **sink),
        graph.add("abuffersink"),
    ).configure()
    return graph
