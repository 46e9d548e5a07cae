"""Commands of service managers that only note how they are called, and answer as a test tells them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_PROGRAM = """#!{python}
import json, pathlib, sys
here = pathlib.Path({folder!r})
words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with (here / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
line = " ".join(words)
for start, status, out, err, changes in json.loads((here / "answers").read_text()):
    if line.startswith(start):
        if changes is not None:
            (here / "answers").write_text(json.dumps(changes + json.loads((here / "answers").read_text())))
        sys.stdout.write(out)
        sys.stderr.write(err)
        sys.exit(status)
"""

Answer = tuple[str, int, str, str, "list[Answer] | None"]


def answer(
    start: str, out: str = "", *, status: int = 0, err: str = "", then: Sequence[Answer] | None = None
) -> Answer:
    """Return what to answer to a line that begins like this. From then on the answers ``then`` stand before others."""
    return (start, status, out, err, None if then is None else list(then))


class FakeCommands:
    """Commands in a folder of their own. All lines that nothing is said about succeed silently."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder = folder
        self.path = folder / "bin"
        self.path.mkdir(parents=True)
        for name in names:
            program = self.path / name
            program.write_text(_PROGRAM.format(python=sys.executable, folder=str(folder)))
            program.chmod(0o755)
        (folder / "calls").touch()
        (folder / "answers").write_text("[]")

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process find these commands, and no others of a service manager."""
        return {"PATH": f"{self.path}{os.pathsep}/nowhere"}

    def answers(self, *answers: Answer) -> None:
        """Answer like this from now on; what is said last stands first."""
        file = self._folder / "answers"
        file.write_text(json.dumps([*answers, *json.loads(file.read_text())]))

    def calls(self) -> list[str]:
        """Return the lines since the last time."""
        file = self._folder / "calls"
        lines = [" ".join(json.loads(line)) for line in file.read_text().splitlines()]
        file.write_text("")
        return lines
