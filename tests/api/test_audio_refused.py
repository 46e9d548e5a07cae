"""What ``/v1/audio/transcriptions`` refuses and what bounds it, and what clients learn of a model of speech."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from api_helpers import CHAT, COMPLETIONS, assert_error
from audio_files import SPEECH
from audio_helpers import SAID, TRANSCRIPTIONS, TRANSLATIONS, all_heard, hearing, spoken_times, upload, words_of
from hostile_audio import silent_flac
from model_helpers import INFO, LOAD, UNLOAD, loaded, write_registry
from running_server import RunningServer, wait_until

from llamaserve.api import transcribing
from llamaserve.api.transcribing import Hearing
from llamaserve.errors import NotSupported
from llamaserve.speech.values import Transcription


@pytest.fixture(scope="module")
def strict_server(
    speech_model: Path, starter_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with a chat model and the speech model three times: as it is, with no queue, and with no time. Streams
    that wait say so five times a second.
    """
    source = f"source: 'file:{speech_model}'"
    models: dict[str, Path | str] = {
        "smollm2-135m": starter_model,
        "tiny.en": source,
        "lonely": f"{source}, queue: 0",
        "hasty": f"{source}, time_limit: 0.1",
        "odd": f"source: 'file:{starter_model}', task: transcription",
    }
    path = write_registry(tmp_path_factory.mktemp("strict") / "models.yaml", models)
    environment = {
        "LLAMASERVE_HEARTBEAT": "0.2",
        "LLAMASERVE_MAX_UPLOAD": f"{12 * 2**20}",
        "LLAMASERVE_MAX_AUDIO": "400",
    }
    with RunningServer("serve", "smollm2-135m", "--models-file", str(path), environment=environment) as running:
        yield running


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"language": "xx"}, "language", "'xx' is no language"),
        ({"language": "Klingon"}, "language", "no language that Whisper knows"),
        ({"language": "e" * 65}, "language", "64"),
        ({"language": ["en", "de"]}, "language", "more than once"),
        ({"response_format": "docx"}, "response_format", "'srt'"),
        ({"response_format": "diarized_json"}, "response_format", "'srt'"),
        ({"temperature": "1.1"}, "temperature", "less than or equal to 1"),
        ({"temperature": "-0.1"}, "temperature", "greater than or equal to 0"),
        ({"temperature": "nan"}, "temperature", "finite"),
        ({"temperature": "warm"}, "temperature", "number"),
        ({"stream": "perhaps"}, "stream", "boolean"),
        ({"timestamp_granularities[]": ["word", "letter"]}, "timestamp_granularities[1]", "'word'"),
        ({"include[]": "everything"}, "include[0]", "'logprobs'"),
        ({"keep_alive": "soon"}, "keep_alive", "15m"),
        ({"prompt": "x" * 65_537}, None, "more than 64 KiB"),
        ({f"field{number}": "1" for number in range(65)}, None, "too many fields"),
    ],
)
def test_a_wrong_field(speech_server: RunningServer, fields: dict[str, Any], param: str | None, says: str) -> None:
    assert says in assert_error(upload(speech_server, **fields), 400, None, param)


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_subtitles_are_not_streamed(speech_server: RunningServer, kind: str) -> None:
    response = upload(speech_server, response_format=kind, stream="true")
    assert kind in assert_error(response, 400, "unsupported_parameter", "stream")


@pytest.mark.parametrize("field", ["known_speaker_names[]", "known_speaker_references[]", "diarize"])
def test_speakers_are_not_told_apart(speech_server: RunningServer, field: str) -> None:
    response = upload(speech_server, **{field: "true"})
    assert "not told apart" in assert_error(response, 400, "unsupported_parameter", field.removesuffix("[]"))


def test_an_english_model_knows_english_only(speech_server: RunningServer) -> None:
    french = upload(speech_server, language="fr-CA")
    assert "French" in assert_error(french, 400, "model_not_capable", "language")
    translation = upload(speech_server, path=TRANSLATIONS, model="tiny.en")
    message = assert_error(translation, 400, "model_not_capable", "model")
    assert "can't translate" in message
    assert "llamaserve pull whisper-base" in message
    assert_error(upload(speech_server, path=TRANSLATIONS), 400, "model_not_capable", None)
    streamed = upload(speech_server, path=TRANSLATIONS, stream="true", model="tiny.en")
    assert_error(streamed, 400, "model_not_capable", "model")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"files": {"audio": ("a.flac", b"")}}, "Field required"),
        ({"files": {"file": (None, "hello")}}, "not text"),
        ({"json": {"file": "aGVsbG8=", "model": "tiny.en"}}, "multipart/form-data"),
        ({"data": {"file": "hello", "model": "tiny.en"}}, "multipart/form-data"),
        ({"content": SPEECH.read_bytes(), "headers": {"content-type": "audio/flac"}}, "multipart/form-data"),
        ({"content": b""}, "multipart/form-data"),
        ({"files": {"file": ("a.flac", b"")}}, "the file is empty"),
        ({"files": {"file": ("a.flac", b"hello")}}, "the file is text, not audio"),
    ],
)
def test_a_request_without_audio(speech_server: RunningServer, options: dict[str, Any], says: str) -> None:
    assert says in assert_error(httpx.post(speech_server.url + TRANSCRIPTIONS, **options), 400, None, "file")


def test_one_file_at_a_time(speech_server: RunningServer) -> None:
    files = [("file", ("a", SPEECH.read_bytes())), ("file", ("b", SPEECH.read_bytes()))]
    response = httpx.post(speech_server.url + TRANSCRIPTIONS, files=files, timeout=30)
    assert "Maximum number of files is 1" in assert_error(response, 400, None)


def test_an_unknown_model(speech_server: RunningServer) -> None:
    assert "whisper-tiny.en" in assert_error(upload(speech_server, model="whisper-2"), 404, "model_not_found", "model")


def test_without_the_packages_for_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcribing, "_NEEDED", ("av", "no_such_package"))
    upload = mock.Mock()
    hearing = Hearing(mock.Mock(), mock.Mock(), upload, Transcription(), named=True, keep_alive=None)
    with pytest.raises(NotSupported, match=r"\(no_such_package\): llamaserve\[speech\]"):
        asyncio.run(hearing.open())
    upload.close.assert_called_once_with()


def test_all_is_let_go_when_all_is_heard_though_the_client_has_not_read_it() -> None:
    upload, use, place = mock.Mock(), mock.Mock(), mock.Mock()
    hearing = Hearing(mock.Mock(), mock.Mock(), upload, Transcription(), named=True, keep_alive=5.0)
    hearing._use, hearing._place, hearing._stream = use, place, mock.Mock(failed=False)
    hearing._over()
    assert [use.keep.call_args.args, use.leave.called, place.leave.called] == [(5.0,), True, True]
    hearing._stream.failed = True
    use.keep.reset_mock()
    hearing._over()
    assert not use.keep.called  # nothing was answered


# ---- the bounds ----------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large(strict_server: RunningServer) -> None:
    response = upload(strict_server, bytes(12 * 2**20), model="tiny.en")
    assert str(12 * 2**20) in assert_error(response, 413, "body_too_large")


def test_one_that_does_not_tell_its_length(strict_server: RunningServer) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(13):
            yield bytes(2**20)

    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = httpx.post(strict_server.url + TRANSCRIPTIONS, content=chunks(), headers=headers, timeout=30)
    assert_error(response, 413, "body_too_large")


def test_a_form_elsewhere_may_be_no_larger_than_any_body(strict_server: RunningServer) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = httpx.post(strict_server.url + COMPLETIONS, content=bytes(17 * 2**20), headers=headers, timeout=30)
    assert str(16 * 2**20) in assert_error(response, 413, "body_too_large")


@pytest.mark.parametrize("seconds", [401, 10 * 3600])
def test_audio_that_is_too_long(strict_server: RunningServer, seconds: int) -> None:
    response = upload(strict_server, silent_flac(seconds), model="tiny.en")
    assert "longer than 400 s; send it in parts" in assert_error(response, 400, None, "file")


def test_a_full_queue(strict_server: RunningServer) -> None:
    with hearing(strict_server, spoken_times(24), model="lonely"):
        for stream in ("false", "true"):
            refused = upload(strict_server, model="lonely", stream=stream)
            error = refused.json()["error"]
            assert (refused.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "queue_full")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
    wait_until(lambda: strict_server.running == 0)
    assert upload(strict_server, model="lonely").status_code == 200


def test_little_time(strict_server: RunningServer) -> None:
    response = upload(strict_server, model="hasty")
    assert "0.1 seconds" in assert_error(response, 504, "time_limit_exceeded")
    assert response.headers["x-should-retry"] == "false"
    *_, error, end = all_heard(strict_server, SPEECH.read_bytes(), model="hasty")
    assert (error["error"]["code"], end) == ("time_limit_exceeded", "[DONE]")
    wait_until(lambda: strict_server.running == 0)


def test_a_stream_says_where_it_is(strict_server: RunningServer) -> None:
    with hearing(strict_server, spoken_times(10), model="tiny.en") as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith(": "))
        with hearing(strict_server, SPEECH.read_bytes(), model="tiny.en") as other:
            waiting = next(line for line in other.iter_lines() if line.startswith(": queued"))
        assert re.fullmatch(r": queued, place [12]", waiting)
        comments = {first, *(line for line in lines if line.startswith(": "))}
    seconds = [int(found[1]) for line in comments if (found := re.fullmatch(r": heard (\d+) of 150 s", line))]
    assert any(0 < each < 150 for each in seconds), comments


# ---- models --------------------------------------------------------------------------------------------------------


def test_a_chat_model_does_not_hear(strict_server: RunningServer) -> None:
    message = assert_error(upload(strict_server, model="smollm2-135m"), 400, "model_not_capable")
    assert "smollm2-135m generates text" in message
    assert "/v1/audio/transcriptions" in message
    assert_error(upload(strict_server, model="smollm2-135m", stream="true"), 400, "model_not_capable")
    message = assert_error(upload(strict_server, model="odd"), 400, "model_not_capable", "model")
    assert message.startswith("odd: its file is none of whisper.cpp's")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "Hello"}]}),
        (COMPLETIONS, {"prompt": "Hello"}),
        ("/v1/embeddings", {"input": "Hello"}),
        ("/v1/rerank", {"query": "Hello", "documents": ["Hello"]}),
        ("/v1/moderations", {"input": "Hello"}),
        ("/v1/internal/encode", {"text": "Hello"}),
        ("/v1/internal/decode", {"tokens": [1]}),
        ("/v1/internal/token-count", {"text": "Hello"}),
        ("/v1/internal/logits", {"prompt": "Hello"}),
        ("/v1/internal/chat-prompt", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}),
        ("/v1/internal/lora/load", {"lora_names": ["style"]}),
    ],
)
def test_a_speech_model_does_nothing_with_texts(speech_server: RunningServer, path: str, body: dict[str, Any]) -> None:
    pid = speech_server.worker_pid()
    named = {} if "lora" in path else {"model": "whisper-tiny.en"}
    response = speech_server.post(path, {**body, **named})
    assert response.status_code == 400, response.text
    if "lora" not in path:
        assert response.json()["error"]["code"] == "model_not_capable"
    assert speech_server.worker_pid() == pid


def test_a_speech_model_is_described(speech_server: RunningServer, speech_model: Path) -> None:
    (model,) = speech_server.get("/v1/models")["data"]
    assert (model["id"], model["aliases"]) == ("whisper-tiny.en", ["tiny.en", "whisper-1"])
    assert model["context_length"] is None
    assert model["meta"]["architecture"] == "whisper"
    assert model["meta"]["size"] == speech_model.stat().st_size
    assert (model["meta"]["n_vocab"], model["meta"]["quantization"]) == (51864, "F16")
    assert 37e6 < model["meta"]["n_params"] < 39e6
    assert model["architecture"] == {"input_modalities": ["audio"], "output_modalities": ["text"]}
    assert {name for name, offered in model["capabilities"].items() if offered} == {"transcription"}
    info = speech_server.get(INFO)
    assert (info["model_name"], info["loader"], info["status"]) == ("whisper-tiny.en", "whisper.cpp", "loaded")
    assert info["capabilities"] == model["capabilities"]
    assert info["memory"]["measured"]["host"] < info["memory"]["planned"]
    assert info["args"].keys() == {"threads", "gpu_layers"}


def test_it_may_be_the_server_s_only_model(speech_server: RunningServer) -> None:
    banner = "\n".join(speech_server.lines)
    assert "is ready: whisper-tiny.en, F16, English only, on the CPU" in banner
    assert f"curl -N {speech_server.url}{TRANSCRIPTIONS} -F file=@" in banner


def test_it_is_loaded_and_unloaded_by_command(strict_server: RunningServer) -> None:
    assert strict_server.post(UNLOAD, {}).json() == "OK"
    assert loaded(strict_server) == []
    assert strict_server.post(LOAD, {"model_name": "tiny.en", "args": {"threads": 1}}).json() == "OK"
    assert loaded(strict_server) == ["tiny.en"]
    info = strict_server.get(INFO)
    assert (info["model_name"], info["args"]["threads"]) == ("tiny.en", 1)
    assert words_of(upload(strict_server).json()["text"]) == SAID
    assert strict_server.post(UNLOAD, {"model_name": "tiny.en"}).json() == "OK"
    assert loaded(strict_server) == []
    assert words_of(upload(strict_server, model="tiny.en", keep_alive="0").json()["text"]) == SAID
    wait_until(lambda: loaded(strict_server) == [])


# ---- the description -----------------------------------------------------------------------------------------------


def test_the_forms_are_described(speech_server: RunningServer) -> None:
    paths = speech_server.get("/openapi.json")["paths"]
    described = [paths[path]["post"] for path in (TRANSCRIPTIONS, TRANSLATIONS)]
    assert described[0]["summary"] != described[1]["summary"]
    assert described[0]["description"] != described[1]["description"]
    for each in described:
        assert each["requestBody"]["required"] is True
        (kind,) = each["requestBody"]["content"]
        assert kind == "multipart/form-data"
        schema = each["requestBody"]["content"][kind]["schema"]
        assert schema["required"] == ["file"]
        fields = schema["properties"]
        assert fields["file"]["type"] == "string"
        assert fields["response_format"]["enum"] == ["json", "text", "srt", "verbose_json", "vtt"]
        assert fields["timestamp_granularities"]["items"]["enum"] == ["segment", "word"]
        assert (fields["temperature"]["minimum"], fields["temperature"]["maximum"]) == (0, 1)
        assert [name for name, field in fields.items() if not field.get("description")] == []
        assert "$ref" not in json.dumps(schema)
