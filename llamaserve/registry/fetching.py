"""From a source to a file on this machine: ``locate`` looks on this machine only, ``fetch`` downloads what is not here.

Both check a promised SHA-256, and both block. Of a model in several files they return the first, when all of them are
here. This module does not know what a model is called, and how files are converted that a source says to convert.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from llamaserve import errors
from llamaserve.registry import hub, wheels
from llamaserve.registry.cache import is_file, verify
from llamaserve.registry.sources import WEIGHTS, FileSource, HubSource, Progress, Source, WheelSource
from llamaserve.registry.split import part_of, part_paths


def _silent(done: int, total: int | None) -> None:
    """Report to nobody."""


def locate(source: Source, sha256: str | None = None) -> Path | None:
    """Return the file where it is on this machine already, without touching the network; None where it is not, or where
    a part of it is missing.

    With a sum the file is checked, which reads all of it the first time.

    Raises:
        ChecksumMismatch: the file is here, and is another one.
        RegistryError: a sum is given, and the model has several files.
    """
    match source:
        case FileSource():
            path = source.path if all(is_file(part) for part in part_paths(source.path)) else None
        case HubSource():
            path = hub.cached_file(source)
        case WheelSource():
            path = wheels.cached_file(source)
    if path is not None and sha256 is not None:
        check_sum(source, path, sha256)
    return path


def while_checked(path: Path, progress: Progress) -> Callable[[], None]:
    """Return what reports, while a model's files are read to check them, that they are here, and so may give up."""
    size = sum(part.stat().st_size for part in part_paths(path))
    return lambda: progress(size, size)


def check_sum(source: Source, path: Path, sha256: str | None, progress: Progress = _silent) -> None:
    """Check a file against the sum that models.yaml promises, if it promises one. Of a converted file that is the sum
    of the weights that it was made from, and it is also checked against its own when it was made.
    """
    if isinstance(source, WheelSource):
        wheels.verify_file(source, path, sha256, while_checked(path, progress))
        return
    if sha256 is None:
        return
    if len(parts := part_paths(path)) > 1:
        raise errors.RegistryError(
            f"sha256 is the sum of one file, and {path.name} is the first of {len(parts)}",
            hint="Leave out sha256 in models.yaml; models.lock keeps the sum of every part",
        )
    verify(path, sha256, while_checked(path, progress))


def fetch(source: Source, sha256: str | None = None, progress: Progress = _silent, *, newest: bool = False) -> Path:
    """Return the file, downloading it where it is not here. What is here is replaced by something newer only if the
    ``newest`` is asked for, which only the hub can have; and what is converted otherwise than before is newer, too. A
    converted file of which nobody knows how it was made is converted anew.

    Raises:
        ModelFileMissing: a ``file:`` source does not exist.
        SourceError: the download failed; the hint says what to do.
        ChecksumMismatch: the file is not the one promised.
    """
    path = None if newest and isinstance(source, HubSource) else locate(source)
    if isinstance(source, WheelSource) and path is not None and wheels.is_to_be_replaced(source, path, newest=newest):
        path = None
    if path is not None:
        check_sum(source, path, sha256, progress)
        return path
    match source:
        case FileSource():
            raise missing(source)
        case HubSource():
            path = hub.fetch_file(source, progress, newest=newest)
            check_sum(source, path, sha256, progress)
            return path
        case WheelSource():
            return wheels.fetch_file(source, sha256, progress, newest=newest)


def missing(source: FileSource) -> errors.ModelFileMissing:
    """Return the error for a path where there is no model file, or not all of one."""
    path, part = source.path, part_of(source.path.name)
    if part is not None and is_file(path):
        absent = next((other for other in part_paths(path) if not is_file(other)), path)
        number = part_of(absent.name)
        return errors.ModelFileMissing(
            f"part {number.number if number else 1} of {part.count} is missing: {absent}",
            hint=f"Put all {part.count} parts into {path.parent}",
        )
    if is_file(path.parent, folder=True):
        near = difflib.get_close_matches(
            path.name, sorted(file.name for file in path.parent.iterdir() if file.name.lower().endswith(WEIGHTS)), n=3
        )
        hint = f"In {path.parent} there is {' and '.join(near)}" if near else f"{path.parent} holds no similar file"
    else:
        hint = f"There is no folder {path.parent}"
    if is_file(path, folder=True):
        return errors.ModelFileMissing(f"{path} is a folder", hint="Name the model's file in it")
    return errors.ModelFileMissing(f"there is no file {path}", hint=hint)
