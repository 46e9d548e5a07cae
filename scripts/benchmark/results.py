"""What was measured, and the rows of the table that follow from it: a figure, its target, and whether it was met.

Knows nothing of how anything is measured or shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Key = tuple[str, str, str]  # workload, contender, figure


@dataclass(frozen=True)
class Target:
    """A bound that a figure should keep."""

    bound: float
    at_least: bool

    def met_by(self, value: float) -> bool:
        """Tell whether a figure keeps it."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"


def at_least(bound: float) -> Target:
    """Return the target that a figure is not below this."""
    return Target(bound, at_least=True)


def at_most(bound: float) -> Target:
    """Return the target that a figure is not above this."""
    return Target(bound, at_least=False)


@dataclass(frozen=True)
class Row:
    """One line of the table. ``low`` and ``high`` are the extremes of the rounds; a value of None was not measured, and
    ``note`` says why.
    """

    workload: str
    what: str
    value: float | None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    target: Target | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None when there is none, or nothing was measured."""
        return None if self.target is None or self.value is None else self.target.met_by(self.value)


@dataclass
class Results:
    """Every single figure of a run, in the order of the rounds."""

    samples: dict[Key, list[float]] = field(default_factory=dict)
    details: dict[str, list[Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # contender or workload, and why it is not there

    def add(self, workload: str, contender: str, figure: str, value: float) -> None:
        """Keep a figure of one round."""
        self.samples.setdefault((workload, contender, figure), []).append(value)

    def add_detail(self, workload: str, value: Any) -> None:
        """Keep something that is no single figure, for the JSON file and the plot."""
        self.details.setdefault(workload, []).append(value)

    def get(self, workload: str, contender: str, figure: str) -> list[float]:
        """Return the figures of all rounds that have one."""
        return [value for value in self.samples.get((workload, contender, figure), []) if math.isfinite(value)]

    def why_missing(self, workload: str, *contenders: str) -> str:
        """Return why a row has no figure."""
        for name in (workload, *(f"{workload}/{each}" for each in contenders), *contenders):
            if name in self.missing:
                return self.missing[name]
        return "not measured"

    def row(
        self,
        key: Key,
        what: str,
        unit: str = "",
        *,
        target: Target | None = None,
        note: str = "",
        of: Callable[[Sequence[float]], float] = statistics.median,
    ) -> Row:
        """Return the row of one figure: its median over the rounds, or what ``of`` makes of them."""
        values = self.get(*key)
        if not values:
            return Row(key[0], what, None, unit, target=target, note=self.why_missing(key[0], key[1]))
        return Row(key[0], what, of(values), unit, min(values), max(values), target, note)

    def ratio(self, above: Key, below: Key, what: str, *, target: Target | None = None, note: str = "") -> Row:
        """Return the row of a ratio of medians; its spread is that of the ratios of single rounds."""
        over, under = self.get(*above), self.get(*below)
        if not over or not under or statistics.median(under) == 0:
            return Row(above[0], what, None, "x", target=target, note=self.why_missing(above[0], above[1], below[1]))
        rounds = [one / other for one, other in zip(over, under, strict=False) if other]
        value = statistics.median(over) / statistics.median(under)
        return Row(above[0], what, value, "x", min(rounds, default=None), max(rounds, default=None), target, note)
