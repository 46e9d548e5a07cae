"""From a request's sampling options to what samples: mostly a chain of llama.cpp's samplers.

The order is that of the seed API: logit bias, penalties, temperature, top-k, top-p, min-p, then the draw. Knows nothing
of requests or batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from llamaserve.engine.llama import Context, SamplerChain, Vocab
from llamaserve.engine.params import Sampling
from llamaserve.errors import EngineError

_WHOLE_TEXT = 0  # our repetition_penalty_range for "all tokens"
_GREEDY_BELOW = 1e-5  # temperatures at which only the best token is left, and dividing by them could overflow


class Greedy:
    """Picks the most probable token. llama.cpp's sampler for this makes a list of the whole vocabulary first: 95 µs
    instead of 5 for 49,152 tokens.
    """

    def sample(self, context: Context, row: int) -> int:
        """Pick a token from a row's logits. Raises ``EngineError`` when they are not numbers."""
        logits = context.logits(row)
        token = int(logits.argmax())  # the first that is no number, if there is one
        _check(logits[token])
        return token

    def close(self) -> None:
        """There is nothing to free."""


class Chain:
    """Picks a token by llama.cpp's samplers, one after the other."""

    def __init__(self) -> None:
        self.native = SamplerChain()

    def sample(self, context: Context, row: int) -> int:
        """Pick a token from a row's logits. Raises ``EngineError`` when they are not numbers."""
        _check(context.logits(row).max())  # which is no number as soon as one of them is none
        return self.native.sample(context, row)

    def close(self) -> None:
        """Free the samplers."""
        self.native.close()


def _check(logit: np.float32) -> None:
    """Refuse logits that are no numbers: they would become noise, or trip an assertion in a sampler."""
    if not math.isfinite(logit):
        raise EngineError("the model computed logits that are not numbers; its file is probably damaged")


def build_sampler(
    sampling: Sampling, vocab: Vocab, *, history: Sequence[int], context: int, choice: int
) -> Greedy | Chain:
    """Return what samples one sequence; its penalties already know ``history``, the prompt.

    ``context`` is the largest number of tokens a sequence can have; ``choice`` is added to the seed.
    """
    window = _penalty_window(sampling, context)
    if sampling.temperature < _GREEDY_BELOW and not sampling.logit_bias and not window:
        return Greedy()
    sampler = Chain()
    chain = sampler.native
    if sampling.logit_bias:
        chain.add_logit_bias(vocab, sampling.logit_bias)
    if window:
        chain.add_penalties(
            vocab, window, sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty
        )
    if sampling.temperature < _GREEDY_BELOW:
        chain.add_greedy()
    else:
        _add_random_draw(chain, sampling, choice)
    for token in history[-window:] if window else ():
        chain.accept(token)
    return sampler


def _penalty_window(sampling: Sampling, context: int) -> int:
    """Return how many last tokens the penalties look at; 0 when all three are neutral."""
    if (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty) == (1.0, 0.0, 0.0):
        return 0
    wanted = sampling.repetition_penalty_range
    return context if wanted == _WHOLE_TEXT else min(wanted, context)  # llama.cpp allocates what it is told


def _add_random_draw(chain: SamplerChain, sampling: Sampling, choice: int) -> None:
    if sampling.temperature != 1:
        chain.add_temperature(sampling.temperature)
    if sampling.top_k > 0:
        chain.add_top_k(sampling.top_k)
    if sampling.top_p < 1:
        chain.add_top_p(sampling.top_p)
    if sampling.min_p > 0:
        chain.add_min_p(sampling.min_p)
    chain.add_distribution(sampling.seed + choice)
