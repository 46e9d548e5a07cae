"""What the service runs: which program with which words, in which folder, and the file with its environment.

Service managers read this from files in which spaces, quotes and percent signs mean something. What can't be written
into such a file at all is refused here; how the rest is written is the business of ``unit`` and ``plist``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamaserve.errors import LlamaserveError

NAME = "llamaserve"
MARK = "Written by `llamaserve service install`"  # what tells our own files from those of others
STOP_LIMIT = 45  # seconds for the server's end: 5 for answers, 10 for what models save, and thrice that to be sure

# Control characters, halves of surrogate pairs (bytes of a path that are no UTF-8), and what XML does not know.
_UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Definition:
    """``words`` are those of llamaserve's own command line, ``serve`` first; all paths are absolute."""

    interpreter: str
    words: tuple[str, ...]
    folder: str
    environment_file: str

    def __post_init__(self) -> None:
        for text in (self.interpreter, *self.words, self.folder, self.environment_file):
            if _UNWRITABLE.search(text):
                raise LlamaserveError(f"{text!r} has characters that a service's file cannot hold")
        if self.folder != self.folder.strip() or self.folder.endswith("\\"):
            raise LlamaserveError(f"the folder {self.folder!r} ends as no line of a service's file can")
        assert all(Path(path).is_absolute() for path in (self.interpreter, self.folder, self.environment_file))

    @property
    def command(self) -> tuple[str, ...]:
        """The whole command. Python does not import from the folder that it runs in (``-P``)."""
        return (self.interpreter, "-P", "-m", "llamaserve", *self.words)


def define(models: Sequence[str], options: Sequence[str], environment_file: Path) -> Definition:
    """Return the definition of a service that runs ``llamaserve serve`` with these models and options, with the Python
    that runs now, in the current folder.
    """
    for model in models:
        if model.startswith("-"):
            raise LlamaserveError(f"{model!r} looks like an option, not like a model", hint="llamaserve models")
    if not sys.executable:
        raise LlamaserveError("Python does not know where it is", hint="python3 -m llamaserve service install")
    return Definition(sys.executable, ("serve", *options, *models), str(current_folder()), str(environment_file))


def current_folder() -> Path:
    """Return the folder in which the service is to run."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise LlamaserveError("the current folder is gone", hint="cd") from None
