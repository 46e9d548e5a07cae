"""The machine that is examined: its files, its programs, and how software is installed on it.

Everything is read through a ``Machine``, so that tests can describe one. Knows nothing of llamaserve.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamaserve.doctor.findings import one_after_the_other

_COMMAND_LIMIT = 3.0  # seconds that a program may take to answer
_MOST = 256 * 1024  # characters read of a file or of a program's answer

# How packages are installed with what is found first, and what they are called there.
_INSTALL = {
    "apt-get": "apt-get install -y",
    "dnf": "dnf install -y",
    "pacman": "pacman -S --needed --noconfirm",
    "zypper": "zypper --non-interactive install",
    "apk": "apk add",
}
_PACKAGES = {
    "compiler": {
        "apt-get": "build-essential",
        "dnf": "gcc-c++ make",
        "pacman": "base-devel",
        "zypper": "gcc-c++ make",
        "apk": "build-base",
    },
    "cuda": {"apt-get": "nvidia-cuda-toolkit", "dnf": "cuda-toolkit", "pacman": "cuda", "zypper": "cuda-toolkit"},
    "vulkan": {
        "apt-get": "libvulkan-dev glslc",
        "dnf": "vulkan-headers vulkan-loader-devel glslc",
        "pacman": "vulkan-headers vulkan-icd-loader shaderc",
        "zypper": "vulkan-headers vulkan-devel shaderc",
        "apk": "vulkan-headers vulkan-loader-dev shaderc",
    },
    "nvidia driver": {"apt-get": "nvidia-driver", "dnf": "akmod-nvidia", "pacman": "nvidia"},
    "openmp": {"apt-get": "libgomp1", "dnf": "libgomp", "pacman": "gcc-libs", "zypper": "libgomp1", "apk": "libgomp"},
    "pip": {"apt-get": "python3-venv", "dnf": "python3-pip", "pacman": "python-pip", "apk": "py3-pip"},
}


def run_program(words: Sequence[str]) -> str | None:
    """Return what a program writes; None when it fails, is not there or takes long."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_LIMIT, check=True, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout[:_MOST].strip()


@dataclass(frozen=True)
class Machine:
    """A machine: the names of its system (``Linux``, ``Darwin``) and processor as ``platform`` gives them, the user's
    environment, and below ``root`` its files.
    """

    system: str = field(default_factory=platform.system)
    processor: str = field(default_factory=platform.machine)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    root: Path = Path("/")
    run: Callable[[Sequence[str]], str | None] = run_program
    find: Callable[[str], str | None] = shutil.which
    superuser: bool = field(default_factory=lambda: os.geteuid() == 0)

    @property
    def is_mac(self) -> bool:
        """Whether it runs macOS."""
        return self.system == "Darwin"

    def read(self, path: str) -> str | None:
        """Return what a small text file holds; None when it can't be read."""
        try:
            with (self.root / path).open(encoding="utf-8", errors="replace") as file:
                return file.read(_MOST).strip()
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Tell whether there is such a file or folder."""
        try:
            return (self.root / path).exists()
        except OSError:
            return False

    def matching(self, pattern: str) -> list[Path]:
        """Return the files and folders that match a pattern, as paths below the root."""
        found: list[Path] = []
        with contextlib.suppress(OSError):
            found += (path.relative_to(self.root) for path in self.root.glob(pattern))
        return sorted(found)

    def ask(self, *words: str) -> str | None:
        """Return what a program writes, if there is such a program, and it succeeds soon."""
        return self.run(words) if self.find(words[0]) else None

    def sysctl(self, name: str) -> str | None:
        """Return a value of macOS's; None on other systems."""
        return self.run(("/usr/sbin/sysctl", "-n", name)) if self.is_mac else None

    @property
    def in_container(self) -> bool:
        """Whether this is a container, whose kernel and devices are not its own."""
        marks = ("/docker", "/kubepods", "/lxc", "/libpod")
        return (
            self.exists(".dockerenv")
            or self.exists("run/.containerenv")
            or any(mark in (self.read("proc/1/cgroup") or "") for mark in marks)
        )

    def as_root(self, line: str) -> str:
        """Return a command that runs with all rights."""
        return line if self.superuser else f"sudo {line}"

    def install(self, what: str) -> str | None:
        """Return the command that installs packages; None where it is not known, or the system's sources have none."""
        if self.is_mac:
            return "xcode-select --install" if what == "compiler" else None
        manager = next((name for name in _INSTALL if self.find(name)), None)
        packages = _PACKAGES[what].get(manager or "")
        if manager is None or packages is None:
            return None
        update = None
        if manager == "apt-get":
            policy = self.ask("apt-cache", "policy", *packages.split()) or ""
            if "Candidate: (none)" in policy:
                return None
            update = self.as_root("apt-get update")
        return one_after_the_other(update, self.as_root(f"{_INSTALL[manager]} {packages}"))

    def write_as_root(self, text: str, path: str, *, add: bool = False) -> str:
        """Return the command that writes a line to a file of the system's."""
        return f"echo {shlex.quote(text)} | {self.as_root('tee -a' if add else 'tee')} {path}"
