"""Files that somebody may upload as audio to do harm, or by mistake: what must be refused, or decoded, without harm."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import cache

import av
import numpy as np
from audio_files import RATE, Encoding, encoded, speech, spoken
from av.container import Flags

File = tuple[str, bytes]

DAY = 86_400  # seconds
_CUT = (0.002, 0.02, 0.3, 0.7, 0.999)
_BASES = (
    *("wav", "wav, ms adpcm", "flac", "mp3", "m4a", "mp4", "mp4 in fragments", "aac", "ogg, opus"),
    *("ogg, vorbis", "webm", "mka, aac", "amr", "3gp, amr", "aiff", "wma", "mpeg"),
)


def hostile_files() -> Iterator[File]:
    """Yield files by name, the same ones each time."""
    yield from other_files()
    yield from beginnings()
    yield from cut_files()
    yield from changed_files()
    yield from wav_headers()
    yield from long_files()
    yield from containers()
    yield from time_stamps()


# No audio.


def other_files() -> Iterator[File]:
    """Yield what is no audio at all."""
    dice = random.Random(1)
    yield "empty", b""
    for byte in (0, 0x49, 0xFF):
        yield f"one byte {byte:#x}", bytes([byte])
    for size in (2, 100, 5_000, 1_000_000):
        yield f"{size} random bytes", dice.randbytes(size)
    for byte in (0, 0x20, 0x55, 0xFF):
        yield f"nothing but {byte:#x}", bytes([byte]) * 300_000
    yield from texts()
    yield "PNG", b"\x89PNG\r\n\x1a\n" + dice.randbytes(2000)
    yield "JPEG", b"\xff\xd8\xff\xe0\0\x10JFIF\0" + dice.randbytes(2000)
    yield "GIF", b"GIF89a\x01\0\x01\0\x80\0\0" + bytes(200)
    yield "PDF", b"%PDF-1.7\n" + dice.randbytes(2000)
    yield "ELF", b"\x7fELF\x02\x01\x01" + bytes(500)
    yield "SQLite", b"SQLite format 3\0" + bytes(4000)
    yield "gzip bomb", gzip.compress(bytes(30_000_000), mtime=0)
    yield "zip", _zipped("speech.wav", spoken("wav"))


def texts() -> Iterator[File]:
    """Yield texts, among them those that tell a player to open something else."""
    other = "/etc/passwd"
    yield "text", b"This is no audio.\n" * 100
    yield "UTF-16 text", ("This is no audio.\n" * 100).encode("utf-16")
    yield "HTML", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "JSON", json.dumps({"audio": "none"}).encode()
    yield "base64 of a WAV file", b"UklGRiQAAABXQVZFZm10IBAAAAABAAEA"
    yield "HLS", f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{other}\n#EXT-X-ENDLIST\n".encode()
    yield "HLS over HTTP", b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:1\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n"
    yield "HLS of files", f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10.0,\nconcat:{other}|{other}\n".encode()
    yield "ffconcat", f"ffconcat version 1.0\nfile '{other}'\n".encode()
    yield "SDP", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=-\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n"
    yield "DASH", b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period></Period></MPD>'
    yield "FFmpeg metadata", b";FFMETADATA1\ntitle=a\n[CHAPTER]\nTIMEBASE=1/1\nSTART=0\nEND=999999999\n"
    yield "SubRip", b"1\n00:00:00,000 --> 00:00:10,000\nsubtitles\n\n" * 50
    yield "WebVTT", b"WEBVTT\n\n00:00.000 --> 00:10.000\nsubtitles\n\n"
    yield "lavfi", b"sine=frequency=440:duration=100000"


def _zipped(name: str, content: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), content)
    return target.getvalue()


def beginnings() -> Iterator[File]:
    """Yield the marks of formats, with nothing or rubbish after them."""
    marks = {
        "RIFF": b"RIFF\xff\xff\xff\xffWAVE",
        "RF64": b"RF64\xff\xff\xff\xffWAVEds64" + b"\xff" * 40,
        "FLAC": b"fLaC\0\0\0\x22" + bytes(34),
        "FLAC with a picture": b"fLaC\x86\xff\xff\xff\0\0\0\x03\xff\xff\xff\xff",
        "ID3": b"ID3\x04\0\0\x7f\x7f\x7f\x7f",
        "MP3": b"\xff\xfb\x90\x64",
        "AAC": b"\xff\xf1\x50\x80\x03\xff\xfc",
        "Ogg": b"OggS\0\x02" + bytes(20) + b"\x01\x13OpusHead\x01\x01",
        "Ogg of Vorbis": b"OggS\0\x02" + bytes(20) + b"\x01\x1e\x01vorbis\0\0\0\0\xff\xff\xff\xff\x7f",
        "Matroska": b"\x1a\x45\xdf\xa3\x01\xff\xff\xff\xff\xff\xff\xff",
        "MP4": b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42",
        "AMR": b"#!AMR\n",
        "AMR wide": b"#!AMR-WB\n",
        "AIFF": b"FORM\x7f\xff\xff\xffAIFFCOMM",
        "CAF": b"caff\0\x01\0\0desc" + b"\xff" * 8,
        "AU": b".snd" + b"\xff" * 20,
        "ASF": bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c") + b"\xff" * 14,
        "MPEG": b"\0\0\x01\xba\x44\0\x04\0\x04\x01",
    }
    dice = random.Random(2)
    for name, mark in marks.items():
        yield f"{name}, the mark alone", mark
        yield f"{name}, then nulls", mark + bytes(20_000)
        yield f"{name}, then rubbish", mark + dice.randbytes(20_000)


# Audio that is damaged.


def cut_files() -> Iterator[File]:
    """Yield good files cut short."""
    for name in _BASES:
        whole = spoken(name)
        for part in _CUT:
            yield f"{name}, {part:.1%} of it", whole[: int(len(whole) * part)]


def changed_files() -> Iterator[File]:
    """Yield good files with other bytes in them: a few in the header, a few anywhere, or a whole stretch."""
    dice = random.Random(3)
    for name in _BASES:
        for kind, count, end in (("head", 3, 200), ("head", 12, 600), ("body", 30, None), ("body", 1000, None)):
            content = bytearray(spoken(name))
            for _ in range(count):
                content[dice.randrange(end or len(content))] = dice.randrange(256)
            yield f"{name}, {count} bytes of its {kind} changed", bytes(content)
        content = bytearray(spoken(name))
        content[len(content) // 3 : len(content) // 2] = dice.randbytes(len(content) // 2 - len(content) // 3)
        yield f"{name}, a sixth of it rubbish", bytes(content)
        yield f"{name}, twice", spoken(name) * 2


# Headers that lie.


def wav_headers() -> Iterator[File]:
    """Yield WAV files with numbers that no recorder writes."""
    for channels in (0, 3, 9, 64, 65, 255, 512, 1000, 65535):
        yield f"wav, {channels} channels", riff(channels=channels)
    for rate in (0, 1, 7, 999, 768_001, 2**24, 2**31 - 1, 2**31, 2**32 - 1):
        yield f"wav, {rate} Hz", riff(rate=rate)
    for bits in (0, 1, 7, 12, 33, 64, 65535):
        yield f"wav, {bits} bits", riff(bits=bits)
    for align in (0, 1, 65535):
        yield f"wav, blocks of {align} bytes", riff(align=align)
    for tag in (2, 0x11, 0x31, 0x50, 0x55, 0x161, 0x162, 0x2000, 0x2001, 0xF1AC, 0xFFFE, 0xFFFF):
        yield f"wav, codec {tag:#x}", riff(tag=tag)
    for size in (0, 1, 2**31 - 1, 2**32 - 1):
        yield f"wav, data of {size} bytes", riff(stated=size)
    yield "wav, no data", riff()[:36]
    yield "wav in lists", b"RIFF\xff\xff\xff\xffWAVE" + b"LIST\xff\xff\xff\x7fINFO" * 5000
    yield "wav in wav", riff(data=riff() * 20)


def riff(
    *,
    channels: int = 1,
    rate: int = 8000,
    bits: int = 16,
    align: int | None = None,
    tag: int = 1,
    stated: int | None = None,
    data: bytes = bytes(range(256)) * 256,
) -> bytes:
    """Return a WAV file with any numbers in its header."""
    block = channels * bits // 8 if align is None else align
    header = struct.pack("<HHIIHH", tag, channels, rate, rate * block & 2**32 - 1, block & 0xFFFF, bits)
    size = struct.pack("<I", len(data) if stated is None else stated)
    return b"RIFF" + struct.pack("<I", len(data) + 36) + b"WAVEfmt \x10\0\0\0" + header + b"data" + size + data


# Much in a small file.


def long_files() -> Iterator[File]:
    """Yield small files with hours of audio in them."""
    yield "amr, an hour of lost frames", b"#!AMR\n" + b"\x7c" * (3600 * 50)
    yield "mp3, ten hours of silence", (b"\xff\xf3\x14\xc4" + bytes(20)) * (10 * 3600 * 1000 // 24)
    yield "flac, ten hours of silence", silent_flac(10 * 3600)
    yield "flac, ten hours that it says it has", silent_flac(60, stated=10 * 3600)
    yield "ogg, two hours of silence", silent_opus("ogg", 2 * 3600)
    yield "webm, two hours of silence", silent_opus("webm", 2 * 3600)
    yield "wav, two hours at 1 kHz", riff(rate=1000, bits=8, data=b"\x80" * (2 * 3600 * 1000))
    yield "wav, a day at 1 Hz", riff(rate=1, bits=8, data=b"\x80" * DAY)
    yield "m4a, samples of a day", with_sample_times(spoken("m4a"), 44_100 * DAY)
    yield "m4a, samples of no time", with_sample_times(spoken("m4a"), 0)
    yield "m4a, an edit of a day before it", with_first_edit(spoken("m4a"), 1000 * DAY, -1)
    yield "m4a, an edit that begins after it", with_first_edit(spoken("m4a"), 11_000, 2**31 - 1)


def silent_flac(seconds: int, *, stated: int | None = None, rate: int = 16_000) -> bytes:
    """Return FLAC of silence, in frames of four seconds and thirteen bytes."""
    block = 65_535
    total = rate * (seconds if stated is None else stated)
    info = struct.pack(">HH", block, block) + bytes(6) + (rate << 44 | 15 << 36 | total).to_bytes(8, "big") + bytes(16)
    frames = (_flac_frame(number, block) for number in range(rate * seconds // block + 1))
    return b"fLaC\x80\0\0\x22" + info + b"".join(frames)


def _flac_frame(number: int, block: int) -> bytes:
    coded = chr(number).encode() if number else b"\0"
    header = b"\xff\xf8\x70\x08" + coded + struct.pack(">H", block - 1)
    frame = header + bytes([_crc(header, 8, 0x07)]) + b"\0\0\0"
    return frame + struct.pack(">H", _crc(frame, 16, 0x8005))


def _crc(content: bytes, bits: int, polynomial: int) -> int:
    value, table = 0, _crc_table(bits, polynomial)
    for byte in content:
        value = (value << 8 ^ table[value >> bits - 8 ^ byte]) & (1 << bits) - 1
    return value


@cache
def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for value in (byte << bits - 8 for byte in range(256)):
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> bits - 1 else 0)) & (1 << bits) - 1
        table.append(value)
    return table


def silent_opus(container: str, seconds: int) -> bytes:
    """Return Opus of silence, in packets of 120 ms and two bytes."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        file.flags |= Flags.bitexact.value
        stream = file.add_stream("libopus", 48_000, layout="mono")
        stream.codec_context.open()
        for index in range(seconds * 100 // 12):
            packet = av.Packet(b"\x0b\x06")  # six frames of 20 ms, all of them missing
            packet.stream, packet.time_base = stream, stream.codec_context.time_base
            packet.pts = packet.dts = index * 5760
            packet.duration = 5760
            file.mux(packet)
    return target.getvalue()


def with_sample_times(mp4: bytes, ticks: int) -> bytes:
    """Return an MP4 file in which each sample lasts so long."""
    place = mp4.index(b"stts")
    count = int.from_bytes(mp4[place + 8 : place + 12], "big")
    entries = b"".join(mp4[place + 12 + 8 * n :][:4] + struct.pack(">I", min(ticks, 2**31 - 1)) for n in range(count))
    return mp4[: place + 12] + entries + mp4[place + 12 + 8 * count :]


def with_first_edit(mp4: bytes, duration: int, start: int) -> bytes:
    """Return an MP4 file with other numbers in its edit list, of which a start of -1 is a pause."""
    place = mp4.index(b"elst") + 12
    return mp4[:place] + struct.pack(">Ii", min(duration, 2**31 - 1), start) + mp4[place + 8 :]


# Containers.


def containers() -> Iterator[File]:
    """Yield containers that hold something else, too much, or themselves."""
    yield "video alone", video()
    yield "mkv, subtitles alone", matroska([track(1, "S_TEXT/UTF8", kind=17)], [block(0, b"subtitle")])
    yield "mkv, no tracks", matroska([], [])
    yield "mkv, unknown codec", matroska([track(1, "A_WHATEVER")], [block(0, bytes(100))])
    for count in (64, 1000, 5000):
        yield f"mkv, {count} tracks", matroska([track(n, "A_PCM/INT/LIT") for n in range(1, count + 1)], [])
    yield "mkv, a block of 10 MB", matroska([track(1, "A_PCM/INT/LIT")], [block(0, bytes(10_000_000))])
    yield (
        "mkv, compressed blocks",
        matroska([track(1, "A_PCM/INT/LIT", compressed=True)], [block(0, zlib.compress(bytes(50_000_000)))]),
    )
    yield "mkv of mkv", nested(b"\x18\x53\x80\x67", 5000)
    yield "mp4 of mp4", b"\0\0\0\x10ftypisom\0\0\0\0" + nested_atoms(5000)
    yield "mp4, huge tables", huge_tables(spoken("m4a"))
    yield "mp4, index at the end, cut", spoken("m4a")[:-300]
    yield "mp4, a compressed index", compressed_index(40_000_000)
    yield "mp4, the data is elsewhere", external_data(spoken("mov"), "/etc/passwd")
    yield "aac, other rates and channels in each frame", changing_aac()
    yield "flac, huge comments", b"fLaC\x04\xff\xff\xff" + bytes(16_777_215) + b"\x80\0\0\x22" + bytes(34)
    yield "ID3 in ID3", (b"ID3\x04\0\0\0\0\x08\0" + bytes(1024)) * 300
    yield "mp3 after 16 MB of ID3", b"ID3\x04\0\0\x07\x7f\x7f\x7f" + bytes(16 * 2**20 - 1) + spoken("mp3")


def video() -> bytes:
    """Return a video without sound."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        file.flags |= Flags.bitexact.value
        stream = file.add_stream("mpeg4", 10, width=64, height=64, pix_fmt="yuv420p")
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((96, 64), np.uint8), "yuv420p")))
        file.mux(stream.encode(None))
    return target.getvalue()


def element(mark: str, *parts: bytes) -> bytes:
    """Return an element of a Matroska file."""
    content = b"".join(parts)
    return bytes.fromhex(mark) + (1 << 56 | len(content)).to_bytes(8, "big") + content


def number(mark: str, value: int) -> bytes:
    """Return an element that holds a number."""
    return element(mark, value.to_bytes(8, "big"))


def track(index: int, codec: str, *, kind: int = 2, rate: float = 8000, compressed: bool = False) -> bytes:
    """Return a Matroska track: audio of one channel and 16 bits."""
    audio = element("e1", element("b5", struct.pack(">d", rate)), number("9f", 1), number("6264", 16))
    coding = element("6d80", element("6240", element("5034", number("4254", 0)))) if compressed else b""
    return element(
        "ae",
        number("d7", index),
        number("73c5", index),
        number("83", kind),
        element("86", codec.encode()),
        audio,
        coding,
    )


def matroska(tracks: list[bytes], blocks: list[bytes], *, cluster: int = 0, tick: int = 1_000_000) -> bytes:
    """Return a Matroska file with one cluster, in ticks of nanoseconds."""
    head = element("1a45dfa3", element("4282", b"matroska"), number("4287", 4), number("4285", 2))
    info = element("1549a966", number("2ad7b1", tick))
    data = element("1f43b675", number("e7", cluster), *(element("a3", block) for block in blocks))
    return head + element("18538067", info, element("1654ae6b", *tracks), data)


def block(time: int, data: bytes) -> bytes:
    """Return a block of the first track, at a time in ticks after its cluster's."""
    return b"\x81" + struct.pack(">h", time) + b"\x80" + data


def nested(mark: bytes, depth: int) -> bytes:
    """Return elements of unknown size, each inside the one before."""
    return element("1a45dfa3", element("4282", b"webm")) + (mark + b"\x01" + b"\xff" * 7) * depth


def nested_atoms(depth: int) -> bytes:
    """Return MP4 atoms, each inside the one before."""
    return b"".join(struct.pack(">I", 8 * (depth - level)) + b"moov" for level in range(depth))


def huge_tables(mp4: bytes) -> bytes:
    """Return an MP4 file whose tables have more entries than there can be."""
    for table in (b"stts", b"stsc", b"stco"):
        place = mp4.index(table) + 8
        mp4 = mp4[:place] + b"\x0f\xff\xff\xff" + mp4[place + 4 :]
    place = mp4.index(b"stsz") + 12
    return mp4[:place] + b"\x0f\xff\xff\xff" + mp4[place + 4 :]


def atom(name: bytes, *parts: bytes) -> bytes:
    """Return an MP4 atom."""
    content = b"".join(parts)
    return struct.pack(">I", len(content) + 8) + name + content


def compressed_index(size: int) -> bytes:
    """Return an MP4 file whose index is compressed, and is much."""
    data = atom(b"cmvd", struct.pack(">I", size), zlib.compress(atom(b"free", bytes(size - 8))))
    return atom(b"ftyp", b"qt  \0\0\0\0qt  ") + atom(b"moov", atom(b"cmov", atom(b"dcom", b"zlib"), data))


def external_data(mov: bytes, path: str) -> bytes:
    """Return a QuickTime file whose samples are in another file, as far as it says."""
    place = mov.index(b"dref") - 4
    old = int.from_bytes(mov[place : place + 4], "big")
    encoded_path = path.encode()
    alias = (
        bytes(10) + bytes(140) + struct.pack(">HH", 2, len(encoded_path)) + encoded_path + bytes(len(encoded_path) % 2)
    )
    alias += struct.pack(">Hh", 0, 0)[:2] + b"\xff\xff\0\0"
    new = atom(b"dref", struct.pack(">II", 0, 1), atom(b"alis", bytes(4), alias))
    changed = mov[:place] + new + mov[place + old :]
    return _grown(changed, len(new) - old)


def _grown(mov: bytes, more: int) -> bytes:
    """Make the atoms around the reference longer."""
    for name in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        place = mov.rindex(name, 0, mov.index(b"dref")) - 4
        mov = mov[:place] + struct.pack(">I", int.from_bytes(mov[place : place + 4], "big") + more) + mov[place + 4 :]
    return mov


def changing_aac() -> bytes:
    """Return AAC of which each frame has another sample rate or number of channels than the one before."""
    kinds = [(8000, "mono"), (96_000, "stereo"), (11_025, "5.1"), (48_000, "mono")]
    files = [
        adts_frames(encoded(speech()[:RATE], RATE, Encoding("adts", "aac", rate, layout))) for rate, layout in kinds
    ]
    return b"".join(b"".join(group) for group in zip(*files, strict=False)) * 20


def adts_frames(content: bytes) -> list[bytes]:
    """Return the frames of an AAC file."""
    found, place = [], 0
    while place < len(content):
        size = int.from_bytes(content[place + 3 : place + 6], "big") >> 5 & 0x1FFF
        found.append(content[place : place + size])
        place += size
    return found


# Time stamps.


def time_stamps() -> Iterator[File]:
    """Yield Matroska files of audio at times that can't be."""
    one = [track(1, "A_PCM/INT/LIT", rate=16_000)]

    def blocks(*times: int) -> list[bytes]:
        return [block(each, speech()[:160].tobytes()) for each in times]

    yield "mkv, at the end of time", matroska(one, blocks(0, 10, 20), cluster=2**62)
    yield "mkv, at the end of time in long ticks", matroska(one, blocks(0, 10, 20), cluster=2**55, tick=2**40)
    yield "mkv, in ticks of nothing", matroska(one, blocks(0, 10, 20), tick=0)
    yield "mkv, all at once", matroska(one, blocks(*[0] * 2000))
    yield "mkv, backwards", matroska(one, blocks(*range(20_000, 0, -10)))
    yield "mkv, to and fro", matroska(one, blocks(*[-32_768, 32_767] * 1000))
    yield "mkv, before its beginning", matroska(one, blocks(*range(-20_000, 0, 10)))
    yield "mkv, a gap of half a minute after each piece", matroska(one, blocks(*[32_000, 0] * 5000))
    yield "mkv, far between", matroska(one, blocks(0, 1, 2, 3), tick=3600 * 10**9)
