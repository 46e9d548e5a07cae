"""Long audio in windows, many requests in turn: what is said once is written once, at its time, and nobody waits longer
than need be.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audio_files import SPEECH_STARTS, speech
from hypothesis import given, settings, strategies as st

from llamaserve.engine import transcriber as module
from llamaserve.engine.events import EngineEvent, Failed, Occupancy, Progress
from llamaserve.engine.transcriber import LoadedTranscriber, Transcriber
from llamaserve.errors import EngineError
from llamaserve.speech.values import (
    SAMPLE_RATE,
    Heard,
    Segment,
    TextToken,
    Transcribed,
    TranscriberParams,
    Transcription,
)
from llamaserve.speech.whisper import (
    CONTEXT,
    WINDOW,
    Interrupted,
    Piece,
    Samples,
    Utterance,
    Whisper,
    Window,
    compression,
)

SENTENCE = "and so my fellow american ask not what your country can do for you ask what you can do for your country"
PLAIN = Transcription(language="en")
TIME = 50_363  # the token of the time 0; any would do


def silence(seconds: float) -> Samples:
    return np.zeros(round(seconds * SAMPLE_RATE), np.float32)


def sound(seconds: float) -> Samples:
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * SAMPLE_RATE)).astype(np.float32)


def voices(seconds: float, *spans: tuple[float, float]) -> Samples:
    """Return silence with noise in it, from one second to another."""
    samples = silence(seconds)
    for start, end in spans:
        voice = sound(end - start)
        first = round(start * SAMPLE_RATE)
        samples[first : first + len(voice)] = voice[: len(samples) - first]
    return samples


def jfk() -> Samples:
    return speech().astype(np.float32) / 32768


Store = Callable[[Samples], Path]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Writes samples to a file as they are decoded to."""
    numbers = itertools.count()

    def write(samples: Samples) -> Path:
        path = tmp_path / str(next(numbers))
        path.write_bytes((samples * 32767).astype("<i2").tobytes())
        return path

    return write


def finish(transcriber: Transcriber) -> list[EngineEvent]:
    """Let everything that was submitted come to its end."""
    events: list[EngineEvent] = []
    while not transcriber.idle:
        events += transcriber.step()
    return events


def segments(events: Sequence[EngineEvent]) -> list[Segment]:
    return [segment for event in events if isinstance(event, Heard) for segment in event.segments]


def text(events: Sequence[EngineEvent]) -> str:
    return "".join(segment.text for segment in segments(events)).strip()


def plain(written: str) -> list[str]:
    return re.sub(r"[^a-z ]", "", written.lower()).split()


# ---- a real model ----


@pytest.fixture(scope="module")
def real(speech_model: Path) -> Iterator[LoadedTranscriber]:
    """A transcriber with tiny.en."""
    loaded: list[float] = []
    params = TranscriberParams(path=str(speech_model), threads=2, adaptive_threads=False, gpu=False)
    transcriber = LoadedTranscriber(params, lambda fraction: bool(loaded.append(fraction)))
    assert loaded == [1.0]
    assert not transcriber.gpu
    yield transcriber
    transcriber.close()


def check_copies(events: Sequence[EngineEvent], begins: Sequence[float]) -> None:
    """Check that the speech is written down as often as it is there, and when its words begin."""
    words = [word for segment in segments(events) for word in segment.words]
    written = [word.replace("americans", "american") for word in plain(" ".join(word.text for word in words))]
    assert written == SENTENCE.split() * len(begins)
    starts = [word.start for word in words]
    for copy, begin in enumerate(begins):
        for place, moment in SPEECH_STARTS.items():
            assert starts[22 * copy + place] == pytest.approx(begin + moment, abs=0.3), (copy, words[place].text)


def test_no_word_of_a_long_audio_is_lost_or_doubled(real: LoadedTranscriber, store: Store) -> None:
    speech = jfk()
    parts = [speech, silence(2), speech, silence(4), speech, silence(1), speech]
    begins = [0.0, 13.0, 28.0, 40.0]
    real.submit(1, store(np.concatenate(parts)), PLAIN)
    events = finish(real)
    check_copies(events, begins)
    *heard, last = events
    assert last == Transcribed(1, "en", 0)
    done = [event.seconds for event in heard if isinstance(event, Heard)]
    assert len(done) == len(heard) <= 3
    assert done == sorted(done)
    assert done[-1] == 51.0
    found = segments(events)
    assert {segment.seek for segment in found} <= {0.0, *done[:-1]}
    edges = [edge for segment in found for word in segment.words for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    for segment in found:
        assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)
        assert segment.text.split() == [word.text for word in segment.words]
        assert b"".join(token.data for token in segment.tokens).decode() == segment.text
        assert segment.temperature == 0
        assert -1 < segment.logprob < 0
        assert all(0 < word.probability <= 1 for word in segment.words)


@pytest.mark.parametrize(("copies", "left_out"), [(4, 0), (4, 2), (4, 2.5), (3, 1), (3, 2), (5, 0)])
def test_where_somebody_speaks_on_at_the_end_of_a_window(
    real: LoadedTranscriber, store: Store, copies: int, left_out: float
) -> None:
    """The same is said again and again, so the text before is almost the only thing that tells where it goes on."""
    samples = np.tile(jfk(), copies)[round(left_out * SAMPLE_RATE) :]
    real.submit(1, store(samples), PLAIN)
    written = plain(text(finish(real)).replace("Americans", "American"))
    assert written == (SENTENCE.split() * copies)[-len(written) :]
    assert len(written) >= 22 * copies - 5  # what is said in the part that is left out


@pytest.mark.parametrize("end", [7.5, 10.2])
def test_a_speech_may_end_with_its_last_word(real: LoadedTranscriber, store: Store, end: float) -> None:
    real.submit(1, store(jfk()[: round(end * SAMPLE_RATE)]), PLAIN)
    (heard, _) = finish(real)
    (segment, *_) = segments([heard])
    assert segment.text.split()[:4] == ["And", "so", "my", "fellow"]
    assert segments([heard])[-1].end == pytest.approx(end, abs=0.05)


@pytest.mark.parametrize("noise", [0, 0.003])
def test_pauses_before_and_between_do_not_move_words(real: LoadedTranscriber, store: Store, noise: float) -> None:
    samples = np.concatenate((silence(7), jfk(), silence(5), jfk()))
    samples += np.random.default_rng(0).standard_normal(len(samples)).astype(np.float32) * np.float32(noise)
    real.submit(1, store(samples), PLAIN)
    check_copies(finish(real), [7, 23])


def test_a_prompt_is_heeded_and_cut_at_its_beginning(real: LoadedTranscriber, store: Store) -> None:
    path = store(jfk())
    prompt = "And so, my phellow Amerikans, phellow Amerikans."
    real.submit(1, path, Transcription(prompt="and so on, " * 100 + prompt))
    events = finish(real)
    assert "phellow Amerikans" in text(events)
    assert events[-1] == Transcribed(1, "en", 100 * 4 + 16 - CONTEXT)
    real.submit(2, path, PLAIN)
    assert "fellow Americans" in text(finish(real))


# ---- a fake one ----


class Fake(Whisper):
    """Hears in each window what is next in its script, or one word; it remembers what it was asked."""

    def __init__(self, *script: Window | Exception) -> None:
        self.script = list(script)
        self.samples: list[Samples] = []
        self.contexts: list[list[int]] = []
        self.languages: list[str] = []
        self.threads: list[int] = []
        self.detections = 0
        self.meanwhile: Callable[[], object] = lambda: None
        self.closed = False

    def tokenize(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def language(self, samples: Samples, *, threads: int) -> str:
        self.detections += 1
        return "de"

    def transcribe(
        self,
        samples: Samples,
        transcription: Transcription,
        context: Sequence[int],
        *,
        language: str,
        threads: int,
        given_up: Callable[[], bool],
    ) -> Window:
        self.samples.append(samples)
        self.contexts.append(list(context))
        self.languages.append(language)
        self.threads.append(threads)
        self.meanwhile()
        if given_up():
            raise Interrupted
        seconds = min(WINDOW, len(samples) / SAMPLE_RATE)
        said = self.script.pop(0) if self.script else window(" word", seconds=seconds)
        if isinstance(said, Exception):
            raise said
        return said

    def close(self) -> None:
        self.closed = True


def window(*texts: str | list[str], seconds: float = WINDOW) -> Window:
    """Return a window with utterances; their tokens are words unless they are given."""
    tokens = [re.findall(r"\s*\S+", each) if isinstance(each, str) else each for each in texts]
    utterances = [Utterance(number, number + 1, [piece(each) for each in part]) for number, part in enumerate(tokens)]
    context = [TIME, *(ord(each[-1]) for part in tokens for each in part), TIME + 1]
    return Window(utterances, seconds, 0.2, context)


def piece(written: str, hint: float | None = None) -> Piece:
    return Piece(TextToken(1, written.encode(), -0.5), 0.25, hint, 0.1)


def fake(*script: Window | Exception) -> tuple[Transcriber, Fake]:
    whisper = Fake(*script)
    return Transcriber(whisper, threads=2), whisper


# What is no speech


@pytest.mark.parametrize(
    ("written", "left"),
    [
        (" [BLANK_AUDIO]", ""),
        (" [ Silence ] [Music]", ""),
        (" (music)", ""),
        (" (upbeat music playing).", ""),
        (" ♪", ""),
        (" ♪♪ la la la ♪♪", "la la la"),
        (" ♪ Happy birthday ♪ said Tom ♪ and so on", "Happy birthday said Tom and so on"),
        (" ♪ (upbeat music) ♪", ""),
        (" *sighs*", ""),
        (" *Door opens*.", ""),
        (" I *really* mean it.", "I *really* mean it."),
        (" What the f*** is that s***?", "What the f*** is that s***?"),
        (" f***ing", "f***ing"),
        (" 2 * 3 * 4 is 24.", "2 * 3 * 4 is 24."),
        (" [Music] Hello there.", "Hello there."),
        (" Hello [laughs] there.", "Hello there."),
        (" Hello there. [APPLAUSE]", "Hello there."),
        (" Hello (again) there.", "Hello (again) there."),
        (" (Hello) there (again)", "(Hello) there (again)"),
        (" 3 [", "3 ["),
        (" f(x)", "f(x)"),
    ],
)
def test_what_is_no_speech_is_left_out(store: Store, written: str, left: str) -> None:
    for tokens in (re.findall(r"\s*\S+", written), list(written)):
        transcriber, _ = fake(window(tokens))
        transcriber.submit(1, store(sound(5)), PLAIN)
        events = finish(transcriber)
        assert text(events) == left
        assert [word.text for segment in segments(events) for word in segment.words] == left.split()


def test_a_segment_keeps_what_is_known_of_it(store: Store) -> None:
    transcriber, _ = fake(window(" (music)", " Hello there.", " Well [laughs] yes"))
    transcriber.submit(1, store(voices(10, (1, 2), (3, 4))), PLAIN)
    first, second = segments(finish(transcriber))
    assert (first.text, second.text) == (" Hello there.", " Well yes")
    assert (first.temperature, first.logprob, first.seek) == (0.2, -0.5, 0)
    assert first.compression == second.compression == compression(" Hello there. Well yes")
    assert [word.probability for word in first.words] == [0.25, 0.25]
    assert [token.data for token in second.tokens] == [b" Well", b" yes"]
    assert [first.start, first.end, second.start, second.end] == pytest.approx([1, 2, 3, 4], abs=0.03)


def test_silence_is_not_listened_to(store: Store) -> None:
    transcriber, whisper = fake()
    transcriber.submit(1, store(silence(100)), PLAIN)
    events = finish(transcriber)
    assert (text(events), events[-1]) == ("", Transcribed(1, "en", 0))
    transcriber.submit(2, store(voices(100, (70, 72))), PLAIN)
    (segment,) = segments(finish(transcriber))
    assert [segment.start, segment.end] == pytest.approx([70, 72], abs=0.03)
    assert len(whisper.samples) == 1
    assert whisper.samples[0][: 5 * SAMPLE_RATE].max() == 0


# Windows


def heard_up_to(store: Store, samples: Samples, *script: Window) -> list[float]:
    """Return up to where an audio is done, step by step."""
    transcriber, _ = fake(*script)
    transcriber.submit(1, store(samples), PLAIN)
    return [event.seconds for event in finish(transcriber) if isinstance(event, Heard)]


def test_a_window_goes_on_where_the_last_one_ended(store: Store) -> None:
    samples = sound(70)
    transcriber, whisper = fake(window(" one", seconds=21.5), window(" two", seconds=28))
    transcriber.submit(1, store(samples), PLAIN)
    assert [event.seconds for event in finish(transcriber) if isinstance(event, Heard)] == [21.5, 49.5, 70]
    for listened, begin in zip(whisper.samples, (0, 21.5, 49.5), strict=True):
        expected = samples[round(begin * SAMPLE_RATE) :][: 35 * SAMPLE_RATE]
        assert len(listened) == len(expected)
        assert abs(listened - expected).max() < 1e-4


def test_a_voice_that_would_be_cut_is_heard_again_as_a_whole(store: Store) -> None:
    samples = voices(40, (1, 2), (28, 32))
    assert heard_up_to(store, samples, window(" once upon a time")) == [pytest.approx(27.9, abs=0.03), 40]


def test_a_voice_that_is_written_is_not_heard_again(store: Store) -> None:
    samples = voices(40, (1, 2), (28, 32))
    once, again = window(" upon a time", " there was a little").utterances
    both = Window([once, again._replace(start=28, end=30)], WINDOW, 0, [])
    assert heard_up_to(store, samples, both) == [30, 40]


def test_a_voice_that_ends_with_the_audio_is_not_heard_again(store: Store) -> None:
    samples = voices(30, (1, 2), (28, 30))
    assert heard_up_to(store, samples, window(" once upon a time")) == [30]


def test_a_long_voice_is_cut(store: Store) -> None:
    samples = voices(40, (1, 2), (21, 32))
    assert heard_up_to(store, samples, window(" once upon a time")) == [30, 40]


def test_a_step_is_never_too_small(store: Store) -> None:
    """Whisper may end a window where it began it, and a voice may begin there."""
    samples = voices(6, (0.5, 6))
    windows = [*(window(seconds=0) for _ in range(5)), window(" well", seconds=1.2), window(seconds=0)]
    steps = heard_up_to(store, samples, *windows, window(" end", seconds=1.2))
    assert steps == pytest.approx([0.2, 0.6, 1.4, 2.4, 3.4, 4.6, 4.8, 6])


def test_text_leads_to_the_next_windows_text(store: Store) -> None:
    transcriber, whisper = fake(window(" a"), window(" b"), window(" c"), window(" d"))
    samples = voices(122, (0, 119.5), (120.2, 122))
    transcriber.submit(1, store(samples), Transcription(language="en", prompt=" hi "))
    finish(transcriber)
    prompt = [ord(each) for each in " hi"]
    first, second, third = ([TIME, ord(each), TIME + 1] for each in "abc")
    assert whisper.contexts == [
        prompt,
        prompt + first,
        prompt + first + second,
        prompt + first + second + third,
        [],  # so short a rest would be confused by it
    ]


def test_a_long_context_leaves_room_for_the_prompt(store: Store) -> None:
    transcriber, whisper = fake(*(window(" ".join(chr(n) for n in range(0x4E00, 0x4E64))) for _ in range(3)))
    transcriber.submit(1, store(sound(100)), Transcription(language="en", prompt="x" * 1000))
    *_, last = finish(transcriber)
    assert last == Transcribed(1, "en", 1001 - CONTEXT)
    assert [len(context) for context in whisper.contexts] == [CONTEXT, 111 + 102, CONTEXT, CONTEXT]
    assert all(context[:111] == [ord("x")] * 111 for context in whisper.contexts)


@pytest.mark.parametrize(("seconds", "context"), [(2.0, 4), (3.2, 0)])
def test_a_short_rest_needs_the_text_before_if_somebody_is_speaking(store: Store, seconds: float, context: int) -> None:
    samples = voices(6, (1, 3), (3.5, 5.5))
    transcriber, whisper = fake(window(" a", " b", seconds=seconds), window(" c", seconds=6 - seconds))
    transcriber.submit(1, store(samples), PLAIN)
    finish(transcriber)
    assert [len(each) for each in whisper.contexts] == [0, context]


_DOUBTFUL = window(" no")._replace(temperature=0.6)


@pytest.mark.parametrize("bad", [_DOUBTFUL, window(" [BLANK_AUDIO]"), window()], ids=["doubtful", "tag", "none"])
def test_what_is_no_text_leads_to_nothing(store: Store, bad: Window) -> None:
    transcriber, whisper = fake(window(" a"), bad, window(" c"))
    transcriber.submit(1, store(sound(100)), PLAIN)
    finish(transcriber)
    assert [len(context) for context in whisper.contexts] == [0, 3, 0, 3]


# Languages


def test_a_language_is_looked_for_once_if_none_is_asked_for(store: Store) -> None:
    transcriber, whisper = fake()
    transcriber.submit(1, store(voices(100, (40, 51), (70, 90))), Transcription())
    assert finish(transcriber)[-1] == Transcribed(1, "de", 0)
    assert (whisper.detections, whisper.languages) == (1, ["de"] * 2)
    transcriber.submit(2, store(sound(40)), Transcription(language="fr"))
    assert finish(transcriber)[-1] == Transcribed(2, "fr", 0)
    assert whisper.detections == 1
    transcriber.submit(3, store(silence(40)), Transcription())
    assert finish(transcriber)[-1] == Transcribed(3, "de", 0)


@pytest.mark.parametrize(("translate", "words"), [(False, ["你", "好", "吗"]), (True, ["你好", "吗"])])
def test_words_are_characters_where_a_language_has_no_spaces(store: Store, translate: bool, words: list[str]) -> None:
    """Which a translation has: it is English."""
    transcriber, _ = fake(window([" 你", "好", " 吗"]))
    transcriber.submit(1, store(sound(3)), Transcription(language="zh", translate=translate))
    (segment,) = segments(finish(transcriber))
    assert [word.text for word in segment.words] == words


# Turns


def order(transcriber: Transcriber) -> list[int]:
    """Return whose windows are done, in order."""
    numbers = []
    while not transcriber.idle:
        (number,) = {event.request for event in transcriber.step() if isinstance(event, Heard)}
        numbers.append(number)
    return numbers


def submit(transcriber: Transcriber, store: Store, *windows: int, share: str = "", first: int = 1) -> None:
    """Submit requests that take so many windows, numbered from ``first`` on."""
    for number, count in enumerate(windows, first):
        transcriber.submit(number, store(sound(30 * count)), PLAIN, share)


def test_requests_of_one_window_are_done_in_order(store: Store) -> None:
    transcriber, _ = fake()
    submit(transcriber, store, *[1] * 8)
    assert order(transcriber) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_short_request_comes_between_windows_of_a_long_one(store: Store) -> None:
    transcriber, _ = fake()
    submit(transcriber, store, 6, 1, 2)
    assert order(transcriber) == [1, 2, 1, 3, 1, 3, 1, 1, 1]


def test_a_long_request_has_half_of_all_steps(store: Store) -> None:
    transcriber, _ = fake()
    submit(transcriber, store, 10, *[1] * 20)
    turns = order(transcriber)
    assert turns[:20].count(1) == 10
    assert [turn for turn in turns if turn > 1] == list(range(2, 22))


def test_no_request_waits_for_the_end_of_all_others(store: Store) -> None:
    transcriber, _ = fake()
    submit(transcriber, store, 9, 9, 2)
    turns = order(transcriber)
    assert max(place for place, turn in enumerate(turns) if turn == 3) < 8


def test_steps_go_round_the_shares_and_in_each_is_the_order_of_one(store: Store) -> None:
    transcriber, _ = fake()
    submit(transcriber, store, 4, 1, 1, share="a")
    assert [event.request for event in transcriber.step()] == [1]
    submit(transcriber, store, 3, 1, share="b", first=4)
    assert order(transcriber) == [4, 2, 4, 1, 5, 3, 4, 1, 1]


def test_a_share_that_has_nothing_left_is_forgotten(store: Store) -> None:
    transcriber, _ = fake()
    for number in range(1, 10):
        submit(transcriber, store, 2, share=f"share{number}", first=number)
        transcriber.step()
        if number % 2:
            transcriber.cancel(number)
        else:
            transcriber.step()
    assert transcriber.idle
    assert not [*transcriber._round, *transcriber._first_went]


# Giving up


def test_a_request_that_is_cancelled_is_forgotten(store: Store) -> None:
    transcriber, whisper = fake()
    submit(transcriber, store, 1, 2, 1)
    transcriber.cancel(1)  # before it has begun
    assert [event.request for event in transcriber.step() if isinstance(event, Heard)] == [2]
    transcriber.cancel(2)  # in the middle
    transcriber.cancel(17)  # nobody
    assert order(transcriber) == [3]
    transcriber.cancel(3)  # after it
    assert transcriber.idle
    assert len(whisper.samples) == 2


def test_what_is_given_up_too_late_is_forgotten(store: Store) -> None:
    transcriber, _ = fake()
    submit(transcriber, store, 1)
    transcriber.interrupt(2)
    assert order(transcriber) == [1]
    transcriber.interrupt(1)
    assert transcriber._given_up == set()


@pytest.mark.parametrize("others", [(), (2,), (2, 3, None)])
def test_a_step_is_given_up_in_the_middle(store: Store, others: Sequence[int | None]) -> None:
    """From another thread, and whoever gives up at the same time."""
    transcriber, whisper = fake()
    submit(transcriber, store, 1, 1, 1, 1)

    def give_up() -> None:
        for request in (1, *others):
            transcriber.interrupt(request)

    def meanwhile() -> None:
        thread = threading.Thread(target=give_up)
        thread.start()
        thread.join()
        whisper.meanwhile = lambda: None

    whisper.meanwhile = meanwhile
    assert transcriber.step() == []
    for request in (1, *others):
        if request is not None:
            transcriber.cancel(request)
    assert order(transcriber) == [number for number in (2, 3, 4) if number not in others]


def test_that_all_shall_end_is_no_reason_to_stop(store: Store) -> None:
    transcriber, whisper = fake()
    whisper.meanwhile = lambda: transcriber.interrupt(None)
    submit(transcriber, store, 2)
    assert transcriber.stop() == []
    assert order(transcriber) == [1, 1]


def test_a_real_window_is_given_up(real: LoadedTranscriber, store: Store) -> None:
    real.submit(1, store(jfk()), PLAIN)
    timer = threading.Timer(0.1, real.interrupt, (1,))
    timer.start()
    assert real.step() == []
    timer.join()
    assert real.idle


# How busy it is


def test_progress_and_occupancy_are_told(store: Store) -> None:
    transcriber, _ = fake()
    assert transcriber.occupancy() == Occupancy()
    assert transcriber.occupancy() is None
    assert transcriber.progress() == []
    submit(transcriber, store, 3, 2, 1)
    assert transcriber.occupancy() == Occupancy(1, 2)
    assert transcriber.progress() == [Progress(1, 1, 0, 0), Progress(2, 2, 0, 0), Progress(3, 3, 0, 0)]
    transcriber.step()
    assert transcriber.occupancy() is None
    assert transcriber.progress() == [Progress(1, 0, 30, 90), Progress(2, 2, 0, 0), Progress(3, 3, 0, 0)]
    transcriber.step()
    assert transcriber.progress() == [Progress(1, 0, 30, 90), Progress(2, 0, 30, 60), Progress(3, 3, 0, 0)]
    finish(transcriber)
    assert transcriber.occupancy() == Occupancy()


# Files


@pytest.mark.parametrize("size", [0, 1, 2, 3199])
def test_an_audio_that_is_too_short_has_no_text(tmp_path: Path, size: int) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"\x7f" * size)
    transcriber, whisper = fake()
    transcriber.submit(1, path, PLAIN)
    assert finish(transcriber) == [Heard(1, [], size // 2 / SAMPLE_RATE), Transcribed(1, "en", 0)]
    assert whisper.samples == []


def test_half_a_sample_at_the_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"\x7f" * (2 * SAMPLE_RATE + 1))
    transcriber, whisper = fake()
    transcriber.submit(1, path, PLAIN)
    assert text(finish(transcriber)) == "word"
    assert len(whisper.samples[0]) == SAMPLE_RATE


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    transcriber, _ = fake()
    for path in (tmp_path / "nowhere", tmp_path, Path("a\0b")):
        with pytest.raises(EngineError, match="decoded audio"):
            transcriber.submit(1, path, PLAIN)
    assert transcriber.idle


def test_a_file_may_vanish_but_not_shrink(store: Store) -> None:
    transcriber, _ = fake()
    gone, cut = store(sound(60)), store(sound(60))
    transcriber.submit(1, gone, PLAIN)
    transcriber.submit(2, cut, PLAIN)
    gone.unlink()
    cut.write_bytes(b"")
    events = finish(transcriber)
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.request, event.error.name) for event in failed] == [(2, "EngineError")]
    assert [event for event in events if isinstance(event, Transcribed)] == [Transcribed(1, "en", 0)]


def test_files_are_closed(store: Store) -> None:
    transcriber, _ = fake(EngineError("no"))
    before = len(list(Path("/dev/fd").iterdir()))
    submit(transcriber, store, 1, 2, 1)
    transcriber.cancel(3)
    finish(transcriber)
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_a_failure_is_one_requests_only(store: Store) -> None:
    transcriber, _ = fake(EngineError("broken"))
    submit(transcriber, store, 2, 1)
    events = finish(transcriber)
    assert [type(event) for event in events] == [Failed, Heard, Transcribed]
    assert isinstance(events[0], Failed)
    assert (events[0].request, events[0].error.message) == (1, "broken")


# Threads


def test_threads_follow_what_other_programs_use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Controller:
        def __init__(self, most: int, *, long_steps: bool) -> None:
            assert long_steps
            self.threads = most
            self.said: list[Any] = [most]
            self.numbers: list[int | None] = [1, None]

        def resume(self) -> None:
            self.said.append("resume")

        def pause(self) -> None:
            self.said.append("pause")

        def update(self) -> int | None:
            if (threads := self.numbers.pop(0)) is not None:
                self.threads = threads
            return threads

    whisper = Fake()
    monkeypatch.setattr(module, "Whisper", lambda path, gpu: whisper)
    monkeypatch.setattr(module, "ThreadController", Controller)
    params = TranscriberParams(path="", threads=2, adaptive_threads=True, gpu=False)
    transcriber = LoadedTranscriber(params, lambda fraction: True)
    submit(transcriber, store, 2, 1)
    finish(transcriber)
    assert whisper.threads == [2, 1, 1]
    assert isinstance(transcriber._controller, Controller)
    assert transcriber._controller.said == [2, "resume", "pause"]
    transcriber._controller.threads = 2  # after a long pause
    submit(transcriber, store, 1)
    finish(transcriber)
    assert whisper.threads == [2, 1, 1, 2]
    transcriber.close()
    assert whisper.closed


# Whatever is heard


spans = st.lists(st.tuples(st.floats(0, 90), st.floats(0.05, 20)), max_size=8)
texts = st.lists(st.text("ab é。你[]()♪* .", max_size=12).map(lambda text: " " + text), max_size=8)
windows = st.lists(st.tuples(texts, st.floats(0, WINDOW)), max_size=12)


@settings(max_examples=40)
@given(seconds=st.floats(0, 90), loud=spans, said=windows)
def test_times_rise_and_an_audio_comes_to_its_end(
    tmp_path_factory: pytest.TempPathFactory, seconds: float, loud: list[tuple[float, float]], said: Any
) -> None:
    samples = voices(seconds, *((start, start + length) for start, length in loud if start + length <= seconds))
    path = tmp_path_factory.mktemp("audio") / "samples"
    path.write_bytes((samples * 32767).astype("<i2").tobytes())
    transcriber, _ = fake(*(window(*each, seconds=end) for each, end in said))
    transcriber.submit(1, path, PLAIN)
    events = finish(transcriber)
    assert isinstance(events[-1], Transcribed)
    done = [event.seconds for event in events if isinstance(event, Heard)]
    assert done == sorted(done)
    assert done[-1] == len(samples) / SAMPLE_RATE
    assert len(done) <= seconds + 2
    words = [word for segment in segments(events) for word in segment.words]
    edges = [edge for word in words for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    assert all(0 <= edge <= done[-1] for edge in edges)
