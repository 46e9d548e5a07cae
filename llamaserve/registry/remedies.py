"""The commands that mend what is wrong with a model's files. Where no command can, they show more of it.

A shell takes each as it is. This module knows sources and how commands are written; it runs nothing.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from llamaserve.errors import LlamaserveError
from llamaserve.registry.sources import FileSource, Source
from llamaserve.registry.spec import Registry

EDITOR = '"${EDITOR:-nano}"'


def command(*words: object) -> str:
    """Return a command with its words quoted for a shell."""
    return shlex.join(str(word) for word in words)


def told(error: LlamaserveError) -> str:
    """Return what an error says, its hint too: only some hints are commands."""
    return f"{error.message}; {error.hint}" if error.hint else error.message


@dataclass(frozen=True)
class Remedies:
    """The commands for a model by a name that commands take. ``program`` is how a shell calls llamaserve, ``options``
    are the words that lead it to the same models.yaml and models folder.
    """

    registry: Registry
    name: str
    options: tuple[str, ...] = ()
    program: tuple[str, ...] = ("llamaserve",)

    def fetch(self, source: Source) -> str:
        """Return the command for files that are not here: the model's own, or an adapter's."""
        return self.correct(source) if isinstance(source, FileSource) else self._call("pull", self.name)

    def fetch_again(self, source: Source, *, adapter: bool = False) -> str:
        """Return the command that replaces damaged files; a user's own can only be looked at."""
        if isinstance(source, FileSource):
            return command("ls", "-l", source.path)
        deleted = source if adapter else self.name  # the model with it may be a user's own file
        return f"{self._call('rm', '--yes', deleted)} && {self._call('pull', self.name)}"

    def accept(self) -> str:
        """Return the command that notes what is here, and of a hub the newest version, in models.lock."""
        return self._call("pull", self.name, "--update")

    def correct(self, source: Source) -> str:
        """Return the command for a model whose source, or what else models.yaml says of it, must become another."""
        if self.name in self.registry.models or self.name in self.registry.aliases:
            return f"{EDITOR} {command(self.registry.path)}"
        if isinstance(source, FileSource):
            return command("ls", "-l", source.path.parent)
        return self._call("models")

    def _call(self, *words: object) -> str:
        return command(*self.program, *words, *self.options)


def caution(source: Source) -> str:
    """Return what to know before files are fetched again."""
    if isinstance(source, FileSource):
        return ""
    return " (the command deletes the files before it fetches them again: use it where they can be reached)"


def make_readable(path: Path) -> str:
    """Return the command for a file that this user may not read."""
    return command("chmod", "u+r", path)
