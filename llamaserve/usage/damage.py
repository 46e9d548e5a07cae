"""What is said of a ledger's file that can't be used, and the command that helps. Nothing here touches the file."""

from __future__ import annotations

import shlex
import sqlite3
from pathlib import Path
from typing import Final

_DAMAGED: Final = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_BESIDE: Final = ("", "-wal", "-shm")  # endings of the files that belong together


def what_is_wrong(error: sqlite3.Error | OSError) -> str:
    """Return an error in words."""
    what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"it is damaged ({what})" if _is_damage(error) else what


def remedy(error: sqlite3.Error | OSError, path: Path) -> str:
    """Return a command: one that moves a damaged file away, so that another is begun, or one that shows more."""
    if not _is_damage(error):
        return f"ls -la {shlex.quote(str(path.parent))}"
    folder = shlex.quote(str(path.parent / "damaged"))
    names = " ".join(shlex.quote(f"{path}{ending}") for ending in _BESIDE if Path(f"{path}{ending}").exists())
    return f"mkdir -p {folder} && mv {names} {folder}"


def _is_damage(error: sqlite3.Error | OSError) -> bool:
    return getattr(error, "sqlite_errorcode", None) in _DAMAGED
