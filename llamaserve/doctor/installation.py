"""How llamaserve was installed here, and the commands that install what is missing in the same way.

In a source checkout that is ``make``; elsewhere pip, or uv where the environment has no pip. Knows nothing of hardware.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import shutil
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import llamaserve
from llamaserve.doctor.findings import command, one_after_the_other
from llamaserve.doctor.machine import Machine

BINDING = "llama-cpp-python"

_PACKAGE = Path(llamaserve.__file__).resolve().parent


def _own_checkout() -> Path | None:
    """Return the checkout that this package lies in, if it does."""
    root = _PACKAGE.parent
    needed = ("Makefile", "pyproject.toml", "scripts/install.py")
    return root if all((root / name).is_file() for name in needed) else None


def _own_program() -> tuple[str, ...]:
    """Return how a shell calls this llamaserve: by its name only if that leads here."""
    own, found = Path(sys.prefix) / "bin" / "llamaserve", shutil.which("llamaserve")
    if found is not None and Path(found).absolute() == own:
        return ("llamaserve",)
    return (str(own),) if own.is_file() else (sys.executable, "-m", "llamaserve")


@dataclass(frozen=True)
class Installation:
    """Where llamaserve runs: its Python, that one's folder (``prefix``), and the source ``checkout`` if it is one. The
    ``program`` is how a shell calls it.
    """

    python: Path = field(default_factory=lambda: Path(sys.executable))
    prefix: Path = field(default_factory=lambda: Path(sys.prefix))
    base_prefix: Path = field(default_factory=lambda: Path(sys.base_prefix))
    checkout: Path | None = field(default_factory=_own_checkout)
    program: tuple[str, ...] = field(default_factory=_own_program)
    has_pip: bool = field(default_factory=lambda: importlib.util.find_spec("pip") is not None)

    @property
    def made_by_make(self) -> bool:
        """Whether ``make`` has made the environment."""
        return self.checkout is not None and (self.prefix / _STAMP).is_file()

    @property
    def isolated(self) -> bool:
        """Whether this is a virtual environment."""
        return self.prefix != self.base_prefix

    def requirements(self, extra: str = "") -> list[str]:
        """Return what is needed, as pip writes it: by llamaserve itself, or by one of its extras."""
        if self.checkout is not None:
            project = tomllib.loads((self.checkout / "pyproject.toml").read_text("utf-8"))["project"]
            needed: list[str] = project["optional-dependencies"].get(extra, []) if extra else project["dependencies"]
            return needed
        listed = (line.partition(";") for line in importlib.metadata.requires("llamaserve") or ())
        if extra:
            return [name.strip() for name, _, marker in listed if f'"{extra}"' in marker.replace("'", '"')]
        return [name.strip() for name, _, marker in listed if "extra" not in marker]

    def command(self, *words: object) -> str:
        """Return the command that calls llamaserve."""
        return command(*self.program, *words)

    def install(self, *requirements: str) -> str:
        """Return the command that installs packages."""
        return self._pip(*requirements)

    def install_all(self) -> str:
        """Return the command that installs llamaserve with all that it needs."""
        if self.made_by_make:
            return self._make()
        return self._pip(*self.requirements())

    def install_anew(self) -> str:
        """Return the command that makes a virtual environment with llamaserve in it."""
        if self.checkout is not None:
            return self._make()
        place = "~/.venvs/llamaserve"
        return f"python3 -m venv {place} && {place}/bin/pip install {shlex.quote(_origin())}"

    def rebuild(self, machine: Machine, flags: Sequence[str]) -> str:
        """Return the command that compiles llama.cpp anew, with CMake's ``flags``."""
        compilers = ("c++", "g++", "clang++")
        compiler = None if any(map(machine.find, compilers)) else machine.install("compiler")
        return one_after_the_other(compiler, self._rebuild(" ".join(flags)))

    def _rebuild(self, flags: str) -> str:
        if self.made_by_make and self._last_flags() != flags:
            return self._make(f"CMAKE_ARGS={flags}")
        wanted = next((each for each in self.requirements() if each.startswith(BINDING)), BINDING)
        again = ("--reinstall", "--no-cache") if not self.has_pip else ("--force-reinstall", "--no-cache-dir")
        pip = self._pip(*again, "--no-deps", "--no-binary", BINDING, wanted.replace(" ", ""))
        return f"CMAKE_ARGS={shlex.quote(flags)} {pip}"

    def _last_flags(self) -> str | None:
        """Return what llama.cpp was compiled with, by the notes of ``make``, which would not do it again."""
        try:
            notes = json.loads((self.prefix / _STAMP).read_bytes())
            return str(notes["cmake_args"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _make(self, *words: str) -> str:
        assert self.checkout is not None
        return command("make", "-C", self.checkout, "install", *words)

    def _pip(self, *words: str) -> str:
        if self.has_pip:
            return command(self.python, "-m", "pip", "install", *words)
        return command("uv", "pip", "install", "--python", self.python, *words)


_STAMP = "llamaserve-install.json"  # in the environment that scripts/install.py makes


def _origin() -> str:
    """Return what pip was told to install, if it was not the plain name."""
    try:
        told = importlib.metadata.distribution("llamaserve").read_text("direct_url.json")
        return str(json.loads(told)["url"]) if told else "llamaserve"
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return "llamaserve"
