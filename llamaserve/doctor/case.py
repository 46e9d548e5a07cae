"""What a check gets: the machine, how llamaserve is installed on it, its settings, and the models in question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llamaserve.doctor.findings import Finding
from llamaserve.doctor.installation import Installation
from llamaserve.doctor.machine import Machine
from llamaserve.settings import Settings


@dataclass(frozen=True)
class Case:
    """All that checks may know. Without ``models`` those that are on this machine are meant."""

    settings: Settings
    models: tuple[str, ...] = ()
    machine: Machine = field(default_factory=Machine)
    installation: Installation = field(default_factory=Installation)

    def command(self, *words: object) -> str:
        """Return the command that calls llamaserve for the same models."""
        return self.installation.command(*words, *self.settings.options)


@dataclass(frozen=True)
class Check:
    """One check: the heading of its findings, and the seconds that it may take."""

    heading: str
    examine: Callable[[Case], Iterator[Finding]]
    limit: float
