"""Log-probabilities of tokens, from the model's own logits: what a sampler does to them does not show.

Knows nothing of sampling or of texts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np

from llamaserve.engine.candidates import Candidates, Floats, top
from llamaserve.engine.detokenizer import Detokenizer
from llamaserve.engine.events import TokenLogprob, TokenLogprobs
from llamaserve.engine.llama import Vocab
from llamaserve.errors import EngineError


class AnswerLogprobs:
    """The log-probabilities of an answer's tokens, which are given out with the text that they are of."""

    def __init__(self) -> None:
        self._sampled: list[TokenLogprobs] = []
        self._begun = 0
        self._waiting: deque[TokenLogprobs] = deque()

    def record(self, entry: TokenLogprobs) -> None:
        """Add those of the token that was sampled next."""
        self._sampled.append(entry)

    def begin(self, offset: int) -> None:
        """Take note of where the next token's text begins in the answer. Sampled tokens without are no part of it."""
        self._waiting.append(msgspec.structs.replace(self._sampled[self._begun], offset=offset))
        self._begun += 1

    def take(self, end: int | None = None) -> tuple[TokenLogprobs, ...]:
        """Return those that were not taken yet of the tokens whose text begins before ``end``; None for all."""
        taken = []
        while self._waiting and (end is None or self._waiting[0].offset < end):
            taken.append(self._waiting.popleft())
        return tuple(taken)


def with_offsets(prompt: Iterable[TokenLogprobs]) -> Iterator[TokenLogprobs]:
    """Yield the log-probabilities of a prompt's tokens with the places of their texts."""
    text = Detokenizer(())
    for entry in prompt:
        yield msgspec.structs.replace(entry, offset=text.decoded)
        text.push(entry.chosen.data)


def log_probabilities(logits: Floats, tokens: Sequence[int]) -> Floats:
    """Return the natural logarithms of the probabilities of some tokens; ``logits`` of shape (vocabulary,). Raises
    ``EngineError`` when they are not numbers.
    """
    best = logits.max()
    if not math.isfinite(best):
        raise EngineError("the model computed logits that are not numbers; its file is probably damaged")
    total = np.exp(logits - best).sum(dtype=np.float64)
    values: Floats = (logits[list(tokens)] - best) - np.float32(np.log(total))
    return values


def of_token(logits: Floats, token: int, count: int, vocab: Vocab) -> TokenLogprobs:
    """Return the log-probability of a token and of the ``count`` most probable ones in its place, those first that are
    more probable.
    """
    tokens = [token, *top(logits, count)]
    chosen, *others = (
        TokenLogprob(each, vocab.piece(each, special=True), float(value))
        for each, value in zip(tokens, log_probabilities(logits, tokens), strict=True)
    )
    return TokenLogprobs(chosen, tuple(others))


def of_candidates(candidates: Candidates, count: int, vocab: Vocab) -> tuple[TokenLogprob, ...]:
    """Return the log-probabilities of the ``count`` most probable candidates among all of them."""
    places = top(candidates.logits, min(count, len(candidates)))
    values = log_probabilities(candidates.logits, places)
    found = ((candidates.token(place), float(value)) for place, value in zip(places, values, strict=True))
    return tuple(
        TokenLogprob(token, vocab.piece(token, special=True), value) for token, value in found if value > -np.inf
    )
