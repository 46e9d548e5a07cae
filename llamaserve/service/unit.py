"""The service as a unit of systemd's user manager: its text, for systemd 244 or newer.

What is not set here, and why:

- Options that filter system calls (``RestrictNamespaces``, ``LockPersonality``, ``SystemCallFilter``, ...): on x86,
  before Linux 5.16, a process with such a filter runs with a mitigation of Spectre that slows down all it computes.
- Options that hide parts of the file system or of the devices (``PrivateTmp``, ``ProtectSystem``, ``PrivateDevices``,
  ...): a user's manager can't do that without a user namespace, in which drivers of GPUs lose their groups.
- ``MemoryDenyWriteExecute``: drivers of GPUs compile at run time.
- ``MemoryMax``: the server keeps to its own budget, and a limit that is met kills a model in the middle of an answer.
"""

from __future__ import annotations

import re

from llamaserve.errors import LlamaserveError
from llamaserve.service.definition import MARK, NAME, STOP_LIMIT, Definition

FILE_NAME = f"{NAME}.service"

_TEXT = """\
# {mark}, which replaces this file when it runs again.
# Changes of your own: systemctl --user edit {name}

[Unit]
Description=llamaserve, models behind an OpenAI-compatible API
StartLimitIntervalSec=15min
StartLimitBurst=10

[Service]
Type=notify
ExecStart={command}
ExecReload=kill -HUP $MAINPID
WorkingDirectory={folder}
EnvironmentFile=-{environment_file}
Restart=on-failure
RestartSec=10
TimeoutStartSec=2min
TimeoutStopSec={stop_limit}
KillMode=mixed
WatchdogSec=2min
OOMPolicy=continue
LimitCORE=0
NoNewPrivileges=yes
UMask=0077

[Install]
WantedBy=default.target
"""


def unit_text(definition: Definition) -> str:
    """Return the text of the unit. Raises ``LlamaserveError`` where systemd would not run the program."""
    if re.search(r"[\"'\\]", definition.interpreter):
        raise LlamaserveError(
            f"systemd runs no program with a quotation mark or a backslash in its path: {definition.interpreter}",
            hint="move llamaserve's folder to another place, and install it there",
        )
    command = (f":{definition.interpreter}", *definition.command[1:])  # the colon: no word has variables in it
    return _TEXT.format(
        mark=MARK,
        name=NAME,
        command=" ".join(_word(word) for word in command),
        folder=_without_specifiers(definition.folder),
        environment_file=_without_specifiers(_without_patterns(definition.environment_file)),
        stop_limit=STOP_LIMIT,
    )


def _word(text: str) -> str:
    """Return a word of a command line as systemd reads it. It is quoted unless that is needless: a lone semicolon, for
    one, would begin another command.
    """
    text = _without_specifiers(text)
    if re.fullmatch(r"[\w/.:=,+@%-]+", text, re.ASCII):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _without_specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _without_patterns(path: str) -> str:
    """Return the path such that it matches itself alone: the names of environment files are patterns."""
    return re.sub(r"([*?\[\]\\])", r"\\\1", path)
