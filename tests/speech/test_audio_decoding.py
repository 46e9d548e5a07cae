"""Uploaded audio becomes the right samples at the right time, or is refused in words."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import av
import numpy as np
import pytest
from audio_files import CLICKS, ENCODINGS, RATE, SPEECH_SECONDS, Encoding, clicks, encoded, movie, speech, spoken, wav
from hostile_audio import (
    block,
    external_data,
    hostile_files,
    huge_tables,
    matroska,
    riff,
    silent_flac,
    silent_opus,
    track,
    video,
)

from llamaserve.errors import InvalidRequest, Unavailable
from llamaserve.speech import audio_main
from llamaserve.speech.audio import MEMORY_LIMIT, SAMPLE_RATE, Audio, AudioDecoder, DecodeJob


@dataclass
class Decoded:
    """What came of a file."""

    audio: Audio
    samples: np.ndarray


Decode = Callable[[bytes], Decoded]


@pytest.fixture
def decode(tmp_path: Path) -> Decode:
    """A function that decodes in this process, where no time is lost."""

    def run(content: bytes, longest: float = 60) -> Decoded:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(content)
        audio = audio_main.decode(DecodeJob(str(source), str(target), longest))
        samples = np.fromfile(target, "<i2")
        assert len(samples) == audio.samples
        return Decoded(audio, samples)

    return run


def refused(decode: Decode, content: bytes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        decode(content)
    assert caught.value.param == "file"
    return caught.value.message


def likeness(samples: np.ndarray, expected: np.ndarray, *, shift: float = 0.06) -> float:
    """Return how alike two pieces of audio are, 1 being the same, when one is moved by at most so many seconds."""
    size = min(len(samples), len(expected))
    room = 2 ** (2 * size - 1).bit_length()
    at_shifts = np.fft.irfft(np.fft.rfft(samples[:size], room) * np.conj(np.fft.rfft(expected[:size], room)))
    most = int(shift * SAMPLE_RATE)
    scale = np.linalg.norm(samples[:size].astype(float)) * np.linalg.norm(expected[:size].astype(float))
    return float(max(at_shifts[:most].max(), at_shifts[-most:].max()) / scale)


def onset(samples: np.ndarray, second: float) -> float:
    """Return when it gets loud within a tenth of a second of that."""
    begin = max(0, int((second - 0.1) * SAMPLE_RATE))
    (loud,) = np.nonzero(np.abs(samples[begin : int((second + 0.1) * SAMPLE_RATE)].astype(int)) > 6000)
    return float(begin + loud[0]) / SAMPLE_RATE


# Formats.


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_speech_is_heard_in_every_format(decode: Decode, name: str) -> None:
    done = decode(spoken(name))
    padded = 0.09 if name == "wav, ms adpcm" else 0.06 if name == "wma" else 0.05  # whole blocks only
    assert abs(done.audio.seconds - SPEECH_SECONDS) < padded
    assert (done.audio.damaged, done.audio.gaps) == (False, 0)
    assert likeness(done.samples, speech()) > 0.93


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_click_stays_where_it_was(decode: Decode, name: str) -> None:
    done = decode(encoded(clicks(), 48_000, ENCODINGS[name]))
    wma = name == "wma"  # FFmpeg's encoder does not tell its delay, and its decoder leaves out the first frame
    for click in CLICKS[wma:]:
        assert abs(onset(done.samples, click) - click) < (0.05 if wma else 0.03)


@pytest.mark.parametrize("name", ["wav", "rf64", "w64"])
def test_speech_that_needs_no_change_is_not_changed(decode: Decode, name: str) -> None:
    assert (decode(spoken(name)).samples == speech()).all()


@pytest.mark.parametrize(
    ("content", "codec", "seconds"),
    [
        (riff(tag=0x31, bits=0, align=65, data=bytes(65 * 50)), "gsm_ms", 2),
        (b"#!AMR-WB\n" + (b"\x04" + bytes(17)) * 50, "amrwb", 1),
    ],
    ids=["wav, gsm", "amr wide"],
)
def test_formats_that_can_not_be_made_here(decode: Decode, content: bytes, codec: str, seconds: float) -> None:
    assert decode(content).audio == Audio(seconds * SAMPLE_RATE, mock.ANY, codec, 0, False)


def test_the_names_of_what_it_was(decode: Decode) -> None:
    assert decode(spoken("webm")).audio == Audio(176_000, "matroska,webm", "opus", 0, False)


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 8, 9, 11, 16, 31, 64])
def test_all_channels_are_heard(decode: Decode, channels: int) -> None:
    size = 4000
    for loud in {0, channels // 2, channels - 1}:
        samples = np.zeros((size, channels), "<i2")
        samples[:, loud] = 30_000 * np.sin(np.arange(size) / 4)
        heard = decode(riff(channels=channels, data=samples.tobytes())).samples
        assert len(heard) == 2 * size
        assert np.abs(heard).max() > 0.5 * 30_000 / channels or channels in (3, 5, 8, 16)  # a subwoofer is not heard


@pytest.mark.parametrize("mask", [0x1, 0x8, 0x9, 0x600, 0x1800, 0x3000, 0x60000000])
def test_odd_layouts_are_mixed(decode: Decode, mask: int) -> None:
    channels = mask.bit_count()
    data = np.full((4000, channels), 8000, "<i2").tobytes()
    heard = decode(extensible(channels, mask, data)).samples
    assert abs(int(np.median(heard)) - 8000) < 10


def extensible(channels: int, mask: int, data: bytes) -> bytes:
    """Return a WAV file that names its channels."""
    plain = riff(channels=channels, tag=0xFFFE, data=data)
    names = b"\x16\0\x10\0" + mask.to_bytes(4, "little") + bytes.fromhex("0100000000001000800000aa00389b71")
    return plain[:16] + (40).to_bytes(4, "little") + plain[20:36] + names + plain[36:]


def test_more_channels_than_can_be_mixed(decode: Decode) -> None:
    assert refused(decode, riff(channels=65)) == "audio with 65 channels can't be mixed to one"


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_sample_rates_that_are_none(decode: Decode, rate: int) -> None:
    assert refused(decode, riff(rate=rate)) == f"audio with a sample rate of {rate} Hz can't be decoded"


def test_rate_and_channels_may_change_in_the_middle(decode: Decode) -> None:
    kinds = [(8_000, "mono"), (48_000, "stereo"), (22_050, "mono")]
    files = [encoded(speech(), RATE, Encoding("adts", "aac", rate, layout)) for rate, layout in kinds]
    done = decode(b"".join(files))
    assert abs(done.audio.seconds - 3 * SPEECH_SECONDS) < 0.5
    for index in range(3):
        begin = index * len(speech())
        assert likeness(done.samples[begin:][: len(speech())], speech(), shift=0.3) > 0.9
    assert not done.audio.damaged


@pytest.mark.parametrize("name", ["ogg, opus", "ogg, vorbis", "webm", "aac", "flac", "mp3"])
def test_recordings_that_were_joined_are_heard_one_after_the_other(decode: Decode, name: str) -> None:
    done = decode(spoken(name) * 2)
    assert abs(done.audio.seconds - 2 * SPEECH_SECONDS) < 0.1
    second = done.samples[-len(speech()) :]
    assert likeness(second, speech()) > 0.93
    assert (done.audio.damaged, done.audio.gaps) == (False, 0)


# Times.


def test_a_file_that_begins_late_begins_at_once(decode: Decode) -> None:
    content = encoded(clicks(), 48_000, Encoding("webm", "libopus", 48_000, delay=700))
    done = decode(content)
    assert abs(done.audio.seconds - 4) < 0.05
    assert abs(onset(done.samples, CLICKS[1]) - CLICKS[1]) < 0.03


@pytest.mark.parametrize("delay", [0.0, 0.04, 0.7])
@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("mov", "pcm_s16le"), ("matroska", "libopus")])
def test_the_sound_of_a_video_is_where_it_is_seen(decode: Decode, container: str, codec: str, delay: float) -> None:
    done = decode(movie(clicks(), 48_000, container, codec, delay=delay))
    for click in CLICKS[1:]:
        assert abs(onset(done.samples, click + delay) - click - delay) < 0.03
    assert (done.audio.damaged, done.audio.gaps) == (False, 0)


def pieces(*times: int, size: int = 1600, cluster: int = 0) -> bytes:
    """Return a Matroska file of pieces of the speech, each at a time in milliseconds."""
    blocks = [block(each, speech()[n * size :][:size].tobytes()) for n, each in enumerate(times)]
    return matroska([track(1, "A_PCM/INT/LIT", rate=RATE)], blocks, cluster=cluster)


def test_a_gap_is_silence(decode: Decode) -> None:
    done = decode(pieces(0, 100, 200, 2300, 2400))
    assert done.audio.seconds == 2.5
    assert (done.samples[:4800] == speech()[:4800]).all()
    assert not done.samples[4800:36_800].any()
    assert (done.samples[36_800:] == speech()[4800:8000]).all()
    assert done.audio.gaps == pytest.approx(2)
    assert not done.audio.damaged


def test_gaps_do_not_add_up_to_a_shift(decode: Decode) -> None:
    times = [n * 350 + n // 3 for n in range(60)]
    done = decode(pieces(*times))
    for n, each in enumerate(times):
        assert (done.samples[each * 16 :][:1600] == speech()[n * 1600 :][:1600]).all()


@pytest.mark.parametrize(
    "times",
    [
        [n * 100 + (n * 37) % 50 for n in range(80)],  # jitter
        [n * 99 for n in range(80)],  # a slow clock
        [0] * 80,
        [n * -100 for n in range(80)],
        [n % 20 * 100 for n in range(80)],  # four recordings
    ],
)
def test_no_audio_is_left_out_or_cut_up_because_of_its_time_stamps(decode: Decode, times: list[int]) -> None:
    done = decode(pieces(*times))
    assert (done.samples == speech()[: 80 * 1600]).all()
    assert (done.audio.damaged, done.audio.gaps) == (False, 0)


def test_a_time_stamp_that_can_not_be_is_passed_over_and_told(decode: Decode) -> None:
    times = [0, 100, 200, 30_000, 400, 500]
    done = decode(pieces(*times), 20)
    assert (done.samples == speech()[: 6 * 1600]).all()
    assert done.audio.damaged


@pytest.mark.parametrize("cluster", [2**40, 2**53])
def test_time_may_begin_anywhere(decode: Decode, cluster: int) -> None:
    done = decode(pieces(0, 100, 200, cluster=cluster))
    assert (done.samples == speech()[:4800]).all()


# What else is in a file.


def test_the_first_of_several_tracks_that_can_be_decoded(decode: Decode) -> None:
    tracks = [track(1, "A_REAL/COOK"), track(2, "S_TEXT/UTF8", kind=17), track(3, "A_PCM/INT/LIT", rate=RATE)]
    blocks = [b"\x83" + block(n * 100, speech()[n * 1600 :][:1600].tobytes())[1:] for n in range(20)]
    done = decode(matroska(tracks, blocks))
    assert (done.samples == speech()[: 20 * 1600]).all()


def test_tags_and_pictures_do_not_matter(decode: Decode) -> None:
    title = b"TIT2\0\0\0\x05\0\0\x03\xff\xfe\xe9\xff"
    picture = b"APIC\0\0\x07\x68\0\0\0image/png\0\x03\0\x89PNG" + bytes(982)
    tags = title + picture
    header = b"ID3\x04\0\0" + bytes([0, 0, len(tags) >> 7, len(tags) & 127])
    done = decode(header + tags + spoken("mp3") + b"TAG" + b"\xe9" * 125)
    assert abs(done.audio.seconds - SPEECH_SECONDS) < 0.05
    assert not done.audio.damaged


REFUSED = {
    "the file is empty": b"",
    "the file is text, not audio": b"RIFF, which this is not",
    "the file is a PDF document, not audio": b"%PDF-1.7\n\xff",
    "the file is an image, not audio": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "the file is a ZIP archive, not audio": b"PK\x03\x04" + bytes(100),
    "the file is a program, not audio": b"\x7fELF" + bytes(100),
    "the file is no audio of a known format, or damaged at its start": bytes(5000),
    "the file is MP4 without its index, cut short or damaged, or of a kind that can't be read": spoken("m4a")[:-5000],
    "the file holds no audio, only video": video(),
    "the file holds no audio, only subtitle": matroska([track(1, "S_TEXT/UTF8", kind=17)], [block(0, b"text")]),
    "the file holds no audio": matroska([], []),
    "the file's audio is of a kind that can't be decoded here, or its description is damaged": matroska(
        [track(1, "A_REAL/COOK")], [block(0, bytes(100))]
    ),
    "no audio could be decoded from the file": riff(data=b"", stated=0),
}


@pytest.mark.parametrize(("words", "content"), REFUSED.items(), ids=REFUSED)
def test_what_is_no_audio_is_refused_in_words(decode: Decode, words: str, content: bytes) -> None:
    assert refused(decode, content) == words


def test_text_may_end_inside_a_character(decode: Decode) -> None:
    content = "ü".encode() * audio_main.HEAD
    assert refused(decode, content[1:]).startswith("the file is no audio")
    assert refused(decode, b"x" + content) == "the file is text, not audio"


# Damage.


CUT = ["wav", "wav, mu-law", "wav, ms adpcm", "flac", "mp3", "mp4", "mp4 in fragments", "aac", "webm", "webm, vorbis"]


@pytest.mark.parametrize("name", [*CUT, "mka, aac", "mka, pcm", "amr", "caf", "aiff", "au", "rf64", "w64"])
def test_a_file_that_was_cut_short_is_decoded_as_far_as_it_goes(decode: Decode, name: str) -> None:
    content = spoken(name)
    done = decode(content[: len(content) * 2 // 3])
    assert 6 < done.audio.seconds < 8
    assert likeness(done.samples, speech()[: done.audio.samples]) > 0.93
    assert done.audio.damaged


@pytest.mark.parametrize("name", ["mp3 without a tag", "ogg, opus", "ogg, vorbis", "webm of a browser"])
def test_a_file_that_does_not_tell_its_length_may_end_anywhere(decode: Decode, name: str) -> None:
    content = spoken(name)
    done = decode(content[: len(content) * 2 // 3])
    assert 6 < done.audio.seconds < 8
    assert likeness(done.samples, speech()[: done.audio.samples]) > 0.93


@pytest.mark.parametrize("name", ["mp3", "m4a", "mp4", "webm", "ogg, opus", "ogg, vorbis", "flac", "aac", "mka, aac"])
def test_a_stretch_of_rubbish_costs_a_stretch_of_audio(decode: Decode, name: str) -> None:
    content = spoken(name)
    third = len(content) // 3
    done = decode(content[:third] + bytes(len(content) // 20) + content[third + len(content) // 20 :])
    assert done.audio.damaged or done.audio.gaps > 0.3
    assert likeness(done.samples[:48_000], speech()[:48_000]) > 0.93
    if name not in ("mp3", "aac"):  # there nothing tells when a frame is heard
        assert abs(done.audio.seconds - SPEECH_SECONDS) < 0.1
        assert likeness(done.samples[-48_000:], speech()[-48_000:]) > 0.8


@pytest.mark.parametrize("stated", [0, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_wav_file_of_unknown_length_is_whole(decode: Decode, stated: int) -> None:
    assert not decode(riff(stated=stated)).audio.damaged


# Limits.


LONG = {
    "told": silent_flac(1, stated=10 * 3600),
    "flac": silent_flac(100),
    "ogg": silent_opus("ogg", 300),
    "webm": silent_opus("webm", 300),
    "mp3": (b"\xff\xf3\x14\xc4" + bytes(20)) * 100_000,
    "one frame": matroska([track(1, "A_PCM/INT/LIT", rate=1000)], [block(0, bytes(200_000))]),
    "wav": riff(rate=1000, bits=8, data=b"\x80" * 3_600_000),
}


@pytest.mark.parametrize("content", LONG.values(), ids=LONG)
def test_audio_that_is_too_long_is_refused_as_soon_as_that_is_known(
    decode: Decode, content: bytes, tmp_path: Path
) -> None:
    started = time.monotonic()
    assert refused(decode, content) == "the audio is longer than 60 s; send it in parts"
    assert time.monotonic() - started < 2
    assert (tmp_path / "target").stat().st_size <= 2 * 60 * SAMPLE_RATE


def test_audio_as_long_as_allowed(decode: Decode) -> None:
    assert decode(spoken("wav"), 11).audio.seconds == 11


@pytest.fixture
def web() -> Iterator[tuple[str, list[bytes]]]:
    """The address of a server that knows nothing, and the requests to it."""
    requests: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            requests.append(self.request.recv(1000))
            self.request.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/audio.ts", requests
        server.shutdown()
        thread.join()


def test_a_playlist_opens_no_address(decode: Decode, web: tuple[str, list[bytes]], tmp_path: Path) -> None:
    address, requests = web
    playlist = tmp_path / "list.m3u8"
    head = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10,\n"
    playlist.write_text(f"{head}{address}\n#EXT-X-ENDLIST\n")
    assert refused(decode, playlist.read_bytes()) == "the file is text, not audio"
    assert not requests
    with pytest.raises(av.error.InvalidDataError):
        av.open(str(playlist), options={"protocol_whitelist": "file,http,tcp"})
    assert requests  # so it would have worked


def test_a_playlist_opens_no_file(decode: Decode, tmp_path: Path) -> None:
    other, playlist = tmp_path / "other", tmp_path / "list"
    other.write_bytes(spoken("flac"))
    playlist.write_text(f"ffconcat version 1.0\nfile '{other}'\n")
    assert refused(decode, playlist.read_bytes()) == "the file is text, not audio"
    with av.open(str(playlist), options={"safe": "0"}) as container:
        assert next(container.decode(audio=0)).samples  # so it would have worked


DATA_ELSEWHERE = {"enable_drefs": "1", "use_absolute_path": "1"}


@pytest.mark.parametrize("options", [{}, DATA_ELSEWHERE], ids=["as it is", "if FFmpeg were told to"])
def test_a_reference_opens_no_file(
    decode: Decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    other, content = tmp_path / "other", tmp_path / "content"
    other.write_bytes(spoken("mov"))
    content.write_bytes(external_data(spoken("mov"), str(other)))
    monkeypatch.setattr(audio_main, "_OPTIONS", audio_main._OPTIONS | options)
    assert refused(decode, content.read_bytes()) == "no audio could be decoded from the file"
    with av.open(str(content), options=DATA_ELSEWHERE) as container:
        assert next(container.decode(audio=0)).samples  # so it would have worked


# Processes.


LONG_FLAC = silent_flac(20 * 3600)  # some seconds to decode


class Hardened(AudioDecoder):
    """Its processes take more after a bad file, and tell how much memory they had."""

    def __init__(self) -> None:
        super().__init__(longest=60, time_limit=20)
        self._module = "hostile_child"


@dataclass
class Client:
    """Sends files to a decoder, in a folder of its own."""

    decoder: AudioDecoder
    folder: Path

    async def send(self, content: bytes) -> Audio:
        source = self.folder / "source"
        source.write_bytes(content)
        return await self.decoder.decode(source, self.folder / "target")

    async def outcome(self, content: bytes) -> Audio | str:
        """Return what came of a file: the audio, or why not."""
        try:
            return await self.send(content)
        except InvalidRequest as error:
            return f"{error.param}: {error.message}"

    def samples(self) -> np.ndarray:
        return np.fromfile(self.folder / "target", "<i2")


SPEECH = Audio(176_000, "wav", "pcm_s16le", 0, False)


def test_hostile_files_do_no_harm(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two processes take them all, none for long, and at last decode good audio as at first."""
    files = hostile_files()
    peaks: list[int] = []

    async def send_all(client: Client) -> int:
        count = 0
        for name, content in files:
            result = await client.outcome(content)
            assert isinstance(result, Audio) or not re.search("crash|longer than 20 s", result), name
            peaks.append(int((client.folder / "target.peak").read_text()))
            count += 1
        return count

    async def scenario() -> None:
        async with Hardened() as decoder:
            await asyncio.gather(decoder.warm(), decoder.warm())
            pids = decoder.pids
            clients = [Client(decoder, Path(mkdtemp(dir=tmp_path))) for _ in range(2)]
            assert sum(await asyncio.gather(*map(send_all, clients))) > 300
            for client in clients:
                assert await client.send(spoken("wav")) == SPEECH
                assert (client.samples() == speech()).all()
            assert decoder.pids == pids

    asyncio.run(scenario())
    assert max(peaks) < 200 * 2**20
    assert capfd.readouterr() == ("", "")


def test_a_process_says_what_this_one_says(decode: Decode, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AudioDecoder(longest=60) as decoder:
            client = Client(decoder, tmp_path)
            for name in ("mp3", "webm", "mp4"):
                assert await client.send(spoken(name)) == decode(spoken(name)).audio
            assert await client.outcome(video()) == "file: the file holds no audio, only video"

    asyncio.run(scenario())


def test_good_files_share_a_process_and_a_bad_one_ends_it(tmp_path: Path) -> None:
    cut = spoken("wav")[:200_000]

    async def scenario() -> None:
        async with AudioDecoder(longest=60) as decoder:
            client = Client(decoder, tmp_path)
            assert await client.send(spoken("wav")) == SPEECH
            first = decoder.pids
            assert await client.send(spoken("wav")) == SPEECH
            assert decoder.pids == first
            assert (await client.send(cut)).damaged
            assert not decoder.pids
            await decoder.warm()
            assert await client.outcome(b"text") == "file: the file is text, not audio"
            assert not decoder.pids

    asyncio.run(scenario())


def test_a_file_that_takes_too_long(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AudioDecoder(longest=1e6, time_limit=0.2) as decoder:
            client = Client(decoder, tmp_path)
            await decoder.warm()
            started = time.monotonic()
            assert await client.outcome(LONG_FLAC) == "file: the audio took longer than 0.2 s to decode"
            assert time.monotonic() - started < 5
            assert not decoder.pids

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not keep to a limit of the address space")
def test_a_file_that_needs_too_much_memory(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with AudioDecoder(longest=60) as decoder:
            client = Client(decoder, tmp_path)
            words = f"file: the audio needed more than {MEMORY_LIMIT} MB of memory to decode"
            assert await client.outcome(huge_tables(spoken("m4a"))) == words
            assert await client.send(spoken("wav")) == SPEECH

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        (signal.SIGSEGV, "the audio could not be decoded: it crashed the decoder (signal 11)"),
        (signal.SIGKILL, f"the audio needed more than {MEMORY_LIMIT} MB of memory to decode"),
    ],
)
def test_a_process_that_dies_fails_only_its_file(tmp_path: Path, ending: signal.Signals, reason: str) -> None:
    async def scenario() -> None:
        async with AudioDecoder(longest=1e6) as decoder:
            client = Client(decoder, tmp_path)
            await decoder.warm()
            (pid,) = decoder.pids
            task = asyncio.create_task(client.outcome(LONG_FLAC))
            await asyncio.sleep(0)  # sends the file
            os.kill(pid, ending)
            assert await task == f"file: {reason}"
            assert await client.send(spoken("wav")) == SPEECH

    asyncio.run(scenario())


@pytest.mark.skipif(sys.platform != "linux", reason="there is no device that is always full")
@pytest.mark.parametrize("samples", [100, 100_000])
def test_samples_that_can_not_be_written(tmp_path: Path, samples: int) -> None:
    async def scenario() -> None:
        (tmp_path / "source").write_bytes(wav(speech()[:samples]))
        async with AudioDecoder(longest=60) as decoder:
            with pytest.raises(Unavailable, match=r"can't be .*written: No space left on device"):
                await decoder.decode(tmp_path / "source", Path("/dev/full"))
            for source, target in (("source", "nowhere/target"), ("nowhere", "target")):
                with pytest.raises(Unavailable, match="the audio can't be read or written: No such file"):
                    await decoder.decode(tmp_path / source, tmp_path / target)

    asyncio.run(scenario())


def test_files_that_run_or_wait_when_it_closes_fail_as_unavailable(tmp_path: Path) -> None:
    async def scenario() -> None:
        decoder = AudioDecoder(1, longest=1e6)
        client = Client(decoder, tmp_path)
        await decoder.warm()
        running, waiting = (asyncio.create_task(client.send(LONG_FLAC)) for _ in range(2))
        await asyncio.sleep(0)  # sends the first; the second waits for the process
        await decoder.aclose()
        assert not decoder.pids
        for task in (running, waiting, asyncio.create_task(client.send(b""))):
            with pytest.raises(Unavailable, match="the audio decoder is shut down"):
                await task

    asyncio.run(scenario())


@pytest.mark.parametrize(("module", "absent"), [("audio", ["av", "numpy"]), ("audio_main", ["numpy"])])
def test_neither_side_loads_what_it_has_no_use_for(module: str, absent: list[str]) -> None:
    check = f"import sys, llamaserve.speech.{module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
