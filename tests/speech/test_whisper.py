"""One window at a time: what is heard in it, that no call leaves anything for the next, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import whisper_writer
from audio_files import speech
from hypothesis import given, settings, strategies as st

from llamaserve.errors import EngineError
from llamaserve.speech.languages import NAMES
from llamaserve.speech.values import SAMPLE_RATE, TextToken, Transcription
from llamaserve.speech.whisper import (
    CONTEXT,
    Interrupted,
    Piece,
    Samples,
    Whisper,
    Window,
    compression,
    samples_of,
    text_of,
    words_of,
)

THREADS = 2
SENTENCE = "And so my fellow Americans ask not what your country can do for you ask what you can do for your country"
MISSPELT = "And so, my phellow Amerikans, phellow Amerikans."
SILENCE = np.zeros(SAMPLE_RATE, np.float32)
# Parts of a program that does with a Whisper file what the server's child does.
PROGRAM = """
import sys
import numpy as np
from llamaserve.errors import ModelLoadFailed
from llamaserve.speech.values import Transcription
from llamaserve.speech.whisper import Whisper, text_of
for path in sys.argv[1:]:
    try:
        whisper = Whisper(path, gpu=False)
    except ModelLoadFailed as error:
        print("refused", error.message)
        continue
    noise = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)
    window = whisper.transcribe(noise, Transcription(), [], language="en", threads=2, given_up=lambda: False)
    print("heard", window.seconds)
"""


@pytest.fixture(scope="module")
def english(speech_model: Path) -> Iterator[Whisper]:
    """Whisper tiny.en."""
    whisper = Whisper(str(speech_model), gpu=False)
    yield whisper
    whisper.close()


@pytest.fixture(scope="module")
def multilingual(multilingual_speech_model: Path) -> Iterator[Whisper]:
    """Whisper base."""
    whisper = Whisper(str(multilingual_speech_model), gpu=False)
    yield whisper
    whisper.close()


@pytest.fixture(scope="module")
def jfk() -> Samples:
    return samples_of(speech().tobytes())


def hear(
    whisper: Whisper,
    samples: Samples,
    context: Sequence[int] = (),
    language: str = "en",
    given_up: Callable[[], bool] = lambda: False,
    **asked: Any,
) -> Window:
    return whisper.transcribe(
        samples, Transcription(**asked), context, language=language, threads=THREADS, given_up=given_up
    )


def text(window: Window) -> str:
    return "".join(text_of(utterance.pieces) for utterance in window.utterances).strip()


def plain(window: Window) -> str:
    return text(window).replace(",", "").rstrip(".")


# What is heard


@pytest.fixture(scope="module")
def heard(english: Whisper, jfk: Samples) -> Window:
    """The speech as tiny.en hears it."""
    return hear(english, jfk)


def test_a_speech_is_written_down(heard: Window) -> None:
    assert plain(heard) == SENTENCE
    assert heard.temperature == 0
    assert heard.seconds == pytest.approx(11, abs=0.02)


def test_utterances_have_rising_times_and_sound_tokens(heard: Window) -> None:
    times = [time for utterance in heard.utterances for time in (utterance.start, utterance.end)]
    assert times == sorted(times)
    assert all(0 <= time <= 11.1 for time in times)
    for utterance in heard.utterances:
        hints = [piece.hint for piece in utterance.pieces if piece.hint is not None]
        assert hints
        assert hints == sorted(set(hints))
        assert all(utterance.start < hint <= utterance.end for hint in hints)
        for piece in utterance.pieces:
            assert 0 < piece.probability <= 1
            assert piece.token.logprob == pytest.approx(math.log(piece.probability), abs=1e-3)
            assert 0 <= piece.pause <= 1


def test_the_context_has_each_segments_text_and_times(english: Whisper, heard: Window) -> None:
    """As whisper.cpp itself would give it to the next window: a time before and after each text."""
    marks = [token for token in heard.context if token >= english._first_time]
    assert len(marks) == 2 * len(heard.utterances)
    assert heard.context[0] == english._first_time
    told = [token for token in heard.context if token < english._end_of_text]
    assert told == [piece.token.token for utterance in heard.utterances for piece in utterance.pieces]


def test_only_the_first_half_minute_is_listened_to(english: Whisper, jfk: Samples) -> None:
    pause = np.zeros(20 * SAMPLE_RATE, np.float32)
    window = hear(english, np.concatenate((pause, jfk, pause, jfk)))
    assert 20 < window.seconds <= 30
    assert text(window).count("country") <= 1


@pytest.mark.parametrize(
    ("frames", "percent", "times", "done"),
    [
        (3500, 57, [0, 1000], 2000),  # after the last time
        (3500, 85, [0, 1000], 3000),  # nothing else is said
        (3500, 85, [0, None], 3000),  # the text has no end
        (3500, 57, [0, 1000, None], 2000),  # what comes behind a time did not count,
        (3500, 57, [0, 1000, 1000, 300], 2000),  # a time that is earlier did not either
        (3500, 20, [0, 1400, 1400, None], 700),  # nor did any of them
        (1100, 272, [0, 500], 1100),  # the audio ends before the window
        (1100, 90, [0, 500], 1000),
        (1100, 90, [0, 1400], 990),
        (3500, 85, [], 3000),
    ],
)
def test_whisper_cpp_says_where_to_go_on(
    english: Whisper, frames: int, percent: int, times: Sequence[int | None], done: int
) -> None:
    """``times`` are those among the tokens, in steps of 20 ms; None stands for text."""
    context = [1 if time is None else english._first_time + time for time in times]
    assert english._frames_done(frames, percent, context) == done


# No call leaves anything for the next


def test_a_prompt_changes_the_spelling_of_its_window_only(english: Whisper, jfk: Samples, heard: Window) -> None:
    window = hear(english, jfk, english.tokenize(" " + MISSPELT))
    assert "phellow Amerikans" in text(window)
    assert hear(english, jfk) == heard


def test_a_temperature_is_that_of_its_window_only(english: Whisper, jfk: Samples, heard: Window) -> None:
    assert hear(english, jfk, temperature=0.4).temperature == pytest.approx(0.4)
    assert hear(english, jfk) == heard


def test_a_task_and_a_language_are_those_of_their_window_only(multilingual: Whisper, jfk: Samples) -> None:
    assert "votre" in text(hear(multilingual, jfk, language="fr"))
    assert "your country" in text(hear(multilingual, jfk, language="fr", translate=True))
    assert plain(hear(multilingual, jfk)) == SENTENCE


# Temperatures


class Strict:
    """A binding in which a text counts as failed however probable it is, but for the last attempt."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def whisper_full(self, context: Any, params: Any, samples: Samples, count: int) -> int:
        params.logprob_thold = 1.0
        return int(self._native.whisper_full(context, params, samples, count))


@pytest.mark.parametrize(("asked", "last"), [(0.7, 0.9), (0.8, 1.0), (1.0, 1.0)])
def test_a_failed_text_is_tried_again_at_higher_temperatures(
    english: Whisper, jfk: Samples, monkeypatch: pytest.MonkeyPatch, asked: float, last: float
) -> None:
    monkeypatch.setattr(english, "_native", Strict(english._native))
    assert hear(english, jfk[: 3 * SAMPLE_RATE], temperature=asked).temperature == pytest.approx(last)


def test_what_is_as_good_as_no_temperature_is_none(english: Whisper, jfk: Samples, heard: Window) -> None:
    assert hear(english, jfk, temperature=1e-40) == heard


@pytest.mark.parametrize("temperature", [-0.1, 1.01, 2.0, math.nan, math.inf])
def test_other_temperatures_are_refused(english: Whisper, jfk: Samples, temperature: float) -> None:
    """With those over 1 whisper.cpp would return the text of the window before."""
    with pytest.raises(EngineError, match="temperature"):
        hear(english, jfk, temperature=temperature)


# Tokens


@pytest.mark.parametrize(
    "written",
    [
        " Hello, world!",
        " It's what we've said: they'll come, I'm sure.",
        " naïve café, Ångström, Straße",
        " 1,234.50 $ (2024) a_b\n\tx  y   ",
        " 👩‍👩‍👧‍👦 🎉🎉",
        " 東京都に住んでいます。",
        " Привет, שלום, สวัสดี",
    ],
)
def test_tokens_have_the_text_that_they_were_made_of(multilingual: Whisper, english: Whisper, written: str) -> None:
    for whisper in (multilingual, english):
        assert told(whisper, whisper.tokenize(written)) == written


@settings(max_examples=30)
@given(written=st.text(max_size=60))
def test_any_text_has_tokens(english: Whisper, written: str) -> None:
    whole = written.encode("utf-8", "ignore").replace(b"\0", b"")  # nobody has a token for that
    assert told(english, english.tokenize(written)).encode() == whole


def test_known_texts_have_known_tokens(english: Whisper, multilingual: Whisper, heard: Window) -> None:
    """The model's own, and those of OpenAI's tokenizers."""
    spoken = [piece.token.token for utterance in heard.utterances for piece in utterance.pieces]
    assert english.tokenize(f" {text(heard)}") == spoken
    assert english.tokenize(" Hello world") == [18435, 995]
    assert multilingual.tokenize(" Hello world") == [2425, 1002]
    assert english.tokenize("") == []


@pytest.mark.parametrize("written", ["a" * 65536, " " * 65536, "é" * 32768])
def test_a_long_prompt_has_tokens_soon(english: Whisper, written: str) -> None:
    begun = time.process_time()
    assert len(english.tokenize(written)) > CONTEXT
    assert time.process_time() - begun < 10  # it takes less than one; with a search through all of it, minutes


def told(whisper: Whisper, tokens: Sequence[int]) -> str:
    native = whisper._native
    return b"".join(native.whisper_token_to_bytes(whisper._context, token) for token in tokens).decode()


def test_words_begin_with_a_space() -> None:
    words = [
        text_of(word) for word in words_of(pieces(" I", " don", "'t", " know", ",", " Al", "ice", "."), spaced=True)
    ]
    assert words == [" I", " don't", " know,", " Alice."]


def test_words_without_spaces_are_characters() -> None:
    tokens = ["你".encode(), "好".encode()[:2], "好".encode()[2:], "吗。".encode()]
    words = [text_of(word) for word in words_of([piece(data) for data in tokens], spaced=False)]
    assert words == ["你", "好", "吗。"]


def test_what_is_cut_inside_a_character_is_shown_so() -> None:
    (word,) = words_of([piece("好".encode()[:2])], spaced=False)
    assert text_of(word) == "\ufffd"
    assert list(words_of([], spaced=True)) == []


def pieces(*texts: str) -> list[Piece]:
    return [piece(each.encode()) for each in texts]


def piece(data: bytes) -> Piece:
    return Piece(TextToken(0, data, 0.0), 1.0, None, 0.0)


# Languages


def test_languages_are_numbered_as_whisper_cpp_does(english: Whisper) -> None:
    last = english._native.whisper_lang_max_id()
    assert [english._native.whisper_lang_str(number) for number in range(last + 1)] == list(NAMES)


def test_the_language_of_a_speech_is_found(multilingual: Whisper, english: Whisper, jfk: Samples) -> None:
    assert multilingual.language(jfk, threads=THREADS) == "en"
    assert multilingual.language(SILENCE, threads=THREADS) in list(NAMES)[:99]
    assert english.language(jfk, threads=THREADS) == "en"


def test_an_unknown_language_is_refused(english: Whisper, jfk: Samples) -> None:
    with pytest.raises(EngineError, match="xx"):
        hear(english, jfk, language="xx")


# Giving up


@pytest.mark.parametrize("asked", [1, 3, 10])
def test_a_window_is_given_up_soon(english: Whisper, jfk: Samples, heard: Window, asked: int) -> None:
    """After what is under way: the encoder's pass, or one token."""
    count = 0

    def given_up() -> bool:
        nonlocal count
        count += 1
        return count >= asked

    with pytest.raises(Interrupted):
        hear(english, jfk, given_up=given_up)
    assert count <= asked + 3
    if asked == 10:
        assert hear(english, jfk) == heard  # and it is none the worse for it


# What is refused


@pytest.mark.parametrize(
    "samples",
    [
        np.full(SAMPLE_RATE, np.nan, np.float32),
        np.array([*np.zeros(SAMPLE_RATE), np.inf], np.float32),
        np.zeros((2, SAMPLE_RATE), np.float32),
        np.zeros(SAMPLE_RATE, np.int16),
        np.zeros(SAMPLE_RATE, np.float64),
        np.zeros(0, np.float32),
        np.zeros(1599, np.float32),
    ],
    ids=["nan", "inf", "two rows", "int16", "float64", "none", "too short"],
)
def test_other_samples_are_refused(english: Whisper, multilingual: Whisper, samples: Samples) -> None:
    """The binding would read other memory, or listen to an earlier request's samples again."""
    with pytest.raises(EngineError, match="samples"):
        hear(english, samples)
    with pytest.raises(EngineError, match="samples"):
        multilingual.language(samples, threads=THREADS)


def test_samples_may_be_any_view(english: Whisper, jfk: Samples, heard: Window) -> None:
    assert hear(english, np.repeat(jfk, 2)[::2]) == heard


@pytest.mark.parametrize("tensor", ["encoder.conv1.bias", "decoder.ln.weight"])
def test_weights_that_are_no_numbers_fail_the_window_at_once(tmp_path: Path, tensor: str) -> None:
    file = whisper_writer.whisper_file(n_text_ctx=448)
    tensors = [replace(each, data=nans(each)) if each.name == tensor else each for each in file.tensors]
    assert tensors != file.tensors
    path = tmp_path / "nan.bin"
    path.write_bytes(replace(file, tensors=tensors).bytes())
    whisper = Whisper(str(path), gpu=False)
    asked = 0

    def given_up() -> bool:
        nonlocal asked
        asked += 1
        return False

    with pytest.raises(EngineError, match="no numbers"):
        hear(whisper, noise(), given_up=given_up)
    assert asked < 10  # not once for each token of six attempts
    whisper.close()


def nans(tensor: whisper_writer.Tensor) -> bytes:
    return np.full(math.prod(tensor.shape), np.nan, np.float32).tobytes()


def noise() -> Samples:
    return np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)


def test_an_error_of_whisper_cpp_is_told(english: Whisper, jfk: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(Strict):
        def whisper_full(self, context: Any, params: Any, samples: Samples, count: int) -> int:
            params.greedy = {"best_of": 99}
            return int(self._native.whisper_full(context, params, samples, count))

    monkeypatch.setattr(english, "_native", Greedy(english._native))
    with pytest.raises(EngineError, match="too many decoders requested"):
        hear(english, jfk)


# Files, and the end of a process


def test_a_file_that_is_damaged_is_refused(tmp_path: Path) -> None:
    """Those that whisper.cpp tells from a sound one; all others are refused before they come here."""
    sound = whisper_writer.whisper_file().bytes()
    damaged = {
        "empty": b"",
        "gguf": b"GGUF" + sound[4:],
        "cut": sound[: len(sound) // 2],
        "shape": sound.replace(b"encoder.conv1.bias", b"encoder.conv1.bibs"),
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in (*damaged, "missing")]
    lines = run(*paths)
    assert [line.split(" ", 1)[0] for line in lines] == ["refused"] * len(paths)
    assert all(path in line for path, line in zip(paths, lines, strict=True))


def test_a_process_says_nothing_of_its_own_and_ends_well(speech_model: Path) -> None:
    (line,) = run(str(speech_model))
    assert line.startswith("heard 0.9")


def run(*paths: str) -> list[str]:
    """Run the program, which ends without an error and without a word but its own."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_model_may_be_closed_twice(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(whisper_writer.whisper_file().bytes())
    whisper = Whisper(str(path), gpu=False)
    whisper.close()
    whisper.close()


# Numbers


def test_samples_are_from_minus_one_to_one() -> None:
    stored = np.array([-32768, -1, 0, 16384, 32767], "<i2").tobytes()
    assert samples_of(stored).tolist() == [-1, -1 / 32768, 0, 0.5, 32767 / 32768]
    assert samples_of(memoryview(b"")).dtype == np.float32


def test_a_repetition_is_compressed_more() -> None:
    assert compression("") == 0
    assert compression("And so my fellow Americans") < 1.2
    assert compression("you. " * 50) > 10
