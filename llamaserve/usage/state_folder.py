"""The state folder: where a server keeps its records. Knows nothing of what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import platformdirs

LEDGER: Final = "usage.sqlite3"


def state_folder(configured: Path | None) -> Path:
    """Return the configured folder, or the user's own for such things. It need not be there yet."""
    return configured.expanduser().absolute() if configured is not None else platformdirs.user_state_path("llamaserve")


def ledger_path(configured: Path | None) -> Path:
    """Return the file of the ledger in the state folder."""
    return state_folder(configured) / LEDGER
