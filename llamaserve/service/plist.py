"""The service as an agent of launchd, for macOS: its property list.

launchd knows no environment files, and what is in a property list can be read by every program of the user. So the file
names no secret: ``launch`` reads the environment file at each start, and becomes the server.
"""

from __future__ import annotations

import plistlib
from pathlib import Path

from llamaserve.service.definition import MARK, NAME, STOP_LIMIT, Definition

LABEL = f"local.{NAME}"
FILE_NAME = f"{LABEL}.plist"

_UMASK = 0o077
_THROTTLE = 10  # seconds between two starts


def plist_text(definition: Definition, log: Path) -> str:
    """Return the text of the property list. All output goes to the file ``log``."""
    launch = (definition.interpreter, "-P", "-m", "llamaserve.service.launch", definition.environment_file)
    values = {
        "Label": LABEL,
        "ProgramArguments": [*launch, *definition.words],
        "WorkingDirectory": definition.folder,
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": _THROTTLE,
        "ExitTimeOut": STOP_LIMIT,
        "ProcessType": "Interactive",  # all others are slowed down in favour of what is on the screen
        "StandardOutPath": str(log),
        "StandardErrorPath": str(log),
        "Umask": _UMASK,
    }
    head, rest = plistlib.dumps(values, sort_keys=False).decode().split("<plist", 1)
    return f"{head}<!-- {MARK}, which replaces this file when it runs again. -->\n<plist{rest}"
