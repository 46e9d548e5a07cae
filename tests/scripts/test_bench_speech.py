"""The recordings, those who listen to them, and the rows that follow."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Iterator, Mapping
from email import message_from_bytes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark import hearing, speech
from benchmark.client import FORM, Client, Stream, Unreachable, form
from benchmark.contenders import HttpServer
from benchmark.hearing import Clip, SpeechServer
from benchmark.lab import OURS, NotPossible
from benchmark.processes import LineProcess, StartFailed, running
from benchmark.results import Results
from running_server import RunningServer, wait_until


def spoken(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@pytest.fixture(scope="module")
def samples() -> bytes:
    return hearing.read_speech()


@pytest.fixture
def listener(speech_server: RunningServer) -> SpeechServer:
    return SpeechServer(HttpServer(OURS, f"{speech_server.url}/v1", None), "whisper-tiny.en")


def test_a_clip_has_the_samples_again_and_again_with_pauses(samples: bytes) -> None:
    for times, seconds in ((1, 11.0), (5, 60.0)):
        clip = hearing.repeated(samples, times)
        assert clip.seconds == pytest.approx(seconds, abs=0.1)
        with wave.open(io.BytesIO(clip.wav)) as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
            content = file.readframes(file.getnframes())
        assert content.count(samples) == times
        assert len(content) / 2 / 16_000 == clip.seconds


def test_a_form_is_what_a_mail_parser_takes_it_for() -> None:
    body = form({"model": "tiny", "stream": "true"}, b"\x00RIFF\r\n--")
    message = message_from_bytes(f"Content-Type: {FORM}\r\n\r\n".encode() + body)
    parts = {part.get_param("name", header="content-disposition"): part for part in message.get_payload()}
    assert {name: part.get_payload(decode=True) for name, part in parts.items()} == {
        "model": b"tiny",
        "stream": b"true",
        "file": b"\x00RIFF\r\n--",
    }
    assert parts["file"].get_filename() == "audio.wav"


@pytest.mark.parametrize("threads", [1, None])
def test_the_library_alone_hears_what_the_server_hears(
    samples: bytes, speech_model: Path, listener: SpeechServer, threads: int | None
) -> None:
    clip = hearing.repeated(samples, 1)
    with hearing.bare_call("bare", speech_model, threads) as bare:
        alone = bare.hear(clip)
    ours = listener.hear(clip)
    assert spoken(alone.text) == spoken(ours.text) == spoken(hearing.SPOKEN)
    assert ours.language == "english"
    assert alone.seconds > 0


def test_the_server_is_told_the_language_of_clips_and_of_nothing_else(
    samples: bytes, listener: SpeechServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, upload = [], Client.upload

    def noted(client: Client, path: str, fields: Mapping[str, str], file: bytes) -> Stream:
        sent.append(fields.get("language"))
        return upload(client, path, fields, file)

    monkeypatch.setattr(Client, "upload", noted)
    clip = hearing.repeated(samples, 1)
    listener.hear(clip)
    with listener.listening(clip):
        pass
    listener.transcribe(clip.wav)
    assert sent == ["en", "en", None]


def test_the_library_is_told_the_same_language(speech_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = pytest.importorskip("_pywhispercpp")
    from benchmark import bare_speech

    told, defaults = [], native.whisper_full_default_params

    def other_defaults(strategy: Any) -> Any:
        params = defaults(strategy)
        params.language = "fr"
        return params

    def noted(_context: Any, params: Any, _samples: Any, _count: int) -> int:
        told.append(params.language)
        return 0

    monkeypatch.setattr(native, "whisper_full_default_params", other_defaults)
    monkeypatch.setattr(native, "whisper_full", noted)
    assert bare_speech.plain(str(speech_model), 1)(np.zeros(16_000, np.float32)) == []
    assert told == [hearing.LANGUAGE]


def test_a_transcription_ends_with_its_block(
    samples: bytes, listener: SpeechServer, speech_server: RunningServer
) -> None:
    with listener.listening(hearing.repeated(samples, 25)) as stream:
        assert stream.flowing
        assert not stream.done
        assert speech_server.running == 1
    wait_until(lambda: speech_server.running == 0)


def test_refusals_are_told(listener: SpeechServer) -> None:
    with pytest.raises(Unreachable, match=r"status 400: .*empty"):
        listener.hear(Clip(b"", 1.0))
    with pytest.raises(Unreachable, match=r"status 400: .*English"):
        listener.transcribe(b"RIFF", translate=True)


@pytest.fixture
def echo() -> Iterator[LineProcess]:
    with running(["sh", "-c", "echo 1; read line; echo \"$line\"; echo 'out of ideas' >&2"]) as started:
        yield LineProcess("echo", *started)


def test_a_process_that_has_ended_is_told_with_its_last_words(echo: LineProcess) -> None:
    echo.wait_until_started()
    assert echo.command(do="say", what=[1, "two"]) == {"do": "say", "what": [1, "two"]}
    for _ in range(2):
        with pytest.raises(StartFailed, match="the echo ended: out of ideas"):
            echo.command(do="say")


def test_a_side_that_is_done_before_the_other_makes_no_figure(samples: bytes, listener: SpeechServer) -> None:
    with listener.listening(hearing.repeated(samples, 25)) as stream:
        speech._expect_running([stream])
    with pytest.raises(NotPossible, match="before the other"):
        speech._expect_running([stream])


def test_the_rows_set_the_server_against_the_library_and_chats_beside_it_against_those_alone() -> None:
    results = Results()
    for when, ours in (("quiet", 0.11), ("busy", 0.24)):
        results.add("speech", OURS, f"11 s of speech, {when}", ours)
        results.add("speech", speech.BARE, f"11 s of speech, {when}", 0.1 if when == "quiet" else 0.2)
    for what, same in (("11 s of speech", 1.0), ("a minute of speech", 0.0)):
        results.add("speech", OURS, f"{what}, same", same)
    for streams, beside in ((1, 60.0), (4, 40.0)):
        results.add("speech", OURS, f"{streams} chats alone", 100.0)
        results.add("speech", OURS, f"{streams} chats beside", beside)
    judged = [row for row in speech.rows(results) if row.target is not None]
    assert [(str(row.target), row.value, row.met) for row in judged] == [
        ("≤ 1.15", pytest.approx(1.1), True),
        ("≤ 1.15", pytest.approx(1.2), False),
        ("≥ 1", 1.0, True),
        ("≤ 1.15", None, None),  # a minute, which was not measured
        ("≤ 1.15", None, None),
        ("≥ 1", 0.0, False),  # other words, so that ratios would say nothing
        ("≥ 0.5", 0.6, True),
        ("≥ 0.5", 0.4, False),
    ]
