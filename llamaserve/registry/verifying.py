"""Whether a model's files are what they should be: read anew, and compared with models.yaml, models.lock and the hub.

Nothing is fetched, changed or loaded. This module knows files and promises, and not how findings are shown.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import msgspec

from llamaserve import errors
from llamaserve.registry import hub
from llamaserve.registry.cache import checksum
from llamaserve.registry.fetching import check_sum, fetch, locate
from llamaserve.registry.gguf import read_header
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.lock_file import LockEntry, LockFile
from llamaserve.registry.pulling import differences, template_sum
from llamaserve.registry.sources import FileSource, Source, parse_source
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.split import part_paths


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong with a model, and the command that mends it."""

    model: str
    problem: str
    fix: str


def verify_model(registry: Registry, name: str, spec: ModelSpec, lock: LockFile) -> list[Finding]:
    """Return what is wrong with a model and its adapters. Raises ``RegistryError`` for a damaged models.lock."""
    base = registry.path.parent
    source = registry.source(spec)
    found = list(_file_findings(name, source, spec.sha256, lock.get(spec.source)))
    if not found and (path := locate(source)) is not None:
        found += _model_findings(name, path, source)
    for adapter in spec.lora:
        found += _file_findings(name, parse_source(adapter.source, base), None, lock.get(adapter.source))
    return found


def _file_findings(name: str, source: Source, sha256: str | None, entry: LockEntry | None) -> Iterator[Finding]:
    path = locate(source)
    if path is None:
        yield _absent(name, source)
        return
    again = _fetch_again(name, source)
    try:
        sums = {part: checksum(part, anew=True) for part in part_paths(path)}
        for part, actual in sums.items():
            promised = hub.promised_sum(part)
            if promised is not None and promised != actual:
                problem = f"{part} has the SHA-256 {actual}, and the hub promised {promised}"
                yield Finding(name, problem + _caution(source), again)
        if entry is not None:
            for problem in differences(entry, path):
                yield Finding(name, problem + _caution(source), again)
        check_sum(path, sha256)
        if entry is not None and (template := template_sum(path)) != entry.template:
            shown = template or "none", entry.template or "none"
            problem = "{} has the chat template {}, and models.lock says {}".format(path, *shown)
            yield Finding(name, problem, _command("llamaserve", "pull", name, "--update"))
    except errors.ChecksumMismatch as error:
        yield Finding(name, error.message + _caution(source), again)
    except errors.LlamaserveError as error:
        yield _finding(name, source, error)
    except OSError as error:
        yield Finding(name, f"{path} cannot be read: {error.strerror or error}", _command("chmod", "u+r", path))


def _model_findings(name: str, path: Path, source: Source) -> Iterator[Finding]:
    if not path.name.lower().endswith(".gguf"):
        return
    try:
        check_loadable(read_header(path))
    except errors.LlamaserveError as error:
        yield _finding(name, source, error)


def _absent(name: str, source: Source) -> Finding:
    if isinstance(source, FileSource):
        try:
            fetch(source)
        except errors.ModelFileMissing as error:
            return Finding(name, error.message, error.hint or _command("llamaserve", "show", name))
    return Finding(name, "it is not on this machine", _command("llamaserve", "pull", name))


def _finding(name: str, source: Source, error: errors.LlamaserveError) -> Finding:
    if error.hint:
        return Finding(name, error.message, error.hint)
    return Finding(name, error.message + _caution(source), _fetch_again(name, source))


def _caution(source: Source) -> str:
    """Return what to know before files are replaced."""
    if isinstance(source, FileSource):
        return ""
    return " (the command deletes the files before it fetches them again: use it where they can be reached)"


def _fetch_again(name: str, source: Source) -> str:
    """Return the command that replaces the files; for a user's own, the one that accepts them as they are."""
    if isinstance(source, FileSource):
        return _command("llamaserve", "pull", name, "--update")
    return f"{_command('llamaserve', 'rm', '--yes', name)} && {_command('llamaserve', 'pull', name)}"


def _command(*words: str | Path) -> str:
    """Return a command with its words quoted for a shell."""
    return shlex.join(str(word) for word in words)
