"""Notices changes of models.yaml and of the models folder, and has the pool take them over.

Files are looked at once a second, which costs a few system calls and works on every filesystem and with every editor's
way to save.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from llamaserve.errors import RegistryError
from llamaserve.registry.folder import stamp
from llamaserve.registry.pool import ModelPool

logger = logging.getLogger(__name__)

INTERVAL: Final = 1.0  # seconds


async def watch(pool: ModelPool, interval: float = INTERVAL) -> None:
    """Reload whenever a file has changed, until cancelled. A change counts once it has been the same twice, so that no
    file is read while it is being written.
    """
    taken = seen = await asyncio.to_thread(_signature, pool)
    while True:
        await asyncio.sleep(interval)
        now = await asyncio.to_thread(_signature, pool)
        if now == seen != taken:
            taken = now
            try:
                await pool.reload()
            except Exception:
                logger.exception("the list of models could not be reloaded")
        seen = now


def _signature(pool: ModelPool) -> tuple[object, ...]:
    """Return what changes when models.yaml or the folder does."""
    try:
        status = pool.registry.path.stat()
        listed: object = (status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError:  # it is being replaced, or was taken away, which changes nothing
        listed = None
    try:
        found = stamp(pool.folder) if pool.folder is not None else ()
    except RegistryError:  # more than one can look at
        found = ()
    return listed, found
