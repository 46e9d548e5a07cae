"""What is asked and what came back, with the time of every piece; and the figures that follow from those times.

Knows nothing of where an answer comes from: a server's and the bare loop's are measured by the same functions.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WINDOW = 0.2  # seconds: what a rate "at a moment" is taken over
_LASTING = 0.5  # seconds for which a new rate has to hold to count as reached
_REACHED = 0.9  # of the rate in the end


@dataclass(frozen=True)
class Request:
    """A prompt, or the messages of a chat. ``banned`` tokens, such as those that end an answer, are never chosen."""

    tokens: int
    prompt: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    n: int = 1
    banned: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str | None) -> dict[str, Any]:
        """Return the JSON of a streaming OpenAI request, always the most probable token."""
        what: dict[str, Any] = {"messages": list(self.messages)} if self.messages else {"prompt": self.prompt}
        what |= {"max_tokens": self.tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        if model is not None:
            what["model"] = model
        if self.n > 1:
            what["n"] = self.n
        if self.banned:
            what["logit_bias"] = {str(token): -100 for token in self.banned}
        return what | dict(self.extra)


@dataclass
class Answer:
    """One streamed answer. ``times`` and ``sizes`` are the arrival (a monotonic clock's seconds) and the length of each
    piece of text, ``firsts`` the arrival of each choice's first; ``tokens`` is what really came, told by the server
    when ``counted``. Without a ``finish`` the stream just ended: it was interrupted.
    """

    started: float
    times: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    firsts: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    counted: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None
    error: str | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.texts.get(0, "")

    @property
    def ended(self) -> float:
        """When the last text came."""
        return self.times[-1] if self.times else self.started

    @property
    def first(self) -> float:
        """Seconds from the request until every choice has text; NaN when none came."""
        return max(self.firsts.values()) - self.started if self.firsts else float("nan")

    def tokens_between(self, start: float, end: float) -> float:
        """Return how many tokens came after ``start`` and not after ``end``; a piece of text may hold several, so they
        are counted by its length.
        """
        low, high = bisect_right(self.times, start), bisect_right(self.times, end)
        total = sum(self.sizes)
        return self.tokens * sum(self.sizes[low:high]) / total if total else 0.0

    def gaps(self, start: float, end: float) -> list[float]:
        """Return the seconds between neighbouring pieces, of which the later one came within this time."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [later - earlier for earlier, later in pairs if start < later <= end]


def seconds(answers: Sequence[Answer]) -> float:
    """Return the time from the first request to the last text."""
    return max(each.ended for each in answers) - min(each.started for each in answers)


def rate(answers: Sequence[Answer]) -> float:
    """Return tokens a second of all answers together, prompts included."""
    return _divided(sum(each.tokens for each in answers), seconds(answers))


def decode_rate(answers: Sequence[Answer]) -> float:
    """Return tokens a second while all answers were flowing: from the latest first text to the earliest last one."""
    if not all(each.times for each in answers):
        return float("nan")
    start, end = max(each.times[0] for each in answers), min(each.times[-1] for each in answers)
    return _divided(sum(each.tokens_between(start, end) for each in answers), end - start)


def rates_over_time(answer: Answer, start: float, end: float, step: float = 0.05) -> list[tuple[float, float]]:
    """Return (middle of the window, tokens a second) for windows of ``WINDOW`` seconds that slide from start to end."""
    count = max(0, int((end - start - WINDOW) / step + 1e-9) + 1)
    begins = (start + step * number for number in range(count))
    return [(at + WINDOW / 2, answer.tokens_between(at, at + WINDOW) / WINDOW) for at in begins]


def settled_rate(answer: Answer, start: float, end: float) -> float:
    """Return the median rate of the windows in the second half of a span."""
    later = [value for _, value in rates_over_time(answer, (start + end) / 2, end)]
    return statistics.median(later) if later else float("nan")


def change_over(answer: Answer, event: float, end: float) -> float:
    """Return the seconds after an event until the rate is the one at which it then stays.

    It is reached where the next window and the next half second are at 0.9 of the rate that the second half of the span
    up to ``end`` has; never is the whole span.
    """
    goal = _REACHED * settled_rate(answer, event, end)
    moments = [event, *answer.times[bisect_left(answer.times, event) :]]
    for moment in moments:
        if moment + _LASTING > end:
            break
        if all(answer.tokens_between(moment, moment + span) / span >= goal for span in (WINDOW, _LASTING)):
            return moment - event
    return end - event


def _divided(value: float, by: float) -> float:
    return value / by if by > 0 else float("nan")
