"""Speech with the multilingual starter model: the language is found, or given, and translated into English."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from api_helpers import assert_error
from audio_files import RATE, SPEECH, wav
from audio_helpers import SAID, TRANSLATIONS, upload, words_of
from model_helpers import write_registry
from running_server import RunningServer


@pytest.fixture(scope="module")
def server(multilingual_speech_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("languages")
    path = write_registry(folder / "models.yaml", {"base": multilingual_speech_model}, "transcription_model: base")
    with RunningServer("serve", "base", "--models-file", str(path)) as running:
        yield running


@pytest.fixture
def sdk(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_language_is_found(sdk: openai.OpenAI) -> None:
    answer = sdk.audio.transcriptions.create(model="base", file=SPEECH, response_format="verbose_json")
    assert (answer.language, words_of(answer.text)) == ("english", SAID)
    assert answer.to_dict()["task"] == "transcribe"


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # OpenAI's service ends, not the SDK's method
def test_english_translated_into_english(sdk: openai.OpenAI) -> None:
    answer = sdk.audio.translations.create(model="base", file=SPEECH, response_format="verbose_json")
    assert (answer.to_dict()["task"], answer.language) == ("translate", "english")
    assert words_of(answer.text)[:5] == SAID[:5]
    assert answer.segments
    text = sdk.audio.translations.create(model="base", file=SPEECH, response_format="text")
    assert words_of(str(text)) == words_of(answer.text)


def test_the_language_that_is_given_counts(server: RunningServer) -> None:
    german = upload(server, language="de-CH", response_format="verbose_json").json()
    assert german["language"] == "german"
    assert words_of(german["text"]) != SAID
    english = upload(server, path=TRANSLATIONS, language="en", response_format="verbose_json").json()
    assert (english["language"], words_of(english["text"])[:5]) == ("english", SAID[:5])


def test_silence_has_a_language_too(server: RunningServer) -> None:
    answer = upload(server, wav(np.zeros(RATE, np.int16)), response_format="verbose_json").json()
    assert (answer["text"], answer["segments"]) == ("", [])
    assert answer["language"].isalpha()


def test_a_language_that_came_with_a_later_model(server: RunningServer) -> None:
    assert "Cantonese" in assert_error(upload(server, language="yue"), 400, None, "language")


def test_what_it_offers(server: RunningServer) -> None:
    (model,) = server.get("/v1/models")["data"]
    assert {name for name, offered in model["capabilities"].items() if offered} == {"transcription", "translation"}
