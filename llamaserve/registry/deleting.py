"""Deleting a model's files: only those in huggingface_hub's cache, in the cache folder, or in the models folder.

A link is deleted, never what it leads to, and no file of a user's that lies anywhere else is touched. A process that
has a file open or mapped keeps it until it ends. This module knows sources and folders, and asks nobody.
"""

from __future__ import annotations

import contextlib
import shlex
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llamaserve import errors
from llamaserve.registry import hub, wheels
from llamaserve.registry.cache import cache_folder, place_of
from llamaserve.registry.fetching import locate
from llamaserve.registry.sources import FileSource, HubSource, Source, WheelSource, parse_source
from llamaserve.registry.spec import ModelSpec, Registry
from llamaserve.registry.split import part_paths

_LEFT: Final = (errors.InvalidRequest, errors.ModelFileMissing)  # what is said of an adapter or part that stays


@dataclass(frozen=True)
class Deleted:
    """What was deleted, and how many bytes are free again. What other files or revisions share is not."""

    files: tuple[Path, ...]
    freed: int


def deletable(source: Source, folder: Path | None) -> tuple[Path, ...]:
    """Return the files that ``delete`` would delete: of all versions that this source may stand for, and what is here
    of a cut download. ``folder`` is the models folder.

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


def deletable_with_others(registry: Registry, spec: ModelSpec, folder: Path | None) -> tuple[Path, ...]:
    """Return the files that ``delete_model`` would delete. Raises as ``deletable`` does for the model's own."""
    files = deletable(registry.source(spec), folder)
    for source in _own_others(registry, spec, files):
        with contextlib.suppress(*_LEFT):
            files += deletable(source, folder)
    return tuple(dict.fromkeys(files))


def goes_with(registry: Registry, other: ModelSpec, spec: ModelSpec, files: Sequence[Path]) -> bool:
    """Whether another model is gone when these files of a model's are, whatever its source is called."""
    if other.source == spec.source:
        return True
    path = locate(registry.source(other))
    places = {place_of(file) for file in files}
    return path is not None and any(place_of(part) in places for part in part_paths(path))


def delete(source: Source, folder: Path | None) -> Deleted:
    """Delete all files of a source. Raises as ``deletable`` does."""
    files = deletable(source, folder)
    try:
        return Deleted(files, _delete(source, files))
    except OSError as error:
        raise _refused(source, error) from error


def delete_model(registry: Registry, spec: ModelSpec, folder: Path | None) -> Deleted:
    """Delete a model's files, and those adapters and parts that only models need which go with it.

    Raises as ``delete`` does for the model's own, and ``SourceError`` for those, too. The model is deleted last:
    after an error it can be tried again.
    """
    source = registry.source(spec)
    files = deletable(source, folder)
    others: tuple[Path, ...] = ()
    freed = 0
    for other in _own_others(registry, spec, files):
        with contextlib.suppress(*_LEFT):
            more = delete(other, folder)
            others, freed = others + more.files, freed + more.freed
    deleted = delete(source, folder)
    return Deleted(deleted.files + others, deleted.freed + freed)


def _own_others(registry: Registry, spec: ModelSpec, files: Sequence[Path]) -> list[Source]:
    """Return where the adapters and parts of a model, and of those that go with its files, were fetched from that
    nothing else in models.yaml needs, whatever it is called there. A user's own file is not the model's.
    """
    models = registry.models.values()
    if not any(each.other_sources for each in (spec, *models)):
        return []
    base = registry.path.parent
    gone: list[ModelSpec] = [spec]
    others: list[ModelSpec] = []
    for each in models:
        (gone if goes_with(registry, each, spec, files) else others).append(each)
    texts = [text for other in others for text in (other.source, *other.other_sources)]
    needed = {parse_source(text, base) for text in texts}
    places = {place_of(file) for source in needed for file in _files(source)}
    own = dict.fromkeys(parse_source(text, base) for each in gone for text in each.other_sources)
    return [
        source
        for source in own
        if not isinstance(source, FileSource)
        and source not in needed
        and places.isdisjoint(place_of(file) for file in _files(source))
    ]


def _files(source: Source) -> tuple[Path, ...]:
    """Return what is here of a source: a model's files in all versions, and those of cut downloads."""
    if isinstance(source, HubSource):
        files = [part for path in hub.cached_versions(source) for part in part_paths(path)]
        return (*files, *hub.cut_downloads(source))
    path = locate(source)
    return () if path is None else part_paths(path)


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file's own place, links in the way followed, is in a folder."""
    return place_of(path).is_relative_to(folder.resolve())


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
