"""Deleting a model's files: only those in huggingface_hub's cache, in the cache folder, or in the models folder.

A link is deleted, never what it leads to, and no file of a user's that lies anywhere else is touched. A process that
has a file open or mapped keeps it until it ends. This module knows sources and folders, and asks nobody.
"""

from __future__ import annotations

import stat
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


@dataclass(frozen=True)
class Deleted:
    """What was deleted, and how many bytes are free again. What other files or revisions share is not."""

    files: tuple[Path, ...]
    freed: int


def deletable(source: Source, folder: Path | None) -> tuple[Path, ...]:
    """Return the files that ``delete`` would delete first. ``folder`` is the models folder.

    Raises ``ModelFileMissing`` when there is none, and ``InvalidRequest`` when they are not ours to delete.
    """
    path = locate(source)
    if path is None:
        raise errors.ModelFileMissing(f"{source} is not on this machine, so there is nothing to delete")
    match source:
        case FileSource():
            allowed = folder.expanduser() if folder is not None else None
            if allowed is None or not _is_inside(path, allowed):
                raise errors.InvalidRequest(
                    f"{path} lies outside the models folder and the caches, where nothing is deleted",
                    hint=f"rm '{path}'",
                )
        case HubSource():
            allowed = hub.cache_root()
        case WheelSource():
            allowed = cache_folder() / "models"
    if not _is_inside(path, allowed):
        raise errors.InvalidRequest(f"{path} leads out of {allowed}; nothing is deleted", hint=f"rm '{path}'")
    return part_paths(path)


def delete(source: Source, folder: Path | None) -> Deleted:
    """Delete all files of a source. Raises as ``deletable`` does, and ``SourceError`` when the system refuses."""
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
        raise errors.SourceError(f"{source} cannot be deleted: {error}") from error
    return Deleted(tuple(files), freed)


def delete_model(registry: Registry, spec: ModelSpec, folder: Path | None) -> Deleted:
    """Delete a model's files, and those of its adapters that are ours to delete and that no other listed model has.

    Raises as ``delete`` does for the model's own.
    """
    deleted = delete(registry.source(spec), folder)
    files, freed = deleted.files, deleted.freed
    for source in own_adapters(registry, spec):
        try:
            more = delete(source, folder)
        except (errors.InvalidRequest, errors.ModelFileMissing):
            continue
        files, freed = files + more.files, freed + more.freed
    return Deleted(files, freed)


def own_adapters(registry: Registry, spec: ModelSpec) -> list[Source]:
    """Return where the adapters of a model are that no other model of models.yaml has."""
    others = [other for other in registry.models.values() if other.source != spec.source]
    shared = {adapter.source for other in others for adapter in other.lora}
    return [parse_source(each.source, registry.path.parent) for each in spec.lora if each.source not in shared]


def _is_inside(path: Path, folder: Path) -> bool:
    """Whether a file's own place, links in the way followed, is in a folder."""
    return path.parent.resolve().is_relative_to(folder.resolve())


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
