"""What clients did and saw, and every violation that was found. Knows neither HTTP nor the server's files."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from faults.answers import Answer, problem_with
from faults.calendar import Calendar
from faults.questions import Question

_SHOWN = 200  # violations that are kept in words


@dataclass(frozen=True)
class Violation:
    """Something that must never happen. ``check`` is one word or two, ``evidence`` what shows it."""

    check: str
    what: str
    evidence: str
    at: float  # seconds since the start of the run


@dataclass
class Entry:
    """One request."""

    id: str
    question: Question
    key: str | None
    began: float
    ended: float | None = None
    answer: Answer | None = None
    left: bool = False  # the client hung up before it had the answer, or never sent all of the request

    @property
    def answered(self) -> bool:
        """Whether the client has all of an answer."""
        return self.answer is not None and self.answer.answered and not self.left


@dataclass
class Journal:
    """The requests of a run, by id. ``prefix`` sets its ids apart from those of other runs."""

    prefix: str
    calendar: Calendar
    references: Mapping[str, Answer] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)
    open: int = 0
    over: bool = False  # nothing is judged any more, since the run was interrupted
    _known: set[tuple[str, str, str]] = field(default_factory=set)

    def begin(self, question: Question, key: str | None) -> Entry:
        """Return a new request's entry."""
        entry = Entry(f"{self.prefix}-{len(self.entries)}", question, key, time.monotonic())
        self.entries[entry.id] = entry
        self.open += 1
        return entry

    def end(self, entry: Entry, answer: Answer) -> None:
        """Take note of what became of a request, and judge it."""
        entry.answer, entry.ended = answer, time.monotonic()
        self.open -= 1
        self.outcomes[_outcome(entry)] += 1
        if entry.left:
            return
        excuses = self.calendar.excuses(entry.began, entry.ended)
        if not entry.question.constrained:  # only where a grammar could not be tried an error has no code
            excuses = replace(excuses, codes=excuses.codes - {None})
        problem = problem_with(answer, self.references.get(entry.question.name), excuses)
        if problem is not None:
            faults = ", ".join(self.calendar.at_work_between(entry.began, entry.ended)) or "none"
            seconds = entry.ended - entry.began
            how = "streamed" if entry.question.streamed else "whole"
            evidence = f"{entry.id}: {entry.question.name}, {how}, {seconds:.1f} s; faults at work: {faults}"
            self.violate("answers", problem, evidence)

    def violate(self, check: str, what: str, evidence: str = "") -> None:
        """Take note of a violation; of one that was found before, no more."""
        if self.over or (check, what, evidence) in self._known:
            return
        self._known.add((check, what, evidence))
        self.outcomes["violations"] += 1
        if len(self.violations) < _SHOWN:
            self.violations.append(Violation(check, what, evidence, round(time.monotonic() - self.started, 1)))

    def answered_since(self, moment: float) -> bool:
        """Whether a request was answered that began later than this."""
        for entry in reversed(self.entries.values()):
            if entry.began < moment:
                return False
            if entry.answered:
                return True
        return False

    @property
    def failed(self) -> bool:
        """Whether anything has happened that must not."""
        return bool(self.outcomes["violations"])


def _outcome(entry: Entry) -> str:
    assert entry.answer is not None
    if entry.left:
        return "hung up"
    if entry.answer.answered:
        return "answered"
    if entry.answer.failure is not None:
        return f"error {entry.answer.failure.code or entry.answer.failure.status}"
    return "late" if entry.answer.late else "broken"
