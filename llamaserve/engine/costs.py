"""What steps cost, learned from those that were measured. Knows rows and seconds, not what is in the rows.

Two things change at different speeds. Deep contexts and a busy machine make all steps slower, within seconds: that is
the scale, the seconds of a step with one row, which every step moves. How many times that a step of more rows takes is
a property of model and hardware: it is learned once for each number of rows, and moves slowly afterwards. A prompt's
token costs less in large steps than in small ones, so that is learned for the two apart.
"""

from __future__ import annotations

from bisect import bisect_left, insort

# Rows of a step, prompts included, from which llama.cpp's flash attention on a CPU computes in tiles. With SmolLM2 on
# two cores a token 3,000 tokens deep takes 7.7 ms in steps of 64 rows and 16.3 ms in steps of 8 to 63.
LARGE = 64

_LEAST_SECONDS = 1e-6  # of a step, for clocks that stand still
_UNKNOWN_SECONDS = 0.03  # of a step of one row before any was measured
_UNKNOWN_SLOPE = 0.6  # what a further row costs, in steps of one row, before a prompt was measured: little is gained
_ROW_PER_PROMPT_TOKEN = 1.5  # a row among a few costs as much as 1.5 tokens of a prompt (SmolLM2 on a CPU)
_FIRST = 4  # measurements that are believed when they are far below what was expected
_SURPRISE = 1.5  # otherwise a step counts as at most so many times longer or shorter: the machine may have paused
_SCALE_WEIGHT = 0.15  # of the newest step
_RELATIVE_WEIGHT = 0.02  # of the newest step, at least
_LEAST_PROMPT_TOKEN = 1e-3  # in steps of one row: what is lost among other costs is not free
_REMEMBERED = 8  # steps' worth of tokens of earlier prompts that count: large steps have 64 or more, small ones often 8


class _PromptCost:
    """The seconds of a prompt's token in some steps, and how many ``tokens`` were measured, of which the last ``most``
    count.
    """

    def __init__(self, most: int) -> None:
        self.token = 0.0
        self.tokens = 0
        self.most = most


class StepCosts:
    """The cost of a step by its rows, and of prompt tokens beside them. Seconds throughout."""

    def __init__(self) -> None:
        self._scale = _UNKNOWN_SECONDS
        self._steps = 0  # measured without prompts
        self._relative = {0: 0.0, 1: 1.0}  # by number of rows; one row is the unit
        self._measured = [1]  # the numbers of rows of which the relative cost is known, in order
        self._times: dict[int, int] = {}  # how often each was measured
        self._in_small_steps, self._in_large_steps = _PromptCost(8 * _REMEMBERED), _PromptCost(LARGE * _REMEMBERED)

    def prompt_token(self, *, large: bool = False) -> float:
        """Return the seconds that one more token of a prompt adds to a step of fewer rows than ``LARGE``, or a
        ``large`` one. As long as only one of the two was measured, the other is believed to cost the same.
        """
        costs = (self._in_large_steps, self._in_small_steps) if large else (self._in_small_steps, self._in_large_steps)
        measured = next((cost for cost in costs if cost.tokens), None)
        return self._scale * _UNKNOWN_SLOPE / _ROW_PER_PROMPT_TOKEN if measured is None else measured.token

    def decode(self, rows: int) -> float:
        """Return the seconds of a step of ``rows`` decoding rows.

        Between measured numbers of rows it is on the line that joins them. Above them it grows as is guessed: each row
        costs 1.5 times what a token of a prompt does, or 0.6 times the first row as long as no prompt was measured.
        """
        relative = self._relative.get(rows)
        return self._scale * (self._guess(rows) if relative is None else relative)

    def record(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step of ``rows`` decoding rows and ``prompt_tokens`` tokens of prompts."""
        seconds = max(seconds, _LEAST_SECONDS)
        if rows == 0:  # a prompt's last token is one
            rows = 1
            prompt_tokens -= 1
        if prompt_tokens > 0:
            self._learn_prompt(rows, prompt_tokens, seconds)
        else:
            self._learn_decode(rows, seconds)

    def _guess(self, rows: int) -> float:
        after = bisect_left(self._measured, rows)
        left = self._measured[after - 1]
        low = self._relative[left]
        if after < len(self._measured):
            right = self._measured[after]
            return low + (self._relative[right] - low) * (rows - left) / (right - left)
        slope = min(1.0, _ROW_PER_PROMPT_TOKEN * self.prompt_token() / self._scale)
        return low * (1 + slope * (rows - 1)) / (1 + slope * (left - 1))

    def _learn_prompt(self, rows: int, prompt_tokens: int, seconds: float) -> None:
        cost = self._in_large_steps if rows + prompt_tokens >= LARGE else self._in_small_steps
        rest = self.decode(rows) if self._steps else 0.0
        if cost.tokens == cost.most:
            seconds = min(seconds, _SURPRISE * (rest + prompt_tokens * cost.token))
        token = max((seconds - rest) / prompt_tokens, self._scale * _LEAST_PROMPT_TOKEN)
        cost.tokens += prompt_tokens
        cost.token += (token - cost.token) * prompt_tokens / cost.tokens
        cost.tokens = min(cost.tokens, cost.most)

    def _learn_decode(self, rows: int, seconds: float) -> None:
        expected = self.decode(rows)
        self._steps += 1
        if self._steps <= _FIRST:  # the fastest: nothing else tells a usual step from a pause yet
            self._scale *= seconds / expected if self._steps == 1 else min(seconds / expected, 1.0)
            return
        times = self._times[rows] = self._times.get(rows, 0) + 1
        surprise = min(seconds / expected, _SURPRISE) - 1
        if rows > 1:
            if times == 1:
                insort(self._measured, rows)
                self._relative[rows] = expected / self._scale
            if times > _FIRST:
                surprise = max(surprise, 1 / _SURPRISE - 1)
            self._relative[rows] *= 1 + surprise * max(1 / times, _RELATIVE_WEIGHT)
        if rows == 1 or times > _FIRST:
            self._scale *= 1 + max(surprise, 1 / _SURPRISE - 1) * _SCALE_WEIGHT
