"""The service under systemd's user manager: asked through ``systemctl --user``, which needs no root."""

from __future__ import annotations

import getpass
import os
from pathlib import Path

from llamaserve.errors import LlamaserveError
from llamaserve.service.definition import Definition
from llamaserve.service.manager import CommandFailed, State, ask, own_text, put_back, write
from llamaserve.service.unit import FILE_NAME, unit_text

_SYSTEMCTL = ("systemctl", "--user")
_START_LIMIT = 300.0  # seconds: the unit's own limits for the end of the old process and the start of the new one
_UNREACHABLE = (
    "log in as yourself, without su and sudo, and try again; in a container let that start llamaserve (docs/service.md)"
)


class Systemd:
    """The user manager of whoever runs this."""

    logs = f"journalctl --user -u {FILE_NAME} -n 50"
    restart = f"systemctl --user restart {FILE_NAME}"

    def __init__(self) -> None:
        home = os.environ.get("XDG_CONFIG_HOME")
        folder = Path(home) if home and Path(home).is_absolute() else Path.home() / ".config"
        self.file = folder / "systemd" / "user" / FILE_NAME

    def text(self, definition: Definition) -> str:
        """Return the unit."""
        return unit_text(definition)

    def check(self) -> None:
        """Raise ``LlamaserveError`` when the user manager cannot be asked, or reads other folders than this process."""
        folders = ask((*_SYSTEMCTL, "show", "--property=UnitPath", "--value"), _UNREACHABLE)
        if f" {self.file.parent} " not in f" {folders.strip()} ":
            raise LlamaserveError(
                f"the user manager does not read {self.file.parent}", hint="unset XDG_CONFIG_HOME, and try again"
            )

    def install(self, definition: Definition) -> None:
        """Write the unit, have it started at each login, and start it now; wait until it takes requests. When systemd
        does not take the unit, all is as before; when the server ends at once, the unit stays.
        """
        former = own_text(self.file)
        write(self.file, self.text(definition))
        try:
            self._ask("daemon-reload")
            self._ask("enable", FILE_NAME)
        except CommandFailed:
            put_back(self.file, former)
            self._ask("daemon-reload")
            raise
        if self._show()["ActiveState"] == "failed":
            self._ask("reset-failed", FILE_NAME)  # it may have reached its limit of starts
        ask((*_SYSTEMCTL, "restart", FILE_NAME), self.logs, _START_LIMIT)

    def uninstall(self) -> bool:
        """Stop the service and remove its unit; tell whether there was one."""
        if own_text(self.file) is None:
            return False
        self.check()
        ask((*_SYSTEMCTL, "disable", "--now", FILE_NAME), self.logs, _START_LIMIT)
        failed = self._show()["ActiveState"] == "failed"
        self.file.unlink()
        self._ask("daemon-reload")
        if failed:
            self._ask("reset-failed", FILE_NAME)
        return True

    def state(self) -> State:
        """Return how the service is."""
        if own_text(self.file) is None:
            return State(installed=False)
        shown = self._show()
        active, pid = shown["ActiveState"], int(shown["MainPID"])
        words = f"{active} ({shown['SubState']})" + (f", {shown['Result']}" if shown["Result"] != "success" else "")
        enabled = shown["UnitFileState"] in ("enabled", "enabled-runtime", "linked")
        return State(True, enabled, active in ("active", "reloading"), pid or None, words)

    def lingers(self) -> bool:
        """Tell whether the user's services run while the user is not logged in."""
        try:
            return ask(("loginctl", "show-user", _user(), "--property=Linger", "--value"), "").strip() == "yes"
        except CommandFailed:  # nobody knows: the user is not logged in by logind's count
            return False

    def linger(self) -> None:
        """Have the user's services start at boot, and run on after logout."""
        ask(("loginctl", "--no-ask-password", "enable-linger", _user()), f"sudo loginctl enable-linger {_user()}")

    def _show(self) -> dict[str, str]:
        wanted = "ActiveState,SubState,Result,UnitFileState,MainPID"
        lines = self._ask("show", f"--property={wanted}", FILE_NAME).splitlines()
        return dict.fromkeys(wanted.split(","), "") | dict(line.split("=", 1) for line in lines if "=" in line)

    def _ask(self, *words: str) -> str:
        return ask((*_SYSTEMCTL, *words), _UNREACHABLE)


def _user() -> str:
    return getpass.getuser()
