"""Words are placed where there is voice, in order and within the sound, whatever the sound and the words are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from audio_files import SPEECH_STARTS, speech
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from llamaserve.speech.word_times import RATE, Samples, Voice, Word, find_voice, place

Span = tuple[float, float]
Spans = Sequence[Span]

NEAR = 0.06  # seconds by which a beginning or end of synthetic voice may be missed


def voiced(seconds: float, spans: Spans, *, noise: float = 0, tone: bool = False) -> Samples:
    """Return a sound with voice from one second to another: noise, or a tone; and other noise everywhere."""
    random = np.random.default_rng(1)
    samples = random.normal(0, noise, round(seconds * RATE)) if noise else np.zeros(round(seconds * RATE))
    for start, end in spans:
        first, last = round(start * RATE), round(end * RATE)
        voice = np.sin(np.arange(last - first) * 0.1) if tone else random.uniform(-1, 1, last - first)
        samples[first:last] += 0.3 * voice
    return samples.astype(np.float32)


def placed(samples: Samples, words: Sequence[Word]) -> list[Span]:
    return place(words, find_voice(samples))


def words(*texts: str) -> list[Word]:
    """Return words of which nothing else is known."""
    return [Word(text) for each in texts for text in each.split()]


def near(spans: Spans) -> object:
    return pytest.approx(np.array(spans), abs=NEAR)


# Voice


@pytest.mark.parametrize("tone", [False, True], ids=["noise", "tone"])
@pytest.mark.parametrize("noise", [0, 0.003, 0.03])
def test_voice_is_found_between_pauses(noise: float, tone: bool) -> None:
    spans = [(0.5, 1.5), (2.0, 2.3), (5.0, 9.0)]
    voice = find_voice(voiced(12, spans, noise=noise, tone=tone))
    assert voice.runs == near(spans)
    assert not voice.cut


def test_voice_may_be_cut_at_the_end() -> None:
    assert find_voice(voiced(5, [(1, 2), (4, 5)])).cut
    assert not find_voice(voiced(5, [(1, 2), (4, 4.9)])).cut


def test_short_pauses_are_no_pauses_and_short_sounds_no_voice() -> None:
    assert find_voice(voiced(6, [(1, 2), (2.15, 3), (4, 4.03)])).runs == near([(1, 3)])


@pytest.mark.parametrize("noise", [0, 0.003, 0.03])
def test_one_short_word_in_a_long_pause_is_found(noise: float) -> None:
    assert find_voice(voiced(30, [(17, 17.2)], noise=noise)).runs == near([(17, 17.2)])


def test_where_there_is_no_voice_all_may_be() -> None:
    for samples in (np.zeros(RATE, np.float32), voiced(1, [], noise=0.1), voiced(1, [(0, 1)])):
        assert find_voice(samples).runs == near([(0, 1)])
    assert find_voice(np.ones(80, np.float32)).runs.tolist() == [[0, 0.005]]


# Words


def test_words_of_one_stretch_take_as_long_as_they_have_letters() -> None:
    times = placed(voiced(4, [(1, 3)]), words("a longerword is"))
    assert [start for start, _ in times] == pytest.approx([1, 1.35, 2.55], abs=0.1)
    assert times[-1][1] == pytest.approx(3, abs=NEAR)
    assert [end for _, end in times[:-1]] == [start for start, _ in times[1:]]


def test_words_are_divided_among_stretches_as_they_fit() -> None:
    """With the pace of speech; the sentences are one voice each."""
    first, second, third = "now we know", "that this was a long sentence", "was it not"
    spans = [(0.4, 1.2), (2.0, 3.9), (4.5, 5.2)]
    for noise in (0, 0.003, 0.03):
        times = placed(voiced(7, spans, noise=noise), words(first, second, third))
        assert (times[0][0], times[2][1]) == near(spans[0])
        assert (times[3][0], times[8][1]) == near(spans[1])
        assert (times[9][0], times[11][1]) == near(spans[2])


@pytest.mark.parametrize("likely", [3, 4, 5])
def test_a_pause_is_where_whisper_might_have_written_a_time(likely: int) -> None:
    known = [Word("ab", pause=0.2 if number == likely else 1e-4) for number in range(8)]
    times = placed(voiced(6, [(1, 2.2), (3.5, 4.7)]), known)
    assert [start > 3 for start, _ in times] == [False] * likely + [True] * (8 - likely)


@pytest.mark.parametrize(("number", "hint", "first"), [(2, 4.5, 2), (3, 1.5, 3)])
def test_a_word_is_where_whisper_believes_that_it_begins(number: int, hint: float, first: int) -> None:
    """Both ways to divide them fit equally."""
    known = [Word("ab", hint=hint if place == number else None) for place in range(5)]
    times = placed(voiced(6, [(1, 2.2), (3.5, 4.7)]), known)
    assert [start > 3 for start, _ in times] == [False] * first + [True] * (5 - first)


@pytest.mark.parametrize("begins", [3.9, 7.8])
def test_a_segment_begins_after_its_time(begins: float) -> None:
    """A sound before it is none of its words."""
    samples = voiced(12, [(1, 2), (4, 4.5), (8, 9.5)])
    known = [*words("hello you there"), Word("this", hint=begins, leads=True), *words("is all of it")]
    assert placed(samples, known)[3][0] == pytest.approx(begins, abs=0.3)


def test_words_that_whisper_has_not_come_to_are_not_missed() -> None:
    """A voice that is cut at the end has none of the words, if they fit what comes before it."""
    samples = voiced(10, [(1, 2.6), (8, 10)])
    assert placed(samples, words("this was a longer sentence"))[-1][1] == pytest.approx(2.6, abs=NEAR)


def test_signs_take_longer_than_letters() -> None:
    (_, first), (second, _) = placed(voiced(3, [(1, 2)]), words("你好 ab"))
    assert first == second == pytest.approx(1 + 8.5 / 13, abs=NEAR)


def test_nothing_is_placed_nowhere() -> None:
    assert place([], find_voice(np.zeros(0, np.float32))) == []


# A real speech, with what tiny.en believes of it: when a word begins and how probable a time is before it.

SPEECH = [
    Word(" And", 0.0, leads=True),
    Word(" so", None, 0.00015),
    Word(" my", None, 0.00045),
    Word(" fellow", None, 0.00001),
    Word(" Americans", None, 0.00079),
    Word(" ask", 3.0, 0.08049),
    Word(" not", 3.8, 0.01031),
    Word(" what", 5.0, 0.15025),
    Word(" your", 5.58, 0.01078),
    Word(" country", None, 0.00789),
    Word(" can", 6.34, 0.04066),
    Word(" do", None, 0.00793),
    Word(" for", 6.88, 0.06928),
    Word(" you", 7.0, 0.0231),
    Word(" ask", 8.0, leads=True),
    Word(" what", None, 0.00025),
    Word(" you", None, 0.00013),
    Word(" can", None, 0.0002),
    Word(" do", None, 0.00008),
    Word(" for", None, 0.00035),
    Word(" your", None, 0.0002),
    Word(" country.", None, 0.00009),
]


@pytest.mark.parametrize("noise", [0, 0.001, 0.003, 0.01, 0.02])
@pytest.mark.parametrize("gain", [0.01, 1])
def test_the_words_of_a_speech_are_placed(noise: float, gain: float) -> None:
    samples = speech().astype(np.float32) / 32768
    samples = samples + np.random.default_rng(0).normal(0, noise, len(samples)).astype(np.float32)
    times = placed(gain * samples, SPEECH)
    for number, moment in SPEECH_STARTS.items():
        assert times[number][0] == pytest.approx(moment, abs=0.3), SPEECH[number].text
    without_hints = [word._replace(hint=None, pause=0.1) for word in SPEECH]
    assert abs(placed(samples, without_hints)[0][0] - SPEECH_STARTS[0]) < 0.3


# Whatever is given


def check(times: Spans, count: int, seconds: float) -> None:
    edges = np.array(times).reshape(-1)
    assert len(edges) == 2 * count
    assert np.isfinite(edges).all()
    assert (np.diff(edges) >= 0).all()
    assert all(0 <= edge <= seconds for edge in edges)


TEXTS = st.text(max_size=12) | st.sampled_from(["", "...", "你好", "ก", "e\u0301", "word", "a" * 300])
HINTS = st.none() | st.floats(-2000, 2000)
WORDS = st.lists(st.builds(Word, TEXTS, HINTS, st.floats(0, 1), st.booleans()), max_size=40)
SAMPLES = arrays.arrays(np.float32, st.integers(1, 4000), elements=st.floats(-1, 1, width=32))


@given(samples=SAMPLES, known=WORDS)
def test_times_of_any_sound_rise_within_it(samples: Samples, known: list[Word]) -> None:
    check(placed(samples, known), len(known), len(samples) / RATE)


@settings(max_examples=60)
@given(known=WORDS, spans=st.lists(st.tuples(st.floats(0, 9), st.floats(0.01, 3)), max_size=10), loud=st.booleans())
def test_times_rise_within_voices(known: list[Word], spans: Spans, loud: bool) -> None:
    samples = voiced(12, [(start, start + length) for start, length in spans], noise=0.1 if loud else 0)
    check(placed(samples, known), len(known), 12)


@given(edges=st.lists(st.floats(0, 30), min_size=2, max_size=40, unique=True), known=WORDS, cut=st.booleans())
def test_times_are_within_stretches_of_voice(edges: list[float], known: list[Word], cut: bool) -> None:
    runs = np.array(sorted(edges)[: len(edges) // 2 * 2]).reshape(-1, 2)
    times = place(known, Voice(runs, cut))
    check(times, len(known), runs[-1][1])
    for start, end in times:
        assert any(first <= start <= end <= last + 1e-9 for first, last in runs)


@pytest.mark.parametrize("samples", [np.zeros(RATE), np.full(RATE, -1), np.eye(1, RATE)[0], np.full(160, 1e-30)])
@pytest.mark.parametrize("text", ["", "a", "...", "你好"])
def test_more_words_than_moments_have_times(samples: Samples, text: str) -> None:
    check(placed(samples.astype(np.float32), [Word(text)] * 220), 220, len(samples) / RATE)
