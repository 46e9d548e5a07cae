"""The keys that hold at this moment: those of the command line, and those of a file that is read again when it changes.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from llamaserve.errors import KeysError
from llamaserve.keys.key_file import KeyFile, read_keys
from llamaserve.keys.keyring import Key, Keyring

logger = logging.getLogger(__name__)

_INTERVAL: Final = 1.0  # seconds

_Stamp = tuple[int, int, int] | None


class WatchedKeys:
    """The keys of a running server. Once a key was needed it always is: a file that is damaged or gone changes nothing
    until it is good again.
    """

    def __init__(self, given: list[Key], path: Path | None) -> None:
        """Raises ``KeysError`` when there is a file that is no good."""
        self._given = given
        self._path = path
        try:
            self._stamp: _Stamp = _stamp_of(path)
        except OSError as error:
            raise KeysError(f"{path} can't be read: {error}") from error
        self._refused: _Stamp = None
        self._hidden = False  # whether it could not be looked at
        self.needed = bool(given) or self._stamp is not None
        self.keyring = self._read() if self._stamp is not None else Keyring(given)

    async def watch(self) -> None:
        """Take over changes of the file, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        """Read the file again if it is another one than before. Whatever is wrong with it is logged once."""
        try:
            stamp = _stamp_of(self._path)
        except OSError as error:
            if not self._hidden:
                logger.error("%s can't be looked at, and its keys go on holding: %s", self._path, error)
            self._hidden = True
            return
        self._hidden = False
        if stamp in (self._stamp, self._refused):
            return
        if stamp is None:
            logger.error("%s is gone; its keys hold until the server is started anew", self._path)
            self._stamp = None
            return
        try:
            self.keyring = self._read()
        except KeysError as error:
            logger.error("the former keys go on holding: %s", error.message)
            self._refused = stamp
            return
        except Exception:  # whoever was let in before still is, and the next change counts
            logger.exception("the former keys go on holding")
            self._refused = stamp
            return
        self._stamp, self._refused, self.needed = stamp, None, True
        logger.info("%s was read anew: %d keys", self._path, len(self.keyring.keys))

    def _read(self) -> Keyring:
        assert self._path is not None
        return keyring_of(self._given, read_keys(self._path))


def keyring_of(given: list[Key], file: KeyFile) -> Keyring:
    """Return the keys of the command line, to which a file's defaults apply, and those of the file."""
    limited = [Key(key.name, key.digest, key.admin, key.limits.over(file.defaults)) for key in given]
    return Keyring(limited, file.listed())


def _stamp_of(path: Path | None) -> _Stamp:
    """Return what changes when the file does; None if there is none. Raises ``OSError`` when that can't be told."""
    try:
        status = path.stat() if path is not None else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status and (status.st_ino, status.st_size, status.st_mtime_ns)
