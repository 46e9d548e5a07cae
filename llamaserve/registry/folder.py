"""The models folder: which GGUF files, Whisper files of whisper.cpp (``.bin``) and whole diffusion models
(``.safetensors``) lie in it, and what each is called.

A file's name is its path within the folder, such as ``qwen/Qwen3-4B-Q4_K_M.gguf``; of a model in several files only the
first is listed. Headers are read to leave out what is no model (adapters, projectors, statistics, and ``.bin`` and
``.safetensors`` files of any other kind), and to say what is wrong with a broken file instead of hiding it; a file that
has not changed is read once. Symbolic links to files are followed, those to folders are not, so there are no loops;
what begins with a dot is no model.

This module knows nothing of models.yaml's models and loads nothing.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final

from llamaserve import errors
from llamaserve.registry.cache import is_file
from llamaserve.registry.diffusion_file import read_diffusion, read_weights
from llamaserve.registry.gguf import read_header
from llamaserve.registry.loadable import other_kind
from llamaserve.registry.sources import WEIGHTS
from llamaserve.registry.spec import ModelSpec, Registry, name_problem
from llamaserve.registry.split import part_of, part_paths
from llamaserve.registry.whisper_file import is_whisper_file, read_whisper

log = logging.getLogger(__name__)

MAX_DEPTH: Final = 8  # folders below the models folder
MAX_ENTRIES: Final = 50_000  # files and folders that are looked at; a folder with more is not one of models
REMEMBERED: Final = 4096  # files

_TO_BE_LISTED: Final = "it is a diffusion model; list it in models.yaml with `task: image`"

_Stamp = tuple[tuple[str, int, int], ...]  # path, size and time of change of each part


@dataclass(frozen=True)
class FoundModel:
    """A model of the folder: its name, its (first) file, the bytes of all its files, and what is wrong with it."""

    name: str
    path: Path
    size: int
    error: str | None = None

    @property
    def source(self) -> str:
        """Where it is, as models.yaml would say it."""
        return f"file:{self.path}"


@dataclass(frozen=True)
class _Facts:
    """What a file says of itself: that it is something else than a model, or what is wrong with it."""

    other: str | None = None
    error: str | None = None


_known: OrderedDict[_Stamp, _Facts] = OrderedDict()  # least recently used first
_known_lock = Lock()


def folder_in_use(configured: Path | None) -> Path | None:
    """Return the folder that is searched for models: the one that is configured, else ./models if there is one. Raises
    ``RegistryError`` when the configured one is not there.
    """
    folder = configured or Path("models")
    if configured is not None and not is_file(folder, folder=True):
        raise errors.RegistryError(f"there is no folder {folder}", hint=f"mkdir {folder}, or leave out --models-dir")
    return folder.absolute() if is_file(folder, folder=True) else None


def scan(folder: Path) -> list[FoundModel]:
    """Return the models of a folder, with ``model2`` before ``model10``.

    Raises ``RegistryError`` when there is no such folder, or when it holds too much to be one of models.
    """
    folder = folder.expanduser().absolute()
    if not is_file(folder, folder=True):
        raise errors.RegistryError(f"there is no folder {folder}", hint="Make it, or name another models folder")
    names = sorted(_weights(folder), key=natural)
    found = [_look(folder, name) for name in _without_later_parts(names)]
    return [model for model in found if model is not None]


def stamp(folder: Path) -> tuple[_Stamp, ...]:
    """Return what changes whenever one of the folder's files of models does, or one comes or goes."""
    return tuple(_stamp(folder / name) for name in sorted(_weights(folder, logging.DEBUG)))


def find(folder: Path, name: str) -> FoundModel | None:
    """Return the model of this name: its own with or without the file's ending, or a subfolder's, which stands for the
    first model in it. None if there is none.
    """
    inner = name.rstrip("/")
    inside = [model for model in scan(folder) if inner and model.name.rpartition("/")[0] == inner]
    return named(folder, name) or (inside[0] if inside else None)


def named(folder: Path, name: str) -> FoundModel | None:
    """Return the model of just this name, with or without the file's ending; None if there is none."""
    models = {model.name: model for model in scan(folder)}
    return next((models[name + ending] for ending in ("", *WEIGHTS) if name + ending in models), None)


def resolve(registry: Registry, folder: Path | None, reference: str) -> tuple[str, ModelSpec]:
    """Return what a person at the command line means: a name of models.yaml, one of the models folder, a path or a
    source. Models of the folder run as models.yaml's defaults say.

    Raises as ``Registry.resolve_reference`` does.
    """
    if folder is not None and reference not in registry.models and reference not in registry.aliases:
        found = named(folder, reference)
        if found is not None:
            return found.name, registry.by_defaults(found.source)
    return registry.resolve_reference(reference)


def without_ending(name: str) -> str:
    """Return a model's name without the ending of its file."""
    return next((name.removesuffix(ending) for ending in WEIGHTS if name.endswith(ending)), name)


def is_something_else(path: Path) -> bool:
    """Whether a file says that it is no model, but an adapter or the like; ``.bin`` and ``.safetensors`` files may be
    anything else, too.
    """
    return _facts(path).other is not None


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names by their value, and letters without regard to case."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(piece), piece) if "0" <= piece[0] <= "9" else (1, 0, piece.casefold()) for piece in pieces]


def _weights(folder: Path, level: int = logging.WARNING) -> Iterator[str]:
    """Yield the paths of all files within a folder that are called as weights are. What can't be looked at is logged at
    this ``level``.
    """
    entries = 0
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        for entry in _entries(folder / inner, level):
            entries += 1
            if entries > MAX_ENTRIES:
                raise errors.RegistryError(
                    f"{folder} holds more than {MAX_ENTRIES} files", hint="Name a folder that holds only models"
                )
            name = f"{inner}/{entry.name}" if inner else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if name.count("/") < MAX_DEPTH:
                    waiting.append(name)
                else:
                    log.log(level, "%s lies too deep in the models folder; %d levels are looked at", name, MAX_DEPTH)
            elif entry.name.lower().endswith(WEIGHTS) and is_file(folder / name):
                yield name


def _entries(folder: Path, level: int) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        log.log(level, "%s cannot be looked into: %s", folder, error.strerror or error)
        return []


def _without_later_parts(names: Sequence[str]) -> list[str]:
    """Return the names with each model in parts once, as the earliest part that there is."""
    earliest: dict[tuple[str, int], int] = {}
    parts = {name: part_of(name) for name in names}
    for part in parts.values():
        if part is not None:
            key = part.stem, part.count
            earliest[key] = min(part.number, earliest.get(key, part.number))
    return [n for n, part in parts.items() if part is None or earliest[part.stem, part.count] == part.number]


def _look(folder: Path, name: str) -> FoundModel | None:
    path = folder / name
    facts = _facts(path)
    if facts.other is not None:
        return None
    problem = name_problem(name)
    error = facts.error or (f"{path} cannot be named in a request: {problem}" if problem else None)
    size = sum(size for _, size, _ in _stamp(path))
    return FoundModel(_printable(name), path, size, error and _printable(error))


def _facts(path: Path) -> _Facts:
    stamp = _stamp(path)
    with _known_lock:
        if stamp in _known:
            _known.move_to_end(stamp)
            return _known[stamp]
    facts = _read(path)
    with _known_lock:
        if stamp:
            _known[stamp] = facts
        if len(_known) > REMEMBERED:
            _known.popitem(last=False)
    return facts


def _read(path: Path) -> _Facts:
    try:
        match path.suffix.lower():
            case ".bin":
                if not is_whisper_file(path):
                    return _Facts(other="some other .bin file")
                read_whisper(path)
            case ".safetensors":
                read_weights(path)
                if not _is_diffusion_model(path):
                    return _Facts(other="some other .safetensors file")
            case _:
                other = other_kind(read_header(path))
                return _Facts(error=_TO_BE_LISTED) if other and _is_diffusion_model(path) else _Facts(other=other)
        return _Facts()
    except errors.ModelError as error:
        return _Facts(error=_TO_BE_LISTED if _is_diffusion_model(path) else error.message)


def _is_diffusion_model(path: Path) -> bool:
    """Whether a file is a diffusion model with all its parts."""
    try:
        read_diffusion(path)
    except (errors.ModelError, errors.ModelNotCapable):
        return False
    return True


def _stamp(path: Path) -> _Stamp:
    stamps = []
    for part in part_paths(path):
        try:
            status = part.stat()
        except OSError:  # it is missing, which the header's reader says
            continue
        stamps.append((str(part), status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def _printable(name: str) -> str:
    """Return a text with file names in it that can be shown: bytes that are no UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
