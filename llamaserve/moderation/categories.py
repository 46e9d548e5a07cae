"""OpenAI's moderation categories, and a text's scores in them.

Knows nothing of where scores come from, or of how they look in an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# In the order of OpenAI's SDK.
CATEGORIES: tuple[str, ...] = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
# What is in the first category is in the second, too.
PARENT: Mapping[str, str] = {name: name.split("/")[0] for name in CATEGORIES if "/" in name}
THRESHOLD = 0.5  # of a category for which nothing else is said


@dataclass(frozen=True)
class Scores:
    """How much a text is in each of the categories: ``values`` has a number from 0 to 1 for all of ``CATEGORIES``.

    Raises ``ValueError`` for anything else.
    """

    values: Mapping[str, float]

    def __post_init__(self) -> None:
        if set(self.values) != set(CATEGORIES):
            raise ValueError(f"scores are of all {len(CATEGORIES)} categories, and of nothing else")
        wrong = [name for name, value in self.values.items() if not 0.0 <= value <= 1.0]
        if wrong:
            raise ValueError(f"the score in {wrong[0]!r} is not from 0 to 1: {self.values[wrong[0]]}")

    @classmethod
    def of(cls, some: Mapping[str, float]) -> Scores:
        """Return scores that are 0 in the categories that are not given."""
        return cls({**dict.fromkeys(CATEGORIES, 0.0), **some})

    @classmethod
    def merged(cls, *scores: Scores) -> Scores:
        """Return the highest score in each category; 0 if there are no scores."""
        return cls({name: max((each.values[name] for each in scores), default=0.0) for name in CATEGORIES})

    def with_parents(self) -> Scores:
        """Return the same with a parent at least as high as the highest of its children."""
        values = dict(self.values)
        for name, parent in PARENT.items():
            values[parent] = max(values[parent], values[name])
        return Scores(values)

    def scaled(self, factor: float) -> Scores:
        """Return all scores times a factor from 0 to 1."""
        return Scores({name: value * factor for name, value in self.values.items()})

    def flags(self, thresholds: Mapping[str, float] | None = None) -> dict[str, bool]:
        """Return, in the order of ``CATEGORIES``, where the score reaches the category's threshold."""
        limits = thresholds or {}
        return {name: self.values[name] >= limits.get(name, THRESHOLD) for name in CATEGORIES}

    def flagged(self, thresholds: Mapping[str, float] | None = None) -> bool:
        """Whether the score reaches its threshold in any category."""
        return any(self.flags(thresholds).values())
