"""The doctor's report: lines on a terminal, or a value for scripts. Knows no check."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from rich.console import Console
from rich.markup import escape

from llamaserve import __version__
from llamaserve.doctor.findings import Finding, Level

_STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
_WIDTH = max(map(len, Level))


class Entry(msgspec.Struct, frozen=True):
    """A finding under its heading, as it is written."""

    check: str
    level: Level
    subject: str
    message: str
    fix: str | None


class Report(msgspec.Struct, frozen=True):
    """All findings, and how many of them are bad."""

    version: str
    problems: int
    warnings: int
    findings: list[Entry]


def print_report(findings: Iterable[tuple[str, Finding]], out: Console) -> int:
    """Print findings as they come, and return how many problems there are."""
    counts = dict.fromkeys(Level, 0)
    last = None
    for heading, finding in findings:
        if heading != last:
            out.print(f"[bold]{escape(heading)}[/]", highlight=False)
            last = heading
        counts[finding.level] += 1
        level = f"[{_STYLES[finding.level]}]{finding.level.value:<{_WIDTH}}[/]"
        line = f"  {level}  {escape(_one_line(finding.subject))}: {escape(_one_line(finding.message))}"
        out.print(line, highlight=False, soft_wrap=True)
        if finding.fix is not None:
            out.print(f"  {'fix:':<{_WIDTH}}  {escape(finding.fix)}", highlight=False, soft_wrap=True)
    out.print(f"\n{_summary(counts)}", highlight=False, soft_wrap=True)
    return counts[Level.PROBLEM]


def _one_line(text: str) -> str:
    """Return a text without what would move the cursor: names of files and models may hold anything."""
    return "".join(each if each.isprintable() else " " for each in text)


def _summary(counts: dict[Level, int]) -> str:
    words = [
        f"{count} {level.value}{'s' if count > 1 else ''}"
        for level, count in counts.items()
        if count and level is not Level.OK
    ]
    return ", ".join(reversed(words)) or "all is well"


def as_report(findings: Iterable[tuple[str, Finding]]) -> Report:
    """Return all findings, for scripts."""
    entries = [Entry(heading, *msgspec.structs.astuple(finding)) for heading, finding in findings]
    levels = [entry.level for entry in entries]
    return Report(__version__, levels.count(Level.PROBLEM), levels.count(Level.WARNING), entries)
