"""What systemd's user manager and launchd have in common: asking them through their command, and the service's file.

This module knows neither of them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llamaserve.errors import LlamaserveError
from llamaserve.service.definition import MARK, Definition


@dataclass(frozen=True)
class State:
    """What a service manager says of the service, and in its own words; ``pid`` is there while it has a process."""

    installed: bool
    enabled: bool = False
    running: bool = False
    pid: int | None = None
    words: str = "not installed"


class Manager(Protocol):
    """A service manager of one user."""

    file: Path  # what it reads of the service
    logs: str  # the command that shows what the service writes
    restart: str  # the command that starts it again

    def text(self, definition: Definition) -> str:
        """Return the service's file for a definition."""

    def check(self) -> None:
        """Raise ``LlamaserveError`` when the manager cannot be asked, or reads other folders."""

    def install(self, definition: Definition) -> None:
        """Write the service's file and start it, or start it again; from now on it starts by itself."""

    def uninstall(self) -> bool:
        """Stop the service and remove its file; tell whether there was one."""

    def state(self) -> State:
        """Return how the service is."""


class CommandFailed(LlamaserveError):
    """A service manager's command ended with an error; the message is what it said."""


def ask(words: Sequence[str], hint: str, limit: float = 30) -> str:
    """Return what a command writes. Raises ``CommandFailed``, also if it is absent or takes over ``limit`` seconds."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=limit, check=False)
    except FileNotFoundError:
        raise CommandFailed(f"there is no {words[0]} on this machine", hint=hint) from None
    except subprocess.TimeoutExpired:
        raise CommandFailed(f"`{' '.join(words)}` does not end", hint=hint) from None
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        raise CommandFailed(f"`{' '.join(words)}`: {said}", hint=hint)
    return done.stdout


def own_text(file: Path) -> str | None:
    """Return the service's file, None if there is none. Raises ``LlamaserveError`` if it is not ours."""
    try:
        text = file.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LlamaserveError(f"{file} cannot be read: {error.strerror}", hint=f"ls -l {file}") from error
    if MARK not in text:
        raise LlamaserveError(
            f"{file} is not from llamaserve, so it stays as it is", hint=f"mv {file} {file}.old, if it is not needed"
        )
    return text


def write(file: Path, text: str) -> None:
    """Put a file in its place as a whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as new:
                new.write(text)
                os.fchmod(new.fileno(), 0o644)
            Path(name).replace(file)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise LlamaserveError(f"{file} cannot be written: {error.strerror}", hint=f"ls -ld {file.parent}") from error


def put_back(file: Path, text: str | None) -> None:
    """Have a file as it was before: with this text, or absent."""
    if text is None:
        file.unlink(missing_ok=True)
    else:
        write(file, text)
