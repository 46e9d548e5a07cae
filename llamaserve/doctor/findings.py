"""What the doctor says: findings, each with the command that fixes it. Knows nothing of what is examined."""

from __future__ import annotations

import shlex
from enum import StrEnum

import msgspec


class Level(StrEnum):
    """How bad it is. A ``note`` costs little or may be meant, a ``warning`` costs speed, a ``problem`` keeps something
    from working.
    """

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(msgspec.Struct, frozen=True):
    """One thing that was found. ``fix`` is the command that a shell takes as it is; only what is ok has none."""

    level: Level
    subject: str
    message: str
    fix: str | None = None


def ok(subject: str, message: str) -> Finding:
    """Return a finding that needs nothing done."""
    return Finding(Level.OK, subject, message)


def note(subject: str, message: str, fix: str) -> Finding:
    """Return a finding that may be meant."""
    return Finding(Level.NOTE, subject, message, fix)


def warning(subject: str, message: str, fix: str) -> Finding:
    """Return a finding that costs speed, or that some clients stumble over."""
    return Finding(Level.WARNING, subject, message, fix)


def problem(subject: str, message: str, fix: str) -> Finding:
    """Return a finding that keeps something from working."""
    return Finding(Level.PROBLEM, subject, message, fix)


def command(*words: object) -> str:
    """Return a command with its words quoted for a shell."""
    return shlex.join(str(word) for word in words)


def one_after_the_other(*commands: str | None) -> str:
    """Return commands as one, each of which needs the success of those before it."""
    return " && ".join(filter(None, commands))


def gigabytes(size: float) -> str:
    """Return a number of bytes for a reader."""
    return f"{size / 1e9:.1f} GB"
