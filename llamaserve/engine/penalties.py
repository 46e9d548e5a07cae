"""The stages of a sampler that look at the text so far: what makes tokens less probable, or bans them, for having
occurred or for coming too early.

A stage is told each token of the prompt and the answer by ``accept`` and changes the candidates' logits when called. It
changes few of them, so none walks the vocabulary. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np

from llamaserve.engine.candidates import Candidates, Tokens
from llamaserve.engine.llama import NativeSampler


class TextStage(Protocol):
    """A stage that follows the text."""

    def __call__(self, candidates: Candidates) -> None:
        """Change the logits of some candidates."""

    def accept(self, token: int) -> None:
        """Take note of the next token of the text."""

    def close(self) -> None:
        """Free what is not Python's."""


class OccurrencePenalty:
    """One of llama.cpp's samplers that change no logits but those of tokens that have occurred. It is shown just these:
    over a whole vocabulary of 49,152 tokens it takes 2.8 ms to look up each of them, every time.
    """

    def __init__(self, native: NativeSampler) -> None:
        self._native = native
        self._known: set[int] = set()
        self._tokens = np.zeros(256, np.int32)

    def __call__(self, candidates: Candidates) -> None:
        """See ``TextStage``."""
        occurred = self._tokens[: len(self._known)]
        places, present = candidates.places_of(occurred)
        logits = candidates.logits[places]
        self._native.apply(occurred[present], logits)
        candidates.logits[places] = logits
        candidates.sorted = False

    def accept(self, token: int) -> None:
        """See ``TextStage``."""
        self._native.accept(token)
        if token in self._known:
            return
        if len(self._known) == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
        self._tokens[len(self._known)] = token
        self._known.add(token)

    def close(self) -> None:
        """See ``TextStage``."""
        self._native.close()


class PromptPreference:
    """Makes the tokens of the prompt more probable, or less: a positive logit is multiplied by the ``factor``, a
    negative one divided by it. Known as ``encoder_repetition_penalty``.
    """

    def __init__(self, factor: float, prompt: Sequence[int]) -> None:
        self._factor = np.float32(factor)
        self._tokens = np.unique(np.array(prompt, np.int32))

    def __call__(self, candidates: Candidates) -> None:
        """See ``TextStage``."""
        places, _ = candidates.places_of(self._tokens)
        logits = candidates.logits[places]
        candidates.logits[places] = np.where(logits > 0, logits * self._factor, logits / self._factor)
        candidates.sorted = False

    def accept(self, token: int) -> None:
        """See ``TextStage``: the prompt is known."""

    def close(self) -> None:
        """See ``TextStage``."""


class NoRepeatedNgrams:
    """Bans each token that would complete a sequence of ``size`` tokens which the text has already.

    Sequences of one token less are known by a number, as in Rabin and Karp's search: two of them have the same one
    with a chance of 1 to 2^127.
    """

    _PRIME = 2**127 - 1
    _BASE = 0x9E3779B97F4A7C15F39CC0605CEDC835

    def __init__(self, size: int) -> None:
        self._length = size - 1
        self._text: list[int] = []
        self._last = 0  # the number of the last ``length`` tokens
        self._leaving = pow(self._BASE, self._length, self._PRIME)
        self._followers: dict[int, set[int]] = {}

    def __call__(self, candidates: Candidates) -> None:
        """See ``TextStage``."""
        if banned := self._followers.get(self._last):
            _ban(candidates, np.array(list(banned), np.int32))

    def accept(self, token: int) -> None:
        """See ``TextStage``."""
        text, length = self._text, self._length
        text.append(token)
        first = len(text) - 1 - length
        if first >= 0:
            self._followers.setdefault(self._last, set()).add(token)
        last = self._last * self._BASE + token + 1
        if first >= 0:
            last -= (text[first] + 1) * self._leaving
        self._last = last % self._PRIME

    def close(self) -> None:
        """See ``TextStage``."""


class LeastLength:
    """Bans the tokens that end an answer, until it has a least number of tokens."""

    def __init__(self, tokens: int, ends: Collection[int]) -> None:
        self._missing = tokens
        self._ends = np.array(list(ends), np.int32)

    def __call__(self, candidates: Candidates) -> None:
        """See ``TextStage``."""
        if self._missing > 0:
            _ban(candidates, self._ends)

    def accept(self, token: int) -> None:  # noqa: ARG002
        """See ``TextStage``."""
        self._missing -= 1

    def close(self) -> None:
        """See ``TextStage``."""


def _ban(candidates: Candidates, tokens: Tokens) -> None:
    places, _ = candidates.places_of(tokens)
    candidates.logits[places] = -np.inf
    candidates.sorted = False
