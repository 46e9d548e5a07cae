"""``python -m llamaserve.service.launch FILE WORDS...``: become ``llamaserve WORDS...`` with the environment of a file.

For service managers that know no such files. The process stays the same, and its command line has no secret in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llamaserve.errors import LlamaserveError
from llamaserve.service.environment import read_environment

_CONFIGURATION = 78  # EX_CONFIG of sysexits.h


def main(arguments: Sequence[str]) -> None:
    """Replace this process; return only by exiting, when the file cannot be used."""
    file, *words = arguments
    try:
        environment = {**os.environ, **read_environment(Path(file))}
    except LlamaserveError as error:
        sys.stderr.write(f"error: {error.message}\ntry:   {error.hint}\n")
        sys.exit(_CONFIGURATION)
    os.execve(sys.executable, [sys.executable, "-P", "-m", "llamaserve", *words], environment)  # noqa: S606 - no shell


if __name__ == "__main__":
    main(sys.argv[1:])
