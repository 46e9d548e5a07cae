"""A service manager as small as can be: it reads a unit by systemd's rules and runs it as systemd would."""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t", "s": " "}


class Unit:
    """The text of a unit, read without the help of the code that writes it."""

    def __init__(self, text: str) -> None:
        self.values: dict[str, dict[str, str]] = {}
        for line in text.split("\n"):
            assert not line.endswith("\\"), "the line would go on in the next one"
            line = line.strip(" \t")
            if line.startswith("["):
                section = self.values.setdefault(line.strip("[]"), {})
            elif line and not line.startswith(("#", ";")):
                name, _, value = line.partition("=")
                section[name.strip()] = value.strip(" \t")

    @property
    def command(self) -> list[str]:
        """The words of the command line, which must not have variables replaced in them."""
        first, *others = [_without_specifiers(word) for word in split(self.values["Service"]["ExecStart"])]
        assert first.startswith(":/")
        return [first[1:], *others]

    @property
    def folder(self) -> str:
        """The folder to run in: the whole line, quotation marks and all."""
        return _without_specifiers(self.values["Service"]["WorkingDirectory"])

    @property
    def environment_files(self) -> list[str]:
        """The files that the pattern of environment files matches."""
        pattern = self.values["Service"]["EnvironmentFile"]
        assert pattern.startswith("-/")
        return glob.glob(_with_sets(_without_specifiers(pattern[1:])))  # noqa: PTH207 - an absolute pattern

    @property
    def stop_limit(self) -> float:
        return float(self.values["Service"]["TimeoutStopSec"])


def split(line: str) -> list[str]:
    """Return the words of a command line as ``systemd.service(5)`` has it, before variables and specifiers."""
    words: list[str] = []
    word, quote, rest = None, "", iter(line)
    for character in rest:
        if character == "\\":
            word = (word or "") + _ESCAPES[next(rest)]
        elif quote:
            if character == quote:
                quote = ""
            else:
                word = (word or "") + character
        elif character in "'\"":
            word, quote = word or "", character
        elif character in " \t":
            words += [word] if word is not None else []
            word = None
        else:
            assert not (character == ";" and word is None), "another command would begin here"
            word = (word or "") + character
    assert not quote
    return words + ([word] if word is not None else [])


def _without_specifiers(text: str) -> str:
    plain = text.replace("%%", "")
    assert "%" not in plain, "systemd would put something else in place of this"
    return text.replace("%%", "%")


def _with_sets(pattern: str) -> str:
    """Return a pattern with backslashes before what is meant as it is, as one that Python's glob reads so."""
    out, rest = "", iter(pattern)
    for character in rest:
        out += glob.escape(next(rest)) if character == "\\" else character
    return out


class Supervisor:
    """Runs a unit within a ``with`` block. ``environment`` is what a user's manager has itself."""

    def __init__(self, unit: Unit, environment: dict[str, str], socket_address: str, watchdog: float | None = None):
        self.unit = unit
        self.messages: list[str] = []
        self._environment = {**environment, "NOTIFY_SOCKET": socket_address}
        self._watchdog = watchdog
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + socket_address[1:] if socket_address.startswith("@") else socket_address)
        self._socket.settimeout(0.05)
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None:
            self._clear()
        self._socket.close()

    def start(self) -> int:
        """Start the server as the unit says, and return its process id."""
        environment = dict(self._environment)
        for file in self.unit.environment_files:
            lines = [line for line in Path(file).read_text().splitlines() if line and line[0] not in "#;"]
            environment |= {name: "".join(shlex.split(value)) for name, value in (line.split("=", 1) for line in lines)}
        if self._watchdog is not None:
            environment["WATCHDOG_USEC"] = str(int(self._watchdog * 1e6))
        self.messages.clear()
        self.process = subprocess.Popen(
            self.unit.command,
            cwd=self.unit.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self.process.pid

    def wait_for(self, message: str, limit: float = 60) -> None:
        """Wait until the server has sent this line."""
        deadline = time.monotonic() + limit
        while message not in self.messages:
            assert self.process is not None
            assert time.monotonic() < deadline, f"{message} did not come; what did: {self.messages}"
            assert self.process.poll() is None or self._receive(), f"the server ended: {self._output()}"
            self._receive()

    def stop(self) -> int:
        """Ask the server to end, which it must do within its limit and without leaving a process; return how."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(self.unit.stop_limit)
        while self._receive():
            pass
        assert not self._clear()
        return status

    def kill(self) -> None:
        """End the main process as the kernel does; what is left of the others is killed, too."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._clear()

    def _receive(self) -> bool:
        with contextlib.suppress(TimeoutError):
            self.messages += self._socket.recv(4096).decode().split("\n")
            return True
        return False

    def _output(self) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        return self.process.stdout.read()

    def _clear(self) -> bool:
        """Kill the process group, and tell whether there was one."""
        assert self.process is not None
        assert self.process.stdout is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        finally:
            self.process.wait()
            self.process.stdout.close()
        return True
