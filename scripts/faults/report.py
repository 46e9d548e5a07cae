"""What is told at the end of a run, as lines and as JSON; and where libfaketime may be."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from faults.course import Course

_PLACES = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")
_NAME = "libfaketimeMT.so.1"  # for programs with threads
_SHOWN, _EVIDENCE = 20, 8  # violations, and lines of what shows each


def find_faketime(given: Path | None) -> Path | None:
    """Return the library that sets a clock wrong, if it is here. Raises ``SystemExit`` if the given one is not."""
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"error: there is no file {given}")
        return given.resolve()
    for place in map(Path, _PLACES):
        for found in (*place.glob(f"faketime/{_NAME}"), *place.glob(f"*/faketime/{_NAME}")):
            return found
    return None


def summary(course: Course, *, interrupted: bool = False) -> Iterator[str]:
    """Yield the lines that end a run."""
    journal, findings = course.journal, course.findings
    yield f"seed       {course.plan.seed}"
    yield f"rounds     {findings.rounds}, starts of the server: {course.server.starts}"
    yield "requests   " + ", ".join(f"{what}: {count}" for what, count in sorted(journal.outcomes.items()))
    yield "faults     " + ", ".join(f"{what}: {count}" for what, count in sorted(journal.calendar.counts.items()))
    for fault, why in journal.calendar.skipped.items():
        yield f"not tried  {fault}: {why}"
    for name, life in findings.lives.longest().items():
        grown = f", {life.warm.memory:.0f} → {life.readings[-1].memory:.0f} MiB" if life.warm is not None else ""
        yield f"longest    {name}: {life.minutes:.1f} minutes, {len(life.readings)} readings{grown}"
    yield f"event loop 99 of 100 times late by at most {findings.lag:g} s, in the longest life"
    for violation in journal.violations[:_SHOWN]:
        yield f"VIOLATION  after {violation.at:g} s, {violation.check}: {violation.what}"
        yield from (f"           {line}" for line in _shortened(violation.evidence.splitlines()))
    verdict = f"{journal.outcomes['violations']} violations" if journal.failed else "no violation"
    yield f"verdict    {verdict}, and the run was interrupted" if interrupted else f"verdict    {verdict}"


def _shortened(lines: Sequence[str]) -> Sequence[str]:
    """Leave out what is in the middle: of a traceback its last lines tell most."""
    return lines if len(lines) <= _EVIDENCE else [*lines[:2], "...", *lines[3 - _EVIDENCE :]]


def write_report(path: Path, course: Course) -> None:
    """Write everything into a file."""
    journal, findings = course.journal, course.findings
    report: dict[str, Any] = {
        "seed": course.plan.seed,
        "plan": dataclasses.asdict(course.plan),
        "machine": platform.platform(),
        "rounds": findings.rounds,
        "starts": course.server.starts,
        "requests": dict(journal.outcomes),
        "faults": dict(journal.calendar.counts),
        "not_tried": journal.calendar.skipped,
        "history": [[round(at - journal.started, 1), fault] for at, fault in journal.calendar.history],
        "memory": findings.memory,
        "longest_lives": {name: dataclasses.asdict(life) for name, life in findings.lives.longest().items()},
        "event_loop_lag_p99": None if math.isnan(findings.lag) else findings.lag,
        "violations": [dataclasses.asdict(violation) for violation in journal.violations],
        "passed": not journal.failed,
    }
    path.write_text(json.dumps(report, indent=2), encoding="utf-8")
