"""Deleting a model's files: only those in huggingface_hub's cache, in the cache folder, or in the models folder.

A link is deleted, never what it leads to, and no file of a user's that lies anywhere else is touched. A process that
has a file open or mapped keeps it until it ends. This module knows sources and folders, and asks nobody.
"""

from __future__ import annotations

import contextlib
import shlex
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llamaserve import errors
from llamaserve.registry import hub, wheels
from llamaserve.registry.cache import cache_folder
from llamaserve.registry.fetching import locate
from llamaserve.registry.sources import FileSource, HubSource, Source, WheelSource, parse_source
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.split import part_paths

_VERSIONS: Final = 100  # of one file in huggingface_hub's cache; a bound for a loop that ends long before
_LEFT: Final = (errors.InvalidRequest, errors.ModelFileMissing)  # what is said of an adapter that stays


@dataclass(frozen=True)
class Deleted:
    """What was deleted, and how many bytes are free again. What other files or revisions share is not."""

    files: tuple[Path, ...]
    freed: int


def deletable(source: Source, folder: Path | None) -> tuple[Path, ...]:
    """Return the files that ``delete`` would delete first, what is here of a cut download too. ``folder`` is the models
    folder.

    Raises ``ModelFileMissing`` when there is none, ``InvalidRequest`` when they are not ours to delete or just being
    fetched, and ``SourceError`` when the system refuses.
    """
    files = _files(source)
    if not files:
        raise errors.ModelFileMissing(f"{source} is not on this machine, so there is nothing to delete")
    match source:
        case FileSource():
            allowed = folder.expanduser() if folder is not None else None
            if allowed is None or not _is_inside(files[0], allowed):
                raise errors.InvalidRequest(
                    f"{files[0]} lies outside the models folder and the caches, where nothing is deleted",
                    hint=shlex.join(("rm", str(files[0]))),
                )
        case HubSource():
            allowed = hub.cache_root()
        case WheelSource():
            allowed = cache_folder() / "models"
    for file in files:
        if not _is_inside(file, allowed):
            raise errors.InvalidRequest(
                f"{file} leads out of {allowed}; nothing is deleted", hint=shlex.join(("rm", str(file)))
            )
    try:
        _require_idle(source, files)
    except OSError as error:
        raise _refused(source, error) from error
    return files


def deletable_with_adapters(registry: Registry, spec: ModelSpec, folder: Path | None) -> tuple[Path, ...]:
    """Return the files that ``delete_model`` would delete first. Raises as ``deletable`` does for the model's own."""
    files = deletable(registry.source(spec), folder)
    for source in _own_adapters(registry, spec):
        with contextlib.suppress(*_LEFT):
            files += deletable(source, folder)
    return tuple(dict.fromkeys(files))


def needs(registry: Registry, spec: ModelSpec, files: Iterable[Path]) -> bool:
    """Whether a model lies in one of these files, whatever its source is called."""
    try:
        path = locate(registry.source(spec))
    except errors.LlamaserveError:
        return False
    places = {_place(file) for file in files}
    return path is not None and any(_place(part) in places for part in part_paths(path))


def delete(source: Source, folder: Path | None) -> Deleted:
    """Delete all files of a source. Raises as ``deletable`` does."""
    files: list[Path] = []
    freed = 0
    try:
        for _ in range(_VERSIONS):
            paths = deletable(source, folder)
            freed += _delete(source, paths)
            files += paths
            if locate(source) is None:  # huggingface_hub's cache may hold an older version
                break
    except OSError as error:
        raise _refused(source, error) from error
    return Deleted(tuple(files), freed)


def delete_model(registry: Registry, spec: ModelSpec, folder: Path | None) -> Deleted:
    """Delete a model's files, and those adapters that were fetched for it alone.

    Raises as ``delete`` does for the model's own.
    """
    adapters = _own_adapters(registry, spec)
    deleted = delete(registry.source(spec), folder)
    files, freed = deleted.files, deleted.freed
    for source in adapters:
        with contextlib.suppress(*_LEFT):
            more = delete(source, folder)
            files, freed = files + more.files, freed + more.freed
    return Deleted(files, freed)


def _own_adapters(registry: Registry, spec: ModelSpec) -> list[Source]:
    """Return where the adapters of a model were fetched from that nothing else in models.yaml needs, whatever it is
    called there. A user's own file is not the model's.
    """
    base = registry.path.parent
    others = [other for other in registry.models.values() if other.source != spec.source]
    texts = [text for other in others for text in (other.source, *(each.source for each in other.lora))]
    needed = {parse_source(text, base) for text in texts}
    places = {_place(file) for source in needed for file in _files(source)}
    own = dict.fromkeys(parse_source(each.source, base) for each in spec.lora)
    return [
        source
        for source in own
        if not isinstance(source, FileSource)
        and source not in needed
        and places.isdisjoint(_place(file) for file in _files(source))
    ]


def _files(source: Source) -> tuple[Path, ...]:
    """Return what is here of a source: a model's files, and those of cut downloads."""
    path = locate(source)
    files = () if path is None else part_paths(path)
    return files + hub.cut_downloads(source) if isinstance(source, HubSource) else files


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file's own place, links in the way followed, is in a folder."""
    return _place(path).is_relative_to(folder.resolve())


def _place(path: Path) -> Path:
    """Return where a file lies, links in the way followed; of a link, where that itself lies."""
    return path.parent.resolve() / path.name


def _require_idle(source: Source, files: tuple[Path, ...]) -> None:
    match source:
        case HubSource():
            hub.require_idle(files)
        case WheelSource():
            wheels.require_idle(source)


def _refused(source: Source, error: OSError) -> errors.SourceError:
    return errors.SourceError(f"{source} cannot be deleted: {error}")


def _delete(source: Source, paths: tuple[Path, ...]) -> int:
    match source:
        case HubSource():
            return hub.delete_files(paths)
        case WheelSource():
            return wheels.delete_file(source)
    return sum(_unlink(path) for path in paths)


def _unlink(path: Path) -> int:
    status = path.lstat()
    path.unlink()
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0
