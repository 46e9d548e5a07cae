"""Folders for the files of one request, which go with it; what a server leaves that is killed goes when the next one
starts.

A living server has a lock on each of its folders, which the system takes from it when it ends, however it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

_PREFIX: Final = "llamaserve-upload-"
_NEW: Final = 60.0  # seconds in which the lock of a new folder may not be there yet


class Scratch:
    """An empty folder in the temporary folder, which only this user may look into. It must be closed."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._lock: int | None = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some file systems have no locks, so that no server can sweep there either
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Delete it with all that is in it. Further calls do nothing."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def sweep() -> None:
    """Delete the folders of this user's servers that are gone. Where there is no temporary folder that can be written,
    nothing is: a server can do without for most requests.
    """
    try:
        found = list(Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"))
    except OSError as error:
        logger.error("files can't be uploaded for now: %s", error)
        return
    for path in found:
        with contextlib.suppress(OSError):  # it has just gone, is another user's, or somebody has the lock
            _sweep(path)


def _sweep(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(lock)
        if found.st_uid != os.getuid() or abs(time.time() - found.st_mtime) < _NEW:
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
        logger.info("deleted %s, which a server has left that was killed", path)
    finally:
        os.close(lock)
