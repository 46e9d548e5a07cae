"""The folders in which model files lie: whether there is room, whether they can be written, and how fast they are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llamaserve.doctor.case import Case
from llamaserve.doctor.findings import Finding, command, gigabytes, note, ok, problem, warning
from llamaserve.doctor.machine import Machine
from llamaserve.registry.cache import cache_folder

_NONE, _LITTLE = 500e6, 5e9  # bytes; the first is less than the smallest useful model, the second than a good one
_FEW_FILES = 1000
_REMOTE = re.compile(r"nfs\d?|cifs|smb\d?|smbfs|9p|afpfs|webdav|ceph|glusterfs|fuse\.(?!ext|fuseblk)\S+|vboxsf|drvfs")
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Space:
    """What is free in a file system, for this user: bytes, and files (None: as many as there is room for)."""

    free: int
    files: int | None


@dataclass(frozen=True)
class _Folder:
    """A folder by what it is for, and the variable that moves it elsewhere."""

    purpose: str
    path: Path
    variable: str


def disk(case: Case) -> Iterator[Finding]:
    """Examine the folders that llamaserve keeps files in."""
    for folder in _folders(case):
        there = nearest(folder.path)
        findings = [
            *_room(folder, space(there)),
            *_writable(case.machine, folder, there),
            *_kind(folder, file_system(case.machine, there)),
        ]
        if not findings:
            findings = [ok(folder.purpose, f"{folder.path}: {gigabytes(space(there).free)} are free")]
        yield from findings


def _folders(case: Case) -> list[_Folder]:
    folders = [
        _Folder("cache", cache_folder(), "LLAMASERVE_CACHE"),
        _Folder("Hugging Face cache", hub_cache(case.machine.environment), "HF_HUB_CACHE"),
    ]
    models = case.settings.models_dir
    if models is not None or Path("models").is_dir():
        path = (models or Path("models")).expanduser().absolute()
        folders.append(_Folder("models folder", path, "LLAMASERVE_MODELS_DIR"))
    return folders


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Return where huggingface_hub keeps files, as its documentation has it."""
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    hub = environment.get("HF_HOME") or f"{home}/huggingface"
    cache = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or f"{hub}/hub"
    return Path(cache).expanduser().absolute()


def nearest(path: Path) -> Path:
    """Return the folder if it is there, else the one in which it will be made."""
    return next((each for each in (path, *path.parents) if os.path.lexists(each)), Path("/"))


def space(folder: Path) -> Space:
    """Return what is free where a folder is."""
    status = os.statvfs(folder)
    return Space(status.f_bavail * status.f_frsize, status.f_favail if status.f_files else None)


def _elsewhere(folder: _Folder) -> str:
    return command("export", f"{folder.variable}=/var/tmp/llamaserve")


def _room(folder: _Folder, free: Space) -> Iterator[Finding]:
    told = f"{folder.path}: {gigabytes(free.free)} are free"
    listing = f"{command('du', '-ah', folder.path)} | sort -rh | head -n 20"
    if free.free < _NONE:
        yield problem(folder.purpose, f"{told}: no model can be fetched; the command lists what takes most", listing)
    elif free.free < _LITTLE:
        yield note(
            folder.purpose, f"{told}, which is less than good models take; the command lists what is there", listing
        )
    if free.files is not None and free.files < _FEW_FILES:
        message = f"{folder.path}: {free.files} more files can be made in this file system"
        yield problem(folder.purpose, message, _elsewhere(folder))


def _writable(machine: Machine, folder: _Folder, there: Path) -> Iterator[Finding]:
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return
    if not there.is_dir():
        yield problem(folder.purpose, f"{there} is no folder, so {folder.path} can't be made", _elsewhere(folder))
    elif os.statvfs(there).f_flag & os.ST_RDONLY:
        message = f"{folder.path}: the file system is read-only, so nothing can be fetched"
        yield problem(folder.purpose, message, _elsewhere(folder))
    else:
        message = f"{there} can't be written by this user, so nothing can be fetched"
        yield problem(folder.purpose, message, machine.as_root(_made_ours(machine, folder.path, there)))


def _made_ours(machine: Machine, folder: Path, there: Path) -> str:
    """Return the command that gives this user the folder, and nothing around it."""
    user = machine.environment.get("USER", str(os.getuid()))
    if there == folder:
        return command("chown", user, folder)
    return command("install", "-d", "-o", user, folder)


def _kind(folder: _Folder, kind: str) -> Iterator[Finding]:
    if _REMOTE.fullmatch(kind):
        message = (
            f"{folder.path} is on a {kind} file system: models load slowly from it, and every pause of it stops them"
        )
        yield warning(folder.purpose, message, _elsewhere(folder))
    elif kind in _IN_MEMORY:
        message = (
            f"{folder.path} is in main memory ({kind}): files take what models need, and are lost at the next start"
        )
        yield note(folder.purpose, message, _elsewhere(folder))


def file_system(machine: Machine, path: Path) -> str:
    """Return the kind of the file system that a path is in, such as ``ext4``; empty where that is not known."""
    best, kind = -1, ""
    for place, each in _mounts(machine):
        if path.is_relative_to(place) and len(place) >= best:  # of two on one folder the later one counts
            best, kind = len(place), each
    return kind


def _mounts(machine: Machine) -> Iterator[tuple[str, str]]:
    if machine.is_mac:
        for line in (machine.run(("/sbin/mount",)) or "").splitlines():
            if found := re.fullmatch(r".+? on (/.*) \(([^,)]+).*\)", line):
                yield found[1], found[2]
        return
    for line in (machine.read("proc/mounts") or "").splitlines():
        words = line.split()
        if len(words) > 2:
            yield re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), words[1]), words[2]
