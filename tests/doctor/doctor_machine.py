"""Machines as a test describes them: files below a folder, and programs with what they answer."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, Level
from llamaserve.doctor.installation import Installation
from llamaserve.doctor.machine import Machine
from llamaserve.settings import Settings

SPARE = ("apt-get", "g++")  # programs of most machines


def described(
    root: Path,
    files: Mapping[str, str] | None = None,
    programs: Mapping[str, str] | None = None,
    *,
    system: str = "Linux",
    processor: str = "x86_64",
    superuser: bool = False,
    found: Sequence[str] = SPARE,
    **environment: str,
) -> Machine:
    """Return a machine. ``programs`` are command lines and their answers, ``found`` programs that are there."""
    answers = dict(programs or {})
    names = {*found, *(line.split()[0] for line in answers)}
    for name, text in (files or {}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Machine(
        system=system,
        processor=processor,
        environment=environment,
        root=root,
        run=lambda words: answers.get(" ".join(words)),
        find=lambda name: f"/usr/bin/{name}" if name in names else None,
        superuser=superuser,
    )


def installed(prefix: Path, *, has_pip: bool = True) -> Installation:
    """Return an installation by pip in a virtual environment."""
    return Installation(prefix / "bin" / "python", prefix, Path("/usr"), None, ("llamaserve",), has_pip)


@dataclass(frozen=True)
class Needing(Installation):
    """An installation that needs what a test says."""

    needs: tuple[str, ...] = ()
    wishes: tuple[str, ...] = ()

    def requirements(self, extra: str = "") -> list[str]:
        return list(self.wishes if extra else self.needs)


def case_of(machine: Machine, settings: Settings | None = None, *models: str) -> Case:
    return Case(settings or Settings(), models, machine, installed(Path("/opt/venv")))


def checked(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings, of which each that is not ok must end with a command that a shell can read."""
    found = list(findings)
    for finding in found:
        assert "\n" not in finding.message
        if finding.level is Level.OK:
            assert finding.fix is None
        else:
            assert finding.fix
            done = subprocess.run(["bash", "-n", "-c", finding.fix], capture_output=True, text=True)
            assert done.returncode == 0, f"{finding.fix}: {done.stderr}"
    return found


def about(findings: Iterable[Finding], subject: str) -> list[Finding]:
    """Return the findings on one subject."""
    return [finding for finding in checked(findings) if finding.subject == subject]


def one(findings: Iterable[Finding], subject: str) -> Finding:
    """Return the only finding on a subject."""
    (finding,) = about(findings, subject)
    return finding


def bad(findings: Iterable[Finding]) -> list[Finding]:
    """Return what is not ok."""
    return [finding for finding in checked(findings) if finding.level is not Level.OK]
