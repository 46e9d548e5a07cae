"""The service under launchd, on macOS: an agent of the user, asked through ``launchctl``, which needs no root.

Agents belong to a login at the screen: they start with it and end with it.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path

from llamaserve.errors import LlamaserveError
from llamaserve.service.definition import NAME, STOP_LIMIT, Definition
from llamaserve.service.manager import CommandFailed, State, ask, own_text, put_back, write
from llamaserve.service.plist import FILE_NAME, LABEL, plist_text

_POLL = 0.1  # seconds between two looks at an agent that leaves
_NO_LOGIN = "log in at the screen of this Mac, or over screen sharing, and try again (docs/mac-mini.md)"


class Launchd:
    """The login session of whoever runs this."""

    def __init__(self) -> None:
        self._domain = f"gui/{os.getuid()}"
        self._target = f"{self._domain}/{LABEL}"
        self.file = Path.home() / "Library" / "LaunchAgents" / FILE_NAME
        self.log = Path.home() / "Library" / "Logs" / NAME / f"{NAME}.log"
        self.logs = f"tail -n 50 {shlex.quote(str(self.log))}"
        self.restart = f"launchctl kickstart -k {self._target}"

    def text(self, definition: Definition) -> str:
        """Return the property list."""
        return plist_text(definition, self.log)

    def check(self) -> None:
        """Raise ``LlamaserveError`` when the user is not logged in at the screen."""
        ask(("launchctl", "print", self._domain), _NO_LOGIN)

    def install(self, definition: Definition) -> None:
        """Write the property list, and have the agent started now and at each login. When launchd does not take it, all
        is as before.
        """
        former = own_text(self.file)
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # launchd makes none
        self._leave()
        write(self.file, self.text(definition))
        try:
            self._enter()
        except CommandFailed:
            put_back(self.file, former)
            if former is not None:
                self._enter()
            raise

    def uninstall(self) -> bool:
        """Stop the agent and remove its property list; tell whether there was one."""
        if own_text(self.file) is None:
            return False
        self._leave()
        self.file.unlink()
        return True

    def state(self) -> State:
        """Return how the agent is."""
        if own_text(self.file) is None:
            return State(installed=False)
        shown = self._shown()
        if shown is None:
            return State(True, self._enabled(), words="not loaded")
        # launchd's own words, which Apple does not promise to keep
        state = re.search(r"^\s*state = (.+)$", shown, re.MULTILINE)
        pid = re.search(r"^\s*pid = (\d+)$", shown, re.MULTILINE)
        status = re.search(r"^\s*last exit code = (.+)$", shown, re.MULTILINE)
        words = state[1] if state else "loaded"
        if pid is None and status is not None:
            words += f", last exit code {status[1]}"
        return State(True, self._enabled(), pid is not None, int(pid[1]) if pid else None, words)

    def _enter(self) -> None:
        ask(("launchctl", "enable", self._target), _NO_LOGIN)
        ask(("launchctl", "bootstrap", self._domain, str(self.file)), _NO_LOGIN)

    def _leave(self) -> None:
        """Have launchd forget the agent, and wait until it has: it would not take another one by this name before."""
        if self._shown() is None:
            return
        ask(("launchctl", "bootout", self._target), self.logs, STOP_LIMIT + 30)
        deadline = time.monotonic() + STOP_LIMIT + 30
        while self._shown() is not None:
            if time.monotonic() > deadline:
                raise LlamaserveError(f"launchd does not let go of {LABEL}", hint=f"launchctl print {self._target}")
            time.sleep(_POLL)

    def _shown(self) -> str | None:
        """Return what launchd says of the agent; None when it knows none."""
        try:
            return ask(("launchctl", "print", self._target), _NO_LOGIN)
        except CommandFailed:
            self.check()
            return None

    def _enabled(self) -> bool:
        """Tell whether the agent starts at login: one that is not listed does."""
        listed = ask(("launchctl", "print-disabled", self._domain), _NO_LOGIN)
        return re.search(rf'"{re.escape(LABEL)}" => (disabled|true)', listed) is None
