"""Processes of the machine: starting some that are gone for certain afterwards, and what others take of it.

Linux tells through ``/proc``, other systems through ``ps``. Knows nothing of what the processes do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_PROC = Path("/proc")
_GRACE = 10.0  # seconds between asking a process to end and making it
_SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""


class StartFailed(Exception):
    """A process did not become what it should; the text says why."""


@contextlib.contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, talks: bool = True
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Run a command in a session of its own, its errors in a file. It has ended when the block is left, and so have its
    children. When it ``talks``, its standard input and output are pipes, to be read; else it writes to the file.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else errors,
            stderr=errors,
            start_new_session=True,
        )
        try:
            yield process, errors
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, BrokenPipeError):
        process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):  # what is left of its session
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            if stream is not None:
                stream.close()


def last_words(errors: IO[bytes]) -> str:
    """Return the last lines that a process wrote to its standard error."""
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return " / ".join(line.strip() for line in lines[-3:]) or "it said nothing"


class LineProcess:
    """A process that says a line of JSON once it has started, and answers each that it is told with another."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self.pid = process.pid
        self._name = name
        self._process = process
        self._errors = errors

    def wait_until_started(self) -> None:
        """Return when it has said its first line. Raises ``StartFailed``."""
        self._answer()

    def command(self, **command: Any) -> Any:
        """Return what it answers. Raises ``StartFailed`` when it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> StartFailed:
        return StartFailed(f"the {self._name} ended: {last_words(self._errors)}")


@contextlib.contextmanager
def busy_process() -> Iterator[int]:
    """Keep one core busy with a program that does nothing else; yield its id. It also ends when this process does."""
    process = subprocess.Popen([sys.executable, "-S", "-c", _SPIN, str(os.getpid())], start_new_session=True)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def tree(root: int) -> list[int]:
    """Return a process and all that descend from it."""
    children: dict[int, list[int]] = {}
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout  # noqa: S607
    for line in listing.splitlines():
        pid, parent = map(int, line.split())
        children.setdefault(parent, []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def command_line(pid: int) -> str:
    """Return how a process was started; empty when it is gone."""
    done = subprocess.run(["ps", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False)  # noqa: S607
    return done.stdout.strip()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has taken, all its threads together."""
    if _PROC.joinpath("self/stat").exists():
        fields = _PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    done = subprocess.run(["ps", "-p", str(pid), "-o", "time="], capture_output=True, text=True, check=True)  # noqa: S607
    total = 0.0
    for part in done.stdout.strip().replace("-", ":").split(":"):
        total = total * 60 + float(part)
    return total


@dataclass(frozen=True)
class Memory:
    """Resident MiB: of the model's file, which is mapped and shared by all who read it, and everything else."""

    file: float
    rest: float

    @property
    def total(self) -> float:
        """Both."""
        return self.file + self.rest

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.file + other.file, self.rest + other.rest)


def memory(pid: int, model: Path) -> Memory:
    """Return a process's memory. What it shares with others counts in part, but the model's file in full."""
    smaps = _PROC / str(pid) / "smaps"
    if not smaps.exists():
        done = subprocess.run(["ps", "-p", str(pid), "-o", "rss="], capture_output=True, text=True, check=True)  # noqa: S607
        return Memory(0.0, int(done.stdout) / 1024)
    return parse_smaps(smaps.read_text(), str(model))


def parse_smaps(text: str, model: str) -> Memory:
    """Read Linux's account of a process's mappings."""
    file = rest = 0.0
    is_model = False
    for line in text.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_model = line.endswith(model)
        elif is_model and line.startswith("Rss:"):
            file += int(line.split()[1]) / 1024
        elif not is_model and line.startswith("Pss:"):
            rest += int(line.split()[1]) / 1024
    return Memory(file, rest)
