"""Notices changes of models.yaml and of the models folder, and has the pool take them over.

Files are looked at once a second, which costs a few system calls and works on every filesystem and with every editor's
way to save.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from llamaserve.errors import RegistryError
from llamaserve.registry.folder import stamp
from llamaserve.registry.lock_file import lock_path
from llamaserve.registry.pool import ModelPool

logger = logging.getLogger(__name__)

INTERVAL: Final = 1.0  # seconds


async def watch(pool: ModelPool, interval: float = INTERVAL) -> None:
    """Reload whenever a file has changed, until cancelled. A change counts once it has been the same twice, so that no
    file is read while it is being written. What somebody else has had reloaded is looked at once more, since it may
    have changed back before it was seen here.
    """
    taken = seen = await asyncio.to_thread(_signature, pool)
    reloads = pool.reloads
    while True:
        await asyncio.sleep(interval)
        now = await asyncio.to_thread(_signature, pool)
        if now == seen and (now != taken or pool.reloads != reloads):
            taken = now
            reloads = pool.reloads + 1  # with this one, and without those that come meanwhile
            try:
                await pool.reload()
            except Exception:
                logger.exception("the list of models could not be reloaded")
        seen = now


def _signature(pool: ModelPool) -> tuple[object, ...]:
    """Return what changes when models.yaml, models.lock or the folder does."""
    try:
        found = stamp(pool.folder) if pool.folder is not None else ()
    except RegistryError:  # more than one can look at
        found = ()
    return _state(pool.registry.path), _state(lock_path(pool.registry.path)), found


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:  # it is being replaced, or is not there
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
