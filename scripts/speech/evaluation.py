"""How well a server understands prompts: its transcripts against theirs, the languages that it found, translations.

Knows nothing of packages, or of how the server is started.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmark.hearing import Heard

from speech.prompts import Prompt
from speech.words import errors, normalised

Hear = Callable[[bytes], Heard]

NAMES = {"en": "english", "es": "spanish", "fr": "french", "it": "italian"}
MOST_ERRORS = {"en": 0.08, "es": 0.35, "fr": 0.35, "it": 0.35}  # the mean of the prompts' word error rates


@dataclass(frozen=True)
class Attempt:
    """A prompt, what was understood of it, and what a translation of it says, if there is one."""

    prompt: Prompt
    language: str
    heard: Heard
    translation: str | None = None

    @cached_property
    def words(self) -> list[str]:
        """What should have been understood."""
        return normalised(self.prompt.text, self.language)

    @cached_property
    def errors(self) -> int:
        """Words that are wrong, missing or too many."""
        return errors(self.words, normalised(self.heard.text, self.language))

    @property
    def rate(self) -> float:
        """The word error rate."""
        return self.errors / len(self.words)

    @property
    def found(self) -> bool:
        """Whether the server found out the language."""
        return self.heard.language == NAMES[self.language]


@dataclass(frozen=True)
class Evaluation:
    """The attempts at the prompts of a language. ``vocabulary`` are words that are English."""

    language: str
    model: str
    attempts: Sequence[Attempt]
    vocabulary: Collection[str]

    @property
    def mean(self) -> float:
        """The mean of the prompts' word error rates."""
        return statistics.fmean(attempt.rate for attempt in self.attempts)

    @property
    def pooled(self) -> float:
        """The word error rate over all prompts as one text, where long ones weigh more."""
        return sum(attempt.errors for attempt in self.attempts) / sum(len(attempt.words) for attempt in self.attempts)

    @property
    def found(self) -> int:
        """The prompts whose language the server found out."""
        return sum(attempt.found for attempt in self.attempts)

    @property
    def good(self) -> bool:
        """Whether the error rate is within its bound."""
        return self.mean <= MOST_ERRORS[self.language]

    @property
    def translated(self) -> list[Attempt]:
        """The attempts with translations."""
        return [attempt for attempt in self.attempts if attempt.translation is not None]

    def english(self, *, translated: bool) -> float:
        """Return the share of words that are English, of the translations or of the transcripts themselves."""
        texts = [attempt.translation or "" if translated else attempt.heard.text for attempt in self.translated]
        words = [word for text in texts for word in normalised(text, "en")]
        return sum(word in self.vocabulary for word in words) / max(1, len(words))

    def worst(self, count: int) -> list[Attempt]:
        """Return the attempts with the highest error rates, those with any."""
        wrong = sorted((each for each in self.attempts if each.errors), key=lambda each: each.rate, reverse=True)
        return wrong[:count]


def attempt(prompt: Prompt, language: str, hear: Hear, translate: Hear | None = None) -> Attempt:
    """Have a prompt transcribed, and translated if it can be."""
    audio = prompt.file.read_bytes()
    heard = hear(audio)
    return Attempt(prompt, language, heard, translate(audio).text if translate is not None else None)
