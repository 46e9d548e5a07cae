"""``/v1/audio/transcriptions`` with the English starter model: the clients, formats, times and refusals."""

from __future__ import annotations

import io
import json
import math
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import srt
import webvtt
from api_helpers import assert_error
from audio_files import RATE, SPEECH, SPEECH_END, SPEECH_SECONDS, SPEECH_STARTS, spoken, wav
from audio_helpers import (
    PERIOD,
    SAID,
    TOLERANCE,
    TRANSCRIPTIONS,
    all_heard,
    spoken_times,
    upload,
    words_of,
)
from running_server import RunningServer

from llamaserve.api.options import IGNORED_HEADER, TRUNCATED_HEADER, WARNING_HEADER

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
SECOND_LINE = "ask what you can do for your country"


@pytest.fixture
def sdk(speech_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=speech_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def silence(seconds: float = 3) -> bytes:
    return wav(np.zeros(int(seconds * RATE), np.int16))


def cues_of(kind: str, text: str) -> list[tuple[float, float, str]]:
    """Return the start, end and text of subtitles, as a player reads them."""
    if kind == "srt":
        cues = list(srt.parse(text))
        assert [cue.index for cue in cues] == list(range(1, len(cues) + 1))
        assert srt.compose(cues) == text
        return [(cue.start.total_seconds(), cue.end.total_seconds(), cue.content) for cue in cues]
    captions = webvtt.from_buffer(io.StringIO(text), strict=True).captions
    return [(_seconds(cue.start), _seconds(cue.end), cue.text) for cue in captions]


def _seconds(time: str) -> float:
    hours, minutes, seconds = time.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def assert_rising(times: list[tuple[float, float]], end: float = SPEECH_SECONDS) -> None:
    """Check that nothing ends before it begins, or begins before the last has ended."""
    edges = [edge for pair in times for edge in pair]
    assert edges == sorted(edges)
    assert edges[0] >= 0
    assert edges[-1] <= end


# ---- the clients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_the_sdk_gets_every_format(sdk: openai.OpenAI, kind: Any) -> None:
    with SPEECH.open("rb") as file:
        answer = sdk.audio.transcriptions.create(model="whisper-1", file=file, response_format=kind)
    if kind == "json":
        assert words_of(answer.text) == SAID
        assert answer.usage.to_dict() == {"type": "duration", "seconds": 11}
        assert answer.to_dict().keys() == {"text", "usage"}
    elif kind == "verbose_json":
        assert words_of(answer.text) == SAID
        assert (answer.language, answer.duration) == ("english", SPEECH_SECONDS)
        assert answer.words is None
        assert [words_of(segment.text) for segment in answer.segments][-1] == SECOND_LINE.split()
    else:
        assert isinstance(answer, str)
        found = answer if kind == "text" else " ".join(text for _, _, text in cues_of(kind, answer))
        assert words_of(found) == SAID


def test_a_segment_has_what_openai_s_has(sdk: openai.OpenAI) -> None:
    answer = sdk.audio.transcriptions.create(
        model="tiny.en", file=SPEECH, response_format="verbose_json", prompt="A speech.", temperature=0
    )
    assert answer.text == "".join(segment.text for segment in answer.segments).strip()
    for number, segment in enumerate(answer.segments):
        assert (segment.id, segment.seek, segment.temperature, segment.no_speech_prob) == (number, 0, 0, 0)
        assert -1 < segment.avg_logprob < 0
        assert 0.5 < segment.compression_ratio < 2.4
        assert len(segment.tokens) >= len(words_of(segment.text))
    assert_rising([(segment.start, segment.end) for segment in answer.segments])


def test_words_have_times(sdk: openai.OpenAI) -> None:
    answer = sdk.audio.transcriptions.create(
        model="tiny.en", file=SPEECH, response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    assert [word.word.lower() for word in answer.words] == SAID
    starts = {number: answer.words[number].start for number in SPEECH_STARTS}
    assert starts == pytest.approx(SPEECH_STARTS, abs=TOLERANCE)
    assert answer.words[-1].end == pytest.approx(SPEECH_END, abs=TOLERANCE)
    assert_rising([(word.start, word.end) for word in answer.words])
    assert (answer.segments[0].start, answer.segments[-1].end) == (answer.words[0].start, answer.words[-1].end)


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ({"timestamp_granularities[]": "word"}, {"words"}),
        ({"timestamp_granularities": "segment, word"}, {"words", "segments"}),
    ],
)
def test_only_the_times_that_are_asked_for(speech_server: RunningServer, asked: Any, there: set[str]) -> None:
    answer = upload(speech_server, response_format="verbose_json", **asked).json()
    assert answer.keys() & {"words", "segments"} == there


@pytest.mark.parametrize("kind", ["srt", "vtt"])
def test_subtitles_are_shown_while_their_words_are_said(speech_server: RunningServer, kind: str) -> None:
    cues = cues_of(kind, upload(speech_server, response_format=kind).text)
    assert_rising([(start, end) for start, end, _ in cues])
    assert cues[0][0] == pytest.approx(SPEECH_STARTS[0], abs=TOLERANCE)
    assert cues[-1][0] == pytest.approx(SPEECH_STARTS[14], abs=TOLERANCE)
    assert cues[-2][1] == pytest.approx(7.5, abs=TOLERANCE)  # before the pause
    assert cues[-1][1] == pytest.approx(SPEECH_END, abs=TOLERANCE)


def test_the_sdk_gets_the_probabilities_of_tokens(sdk: openai.OpenAI) -> None:
    answer = sdk.audio.transcriptions.create(model="tiny.en", file=SPEECH, include=["logprobs"])
    data = bytes(int(byte) for each in answer.logprobs for byte in each.bytes)
    assert data.decode().strip() == answer.text
    assert all(-10 < each.logprob <= 0 for each in answer.logprobs)
    assert math.exp(sum(each.logprob for each in answer.logprobs) / len(answer.logprobs)) > 0.5


def test_the_sdk_streams(sdk: openai.OpenAI) -> None:
    stream = sdk.audio.transcriptions.create(model="tiny.en", file=SPEECH, stream=True, include=["logprobs"])
    *deltas, done = stream
    assert {each.type for each in deltas} == {"transcript.text.delta"}
    assert done.type == "transcript.text.done"
    assert "".join(each.delta for each in deltas) == done.text
    assert words_of(done.text) == SAID
    assert [token.to_dict() for each in deltas for token in each.logprobs] == [each.to_dict() for each in done.logprobs]
    assert done.usage.to_dict() == {"type": "duration", "seconds": 11}


def test_the_sdk_streams_segments_with_their_times(sdk: openai.OpenAI) -> None:
    *events, done = sdk.audio.transcriptions.create(
        model="tiny.en",
        file=SPEECH,
        stream=True,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    segments = [each for each in events if each.type == "transcript.text.segment"]
    deltas = [each for each in events if each.type == "transcript.text.delta"]
    assert [each.text.strip() for each in segments] == [each.delta.strip() for each in deltas]
    assert [(each.id, each.start, each.end, each.text) for each in segments] == [
        (str(each["id"]), each["start"], each["end"], each["text"]) for each in done.to_dict()["segments"]
    ]
    assert [word["word"].lower() for word in done.to_dict()["words"]] == SAID


def test_curl(speech_server: RunningServer) -> None:
    fields = ("-F", f"file=@{SPEECH}", "-F", "model=whisper-1")
    done = subprocess.run(["curl", "-sS", speech_server.url + TRANSCRIPTIONS, *fields], capture_output=True, check=True)
    assert words_of(json.loads(done.stdout)["text"]) == SAID


def test_no_model_is_named_and_a_path_ends_in_a_slash(speech_server: RunningServer) -> None:
    response = upload(speech_server, path=TRANSCRIPTIONS + "/")
    assert words_of(response.json()["text"]) == SAID
    assert response.headers.keys().isdisjoint({IGNORED_HEADER, TRUNCATED_HEADER, WARNING_HEADER})


# ---- what is heard -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mp3", "m4a", "ogg, opus", "ogg, vorbis", "wav", "webm"])
def test_every_format_of_openai_s_list_gives_the_same_words(speech_server: RunningServer, name: str) -> None:
    response = upload(speech_server, spoken(name), name=f"speech.{name[:3]}")
    assert words_of(response.json()["text"]) == SAID
    assert WARNING_HEADER not in response.headers


def test_a_long_file_is_heard_window_by_window(speech_server: RunningServer) -> None:
    *events, done, end = all_heard(speech_server, spoken_times(4), response_format="verbose_json")
    assert end == "[DONE]"
    assert words_of(done["text"]) == SAID * 4
    assert "".join(each["delta"] for each in events if "delta" in each) == done["text"]
    segments = done["segments"]
    assert len({segment["seek"] for segment in segments}) > 1
    assert_rising([(segment["start"], segment["end"]) for segment in segments], 4 * PERIOD)
    seconds = [segment["start"] for segment in segments if words_of(segment["text"])[0] == "and"]
    assert seconds == pytest.approx([SPEECH_STARTS[0] + number * PERIOD for number in range(4)], abs=TOLERANCE)


@pytest.mark.parametrize("kind", FORMATS)
def test_silence_is_an_empty_text(speech_server: RunningServer, kind: str) -> None:
    response = upload(speech_server, silence(), response_format=kind)
    assert response.status_code == 200
    if kind in ("srt", "vtt"):
        assert cues_of(kind, response.text) == []
    elif kind == "text":
        assert response.text == "\n"
    else:
        assert response.json()["text"] == ""
        assert response.json().get("segments", []) == []


def test_silence_streamed(speech_server: RunningServer) -> None:
    done, end = all_heard(speech_server, silence())
    assert (done["type"], done["text"], end) == ("transcript.text.done", "", "[DONE]")


def test_a_single_sample_is_audio(speech_server: RunningServer) -> None:
    assert upload(speech_server, wav(np.ones(1, np.int16))).json()["text"] == ""


def test_empty_names_in_a_list_are_none(speech_server: RunningServer) -> None:
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": ["", "word"]}
    assert "words" in upload(speech_server, **fields).json()


@pytest.mark.parametrize("language", ["English", "en-US", "auto", ""])
def test_english_by_any_name(speech_server: RunningServer, language: str) -> None:
    answer = upload(speech_server, language=language, response_format="verbose_json").json()
    assert (answer["language"], words_of(answer["text"])) == ("english", SAID)


def test_a_prompt_sets_the_style(speech_server: RunningServer) -> None:
    texts = {upload(speech_server, prompt=prompt).json()["text"] for prompt in ("", "no capitals and no signs")}
    assert {text[0] for text in texts} == {"A", "a"}


# ---- what is reported ----------------------------------------------------------------------------------------------


def test_what_has_no_effect_is_named(speech_server: RunningServer) -> None:
    fields = {"chunking_strategy": "auto", "keywords[]": ["a", "b"], "user": "me", "include[]": "logprobs"}
    response = upload(speech_server, response_format="text", timestamp_granularities="word", **fields)
    ignored = response.headers[IGNORED_HEADER].split(", ")
    assert sorted(ignored) == ["chunking_strategy", "include", "keywords", "timestamp_granularities"]


def test_or_refused(speech_server: RunningServer) -> None:
    message = assert_error(upload(speech_server, strict="true", foo="1"), 400, "unsupported_parameter", "foo")
    assert "foo would have no effect" in message


@pytest.mark.parametrize("name", ["wav", "m4a", "ogg, opus"])
def test_damaged_audio_is_heard_as_far_as_it_goes_and_said_to_be(speech_server: RunningServer, name: str) -> None:
    whole = spoken({"m4a": "mp4"}.get(name, name))  # whose index is at its beginning
    response = upload(speech_server, whole[: len(whole) * 2 // 3])
    assert response.status_code == 200, response.text
    assert words_of(response.json()["text"])[4:8] == SAID[4:8]
    assert response.json()["usage"]["seconds"] < SPEECH_SECONDS
    assert ("damaged" in response.headers.get(WARNING_HEADER, "")) == (name != "ogg, opus")  # which may end anywhere


def test_a_prompt_that_is_too_long_is_cut_and_said_to_be(speech_server: RunningServer) -> None:
    response = upload(speech_server, prompt="word " * 400)
    assert words_of(response.json()["text"]) == SAID
    assert response.headers[TRUNCATED_HEADER] == "prompt: 177 tokens"


def test_a_stream_says_at_its_end_what_came_too_late_for_a_header(speech_server: RunningServer) -> None:
    *_, done, _ = all_heard(speech_server, spoken("wav")[:200_000], prompt="word " * 400)
    assert done[TRUNCATED_HEADER] == "prompt: 177 tokens"
    assert "damaged" in done[WARNING_HEADER]
