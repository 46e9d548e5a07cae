"""The file with the service's environment: settings, and the secrets that no unit and no command line may have.

It is one that systemd reads (``EnvironmentFile=``), and written so plainly that there is only one way to read it: what
systemd takes in a way of its own is refused. On macOS this module reads it in systemd's place.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs

from llamaserve.errors import LlamaserveError

MODE = 0o600
TEMPLATE = """\
# What the llamaserve service finds in its environment: one NAME=value a line. Read when it starts.
# All settings: docs/settings.md

# LLAMASERVE_API_KEY=
# HF_TOKEN=
"""

_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)")
_QUOTED = re.compile(r"""'[^']*'|"[^"]*\"""")
_OURS = re.compile(r"LLAMASERVE_\w+|HF_\w+|XDG_(CACHE|DATA|STATE)_HOME")


def environment_file() -> Path:
    """Return where the file is; it may be absent."""
    return platformdirs.user_config_path("llamaserve").absolute() / "service.env"


def read_environment(path: Path) -> dict[str, str]:
    """Return what is in the file, and nothing where there is none.

    Raises ``LlamaserveError`` with the number of the line that is wrong, or when others than its owner may read it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            lines = file.read().split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise LlamaserveError(f"{path} cannot be read: {error}", hint=f"ls -l {shlex.quote(str(path))}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LlamaserveError(f"others may read {path}, where keys are", hint=f"chmod 600 {shlex.quote(str(path))}")
    return dict(_assignments(path, lines))


def of_service(inherited: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment as the service will see it: without the settings of this shell, with those of its file."""
    return {name: value for name, value in inherited.items() if not _OURS.fullmatch(name)} | dict(own)


def left_behind(inherited: Mapping[str, str], own: Mapping[str, str]) -> list[str]:
    """Return the names of settings of this shell that the service won't see."""
    return sorted(name for name, value in inherited.items() if _OURS.fullmatch(name) and own.get(name) != value)


def write_template(path: Path) -> bool:
    """Write a file that sets nothing yet, for its owner alone, and tell whether there was none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(TEMPLATE)
    return True


def _assignments(path: Path, lines: list[str]) -> Iterator[tuple[str, str]]:
    edit = f"${{EDITOR:-nano}} {shlex.quote(str(path))}"
    for number, line in enumerate(lines, 1):
        text = line.strip(" \t")
        if problem := _problem(text):
            raise LlamaserveError(f"{path}, line {number}: {problem}", hint=edit)
        found = _LINE.fullmatch(text)
        if found is not None:
            value = found[2].strip(" \t")
            yield found[1], value[1:-1] if value[:1] in ("'", '"') else value


def _problem(text: str) -> str | None:
    """Return what is wrong with a line. Its value is never told: it may be a key."""
    if "\\" in text or any(ord(character) < 32 and character != "\t" for character in text):
        return "backslashes and control characters are not taken"
    if not text or text[0] in "#;":
        return None
    found = _LINE.fullmatch(text)
    if found is None:
        return "this is not NAME=value"
    value = found[2].strip(" \t")
    if value[:1] in ("'", '"') and not _QUOTED.fullmatch(value):
        return "a value that begins with a quotation mark must end with it, and have it nowhere else"
    return None
