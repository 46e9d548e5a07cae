"""Fetching what a model needs, its adapters and parts too, as models.lock says, and noting there what was fetched.

A source with an entry is fetched as exactly the commit that the entry names, and its files must have the sums there;
only an update moves an entry on. This module knows models.yaml's values and models.lock, and nothing of commands or
HTTP.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from llamaserve import errors
from llamaserve.registry import hub
from llamaserve.registry.cache import carry_on, checksum
from llamaserve.registry.fetching import fetch, while_checked
from llamaserve.registry.gguf import GGUFHeader, read_header
from llamaserve.registry.lock_file import LockedFile, LockEntry, LockFile, pinned
from llamaserve.registry.sources import FileSource, HubSource, Progress, Source, parse_source
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.split import part_paths
from llamaserve.registry.tasks import kind_of

log = logging.getLogger(__name__)


def pull(
    registry: Registry,
    spec: ModelSpec,
    lock: LockFile,
    progress: Progress,
    *,
    update: bool = False,
    record_files: bool = True,
) -> Path:
    """Fetch a model and its adapters or parts unless they are here, and return the model's (first) file.

    Entries of models.lock are kept to, or made anew with ``update``. Files on this machine (``file:``) get an entry
    only if they are to be recorded, since that takes reading them.

    Raises ``SourceError`` and its kind as ``fetch`` does, ``RegistryError`` for a damaged models.lock, and
    ``GGUFError`` when what came is no model file.
    """
    base = registry.path.parent
    of_texts = kind_of(spec, registry.source(spec)) == "text"
    options = {"update": update, "record_files": record_files, "of_texts": of_texts}
    path = _pull(spec.source, base, spec.sha256, lock, progress, **options)
    for source in spec.other_sources:
        _pull(source, base, None, lock, progress, **options)
    return path


def _pull(
    text: str,
    base: Path,
    sha256: str | None,
    lock: LockFile,
    progress: Progress,
    *,
    update: bool,
    record_files: bool,
    of_texts: bool,
) -> Path:
    source = parse_source(text, base)
    locked = lock.get(text)  # also for an update: a damaged models.lock is told before anything is downloaded
    entry = None if update else locked
    wanted = pinned(source, entry)
    path = fetch(wanted, sha256, progress, newest=update)
    if isinstance(source, HubSource) and wanted != source:
        hub.choose(source, path)
    meanwhile = while_checked(path, progress)
    if entry is not None:
        for problem in differences(entry, path, meanwhile=meanwhile):
            raise errors.ChecksumMismatch(
                problem,
                hint="Delete the file and fetch it again (llamaserve rm, llamaserve pull), or accept what is here: "
                "llamaserve pull --update",
            )
    elif record_files or not isinstance(source, FileSource):
        _note(lock, text, describe(source, path, meanwhile, of_texts=of_texts))
    return path


def _note(lock: LockFile, text: str, entry: LockEntry) -> None:
    """Write an entry. Where that is impossible the model can be used all the same, and the user is told."""
    try:
        lock.put(text, entry)
    except errors.RegistryError as error:
        log.warning("%s", error.message)


def describe(
    source: Source, path: Path, meanwhile: Callable[[], None] = carry_on, *, of_texts: bool = True
) -> LockEntry:
    """Return the entry for a source whose (first) file lies here. Reads the files, unless their sums are known;
    ``meanwhile`` may raise to give that up. What is not ``of_texts`` need not be a file for llama.cpp, but may be one.
    """
    parts = part_paths(path)
    places = [hub.origin(part) for part in parts] if isinstance(source, HubSource) else []
    names = [place.file or "" for place in places if place] or [part.name for part in parts]
    files = [
        LockedFile(name, part.stat().st_size, checksum(part, meanwhile=meanwhile))
        for name, part in zip(names, parts, strict=True)
    ]
    today = datetime.now(UTC).date().isoformat()
    revision = places[0].revision if places and places[0] else None
    try:
        template = template_sum(path)
    except errors.GGUFError:
        if of_texts:
            raise
        template = None
    return LockEntry(tuple(files), revision, template, today)


def template_sum(path: Path) -> str | None:
    """Return the sum of a model file's chat template; None without one."""
    return hash_of_template(read_header(path)) if path.name.lower().endswith(".gguf") else None


def hash_of_template(header: GGUFHeader) -> str | None:
    """Return the SHA-256 of the chat template's text; None without one."""
    template = header.chat_template
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def differences(
    entry: LockEntry, path: Path, *, anew: bool = False, meanwhile: Callable[[], None] = carry_on
) -> list[str]:
    """Return in words what is different between an entry and the files that are here. Unless they are to be read
    ``anew``, a remembered sum of an unchanged file is enough. ``meanwhile`` may raise to give up.
    """
    parts = part_paths(path)
    if len(parts) != len(entry.files):
        return [f"{path} has {len(parts)} parts, and models.lock lists {len(entry.files)}"]
    found = []
    for file, part in zip(entry.files, parts, strict=True):
        size = part.stat().st_size
        if size != file.size:
            found.append(f"{part} has {size} bytes, and models.lock says {file.size}")
        elif (actual := checksum(part, anew=anew, meanwhile=meanwhile)) != file.sha256:
            found.append(f"{part} has the SHA-256 {actual}, and models.lock says {file.sha256}")
    return found
