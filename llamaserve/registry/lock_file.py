"""models.lock: which files each source stood for when it was fetched, so that the same ones are fetched elsewhere.

The file is JSON, sorted by source. It lies beside the models.yaml in use, or in the user's data folder where nothing
can be written there, or where that models.yaml is the one that ships with this program. A file that cannot be read is
an error that names the line, and is never replaced.

This module fetches nothing, and does not know what is in a model file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import platformdirs

from llamaserve import errors
from llamaserve.registry import cache
from llamaserve.registry.sources import HubSource, Source, parse_source

VERSION: Final = 1
MAX_FILE: Final = 4 * 1024 * 1024  # bytes
_SUM = re.compile(r"[0-9a-f]{64}")
_HALF_PAIR = re.compile(r"[\ud800-\udfff]")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PACKAGE = Path(__file__).resolve().parent.parent


class LockedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a source: its name there, its size in bytes, and its sum."""

    name: str
    size: int
    sha256: str


class LockEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a source stood for: the commit of a hub's repository, the files in order, the sum of the chat template's
    text, and the day it was noted.
    """

    files: tuple[LockedFile, ...]
    revision: str | None = None
    template: str | None = None
    date: str = ""


class _Document(msgspec.Struct, frozen=True):
    version: int
    sources: dict[str, Any]


def lock_path(models_file: Path) -> Path:
    """Return where the models.lock of a models.yaml lies."""
    models_file = models_file.absolute()
    beside = models_file.with_name("models.lock")
    shipped = models_file.resolve() in (_PACKAGE / "models.yaml", _PACKAGE.parent / "models.yaml")
    if not shipped and (os.access(beside.parent, os.W_OK) or beside.exists()):
        return beside
    data = platformdirs.user_data_path("llamaserve")
    if shipped:
        return data / "models.lock"
    return data / f"{hashlib.sha256(os.fsencode(models_file)).hexdigest()[:16]}.models.lock"


def pinned(source: Source, entry: LockEntry | None) -> Source:
    """Return a source that means exactly the files of its entry."""
    if entry is None or entry.revision is None or not isinstance(source, HubSource):
        return source
    return HubSource(source.repo, entry.files[0].name, revision=entry.revision)


class LockFile:
    """The models.lock of one models.yaml. It is read anew each time, since other processes may have changed it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def beside(cls, models_file: Path) -> LockFile:
        """Return the models.lock of a models.yaml."""
        return cls(lock_path(models_file))

    def entries(self) -> dict[str, LockEntry]:
        """Return all entries by source, as models.yaml has it. Raises ``RegistryError`` for a damaged file."""
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_FILE + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise errors.RegistryError(f"{self.path} cannot be read: {error.strerror or error}") from error
        return _Reader(self.path, data).entries()

    def get(self, source: str) -> LockEntry | None:
        """Return the entry of a source. Raises ``RegistryError`` for a damaged file."""
        return self.entries().get(source)

    def put(self, source: str, entry: LockEntry) -> None:
        """Write an entry; the file is replaced as a whole. Raises ``RegistryError`` for a damaged file, for a source
        whose name is no text, and where nothing can be written.
        """
        if _HALF_PAIR.search("".join((source, *(file.name for file in entry.files)))):
            raise errors.RegistryError(f"{source!r} cannot be noted in {self.path}: its name is no UTF-8")
        try:
            with cache.lock(f"models.lock {self.path}"):
                entries = self.entries()
                if entries.get(source) != entry:
                    self._write({**entries, source: entry})
        except OSError as error:
            raise errors.RegistryError(
                f"{self.path} cannot be written: {error.strerror or error}",
                hint=f"chmod u+w {shlex.quote(str(self.path.parent))}",
            ) from error

    def _write(self, entries: Mapping[str, LockEntry]) -> None:
        plain = {source: msgspec.to_builtins(entries[source]) for source in sorted(entries)}
        text = json.dumps({"version": VERSION, "sources": plain}, indent=2, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=self.path.parent, delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o644)
                Path(file.name).replace(self.path)
            except OSError:
                with contextlib.suppress(OSError):
                    Path(file.name).unlink()
                raise


class _Reader:
    """From the file's bytes to its entries."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._text = ""
        if len(data) > MAX_FILE:
            self._refuse(1, f"the file is larger than {MAX_FILE} bytes")
        try:
            self._text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            self._refuse(data.count(b"\n", 0, error.start) + 1, f"the file is not UTF-8: {error.reason}")

    def entries(self) -> dict[str, LockEntry]:
        try:
            plain = json.loads(self._text, object_pairs_hook=self._mapping)
        except json.JSONDecodeError as error:
            self._refuse(error.lineno, f"this is no JSON: {error.msg}")
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, or too many brackets
            self._refuse(1, f"this is no JSON that can be read: {error}")
        try:
            document = msgspec.convert(plain, _Document)
        except msgspec.ValidationError as error:
            self._refuse(1, str(error))
        if document.version != VERSION:
            self._refuse(self._line('"version"'), f"version {document.version} is not known, only {VERSION}")
        return {source: self._entry(source, values) for source, values in document.sources.items()}

    def _mapping(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        for text in (*values, *values.values()):
            if isinstance(text, str) and _HALF_PAIR.search(text):
                self._refuse(self._line(json.dumps(text)), f"{text!r} holds half a surrogate pair")
        if len(values) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            quoted = json.dumps(twice, ensure_ascii=False)
            self._refuse(self._line(quoted, self._text.find(quoted) + 1), f"{quoted} is given twice")
        return values

    def _entry(self, source: str, values: object) -> LockEntry:
        quoted = json.dumps(source, ensure_ascii=False)
        start = max(self._text.find(quoted + ":"), 0)
        try:
            entry = msgspec.convert(values, LockEntry)
        except msgspec.ValidationError as error:
            named = re.findall(r"`(\w+)`|\.(\w+)", str(error))
            field = next(
                (f'"{word}"' for pair in reversed(named) for word in pair if f'"{word}"' in self._text), quoted
            )
            self._refuse(self._line(field, start), f"{source}: {error}")
        for problem, where in _problems(source, entry):
            self._refuse(self._line(json.dumps(where, ensure_ascii=False), start), f"{source}: {problem}")
        return entry

    def _line(self, what: str, start: int = 0) -> int:
        """Return the line of a text, or that of the place where the search began."""
        at = self._text.find(what, start)
        return self._text.count("\n", 0, at if at >= 0 else start) + 1

    def _refuse(self, line: int, what: str) -> NoReturn:
        raise errors.RegistryError(
            f"{self._path}:{line}: {what}",
            hint=f"Correct it, or delete it and fetch the models again: rm {shlex.quote(str(self._path))}",
        )


def _problems(source: str, entry: LockEntry) -> list[tuple[str, str]]:
    """Return what is wrong with an entry's values, each with a text that is in the line."""
    found = [(f"{file.sha256!r} is no SHA-256 sum", file.sha256) for file in entry.files if not _is_sum(file.sha256)]
    found += [(f"{file.name} has the size {file.size}", file.name) for file in entry.files if file.size < 0]
    if not entry.files:
        found.append(("there are no files", source))
    if entry.revision is not None and not _COMMIT.fullmatch(entry.revision):
        found.append((f"{entry.revision!r} is no commit", entry.revision))
    if entry.template is not None and not _is_sum(entry.template):
        found.append((f"{entry.template!r} is no SHA-256 sum", entry.template))
    if source.startswith(("hf:", "pypi:")) and entry.files:
        try:
            parsed = parse_source(source, Path("/"))
            parse_source(str(pinned(parsed, entry)), Path("/"))
        except errors.RegistryError as error:
            found.append((error.message, entry.files[0].name))
    return found


def _is_sum(text: str) -> bool:
    return _SUM.fullmatch(text) is not None
