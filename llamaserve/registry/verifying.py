"""Whether a model's files are what they should be: read anew, and compared with models.yaml, models.lock and the hub.

Nothing is fetched, changed or loaded. This module knows files and promises, and not how findings are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from llamaserve import errors
from llamaserve.registry import hub
from llamaserve.registry.adapters import check_adapter
from llamaserve.registry.cache import checksum
from llamaserve.registry.fetching import check_sum, locate, missing
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.loadable import check_loadable
from llamaserve.registry.lock_file import LockEntry, LockFile
from llamaserve.registry.pulling import differences, template_sum
from llamaserve.registry.remedies import Remedies, caution, command, make_readable, told
from llamaserve.registry.sources import FileSource, Source, parse_source
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.split import part_paths


class Finding(msgspec.Struct, frozen=True):
    """Something that is wrong with a model, and the command that mends it."""

    model: str
    problem: str
    fix: str


def verify_model(
    registry: Registry, name: str, spec: ModelSpec, lock: LockFile, options: tuple[str, ...] = ()
) -> list[Finding]:
    """Return what is wrong with a model and its adapters. ``options`` are the words that make other commands see the
    same models. Raises ``RegistryError`` for a damaged models.lock.
    """
    verification = _Verification(registry, name, lock, options)
    source = registry.source(spec)
    found = list(verification.files(source, spec.source, spec.sha256))
    header = None
    if not found:
        try:
            header = _loadable(source)
        except errors.LlamaserveError as error:
            found.append(verification.unloadable(source, error))
    for adapter in spec.lora:
        found += verification.adapter(adapter.source, header)
    return found


def _loadable(source: Source) -> GGUFHeader | None:
    """Return the header of a file that llama.cpp can load; None for one that is not for it."""
    path = locate(source)
    if path is None or not path.name.lower().endswith(".gguf"):
        return None
    header = read_header(path)
    check_loadable(header)
    return header


class _Verification:
    """What is looked at for one model, file by file."""

    def __init__(self, registry: Registry, name: str, lock: LockFile, options: tuple[str, ...]) -> None:
        self._base = registry.path.parent
        self._name = name
        self._lock = lock
        self._remedies = Remedies(registry, name, options)

    def files(self, source: Source, text: str, sha256: str | None, *, adapter: bool = False) -> Iterator[Finding]:
        """Compare the files of a source with all that was promised for them. ``text`` is what models.yaml calls it."""
        path, entry = locate(source), self._lock.get(text)
        if path is None:
            yield self._absent(source, f"the LoRA adapter {text}" if adapter else "it")
            return
        again = self._remedies.fetch_again(source, adapter=adapter)
        try:
            for what in _broken_promises(path):
                yield self._finding(what + caution(source), again)
            if entry is not None:
                fix = self._remedies.accept() if isinstance(source, FileSource) else again
                for what in differences(entry, path):
                    yield self._finding(what + caution(source), fix)
            check_sum(path, sha256)
            if entry is not None and (other := _other_template(entry, path)):
                yield self._finding(other, self._remedies.accept())
        except errors.ChecksumMismatch as error:
            own = isinstance(source, FileSource)
            yield self._finding(error.message + caution(source), self._remedies.correct(source) if own else again)
        except errors.RegistryError as error:
            yield self._finding(told(error), self._remedies.correct(source))
        except errors.LlamaserveError as error:
            yield self._finding(error.message + caution(source), again)
        except OSError as error:
            may_not = isinstance(error, PermissionError)
            fix = make_readable(path) if may_not else command("ls", "-l", path)
            yield self._finding(f"{path} cannot be read: {error.strerror or error}", fix)

    def unloadable(self, source: Source, error: errors.LlamaserveError) -> Finding:
        """Return the finding for a file that is the promised one, and still none for llama.cpp."""
        if isinstance(source, FileSource):
            return self._finding(error.message, self._remedies.fetch_again(source))
        return self._finding(told(error), self._remedies.correct(source))

    def adapter(self, text: str, model: GGUFHeader | None) -> Iterator[Finding]:
        """Compare an adapter with what was promised, and with the model if that is good."""
        source = parse_source(text, self._base)
        found = list(self.files(source, text, None, adapter=True))
        yield from found
        path = locate(source)
        if found or path is None or model is None:
            return
        try:
            check_adapter(read_header(path), model)
        except errors.LlamaserveError as error:
            yield self._finding(told(error), self._remedies.correct(source))

    def _absent(self, source: Source, subject: str) -> Finding:
        what = told(missing(source)) if isinstance(source, FileSource) else f"{subject} is not on this machine"
        return self._finding(what, self._remedies.fetch(source))

    def _finding(self, what: str, fix: str) -> Finding:
        return Finding(self._name, what, fix)


def _broken_promises(path: Path) -> Iterator[str]:
    """Read a model's files, and say which are not what the hub promised."""
    sums = {part: checksum(part, anew=True) for part in part_paths(path)}
    for part, actual in sums.items():
        promised = hub.promised_sum(part)
        if promised is not None and promised != actual:
            yield f"{part} has the SHA-256 {actual}, and the hub promised {promised}"


def _other_template(entry: LockEntry, path: Path) -> str | None:
    template = template_sum(path)
    if template == entry.template:
        return None
    return f"{path} has the chat template {template or 'none'}, and models.lock says {entry.template or 'none'}"
