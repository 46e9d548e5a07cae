"""How many prompt tokens a step takes, so that neither the running streams nor the prompts stand still.

While others decode, prompts get a little less than half of the time, or more when there are more prompts than streams:
what decoding takes is credited to them, what they take is debited, and they wait while the balance is negative. What a
step takes of them is bounded in time, so that the gap in the streams is; a balance saved up lets a short prompt through
at once. Knows what steps cost, not what is in them.
"""

from __future__ import annotations

from llamaserve.engine.costs import LARGE, StepCosts

_SHARE = 0.8  # of the time that decoding takes, what prompts may take beside as many streams or more
_SAVINGS = 0.25  # seconds that prompts may be ahead
_DEBT = 2.0  # seconds that they may be behind: a step that took longer was held up by something else
_GAP = 0.05  # seconds that a prompt may add to a step of decoding sequences, or one such step if that is longer
_STEP = 0.5  # seconds of a step of prompts alone, for which a request that comes meanwhile waits; more if ``LARGE`` is
_LEAST = 8  # tokens: fewer at a time are evaluated no faster


class TimeShare:
    """Shares the time of one context between its prompts and its streams."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._balance = _SAVINGS
        self._majority = 1.0  # prompts for each stream, if there are more of them

    def prompt_tokens(self, decoding: int, prompts: int, pending: int) -> int:
        """See ``Pace``."""
        if not decoding:
            return max(LARGE, self._tokens_in(_STEP, 0, pending))
        self._majority = max(1.0, prompts / decoding)
        if self._balance <= 0:
            return 0
        seconds = min(_STEP, self._majority * max(_GAP, self._costs.decode(decoding)))
        return self._tokens_in(seconds, decoding, pending)

    def record(self, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """Take note of a step: its rows of decoding sequences, its prompt tokens and what it took."""
        if not decoding:
            self._balance = max(0.0, self._balance)  # nobody is owed anything
            return
        for_streams = min(seconds, self._costs.decode(decoding)) if prompt_tokens else seconds
        for_prompts = seconds - for_streams
        balance = self._balance + _SHARE * self._majority * for_streams - for_prompts
        self._balance = max(-_DEBT, min(_SAVINGS, balance))

    def _tokens_in(self, seconds: float, decoding: int, pending: int) -> int:
        """Return how many prompt tokens, of those that there are, take so long beside some decoding sequences."""
        many = min(pending, round(seconds / self._costs.prompt_token(large=True)))
        if decoding + many >= LARGE:
            return many
        few = round(seconds / self._costs.prompt_token())
        return max(_LEAST, min(few, LARGE - 1 - decoding))
