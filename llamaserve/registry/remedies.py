"""What mends a model's files that are at fault: one command for each finding. Where none can, it shows more of it.

A shell takes each as it is. This module reads files only for their sums, to know whether others would come; it runs
nothing, and does not know how faults are found.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llamaserve.errors import ChecksumMismatch, LlamaserveError, ModelFileMissing, RegistryError
from llamaserve.registry import hub, wheels
from llamaserve.registry.cache import checksum
from llamaserve.registry.fetching import locate, missing
from llamaserve.registry.lock_file import LockEntry
from llamaserve.registry.pulling import differences
from llamaserve.registry.sources import FileSource, Source, WheelSource
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.split import part_paths

EDITOR = "${EDITOR:-nano}"  # not quoted: it may hold options, as in "code --wait"


def command(*words: object) -> str:
    """Return a command with its words quoted for a shell."""
    return shlex.join(str(word) for word in words)


def told(error: LlamaserveError) -> str:
    """Return what an error says, its hint too: only some hints are commands."""
    return f"{error.message}; {error.hint}" if error.hint else error.message


class Advice(NamedTuple):
    """What is wrong, and the command that mends it."""

    problem: str
    fix: str


@dataclass(frozen=True)
class Files:
    """The files of a model, or of its ``adapter`` or part, that are here, the first of them at ``path``; and what
    models.lock and models.yaml promise for them.
    """

    source: Source
    path: Path
    entry: LockEntry | None = None
    sha256: str | None = None
    adapter: bool = False

    def promised_by(self) -> str | None:
        """Return who promised just these files; None if nobody did, or if the hub, their conversion or models.lock
        promised others. They are read, unless their sums are known, which raises ``OSError`` where that is impossible.
        """
        sums = [checksum(part) for part in part_paths(self.path)]
        if converted := isinstance(self.source, WheelSource) and self.source.quant is not None:
            promised = [wheels.made_sum(self.source)]
        else:
            promised = [hub.promised_sum(part) for part in part_paths(self.path)]
        if any(promise not in (None, actual) for promise, actual in zip(promised, sums, strict=True)):
            return None
        if self.entry is not None:
            return None if differences(self.entry, self.path) else "models.lock"
        if None not in promised:
            return "its conversion" if converted else "the hub"
        if converted:
            return None  # its sum in models.yaml is that of the weights which it was converted from
        return "models.yaml" if self.sha256 is not None and sums == [self.sha256.lower()] else None


@dataclass(frozen=True)
class Remedies:
    """The commands for a model by a name that commands take. ``program`` is how a shell calls llamaserve, ``options``
    are the words that lead it to the same models.yaml and models folder.
    """

    registry: Registry
    name: str
    options: tuple[str, ...] = ()
    program: tuple[str, ...] = ("llamaserve",)

    def absent(self, source: Source, subject: str = "it") -> Advice:
        """Advise on files that are not all here; ``subject`` is what to call them."""
        why = f": {told(missing(source))}" if isinstance(source, FileSource) else ""
        return Advice(f"{subject} is not on this machine{why}", self.fetch(source))

    def require(self, source: Source, subject: str) -> Path:
        """Return the (first) file of a source. Raises ``ModelFileMissing`` when it is not all here."""
        path = locate(source)
        if path is None:
            absent = self.absent(source, subject)
            raise ModelFileMissing(absent.problem, hint=absent.fix)
        return path

    def mend(self, files: Files, error: LlamaserveError | OSError) -> Advice:
        """Advise on files that cannot be read or loaded, or have another sum than models.yaml says. What is damaged is
        fetched again. What is as promised would come again as it is, so models.yaml must become another.
        """
        refused = error if isinstance(error, OSError) else error.__cause__
        if isinstance(refused, OSError):
            path = refused.filename or files.path
            look = ("chmod", "u+r") if isinstance(refused, PermissionError) else ("ls", "-l")
            return Advice(f"{path} cannot be read: {refused.strerror or refused}", command(*look, path))
        assert isinstance(error, LlamaserveError)
        if isinstance(error, RegistryError):
            return self.unfit(files.source, error)
        if isinstance(files.source, FileSource):
            other_sum = isinstance(error, ChecksumMismatch)
            return Advice(error.message, self.correct(files.source) if other_sum else self._fetch_again(files))
        try:
            promised_by = files.promised_by()
        except OSError as unreadable:
            return self.mend(files, unreadable)
        if promised_by is None:
            return self.replace(files, error.message)
        whole = f" (the file is not damaged: it is as {promised_by} promises)"
        return Advice(error.message + whole, self.correct(files.source))

    def replace(self, files: Files, problem: str) -> Advice:
        """Advise on damaged files."""
        own = isinstance(files.source, FileSource)
        caution = "the command deletes the files before it fetches them again: use it where they can be reached"
        return Advice(problem if own else f"{problem} ({caution})", self._fetch_again(files))

    def unknown(self, files: Files) -> Advice:
        """Advise on a converted file of which nobody knows if it is as it was made."""
        what = f"nobody knows whether {files.path} is as it was when it was converted (the command converts it anew)"
        return Advice(what, self.fetch(files.source))

    def unfit(self, source: Source, error: LlamaserveError) -> Advice:
        """Advise on what is as it was meant to be, and does not go with the rest."""
        return Advice(told(error), self.correct(source))

    def accept(self, spec: ModelSpec, problem: str) -> Advice:
        """Advise on what is not as models.lock says, and may be meant: it is noted there anew."""
        of_hub = [text for text in (spec.source, *spec.other_sources) if text.startswith("hf:")]
        more = f" (the command also fetches the newest version of {' and '.join(of_hub)})" if of_hub else ""
        return Advice(problem + more, self._call("pull", self.name, "--update"))

    def fetch(self, source: Source) -> str:
        """Return the command for files that are not here: the model's own, or an adapter's."""
        return self.correct(source) if isinstance(source, FileSource) else self._call("pull", self.name)

    def correct(self, source: Source) -> str:
        """Return the command for a model whose source, or what else models.yaml says of it, must become another."""
        if self.name in self.registry.models or self.name in self.registry.aliases:
            return f"{EDITOR} {command(self.registry.path)}"
        if isinstance(source, FileSource):
            return command("ls", "-l", source.path.parent)
        return self._call("models")

    def _fetch_again(self, files: Files) -> str:
        """Return the command that replaces damaged files; a user's own can only be looked at."""
        if isinstance(files.source, FileSource):
            return command("ls", "-l", files.source.path)
        deleted = files.source if files.adapter else self.name  # the model with it may be a user's own file
        return f"{self._call('rm', '--yes', deleted)} && {self._call('pull', self.name)}"

    def _call(self, *words: object) -> str:
        return command(*self.program, *words, *self.options)
