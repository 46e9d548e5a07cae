"""Transcripts as JSON and as subtitles, whatever is said in them."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import srt
import webvtt
from hypothesis import given, strategies as st

from llamaserve.api.transcripts import Transcript, as_json, as_srt, as_verbose_json, as_vtt
from llamaserve.speech.values import Segment, SpokenWord, TextToken

SPOKEN = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: text.strip())
TIMES = st.lists(st.floats(0, 360_000), min_size=2, max_size=12, unique=True).map(sorted)


def segment(text: str, start: float = 0.0, end: float = 1.0, words: tuple[str, ...] = ()) -> Segment:
    step = (end - start) / max(1, len(words))
    spoken = tuple(SpokenWord(word, start + n * step, start + (n + 1) * step, 0.9) for n, word in enumerate(words))
    token = TextToken(7, text.encode(), -0.5)
    return Segment(text, start, end, 0.0, 0.2, -0.5, 1.25, spoken, (token,))


def transcript(*segments: Segment, seconds: float = 9.2, language: str = "en") -> Transcript:
    return Transcript(seconds, list(segments), language)


def test_short_json() -> None:
    heard = transcript(segment(" Hello"), segment(" you."))
    assert as_json(heard, logprobs=False) == {"text": "Hello you.", "usage": {"type": "duration", "seconds": 10}}
    assert as_json(heard, logprobs=True)["logprobs"] == [
        {"token": " Hello", "bytes": [32, 72, 101, 108, 108, 111], "logprob": -0.5},
        {"token": " you.", "bytes": [32, 121, 111, 117, 46], "logprob": -0.5},
    ]


def test_verbose_json() -> None:
    heard = transcript(segment(" Hello", 0.12345, 1.5, ("Hello",)), language="ht")
    assert as_verbose_json(heard, task="translate", segments=True, words=True) == {
        "task": "translate",
        "language": "haitian creole",
        "duration": 9.2,
        "text": "Hello",
        "segments": [
            {
                "id": 0,
                "seek": 0,
                "start": 0.123,
                "end": 1.5,
                "text": " Hello",
                "tokens": [7],
                "temperature": 0.2,
                "avg_logprob": -0.5,
                "compression_ratio": 1.25,
                "no_speech_prob": 0.0,
            }
        ],
        "words": [{"word": "Hello", "start": 0.123, "end": 1.5}],
        "usage": {"type": "duration", "seconds": 10},
    }
    assert (
        as_verbose_json(heard, task="transcribe", segments=False, words=False).keys().isdisjoint({"segments", "words"})
    )


@pytest.mark.parametrize(
    ("written", "word"),
    [
        ("country.", "country"),
        ("“Well,”", "Well"),
        ("don't", "don't"),
        ("-3.5%", "3.5%"),
        ("R&D,", "R&D"),
        ("¿Qué?", "Qué"),
        ("l'été", "l'été"),
        ("日", "日"),
        ("$5", "$5"),
        ("हिन्दी।", "हिन्दी"),
        ("—", None),
        ("...", None),
    ],
)
def test_words_are_without_the_signs_around_them(written: str, word: str | None) -> None:
    body = as_verbose_json(transcript(segment(written, words=(written,))), task="", segments=False, words=True)
    assert [each["word"] for each in body["words"]] == ([word] if word else [])


def test_no_speech_is_no_subtitles() -> None:
    assert as_srt(transcript()) == ""
    assert as_vtt(transcript()) == "WEBVTT\n\n"


def test_times_beyond_an_hour() -> None:
    heard = transcript(segment(" late", 3 * 3600 + 61.0006, 100 * 3600))
    assert as_srt(heard) == "1\n03:01:01,001 --> 100:00:00,000\nlate\n\n"
    assert "03:01:01.001 --> 100:00:00.000" in as_vtt(heard)


def test_a_subtitle_is_shown_for_a_moment_at_least() -> None:
    assert "00:00:05,000 --> 00:00:05,001" in as_srt(transcript(segment("a", 5.0, 5.0)))


@pytest.mark.parametrize(
    "text",
    [" a --> b", "a ---> b", "a ------>b", "1\n2\n3", "a\n\nb", "<b>bold</b> & more", "NOTE a", "STYLE", "WEBVTT"],
)
def test_nothing_that_is_said_ends_a_subtitle(text: str) -> None:
    heard = transcript(segment(text, 0, 1), segment("after it", 1, 2))
    assert [cue.content for cue in srt.parse(as_srt(heard))][1:] == ["after it"]
    first, second = webvtt.from_buffer(io.StringIO(as_vtt(heard)), strict=True).captions
    assert (second.start, second.text) == ("00:00:01.000", "after it")
    assert "-->" not in first.raw_text


@given(texts=st.lists(SPOKEN, min_size=1, max_size=6), times=TIMES)
def test_subtitles_are_read_as_they_were_written(texts: list[str], times: list[float]) -> None:
    pieces: list[Any] = list(zip(texts, times, times[1:], strict=False))
    heard = transcript(*(segment(text, start, end) for text, start, end in pieces))
    cues = list(srt.parse(as_srt(heard)))
    captions = webvtt.from_buffer(io.StringIO(as_vtt(heard)), strict=True).captions
    assert len(cues) == len(captions) == len(pieces)
    for number, ((text, start, _), cue) in enumerate(zip(pieces, cues, strict=True), 1):
        assert cue.index == number
        assert abs(cue.start.total_seconds() - start) <= 0.0006
        assert cue.end >= cue.start
        assert cue.content.split() == re.sub("-+>", "->", " ".join(text.split())).split()
